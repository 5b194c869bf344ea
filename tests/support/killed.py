"""Work that is killed, in a child process, before each of its file operations in turn."""

import os
import signal
from collections.abc import Callable, Iterator

OPERATIONS = ("replace", "rename", "unlink", "rmdir", "mkdir")


def _child(work: Callable[[], None], at: int) -> int:
    """Run `work` in a child, killed before its operation number `at`; returns its exit status: 0
    where it ended before, -9 where it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = at

    def counted(real):
        def operation(*args, **given):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*args, **given)

        return operation

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def killed_everywhere(
    prepare: Callable[[], None], work: Callable[[], None], first: int = 0, step: int = 1
) -> Iterator[int]:
    """Yield n after `prepare()`, and `work()` in a child that was killed before its n-th file
    operation, for each n from `first` on, or each step-th."""
    at = first
    while True:
        prepare()
        if (code := _child(work, at)) == 0:
            return
        assert code == -signal.SIGKILL, f"the child ended with {code}"
        yield at
        at += step
