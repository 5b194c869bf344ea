"""The tiny profile's tasks: splits that share nothing, targets that count, answers that do not."""

import pytest

from experiments.toy.corpus import documents
from experiments.toy.tasks import ADJECTIVES, KINDS, NOUNS, TASKS, VERBS, load_task
from qlora_lib.data.tokens import encode_prompt
from qlora_lib.evaluation.tasks import score
from qlora_lib.runs.profiles import load_profile

DRAWN = [name for name in TASKS if name != "word_problems"]


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_prompt_and_are_the_same_at_every_call(name):
    task = load_task(name)
    splits = {split: task.pairs(split, 150) for split in ("train", "dev", "test")}
    prompts = {split: {prompt for prompt, _ in pairs} for split, pairs in splits.items()}
    assert {split: len(p) for split, p in prompts.items()} == dict.fromkeys(splits, 150)
    assert not prompts["train"] & prompts["dev"] and not prompts["train"] & prompts["test"]
    assert not prompts["dev"] & prompts["test"]
    assert task.pairs("train", 150) == splits["train"]
    assert task.pairs("train", 20) == splits["train"][:20]  # a smaller set is a part of it


@pytest.mark.parametrize("name", TASKS)
def test_targets_count_and_are_not_told_by_a_constant(name):
    task = load_task(name)
    pairs = task.pairs("dev", 100)
    targets = iter([f" {target}\n" for _, target in pairs])
    assert score(lambda prompts: [next(targets) for _ in prompts], task, pairs).accuracy == 1
    for same in {target for _, target in pairs[:10]}:
        assert score(lambda prompts: [same] * len(prompts), task, pairs).accuracy < 0.6
    nothing = score(lambda prompts: [""] * len(prompts), task, pairs)
    assert (sum(nothing.right), nothing.n) == (0, 100) and nothing.interval[0] == 0


def test_one_wrong_word_or_number_is_wrong_and_more_text_too():
    code, words = load_task("code"), load_task("word_problems")
    assert not code.matches("return x + 5", "return x + 59")
    assert not code.matches("return x + 59\nok", "return x + 59")
    assert words.matches("by another way\n#### 64.0", "8*8=64\n#### 64")
    assert not words.matches("it is 64", "8*8=64\n#### 64")  # strict: after ####


@pytest.mark.parametrize("name", TASKS)
def test_targets_fit_into_their_limit_and_prompts_stay_short(name):
    tokenizer, task = _tokenizer(), load_task(name)
    for prompt, target in task.pairs("train", 300):
        assert prompt.endswith("\n")
        own = tokenizer.encode(target, add_special_tokens=False)
        assert len(own) < task.max_new_tokens
        assert encode_prompt(tokenizer, prompt) + own == encode_prompt(tokenizer, prompt + target)


def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(load_profile("tiny").model)


def test_a_translation_says_what_its_words_mean():
    meanings = NOUNS | ADJECTIVES | VERBS
    for prompt, target in load_task("translation").pairs("test", 200):
        toy = prompt.split("\n")[0].removeprefix("Toy: ").split()
        english = [word for word in target.split() if word != "the"]
        assert sorted(meanings[word] for word in toy) == sorted(english)
        assert toy[-1] in VERBS and toy[0] in NOUNS


def test_code_computes_what_is_asked():
    for prompt, target in load_task("code").pairs("test", 200):
        variable, _, words = prompt.removeprefix("Code: ").strip().partition(" ")
        value = 5
        for step in words.split(", then "):
            word, k = step.split()
            value = {"plus": value + int(k), "minus": value - int(k), "times": value * int(k)}[word]
        # eval of our own generator's text
        assert eval(target.removeprefix("return "), {variable: 5}) == value


def test_the_base_has_read_no_task():
    """Pretraining documents hold none of the prompts' marks."""
    stream = documents(seed=0)
    text = "\n".join(next(stream)[1] for _ in range(2000))
    marks = ("Review:", "Tone:", "Operation:", "Summary:", "English:", "Code:", "Toy:")
    assert [mark for mark in marks if mark in text] == []


def test_other_names_splits_and_numbers_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="no task 'sentimant'; expected one of word_problems"):
        load_task("sentimant")
    task = load_task("sentiment")
    with pytest.raises(ValueError, match="split is 'valid'; expected one of train, dev, test"):
        task.pairs("valid")
    with pytest.raises(ValueError, match="at least 1"):
        task.pairs("dev", 0)
    monkeypatch.setitem(KINDS, "code", lambda rng: ("Code: always the same\n", ""))
    with pytest.raises(ValueError, match="only . different dev prompts, not 2"):
        load_task("code").pairs("dev", 2)
    with pytest.raises(ValueError, match="word_problems has 500 dev problems"):
        load_task("word_problems").pairs("dev", 501)
    with pytest.raises(ValueError, match="nothing to ask"):
        score(lambda prompts: [], task, [])
