"""The hub: where its client keeps what it downloads, and whether it answers."""

import os
import sys
from pathlib import Path

from .finding import SECONDS, Findings, ask, note, ok


def hub_cache() -> Path:
    """Return the folder of what the hub's client downloads, by the variables that it reads."""
    home = os.environ.get("HF_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(home) if home else cache / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser().absolute()


def check_hub() -> Findings:
    offline = "the tiny profile needs none; others take MODEL=folder and GSM8K_DIR=folder"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield note(f"no hub: HF_HUB_OFFLINE is set ({offline}): unset it to download")
        return
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    script = ("import sys, urllib.request as web\nrequest = web.Request(sys.argv[1], method='HEAD')"
              "\ntry: web.urlopen(request, timeout=float(sys.argv[2]))"
              "\nexcept OSError as error: sys.exit(str(getattr(error, 'reason', error)))")
    try:  # in a process, since nothing else bounds the look-up of the name
        ask([sys.executable, "-c", script, address, str(SECONDS - 1)], SECONDS)
        yield ok(f"the hub answers, {address}")
    except RuntimeError as error:
        yield note(f"no hub: {address} does not answer ({error}; {offline}): HTTPS_PROXY or a "
                   "mirror in HF_ENDPOINT may help")  # fmt: skip
