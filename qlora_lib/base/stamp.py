"""What a result needs beside it to be made again."""

import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any


def stamp(seed: int | None = None, **extra: Any) -> dict[str, Any]:
    """Return device, versions, seed, date and command; `extra` adds to them or replaces."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "seed": seed,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    } | extra
