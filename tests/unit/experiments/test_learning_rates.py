"""The recorded search over learning rates: whole, and what notebook 03 reads from it."""

import pytest

from experiments.learning_rates import (
    DEV,
    FULL,
    RATES,
    RESULT,
    SEEDS,
    WAYS,
    best_rates,
    main,
    row_name,
    sweep,
)
from experiments.table import Table


def test_every_way_has_each_of_its_rates_with_every_seed():
    rows = Table(RESULT, SEEDS[0]).rows
    names = {row_name(way, lr, seed) for way in WAYS for lr in RATES[way] for seed in SEEDS}
    assert set(rows) == names
    assert all(row["dev_problems"] == DEV and row["steps"] == 32 for row in rows.values())
    found = sweep()
    assert {way: tuple(rates) for way, rates in found.items()} == RATES
    assert all(len(losses) == len(SEEDS) for rates in found.values() for losses in rates.values())


def test_two_ways_have_equally_many_parameters():
    counts = {row["way"]: row["parameters"] for row in Table(RESULT, SEEDS[0]).rows.values()}
    assert counts["all seven, r = 16"] == counts["q, k, v, o, r = 40"] == 327_680
    assert counts["all seven, r = 2"] == 40_960 and counts[FULL] == 3_541_248


def test_each_best_rate_has_higher_ones_and_lower_ones_beside_it():
    for way, rate in best_rates(sweep()).items():
        assert min(RATES[way]) < rate < max(RATES[way]), way


def test_best_is_the_lowest_mean_over_the_seeds():
    found = {"a": {0.1: [1.0, 3.0], 0.2: [1.9, 1.9], 0.3: [1.5, 2.5]}, "b": {0.4: [9.0]}}
    assert best_rates(found) == {"a": 0.2, "b": 0.4}


def test_rows_are_measured_once_each_and_only_those_asked_for(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(way, lr, seed):
        measured.append((way, lr, seed))
        return {"way": way, "lr": lr, "seed": seed, "dev_loss": lr + seed}

    monkeypatch.setattr("experiments.learning_rates.measure", measure)
    path, rate = tmp_path / "rates.json", RATES[FULL][0]
    names = [row_name(FULL, rate, seed) for seed in (0, 1)]
    for _ in range(2):
        main(["--out", str(path), "--rows", *names])
    assert measured == [(FULL, rate, 0), (FULL, rate, 1)]
    assert sweep(path) == {FULL: {rate: [rate, rate + 1]}}
    with pytest.raises(SystemExit):
        main(["--out", str(path), "--rows", "full"])
    assert "no rows ['full']" in capsys.readouterr().err
