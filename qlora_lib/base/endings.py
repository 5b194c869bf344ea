"""How a command ends: one plain line on stderr for what went wrong, and an exit code."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress

BAD_INPUT, INTERRUPTED = 2, 130
KEPT = "stopped; what was finished is kept"
NO_READER = "nobody reads the output any more (a closed pipe); what was finished is kept"
FULL = ("not enough memory", "out of memory")  # of a device, in PyTorch's words


def ending(run: Callable[[], int | None], stopped: str = KEPT) -> int:
    """Return the exit code of run(), 0 for None. Bad input, files that can't be read or written and
    too little memory are a line and 2; Ctrl-C is the line `stopped` and 130."""
    _open_streams()
    interrupts: list[int] = []  # libraries turn a KeyboardInterrupt into errors of their own

    def interrupt(number, frame):
        interrupts.append(number)
        raise KeyboardInterrupt

    try:
        with _handled(interrupt):
            code = run() or 0
            sys.stdout.flush()
            return code
    except Exception as error:
        if interrupts:
            return _ended(stopped, INTERRUPTED)
        return _bad(error)
    except KeyboardInterrupt:
        return _ended(stopped, INTERRUPTED)


def _bad(error: Exception) -> int:
    """Say what a user can mend; other errors are bugs, and raised."""
    if isinstance(error, BrokenPipeError):
        return _ended(NO_READER, BAD_INPUT)
    if isinstance(error, (ValueError, OSError, ImportError)):
        return _ended(str(error) or type(error).__name__, BAD_INPUT)
    full = isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)
    if full or isinstance(error, MemoryError):
        return _ended(f"too little memory: {error}", BAD_INPUT)
    raise error


@contextmanager
def _handled(interrupt: Callable):
    """Let `interrupt` handle Ctrl-C in the block, where it would raise or end the process."""
    usual = signal.getsignal(signal.SIGINT)
    ours = usual in (signal.default_int_handler, _exit)
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def quiet_interrupt() -> None:
    """Let Ctrl-C end a process that still imports with a line: nothing is begun yet, and an
    exception in the middle of an import of C++ may abort."""
    signal.signal(signal.SIGINT, _exit)


def _exit(number, frame) -> None:
    os._exit(_ended(KEPT, INTERRUPTED))


def _open_streams() -> None:
    """Give a process that was started with closed streams others: a file that it opens would get
    their numbers, and what libraries print."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        # Lines appear at once in a pipe too, and a terminal without the check mark gets a "?".
        sys.stdout.reconfigure(line_buffering=True, errors="replace")


def _ended(text: str, code: int) -> int:
    with suppress(OSError):
        word = "" if code == INTERRUPTED else "error: "
        print(word + " ".join(text.split())[:900], file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # what is left would be tried again at the end, with a traceback
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
