"""Exit codes, and the one line that says what went wrong."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from qlora_lib.base.endings import BAD_INPUT, INTERRUPTED, ending, quiet_interrupt


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize("error", [
    ValueError("two\nlines"), FileNotFoundError("no such thing"), ImportError("no such module"),
    OSError(errno.ENOSPC, "No space left on device"), MemoryError(), BrokenPipeError(),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
])  # fmt: skip
def test_what_a_user_can_cause_is_one_line(error, capsys):
    assert ending(raising(error)) == BAD_INPUT
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) > len("error: \n")


def test_an_interrupt_is_one_line(capsys):
    assert ending(raising(KeyboardInterrupt())) == INTERRUPTED
    assert capsys.readouterr().err.count("\n") == 1


def test_other_errors_are_bugs_and_keep_their_traceback():
    for error in (RuntimeError("a shape"), KeyError("a"), AssertionError()):
        with pytest.raises(type(error)):
            ending(raising(error))


def test_codes_of_what_ran_stay(capsys):
    assert ending(lambda: None) == 0 and ending(lambda: 1) == 1
    assert capsys.readouterr().err == ""


@pytest.fixture
def heard():
    """Ctrl-C raises, also where a shell has started the tests in the background, which ignores it."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def test_an_interrupt_that_a_library_turns_into_its_own_error(heard, capsys):
    def run():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("could not import a module") from None

    assert ending(run) == INTERRUPTED
    assert capsys.readouterr().err.count("\n") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_during_imports_is_one_line_and_the_end(heard, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    quiet_interrupt()
    signal.raise_signal(signal.SIGINT)
    assert codes == [INTERRUPTED] and capsys.readouterr().err.count("\n") == 1


PROGRAM = """
import sys
from qlora_lib.base.endings import ending
def run():
    for i in range(20_000):
        print("a line of output")
sys.exit(ending(run))
"""


def program(redirection: str) -> subprocess.CompletedProcess:
    shell = f'"{sys.executable}" -c \'{PROGRAM}\' {redirection}'
    return subprocess.run(["bash", "-c", shell], capture_output=True, text=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    "redirection, code", [(">/dev/full", 2), (">&-", 0), (">&- 2>&- <&-", 0), ("2>&- >/dev/full", 2)]
)
def test_a_full_disk_and_closed_streams(redirection, code):
    done = program(redirection)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr and done.stderr.count("\n") <= 1


def test_a_reader_that_goes_away():
    done = program("| head -1; exit ${PIPESTATUS[0]}")
    assert done.returncode == 2 and done.stdout == "a line of output\n"
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
