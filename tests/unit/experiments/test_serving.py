"""The throughput measurement, on a random model."""


import pytest

from experiments import serving as experiments
from tests.support.small_models import PAIRS, small_model, small_tokenizer


def test_both_ways_are_timed_on_the_same_answers():
    model = small_model()
    names = [n for n in experiments.random_adapters(model, count=2, rank=2) for _ in range(2)]
    prompts = [prompt for prompt, _ in PAIRS[:4]]
    row = experiments.compare_serving(model, small_tokenizer(), prompts, names, new=3, turns=2)
    assert {way: len(times) for way, times in row["seconds"].items()} == {
        "mixed": 2, "one batch an adapter": 2,
    }  # fmt: skip
    assert row["tokens"] == 12 and row["different_answers"] > 1
    assert row["speedup"]["least"] <= row["speedup"]["median"] <= row["speedup"]["most"]


def test_answers_that_differ_stop_the_measurement(monkeypatch):
    def generator(model, tokenizer, decoding):
        return lambda prompts, adapters=None: [f"{adapters is None}" for _ in prompts]

    monkeypatch.setattr(experiments, "generator", generator)
    model = small_model()
    names = experiments.random_adapters(model, count=2, rank=2)
    with pytest.raises(ValueError, match="2 of 2 answers differ between the two ways"):
        experiments.compare_serving(model, None, ["1", "2"], names, new=1, turns=1)
