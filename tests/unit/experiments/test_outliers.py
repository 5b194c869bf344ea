"""Planted outliers: the rows of the table, and that some are measured as they were recorded."""

import pytest

from experiments import outliers
from experiments.outliers import REPAIRS, RESULT, SIZE, WAYS, main, plan, planted, repair, row_name
from experiments.table import Table
from qlora_lib.quant.grid import QuantSpec
from tests.support.calibrated_models import batches, logits


def test_every_repair_is_measured_in_every_way_at_one_size():
    rows = plan()
    assert all(row_name(SIZE, how, *way) in rows for how in REPAIRS for way in WAYS)
    assert all(row_name(1, "none", *way) in rows for way in WAYS)  # without outliers
    assert len(set(rows.values())) == len(rows) and rows["exact"] is None


def test_rows_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    asked = []

    def measure(setting):
        asked.append(setting)
        return {"loss": 1.0, "correct": 1}

    monkeypatch.setattr(outliers, "measure", measure)
    path, names = tmp_path / "rows.json", list(plan())[:3]
    for _ in range(2):
        main(["--out", str(path), "--rows", *names])
    assert asked == [plan()[name] for name in names]
    assert list(Table(path, 0).rows) == names


@pytest.mark.long
@pytest.mark.parametrize("how", REPAIRS)
def test_neither_outliers_nor_repairs_change_the_function(how):
    ids = batches(1)[0]["input_ids"]
    model, before = planted(SIZE), logits(planted(1), ids)
    repair(model, how, QuantSpec(4, 64))
    assert (logits(model, ids) - before).abs().max() < 1e-4 * max(1, float(before.abs().max()))


@pytest.mark.long
@pytest.mark.parametrize("name", [
    row_name(SIZE, "none", "w4a4", "rtn"), row_name(SIZE, "rotate online", "w4a4", "rtn"),
])  # fmt: skip
def test_a_row_is_measured_as_it_was_recorded(name, monkeypatch):
    """The loss; where activations are rounded, a sum in another order may move one by a step."""
    recorded = Table(RESULT, 0).rows[name]
    monkeypatch.setattr(outliers, "ASKED", 4)
    found = outliers.measure(plan()[name])
    assert found["bits_per_weight"] == recorded["bits_per_weight"]
    assert found["loss"] == pytest.approx(recorded["loss"], rel=0.02)
