"""Votes and scores, against slow and obvious versions."""

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.evaluation.evaluate import evaluate
from qlora_lib.evaluation.votes import (
    best_score,
    choose,
    likelihood,
    log_likelihoods,
    majority,
    sample_answers,
    weighted_vote,
    with_scores,
)
from qlora_lib.generation.generate import Completion, Decoding, Generator, generator
from tests.support.small_models import PAIRS, small_model, small_tokenizer
from tests.support.tensors import PROPERTY

# --- Votes -------------------------------------------------------------------------------

ANSWERS = st.lists(st.sampled_from([None, 1, 2, 3]), min_size=1, max_size=12)


@PROPERTY
@given(ANSWERS)
def test_choose_takes_the_most_frequent_and_of_equals_the_first(answers):
    counts = Counter(a for a in answers if a is not None)
    if not counts:
        assert choose(answers) == 0
        return
    most = max(counts.values())
    first = next(i for i, a in enumerate(answers) if a is not None and counts[a] == most)
    assert choose(answers) == first


@PROPERTY
@given(ANSWERS, st.data())
def test_weights_are_summed_by_answer(answers, data):
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=len(answers),
                                 max_size=len(answers)))  # fmt: skip
    picked = choose(answers, weights)
    sums = {a: sum(w for b, w in zip(answers, weights) if b == a) for a in answers}
    assert all(sums[answers[picked]] >= s for a, s in sums.items() if a is not None) or all(
        a is None for a in answers
    )
    assert choose(answers, [1.0] * len(answers)) == choose(answers)


def test_choose_refuses_what_cannot_be_counted():
    with pytest.raises(ValueError, match="no samples"):
        choose([])
    for weights in ([1.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="expected as many finite"):
            choose([1, 2], weights)


def test_a_sample_without_an_answer_has_no_vote():
    assert majority(["nothing", "hm", "so\n#### 7"]) == "so\n#### 7"
    assert majority(["I say 3", "#### 4", "I say 3"]) == "#### 4"  # 3 is not in the format
    assert majority(["I say 3", "I say 4", "or 4"]) == "I say 4"  # no one has it: last numbers
    assert majority(["#### 7", "#### 7.0", "#### 8"]) == "#### 7"  # one number, two spellings
    assert sample_answers(["#### 1/2"]) == [Fraction(1, 2)]


def scored(*pairs):
    samples = [Completion(text, 3, True) for text, _ in pairs]
    for sample, (_, score) in zip(samples, pairs):
        sample.score = score
    return samples


def test_the_votes_by_score():
    samples = scored(("#### 1", 0.4), ("#### 2", 0.9), ("#### 1", 0.6))
    assert best_score(samples) == "#### 2"
    assert weighted_vote(samples) == "#### 1"  # 0.4 + 0.6 > 0.9
    with pytest.raises(ValueError, match="with_scores"):
        best_score(["#### 1"])


def test_with_scores_hands_out_the_scores_in_order():
    def generate(prompts):
        return [[Completion(f"{p}{i}", 5, i == 0) for i in range(3)] for p in prompts]

    generate = Generator(generate, {"model": "m"})
    generate.fingerprint = lambda: "f"
    new = with_scores(generate, lambda ps, cs: [float(ord(p) * 10 + int(c[1])) for p, c in
                                                zip(ps, cs)], "test")  # fmt: skip
    rows = new(["a", "b"])
    assert [[s.score for s in row] for row in rows] == [[970, 971, 972], [980, 981, 982]]
    assert [s.finished for s in rows[0]] == [True, False, False] and rows[1][2].tokens == 5
    assert new.info == {"model": "m", "score": "test"} and new.fingerprint() != "f"
    assert with_scores(print, print, "t").fingerprint() is None
    single = with_scores(lambda prompts: ["x" for _ in prompts], lambda ps, cs: [1.0] * len(ps), "t")
    assert single(["a"]) == ["x"] and single(["a"])[0].score == 1.0


def test_evaluate_counts_all_samples_and_keeps_them_with_their_scores(tmp_path):
    def generate(prompts):
        return [scored(("#### 1", 0.2), ("#### 2", 0.8)) for _ in prompts]

    problems = [{"question": "a?", "answer": "#### 2"}, {"question": "b?", "answer": "#### 1"}]
    report = evaluate(generate, problems, tmp_path / "r", vote=best_score)
    assert report.strict_correct == 1 and report.tokens == 12
    assert report.predictions[0]["samples"] == ["#### 1", "#### 2"]
    assert report.predictions[0]["scores"] == [0.2, 0.8]
    with pytest.raises(ValueError, match="vote was 'best_score', is 'majority'"):
        evaluate(generate, problems, tmp_path / "r", vote=majority)


# --- Likelihood --------------------------------------------------------------------------


def test_log_likelihoods_are_those_of_the_tokens_one_by_one():
    """Float64, each completion alone, no padding; fp32 sums of up to 30 terms: 1e-4."""
    model, tokenizer = small_model(), small_tokenizer()
    pairs = PAIRS[:7]
    found = log_likelihoods(model, tokenizer, *zip(*pairs), batch_size=3)
    exact = small_model().double()
    for (prompt, target), (total, count) in zip(pairs, found):
        start = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        ids = [*tokenizer.encode(target, add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            logits = exact(torch.tensor([start + ids])).logits[0]
        log_p = [logits[len(start) + i - 1].log_softmax(-1)[t].item() for i, t in enumerate(ids)]
        assert count == len(ids)
        assert total == pytest.approx(sum(log_p), abs=1e-4)
    means = likelihood(model, tokenizer)(*zip(*pairs))
    assert means == pytest.approx([t / n for t, n in found], abs=1e-5)


def test_greedy_is_more_likely_than_a_hot_sample():
    model, tokenizer = small_model(), small_tokenizer()
    prompts = [p for p, _ in PAIRS[:8]]
    score = likelihood(model, tokenizer)
    greedy, hot = (
        score(prompts, generator(model, tokenizer, Decoding(t, max_new_tokens=20, seed=3))(prompts))
        for t in (0.0, 3.0)
    )
    assert sum(greedy) > sum(hot)
