"""Each canary passes on the real grader, and catches the broken one that it is meant for."""

from collections import Counter

import pytest

from experiments.accuracy import bare_question, statement
from qlora_lib.data.gsm8k import PROMPT, format_gsm8k, parse_gold
from qlora_lib.data.sources import load_minigsm
from qlora_lib.evaluation import evaluate as evaluation
from qlora_lib.evaluation.canaries import AT_MOST, CanaryError, run_canaries, sample
from qlora_lib.evaluation.evaluate import evaluate, few_shot
from qlora_lib.evaluation.extraction import numbers

PROBLEMS = load_minigsm("test")
SHOTS = few_shot(load_minigsm("train"), 3)


@pytest.mark.parametrize("prompt", [format_gsm8k, SHOTS], ids=["zero-shot", "3-shot"])
def test_scores_are_known_beforehand(prompt):
    scores = run_canaries(evaluate, PROBLEMS, prompt)
    chosen = sample(PROBLEMS)
    assert scores["silent"] == scores["echo"] == (0, 0)
    assert scores["gold"] == (len(chosen), len(chosen)) and len(chosen) == 63 <= AT_MOST
    # Shuffled: near chance, which is sum of (k/n)^2 over the golds that occur k times.
    golds = Counter(parse_gold(e["answer"]) for e in chosen)
    chance = sum(k * k for k in golds.values()) / len(chosen)
    assert scores["shuffled"][0] == scores["shuffled"][1] <= 3 * chance


@pytest.mark.parametrize("prompt", [bare_question, statement])
def test_prompts_without_the_template_are_allowed_their_luck(prompt):
    """Such an echo may be right where the answer stands in the question, and only there."""
    strict, flexible = run_canaries(evaluate, PROBLEMS, prompt)["echo"]
    lucky = [e for e in sample(PROBLEMS) if parse_gold(e["answer"]) in numbers(e["question"])]
    assert strict == 0 and flexible <= len(lucky)


def broken(monkeypatch, **parts):
    """`evaluate` with parts of its grader replaced."""
    for name, part in parts.items():
        monkeypatch.setattr(evaluation, name, part)
    return evaluate


@pytest.mark.parametrize(
    "name, message, parts",
    [
        ("silent", "silence", {"equals": lambda answer, gold: answer is None or answer == gold}),
        ("gold", "does not find", {"extract_answer": lambda text, mode="strict": None}),
        ("gold", "does not find", {"equals": lambda answer, gold: gold < 10 and answer == gold}),
        ("shuffled", "right gold", {"equals": lambda answer, gold: answer is not None}),
    ],
)  # fmt: skip
def test_a_broken_grader_is_caught_by_name(monkeypatch, name, message, parts):
    with pytest.raises(CanaryError, match=f"canary {name}: .*{message}"):
        broken(monkeypatch, **parts)(str, PROBLEMS)


def test_a_grader_that_reads_on_after_the_stop_is_caught(monkeypatch):
    """Its echo of few-shot prompts finds the examples' answers."""
    shots = [{"question": f"{i}?", "answer": f"So\n#### {i}"} for i in range(5)]
    problems = [{"question": f"What comes after {i}?", "answer": "#### 4"} for i in range(9)]
    assert run_canaries(evaluate, problems, few_shot(shots, 5))["echo"] == (0, 0)

    def reads_on(text, mode="strict"):
        found = numbers(text.split("#### ")[-1])
        return found[0] if found else None

    monkeypatch.setattr(evaluation, "extract_answer", reads_on)
    with pytest.raises(CanaryError, match=r"canary echo: 9 of 9 right \(strict\), expected 0"):
        evaluate(str, problems, prompt=few_shot(shots, 5))


def test_questions_left_out_of_the_denominator_are_caught(monkeypatch):
    def skips(generate, problems, **options):
        return evaluate(generate, problems[1:], **options)

    with pytest.raises(CanaryError, match="62 of 63 questions were counted"):
        run_canaries(skips, PROBLEMS)


def leaky(entry):
    prompt, target = format_gsm8k(entry)
    return prompt + target, target


def ends_in_gold(entry):
    return PROMPT.format(**entry) + "#### 42", ""


def test_a_gold_solution_in_the_prompt_is_an_error():
    def never(prompts):
        pytest.fail("asked")

    with pytest.raises(CanaryError, match="holds its gold solution"):
        evaluate(never, PROBLEMS, prompt=leaky)
    with pytest.raises(CanaryError, match="holds its gold solution"):
        evaluate(never, PROBLEMS, prompt=few_shot(PROBLEMS[500:], 3))  # examples from the test set
    with pytest.raises(CanaryError, match="holds its gold solution"):
        evaluate(never, [{"question": "q", "answer": "#### 42"}], prompt=ends_in_gold)


def test_canaries_can_be_left_out():
    report = evaluate(lambda prompts: prompts, PROBLEMS[:3], prompt=leaky, canaries=False)
    assert report.n == 3


@pytest.mark.parametrize("answers", [["#### 5"], ["#### 5"] * 3, ["5", "7"]])
def test_few_or_equal_golds_pass(answers):
    problems = [{"question": f"{i}?", "answer": a} for i, a in enumerate(answers)]
    scores = run_canaries(evaluate, problems, lambda e: (PROMPT.format(**e), ""))
    assert scores["gold"] == (len(problems),) * 2


def test_a_gold_solution_that_the_grader_reads_otherwise_is_named():
    problems = [{"question": "q", "answer": "#### 2\n#### 3"}]  # its gold is the last, 3
    with pytest.raises(CanaryError, match=r"canary gold: 0 of 1 .*such as '#### 2\\n#### 3'"):
        evaluate(str, problems)
