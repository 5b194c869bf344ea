"""What Linux takes from a process for good: files, sockets, further processes.

Landlock (https://docs.kernel.org/userspace-api/landlock.html) decides which files a process can
open, seccomp which system calls it can make. Neither needs rights, and both hold for root.
"""
import ctypes
import os
import platform
import signal
import struct
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on all machines
WRITE, READ, LIST = 1 << 1, 1 << 2, 1 << 3
EXECUTE = 1
RIGHTS = {0: 0, 1: 13, 2: 14, 3: 15, 4: 15}  # how many a version of Landlock knows; then 16
SIGNALS = 6                                  # the version that holds back signals
END_WITH_PARENT, NO_NEW_PRIVILEGES, GET_FILTER, SET_FILTER = 1, 38, 21, 22  # of prctl

# Refused: what starts a process or a thread; what opens a socket (the server that submissions are
# forked from listens on one); what acts on other processes; and what changes the mode of a file,
# which Landlock does not look at.
REFUSED = {
    "x86_64": (0xC000003E, {
        "clone": 56, "fork": 57, "vfork": 58, "clone3": 435, "socket": 41, "io_uring_setup": 425,
        "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
        "pidfd_send_signal": 424, "prlimit64": 302, "chmod": 90, "fchmod": 91, "fchmodat": 268,
        "fchmodat2": 452}),
    "aarch64": (0xC00000B7, {
        "clone": 220, "clone3": 435, "socket": 198, "io_uring_setup": 425, "kill": 129,
        "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240,
        "pidfd_send_signal": 424, "prlimit64": 261, "fchmod": 52, "fchmodat": 53,
        "fchmodat2": 452}),
}


def landlock() -> int:
    """The version of Landlock; 0 where there is none."""
    return max(0, _libc().syscall(CREATE_RULESET, None, 0, 1)) if linux() else 0


def seccomp() -> bool:
    """Whether the table has this machine's system calls, and the kernel filters them."""
    return linux() and platform.machine() in REFUSED and _libc().prctl(GET_FILTER) >= 0


def confine(folder: Path, readable: list[Path]) -> None:
    """Let this process write in `folder` only, read there and in `readable` (files, or folders
    with all that is below), and make none of the calls REFUSED. The names of files it can list.

    Call it in a process of one thread. What the system does not have is not done; OSError where
    it has it and refuses.
    """
    if linux():
        _ask("prctl", END_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        _ask("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if version := landlock():
        _hold_files(version, folder, readable)
    if seccomp():
        _refuse_calls(*REFUSED[platform.machine()])
    if linux():  # root's powers: other users' files, mounts, the clock
        _ask("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))


def linux() -> bool:
    return platform.system() == "Linux"


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _ask(name: str, *arguments) -> int:
    result = getattr(_libc(), name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
    return result


def _hold_files(version: int, folder: Path, readable: list[Path]) -> None:
    known = (1 << RIGHTS.get(version, 16)) - 1
    scoped = 3 if version >= SIGNALS else 0  # signals, and sockets that are no files
    rules = _ask("syscall", CREATE_RULESET, struct.pack("QQQ", known, 0, scoped), 24, 0)
    allowed = {Path("/"): LIST, Path(os.devnull): READ | WRITE, folder: known & ~EXECUTE}
    allowed |= {path: READ | LIST if path.is_dir() else READ for path in readable if path.exists()}
    for path, rights in allowed.items():
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _ask("syscall", ADD_RULE, rules, 1, struct.pack("=Qi", rights, at), 0)
        os.close(at)
    _ask("syscall", RESTRICT_SELF, rules, 0)
    os.close(rules)


def _refuse_calls(machine: int, numbers: dict[str, int]) -> None:
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # of classic BPF
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050000 | 1  # 1: EPERM
    tests = [(at_least, 0x40000000), *((equal, n) for n in numbers.values())]  # x32's calls first
    program = [(load, 0, 0, 4), (equal, 1, 0, machine), (answer, 0, 0, kill), (load, 0, 0, 0),
               *((test, len(tests) - i, 0, n) for i, (test, n) in enumerate(tests)),
               (answer, 0, 0, allow), (answer, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    _ask("prctl", SET_FILTER, 2, struct.pack("HP", len(program), ctypes.addressof(code)))
