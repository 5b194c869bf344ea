"""A line of the doctor, and asking another program within a bounded time.

Nothing here, or in what checks one part of a machine, imports what may be missing or broken.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

INSTALL = "make setup, or python -m pip install -r requirements.txt"
SECONDS = 5  # that a program may take to answer


@dataclass(frozen=True)
class Finding:
    """One line: ok, note (the bundled course runs nevertheless) or problem (it does not)."""

    state: str
    text: str


ok, note, problem = (partial(Finding, state) for state in ("ok", "note", "problem"))
Findings = Iterator[Finding]


def ask(command: list[str], seconds: float) -> str:
    """Return what a program prints; RuntimeError, in one line, where it is missing, too slow or
    fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {seconds} s") from None
    except OSError as error:
        raise RuntimeError(str(error)) from None
    if done.returncode < 0:
        raise RuntimeError(f"the process was ended by signal {-done.returncode}")
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.splitlines()[-1:]) or f"exit {done.returncode}")
    return done.stdout


def gb(count: float) -> str:
    """Return a number of bytes, as it is printed."""
    return f"{count / 1e9:.1f} GB"
