"""Commands on a disk that is full at some stage: a message and exit code 2, earlier results answer
as before, and with room again the same command gives what it gives on an empty disk."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.support.child_commands import (
    ASK,
    EXPORT,
    JUDGE,
    QUANTIZE,
    STREAM,
    TRAIN,
    VOTE,
    answers,
)
from tests.support.folder_content import content

ROOM = 64 * 2**20  # bytes of the disk when there is room


@dataclass(frozen=True)
class Case:
    """A command, what was run before it, what must answer as before when it fails, and the room
    that it finds: shares of the bytes that it writes."""

    command: str
    shares: tuple[float, ...]
    before: tuple[str, ...] = ()
    asked: str | None = None


CASES = [
    Case(QUANTIZE, (0, 0.5, 0.9)),
    Case(f"{QUANTIZE} --bits 3", (0.5,), (TRAIN,), ASK),
    Case(STREAM, (0.5,)),
    Case(f"{STREAM} --spill spill", (0.9,)),
    Case(TRAIN, (0.1, 0.5, 0.8)),
    Case(f"{TRAIN} --seed 1", (0.1,), (TRAIN,), ASK),
    Case(TRAIN.replace("rtn", "nf4"), (0.4,), (TRAIN,), ASK),
    Case(JUDGE, (0, 0.6), (TRAIN,), ASK),
    Case(f"{JUDGE} --seed 1", (0.5,), (TRAIN, JUDGE), VOTE),
    Case(ASK, (0.5,), (TRAIN,)),
    Case(EXPORT, (0.5,), (TRAIN,), ASK),
    Case(f"{EXPORT} --merge rtn", (0.9,), (TRAIN,), ASK),
]
PLACES = [(case, share) for case in CASES for share in case.shares]


@contextmanager
def disk(folder):
    """Mount a small disk at `folder`; skips where that is not allowed."""
    folder.mkdir()
    size = f"size={ROOM}"
    made = sys.platform == "linux" and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True)  # fmt: skip
    if not made or made.returncode:
        pytest.skip("no file system can be mounted here (root on Linux may)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def used(folder) -> int:
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def give_room(folder, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


def pytest_generate_tests(metafunc):
    few = metafunc.config.getoption("tries") is None  # make long has time for one
    places = [pytest.param(*PLACES[1], marks=pytest.mark.long)] if few else PLACES
    names = [f"{case.command.split()[0]}-{i}-{share}" for i, (case, share) in enumerate(PLACES)]
    metafunc.parametrize("case, share", places, ids=names[1:2] if few else names)


def test_a_full_disk_is_a_message_and_costs_nothing(case, share, commands, start, tmp_path):
    with disk(tmp_path / "disk") as place:
        shutil.copytree(start, place, dirs_exist_ok=True)
        for command in case.before:
            assert commands.run(place, command.split()).code == 0
        shutil.copytree(place, tmp_path / "before")
        said_before = case.asked and answers(commands, place, case.asked)
        empty(place)
        shutil.copytree(tmp_path / "before", place, dirs_exist_ok=True)
        before, taken = content(place), used(place)
        whole = commands.run(place, case.command.split())
        assert whole.code == 0, whole.said
        expected = content(place)
        changed = [place / name for name in expected if expected[name] != before.get(name)]
        written = sum(path.stat().st_size for path in changed)
        empty(place)
        shutil.copytree(tmp_path / "before", place, dirs_exist_ok=True)
        give_room(place, taken + int(share * written) // 4096 * 4096)
        ended = commands.run(place, case.command.split())
        assert ended.error.startswith("error: "), ended.error
        give_room(place, ROOM)
        if case.asked:
            shutil.copytree(place, tmp_path / "asked")
            assert answers(commands, tmp_path / "asked", case.asked) == said_before
        again = commands.run(place, case.command.split())
        assert again.code == 0, again.said
        found = content(place)
        assert [k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)] == []


def empty(folder) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
