"""Progress: a line in time, with the time that is left, and none for short work."""

import pytest

from qlora_lib.base import processes
from qlora_lib.base.progress import Progress


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def lines_of(capsys, seconds_a_step: float, total: int, done: int = 0) -> list[tuple[float, str]]:
    """(second, line) of all that is said during steps of equal length."""
    clock, found = Clock(), []
    progress = Progress("training", total, "steps", done, clock)
    for step in range(done + 1, total + 1):
        clock.now += seconds_a_step
        progress(step, f"loss {1 / step:.3f}")
        out, err = capsys.readouterr()
        assert out == "" and "\r" not in err
        found += [(clock.now - 100, line) for line in err.splitlines()]
    return found


@pytest.mark.parametrize("seconds", [0.01, 1, 7, 29, 31, 55])
def test_who_waits_reads_a_line_each_minute(capsys, seconds):
    times = [t for t, _ in lines_of(capsys, seconds, int(600 / seconds))]
    gaps = [b - a for a, b in zip([0, *times], times)]
    assert max(gaps) < 60 and len(times) <= 600 / 30 + 1


def test_a_line_says_what_is_done_and_what_is_left(capsys):
    _, line = lines_of(capsys, 10, 2000)[0]
    assert line == "training: 3 of 2,000 steps, loss 0.333, 5:32:50 left"


def test_a_run_that_goes_on_counts_the_time_of_its_own_steps(capsys):
    second, line = lines_of(capsys, 10, 1000, done=900)[0]
    assert second == 30 and line.startswith("training: 903 of 1,000 steps")
    assert line.endswith("0:16:10 left")


def test_short_work_and_other_processes_say_nothing(capsys, monkeypatch):
    assert lines_of(capsys, 1, 29) == []
    monkeypatch.setattr(processes, "rank", lambda: 1)
    assert lines_of(capsys, 10, 100) == []
