"""AUC, its intervals over questions, and reliability: by hand, and against slow loops."""

import pytest
import torch

from experiments import ranking
from tests.support.tensors import normal

SCORES = torch.tensor([[0.9, 0.2, 0.6], [0.4, 0.4, 0.8]], dtype=torch.float64)
RIGHT = torch.tensor([[True, False, False], [True, False, True]])


def by_pairs(scores, right):
    good, bad = scores[right].tolist(), scores[~right].tolist()
    return sum((g > b) + (g == b) / 2 for g in good for b in bad) / (len(good) * len(bad))


def test_the_auc_counts_pairs_and_ties_half():
    # right .9 .4 .8; wrong .2 .6 .4: 3 + 1.5 + 3 of 9
    assert ranking.auc(SCORES, RIGHT).tolist() == pytest.approx([7.5 / 9])
    scores = (normal(30, 4, seed=1).double() * 3).round() / 3
    right = normal(30, 4, seed=2) > 0
    assert ranking.auc(scores, right).item() == pytest.approx(by_pairs(scores, right))


def test_a_question_that_is_drawn_twice_counts_twice():
    times = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    scores, right = normal(3, 8, seed=3).double(), normal(3, 8, seed=4) > 0
    wanted = [by_pairs(scores[q], right[q]) for q in ([0, 0, 2], [1, 2, 2])]
    assert ranking.auc(scores, right, times).tolist() == pytest.approx(wanted)


def test_within_a_question_only_its_own_pairs_count():
    scores = torch.cat([SCORES, SCORES[:1]])
    right = torch.cat([RIGHT, torch.ones(1, 3, dtype=torch.bool)])
    found = ranking.auc_within(scores, right)
    assert found[:2].tolist() == pytest.approx([1.0, 0.75]) and found[2].isnan()


def test_questions_are_drawn_with_replacement_and_the_same_ones_for_a_seed():
    times = ranking.questions_drawn(7, draws=50)
    assert times.shape == (50, 7) and (times.sum(1) == 7).all() and times.max() > 1
    assert torch.equal(times, ranking.questions_drawn(7, draws=50))


def test_the_ends_hold_the_middle_and_leave_nan_out():
    values = torch.cat([torch.arange(101.0), torch.tensor([torch.nan])])
    assert ranking.ends(values, 0.9) == pytest.approx((5, 95))


def test_the_gap_is_that_of_the_aucs_and_its_intervals_hold_it():
    right = normal(60, 6, seed=5) > 0
    good = normal(60, 6, seed=6) + 2 * right
    rows = [{"gold": "1", "answers": ["1" if ok else "2" for ok in own], "likelihood": g.tolist(),
             "verifier": v.tolist()} for own, g, v in zip(right, good, normal(60, 6, seed=7))]
    gaps = ranking.auc_gap(rows, "likelihood", "verifier")
    wanted = by_pairs(good, right) - by_pairs(normal(60, 6, seed=7), right)
    assert gaps["over all"][0] == pytest.approx(wanted, abs=1e-6)
    for gap, low, high in gaps.values():
        assert 0 < low < gap < high
    wider = ranking.auc_gap(rows, "likelihood", "verifier", level=0.99)
    assert all(wider[k][1] < gaps[k][1] and wider[k][2] > gaps[k][2] for k in gaps)


def test_an_interval_of_the_auc_holds_the_truth_about_as_often_as_it_says():
    held = 0
    for seed in range(40):
        right = normal(80, 2, seed=seed) > 0
        scores = normal(80, 2, seed=100 + seed).double()  # of a coin
        found, low, high = ranking.auc_interval(scores, right)
        assert low < found < high and found == pytest.approx(by_pairs(scores, right))
        held += low <= 0.5 <= high
    assert 35 <= held <= 40


def test_reliability_of_each_bin_by_hand():
    found = ranking.reliability(SCORES, RIGHT, bins=2)
    assert [row["n"] for row in found] == [3, 3]
    assert [row["says"] for row in found] == pytest.approx([1 / 3, 2.3 / 3])
    assert [row["right"] for row in found] == pytest.approx([1 / 3, 2 / 3])
    assert all(row["low"] <= row["right"] <= row["high"] for row in found)
    honest = torch.rand(400, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = torch.rand(400, 5, generator=torch.Generator().manual_seed(1)) < honest
    rows = ranking.reliability(honest, drawn)
    assert sum(row["low"] <= row["says"] <= row["high"] for row in rows) >= 8
