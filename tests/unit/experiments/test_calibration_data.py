"""Which text to calibrate on: all rows are there, and one is measured as it was recorded."""

from pathlib import Path

import pytest
import torch

from experiments import calibration_data
from experiments.calibration_data import (
    DEV,
    POOL,
    RESULT,
    SEEDS,
    WINDOW,
    main,
    measure,
    plan,
    solver,
    windows,
)
from experiments.table import Table

NOWHERE = Path("nowhere")


def test_every_row_is_recorded_with_a_loss_a_problem():
    rows = Table(RESULT, SEEDS[0]).rows
    assert set(rows) == set(plan()) and {len(row["losses"]) for row in rows.values()} == {DEV}
    for row, setting in zip(rows.values(), plan().values()):
        if setting:
            kept = (row["source"], row["windows"], row["method"], row["seed"])
            assert kept == setting and row["tokens"] == WINDOW * row["windows"]


def test_rows_are_measured_once_each(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(calibration_data, "measure",
                        lambda *setting: asked.append(setting) or {"losses": [1.0]})  # fmt: skip
    path, names = tmp_path / "rows.json", list(plan())[:3]
    for _ in range(2):
        main(["--out", str(path), "--wikitext", "nowhere", "--rows", *names])
    assert asked == [(plan()[name], NOWHERE) for name in names]


@pytest.mark.long
def test_texts_differ_and_hold_their_own_tokens():
    _, tokenizer, _ = solver()
    task, random = windows("task", NOWHERE), windows("random", NOWHERE)
    assert task.shape == random.shape == (POOL, WINDOW)
    text = tokenizer.decode(task[:4].flatten())
    assert text.startswith("Question:") and "####" in text
    # Even draws meet nearly all tokens; problems are written in few of them.
    used = [len(torch.unique(ids)) / len(tokenizer) for ids in (random, task)]
    assert used[0] > 0.95 and used[1] < 0.8
    with pytest.raises(FileNotFoundError, match="WikiText-2"):
        windows("wikitext", NOWHERE)


@pytest.mark.long
@pytest.mark.parametrize("name", ["rtn", "task, 16 windows, gptq, seed=0"])
def test_a_row_is_measured_as_it_was_recorded(name, monkeypatch):
    """Of the first problems; other kernels may round a few codes the other way."""
    monkeypatch.setattr(calibration_data, "DEV", 16)
    recorded = Table(RESULT, SEEDS[0]).rows[name]["losses"][:16]
    found = measure(plan()[name], NOWHERE)["losses"]
    assert sum(found) == pytest.approx(sum(recorded), rel=0.1)
