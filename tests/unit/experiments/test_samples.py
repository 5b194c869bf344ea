"""What is computed from stored samples, by hand on two problems; and the stored ones."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.samples import (
    METHODS,
    cost,
    expected_at,
    pass_at_k,
    pick,
    read_samples,
    right_at,
    verdicts,
    vote_at_k,
)
from qlora_lib.evaluation.votes import choose
from tests.support.tensors import PROPERTY

ROWS = [
    {
        "gold": "12", "prompt_tokens": 50, "greedy": "12", "greedy_tokens": 40,
        "answers": ["9", "12", None, "12"], "tokens": [40, 60, 100, 40],
        "likelihood": [-0.1, -0.2, -0.3, -0.4], "verifier": [0.2, 0.3, 0.9, 0.4],
    },
    {
        "gold": "7", "prompt_tokens": 70, "greedy": "8", "greedy_tokens": 20,
        "answers": ["8", "7", "8", "8"], "tokens": [20, 20, 20, 20],
        "likelihood": [-0.5, -0.2, -0.5, -0.5], "verifier": [0.1, 0.8, 0.2, 0.3],
    },
]  # fmt: skip


@pytest.mark.parametrize(
    "method, chosen, right",
    [
        ("majority", [1, 0], [True, False]),
        ("likelihood", [0, 1], [False, True]),
        ("verifier", [2, 1], [False, True]),
        ("weighted", [1, 1], [True, True]),
    ],
)
def test_what_each_method_takes_of_four_samples(method, chosen, right):
    assert [pick(row, method, range(4)) for row in ROWS] == chosen
    assert right_at(ROWS, method, 4) == right
    assert expected_at(ROWS, method, 4) == sum(right) / 2


def test_greedy_best_and_fewer_samples():
    assert right_at(ROWS, "greedy", 1) == [True, False]
    assert right_at(ROWS, "best", 1) == [False, False] and right_at(ROWS, "best", 2) == [True, True]
    pairs = list(combinations(range(4), 2))
    exact = [sum(any(verdicts(row)[i] for i in pair) for pair in pairs) / 6 for row in ROWS]
    assert expected_at(ROWS, "best", 2) == pytest.approx(sum(exact) / 2)
    assert right_at(ROWS, "majority", 1) == [False, False]
    with pytest.raises(ValueError, match="no way to choose"):
        pick(ROWS[0], "greedy", range(4))


def test_the_cost_in_tokens():
    assert cost(ROWS, "greedy", 1) == (90 + 90) / 2
    assert cost(ROWS, "majority", 4) == 4 * ((50 + 60) + (70 + 20)) / 2
    assert cost(ROWS, "verifier", 4) == 2 * cost(ROWS, "majority", 4) == cost(ROWS, "weighted", 4)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "greedy"])  # is no sample
def test_no_way_to_choose_beats_the_best_of_the_samples(method):
    rows = read_samples()[:200]
    found, best = right_at(rows, method, 8), right_at(rows, "best", 8)
    assert any(found) and not any(got and not could for got, could in zip(found, best))


def test_vote_at_k_is_near_the_mean_over_all_subsets_and_exact_for_all():
    answers, right = [1, 2, 2, 3, 1, 2], [False, True, True, False, False, True]

    def pick(subset):
        return subset[choose([answers[i] for i in subset])]

    exact = [right[pick(list(s))] for s in combinations(range(6), 3)]
    draw = torch.Generator().manual_seed(0)
    # Standard error of 4,000 draws: below 0.008.
    assert vote_at_k(answers, right, 3, pick, 4000, draw) == pytest.approx(
        sum(exact) / len(exact), abs=0.06
    )
    assert vote_at_k(answers, right, 6, pick, 1, draw) == 1.0
    with pytest.raises(ValueError, match="expected 1 <= k"):
        vote_at_k(answers, right, 7, pick, 1, draw)


@PROPERTY
@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(n, data):
    right = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    verdicts = [i < right for i in range(n)]
    subsets = list(combinations(verdicts, k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("n, right, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses(n, right, k):
    with pytest.raises(ValueError, match="draw at least k"):
        pass_at_k(n, right, k)
