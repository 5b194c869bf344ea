"""The bake-off of starts: what is compared, and how sure that is."""

import math

import pytest
import torch

from experiments import calibrated_init as bakeoff
from experiments.calibrated_init import (
    BASELINE,
    SEEDS,
    STARTS,
    TRAINED,
    comparisons,
    holm,
    main,
    paired_t,
    plan,
    row_name,
)
from experiments.table import Table
from tests.support.tensors import normal


def test_students_p_is_that_of_its_density():
    """The closed form for 4 degrees of freedom against the integral of the density."""
    grid = torch.linspace(0, 400, 4_000_001, dtype=torch.float64)
    density = 3 / 8 * (1 + grid.square() / 4) ** -2.5
    for values in (normal(5, seed=1), normal(5, seed=2) + 1, normal(5, seed=3) + 5):
        values = values.double()
        t = float(values.mean().abs() / values.std() * math.sqrt(5))
        inside = grid <= t
        integral = 2 * float(torch.trapezoid(density[inside], grid[inside]))
        assert paired_t(values.tolist()) == pytest.approx(1 - integral, abs=1e-4)
    assert paired_t([0.0] * 5) == 1 and paired_t([1.0] * 5) == 0
    with pytest.raises(ValueError, match="got 4 differences"):
        paired_t([1.0] * 4)


def test_holm_multiplies_by_those_that_are_left_and_never_falls():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06})  # fmt: skip
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def rows_of(base, rank, gaps):
    return {row_name("trained", base, rank, start, seed=seed): {"loss": 1 + gap * (1 + seed / 9)}
            for start, gap in gaps.items() for seed in SEEDS}  # fmt: skip


def test_each_start_is_compared_with_none_over_the_same_seeds():
    base, rank = TRAINED[0]
    rows = rows_of(base, rank, {BASELINE: 0.0, "cloq": -0.1, "svd": 1e-3})
    found = comparisons(rows)
    assert set(found) == {(base, rank, "cloq"), (base, rank, "svd")}
    assert found[base, rank, "cloq"]["difference"] == pytest.approx(-0.1 * (1 + 2 / 9))
    assert found[base, rank, "cloq"]["holm"] >= found[base, rank, "cloq"]["p"]
    del rows[row_name("trained", base, rank, "cloq", seed=SEEDS[0])]
    assert set(comparisons(rows)) == {(base, rank, "svd")}  # all seeds, or none


def test_rows_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(rows, *setting):
        asked.append(setting)
        return {"loss": 1.0}

    monkeypatch.setattr(bakeoff, "measure", measure)
    path, names = tmp_path / "rows.json", list(plan())[:3]
    for _ in range(2):
        main(["--out", str(path), "--rows", *names])
    assert asked == [plan()[name] for name in names]
    assert list(Table(path, 0).rows) == names


@pytest.mark.long
@pytest.mark.parametrize("start", [*STARTS, "again"])
def test_a_start_is_measured_as_it_was_recorded(start, monkeypatch):
    """Before training, at 2 bits and rank 8."""
    name = row_name("before", "gptq 2 bits", 8, start)
    recorded = Table(bakeoff.RESULT, SEEDS[0]).rows[name]
    found = bakeoff.measure({}, *plan()[name])
    assert found["its_own_base"] == recorded["its_own_base"]
    # A code can flip where sums are in another order.
    for key, tolerance in (("kl", 0.05), ("question_loss", 0.002)):
        assert found[key] == pytest.approx(recorded[key], rel=tolerance), key
