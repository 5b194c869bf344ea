"""A log of adapters: which one did how well on which task, one JSON line a measurement.

Every line has n and a 95% interval. The best of a task is chosen on dev; to choose on test
would make its score a best of several, and is refused.
"""

import json
import os
from datetime import datetime, timezone
from pathlib import Path

from qlora_lib.base.paths import short_path
from qlora_lib.base.statistics import wilson
from qlora_lib.data.rows import read_rows

FIELDS = ("task", "adapter", "split", "n", "correct", "score", "interval", "time")
SPLITS = ("dev", "test")


class AdapterLog:
    """Measurements in a JSONL file, which need not be there yet."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def add(self, task: str, adapter: str, correct: int, n: int, split: str = "dev", **more):
        """Append a measurement and return its row. `more`: what else is to be kept, as JSON.

        Raises ValueError for another split than dev and test, for counts that do not fit, and
        for names in `more` that the row has already.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; expected {' or '.join(SPLITS)}")
        if taken := set(more) & set(FIELDS):
            raise ValueError(f"{sorted(taken)} are the log's own fields; name them otherwise")
        row = {
            "task": task,
            "adapter": adapter,
            "split": split,
            "n": n,
            "correct": correct,
            "interval": wilson(correct, n),
            "score": correct / n,
            "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        } | more
        line = json.dumps(row, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read() != b"\n":  # torn by a kill: that line alone is damaged
                    line = "\n" + line
            stream.write(line.encode())  # at the end, wherever was read
            stream.flush()
            os.fsync(stream.fileno())
        return row

    def rows(self, task: str | None = None, split: str | None = None) -> list[dict]:
        """The rows, oldest first. Raises ValueError, naming the line, for one that is damaged."""
        if not self.path.is_file() or not self.path.stat().st_size:
            return []
        found = read_rows(self.path)
        for where, row in found:
            if missing := set(FIELDS) - row.keys():
                raise ValueError(f"{where} lacks {sorted(missing)}; mend or delete that line")
        rows = [row for _, row in found]
        return [r for r in rows if task in (None, r["task"]) and split in (None, r["split"])]

    def best(self, task: str, split: str = "dev") -> dict:
        """The row of the adapter with the highest score on dev, each by its latest measurement;
        of equals the one measured on more, then the first.

        Raises ValueError for split "test", and where nothing of this task was measured on dev.
        """
        if split != "dev":
            raise ValueError(
                f"an adapter is chosen on dev, not on {split!r}: the best of several test scores "
                "is too good. Choose here, then report that adapter's test score"
            )
        latest = {row["adapter"]: row for row in self.rows(task, split)}
        if not latest:
            known = sorted({row["task"] for row in self.rows(split=split)})
            raise ValueError(
                f"{short_path(self.path)} has no dev score for task {task!r}; it has {known}"
            )
        return max(latest.values(), key=lambda row: (row["score"], row["n"]))
