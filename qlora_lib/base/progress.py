"""Lines that say how far long work is, for who waits before a terminal, a log or a notebook."""

import sys
import time
from datetime import timedelta

from . import processes

EVERY = 30.0  # seconds: with what takes as long between two calls, still a line a minute


class Progress:
    """Writes to stderr, each half minute, how many of `total` units are done and how long the
    others will take. done: how many were done before, as when a run goes on."""

    def __init__(self, work: str, total: int, unit: str, done: int = 0, clock=time.monotonic):
        self.work, self.total, self.unit, self.before, self.clock = work, total, unit, done, clock
        self.began = self.said = clock()

    def __call__(self, done: int, facts: str = "") -> None:
        """Say that `done` units are done, and these facts, if it is time for a line."""
        now = self.clock()
        if now - self.said < EVERY or done <= self.before or not processes.first():
            return
        self.said = now
        left = (now - self.began) / (done - self.before) * (self.total - done)
        facts = f", {facts}" if facts else ""
        # A line of its own, at once: \r and a buffer would hide it in a log.
        print(f"{self.work}: {done:,} of {self.total:,} {self.unit}{facts}, "
              f"{timedelta(seconds=round(left))} left", file=sys.stderr, flush=True)  # fmt: skip
