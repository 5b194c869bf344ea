"""Extraction, scoring, the canaries, and generation from a real (random) model."""

import json
import random
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import PAIRS, small_model, small_tokenizer

from qlora_lib.data import PROMPT, load_minigsm
from qlora_lib.evaluation import (
    Completion,
    Decoding,
    evaluate,
    extract_answer,
    few_shot,
    generator,
    is_correct,
)

PROBLEMS = load_minigsm("test")[:200]
PROMPTS = [prompt for prompt, _ in PAIRS]


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("3+4=7\n#### 7", 7, 7),
        ("#### 1,234", 1234, 1234),
        ("#### $5.25.", Fraction(21, 4), Fraction(21, 4)),
        ("#### \u22123", -3, -3),
        ("#### -$3", -3, -3),
        ("#### 3 + 4 = 7 apples", 7, 7),
        ("#### none\n#### 8", 8, 8),
        ("#### 8\n#### 9", 8, 8),
        ("The answer is 5.", 5, 5),
        ("The answer is: $70,000. Check: 1+1=2", 70000, 70000),
        ("The answer is 4. No, the answer is 6", 6, 6),
        ("The answer is 4\n#### 5", 5, 5),
        ("so 10-3", None, 3),
        ("Ava has 12 apples and 5.5 pears.", None, Fraction(11, 2)),
        ("about .5", None, Fraction(1, 2)),
        ("1,2345", None, 2345),
        ("nothing", None, None),
        ("", None, None),
        ("#### 7\nQuestion: What is 2+2?\nAnswer:\n#### 4", 7, 7),
        ("Question: 3 apples. The answer is 3", None, None),
        ("#### " + "9" * 5000, None, None),
    ],
)
def test_extraction(text, strict, flexible):
    assert extract_answer(text) == strict
    assert extract_answer(text, "flexible") == flexible


def test_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="strict"):
        extract_answer("5", "lenient")


ALPHABET = "0123456789.,#$-\u2212= \n%/()[]\\{}*eE\u0663\u00bdTheanswris:Qtio\ud800"


PARTS = ["####", "The answer is", "9" * 30, ",", "1,000", "-", "$", "=", ".", "\n", "Question:"]


@settings(max_examples=200, deadline=None)
@given(st.text(ALPHABET) | st.lists(st.sampled_from(PARTS)).map("".join))
def test_extraction_never_crashes(text):
    strict, flexible = extract_answer(text), extract_answer(text, "flexible")
    assert strict is None or strict == flexible  # strict answers are flexible ones too
    for answer in (strict, flexible):
        assert answer is None or isinstance(answer, Fraction)


@pytest.mark.parametrize("text", ["1," * 200_000, "9" * 400_000, "#" * 400_000, "1,111" * 100_000])
def test_extraction_of_huge_texts_ends(text):
    extract_answer(text, "flexible")


def test_is_correct_is_exact():
    assert is_correct("#### 70,000", "70000") and not is_correct("#### 70003", 70000)
    assert not is_correct("#### 5", 500) and not is_correct("#### 5.4", 5)
    assert is_correct("#### 0.3333333", Fraction(1, 3)) and not is_correct("#### 0.33", "0.3333333")
    assert is_correct("#### 2", "1+1\n#### 2")
    assert not is_correct("", 0) and not is_correct("2", 2) and is_correct("2", 2, "flexible")
    for gold in ("", "many", float("nan"), float("inf"), None, "#### x"):
        with pytest.raises(ValueError, match="gold"):
            is_correct("#### 1", gold)


def silent(prompts):
    return [""] * len(prompts)


def echo(prompts):
    return list(prompts)


def answers_in_order(entries):
    """A model that gives the answer of entries[i] to the question of PROBLEMS[i]."""
    by_prompt = {
        PROMPT.format(question=q["question"]): a["answer"] for q, a in zip(PROBLEMS, entries)
    }
    return lambda prompts: [by_prompt[p] for p in prompts]


def test_canaries():
    shuffled = PROBLEMS[:]
    random.Random(0).shuffle(shuffled)
    for model, low, high in [
        (silent, 0, 0),
        (echo, 0, 0),
        (answers_in_order(PROBLEMS), 1, 1),
        (answers_in_order(shuffled), 0, 0.1),
    ]:
        report = evaluate(model, PROBLEMS)
        assert report.n == len(PROBLEMS) == len(report.predictions)
        assert low <= report.strict <= high and low <= report.flexible <= high


def test_silent_questions_stay_in_the_denominator():
    know = answers_in_order(PROBLEMS)

    def half(prompts):
        return [answer if i % 2 else "" for i, answer in enumerate(know(prompts))]

    report = evaluate(half, PROBLEMS)
    assert report.strict == 0.5 == report.format_rate


def test_only_the_prompt_reaches_the_model():
    seen = []
    evaluate(lambda prompts: seen.extend(prompts) or [""] * len(prompts), PROBLEMS)
    assert seen == [PROMPT.format(question=e["question"]) for e in PROBLEMS]


def test_report_files_and_table(tmp_path):
    def model(prompts):
        return [Completion("#### 1", 3, finished=i > 0) for i, _ in enumerate(prompts)]

    model.info = {"compute_dtype": "bf16"}
    shown = []
    report = evaluate(model, PROBLEMS, tmp_path, callback=shown.append, chunk=50)
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == shown == report.predictions
    assert set(shown[0]) >= {"question", "prompt", "completion", "gold", "strict", "flexible"}
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["n"] == 200 and saved["strict"] == report.strict and saved["tokens"] == 600
    assert report.truncation_rate == 4 / 200  # the first of each chunk
    low, high = report.strict_interval
    table = str(report)
    assert "200 questions" in table and "bf16" in table
    assert f"[{100 * low:.1f}%, {100 * high:.1f}%]" in table


def test_empty_and_unparsable_problems_are_errors():
    with pytest.raises(ValueError, match="no problems"):
        evaluate(silent, [])
    with pytest.raises(ValueError, match="gold"):
        evaluate(lambda prompts: pytest.fail("asked"), [{"question": "q", "answer": "x"}])
    with pytest.raises(ValueError, match="gave 1 completions"):
        evaluate(lambda prompts: [""], PROBLEMS)


def test_few_shot():
    shots = load_minigsm("train")[:5]
    prompt, target = few_shot(shots, 3)(PROBLEMS[0])
    assert prompt.count("Question:") == 4 and prompt.count("####") == 3 and "<<" not in prompt
    assert prompt.endswith(PROMPT.format(question=PROBLEMS[0]["question"]))
    assert few_shot(shots, 0)(PROBLEMS[0])[0] == PROMPT.format(question=PROBLEMS[0]["question"])
    with pytest.raises(ValueError, match="k=6"):
        few_shot(shots, 6)


def test_a_batch_gives_the_completions_of_single_prompts_in_order():
    model, tokenizer = small_model(), small_tokenizer()
    many = generator(model, tokenizer, Decoding(max_new_tokens=12, batch_size=5))(PROMPTS)
    one = generator(model, tokenizer, Decoding(max_new_tokens=12, batch_size=1))
    assert many == [one([p])[0] for p in PROMPTS]
    assert len({len(tokenizer.encode(p)) for p in PROMPTS}) > 1 and len(set(many)) > 5


def test_completion_equals_a_plain_greedy_loop():
    model, tokenizer = small_model(), small_tokenizer()
    ids = [1, *tokenizer.encode(PROMPTS[1], add_special_tokens=False)]
    new = []
    for _ in range(12):
        new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    (completion,) = generator(model, tokenizer, Decoding(max_new_tokens=12))(PROMPTS[1:2])
    assert 2 not in new and completion == tokenizer.decode(new)
    assert completion.tokens == 12 and not completion.finished


def test_end_token_and_stop_string_end_a_completion():
    model, tokenizer = small_model(), small_tokenizer()
    plain = generator(model, tokenizer, Decoding(max_new_tokens=8))(PROMPTS[:1])[0]
    stop = plain[3:5]
    (cut,) = generator(model, tokenizer, Decoding(max_new_tokens=8, stop=(stop,)))(PROMPTS[:1])
    assert cut == plain[: plain.index(stop)] and cut.finished
    first = int(model(torch.tensor([[1, *tokenizer.encode(PROMPTS[0])]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [first, 2]  # a chat model has several end tokens
    (ended,) = generator(model, tokenizer, Decoding(max_new_tokens=8))(PROMPTS[:1])
    assert ended == "" and ended.tokens == 1 and ended.finished


def test_checkpoints_own_sampling_settings_are_ignored(caplog):
    model, tokenizer = small_model(), small_tokenizer()
    greedy = generator(model, tokenizer, Decoding(max_new_tokens=8))
    expected = greedy(PROMPTS[:3])
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.3}
    for name, value in (own | {"max_length": 20}).items():
        setattr(model.generation_config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greedy(PROMPTS[:3]) == expected
    assert not caplog.records
    assert model.generation_config.temperature == 0.6 and model.generation_config.max_length == 20


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    model, tokenizer = small_model(), small_tokenizer()

    def sample(seed):
        decoding = Decoding(temperature=1.0, top_p=0.9, samples=3, seed=seed, max_new_tokens=6)
        return generator(model, tokenizer, decoding)(PROMPTS[:4])

    state = torch.get_rng_state()
    first = sample(0)
    assert torch.equal(state, torch.get_rng_state())
    assert first == sample(0) != sample(1)
    assert len(first) == 4 and all(len(completions) == 3 for completions in first)
    with pytest.raises(ValueError, match="temperature"):
        Decoding(samples=3)


def test_mode_is_restored_and_dtype_named():
    model, tokenizer = small_model().train(), small_tokenizer()
    generate = generator(model, tokenizer, Decoding(max_new_tokens=2))
    generate(PROMPTS[:2])
    assert model.training and generate.info["compute_dtype"] == "fp32"
    generate = generator(model.bfloat16(), tokenizer, Decoding(max_new_tokens=2))
    assert len(generate(PROMPTS[:2])) == 2 and generate.info["compute_dtype"] == "bf16"


def test_prompt_that_fills_the_context_is_an_error():
    generate = generator(small_model(), small_tokenizer(), Decoding(max_new_tokens=10))
    with pytest.raises(ValueError, match="context of 256"):
        generate(["Ava " * 300])
