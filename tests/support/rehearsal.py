"""A rehearsal of the LLaMA-2-7B run: notebooks 04 and 05 on a small random model in its folder
layout, and 04 on one in a GGUF file and on one in bitsandbytes' 4 bits. Their kernels find only
FREE bytes of memory, so that what decodes takes fewer sequences at a time than it would like:
`python -m tests.support.rehearsal`. Returns 1 if a notebook fails, or if one takes as many as ever.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from transformers.utils import logging

from course.tools import execute
from qlora_lib.base.paths import DATA, ROOT, short_path
from tests.support import random_llama
from tests.support.bnb_folder import save_bnb
from tests.support.gguf_file import write_gguf

RUN = ROOT / "checkpoints" / "llama2-7b"  # as in the notebooks
FREE = 64_000_000  # the small model trains in less; 50 of its sequences take more
# IPython runs it before the first cell.
STARTUP = """
import json
from course.kit import outputs
from qlora_lib.train import measure, memory

outputs.random_weights = lambda model: True  # nothing is recorded; a GGUF file could not say so

def fitting_batch(model, tokens, most, *args, real=memory.fitting_batch, **given):
    chosen = real(model, tokens, most, *args, **given)
    with open({log!r}, "a") as file:
        file.write(json.dumps([tokens, most, chosen]) + "\\n")
    return chosen

memory.fitting_batch = fitting_batch
measure.available_memory = memory.available_memory = lambda device: {free}
"""


def rehearse(names: list[str], parameters: dict, free: int = FREE) -> int:
    """Run the notebooks as `course.tools run --profile llama2-7b` does; returns its exit code."""
    startup = execute.BUILD / "ipython" / "profile_default" / "startup" / "little_memory.py"
    startup.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "batches.jsonl"
        startup.write_text(STARTUP.format(log=str(log), free=free), encoding="utf-8")
        try:
            failed = execute.run(names, "llama2-7b", parameters)
        finally:
            startup.unlink()
        chosen = list(map(json.loads, log.read_text().splitlines())) if log.exists() else []
    for tokens, most, batch in chosen:
        print(f"with {free / 1e6:g} MB free: {batch} sequences of {tokens} tokens at once, "
              f"of at most {most}")  # fmt: skip
    return int(failed or not chosen or any(batch == most for _, most, batch in chosen))


def runs() -> list[tuple[list[str], dict]]:
    """Make a small random model in each form that MODEL= takes; return the notebooks, and their
    parameters, that run it."""
    folder, gguf, bnb = (execute.BUILD / f"random-{form}" for form in ("llama", "gguf", "bnb"))
    for path in (gguf, bnb):
        path.mkdir(parents=True, exist_ok=True)
    write_gguf(gguf / "small.gguf", context=1024)
    save_bnb(bnb, context=1024)
    logging.disable_progress_bar()
    random_llama.make(folder)
    given = {"data_from": str(DATA / "minigsm"), "steps": 6}
    return [
        (["04"], {**given, "weights_from": str(gguf / "small.gguf")}),
        (["04"], {**given, "weights_from": str(bnb)}),
        ([], {**given, "weights_from": str(folder), "live_problems": 8}),
    ]


def main() -> int:
    if RUN.exists():
        raise SystemExit(f"{short_path(RUN)} holds a run, whose place a rehearsal would take: move "
                         "it away first")  # fmt: skip
    failed = []
    for names, parameters in runs():
        try:
            failed.append(rehearse(names, parameters))
        finally:
            shutil.rmtree(RUN, ignore_errors=True)
    return any(failed)


if __name__ == "__main__":
    sys.exit(main())
