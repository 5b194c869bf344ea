"""Pretraining: the corpus keeps its rules, the run resumes, the bundled model is sound."""
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from experiments.toy import pretrain
from experiments.toy.corpus import MIX, documents
from experiments.toy.minigsm import OPERATIONS, PRONOUNS, draw, render, solve, split_of

MODEL = Path(__file__).parents[3] / "data" / "tiny-llama"
EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=\$?(\d+)")


@pytest.fixture(scope="module")
def corpus():
    return list(itertools.islice(documents(11), 10_000))


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain.build_tokenizer(0)


@pytest.fixture(scope="module")
def encoded(corpus, tokenizer):
    return tokenizer([text for _, text in corpus])["input_ids"]


def broken_rules(text):
    """Names of the rules that a document breaks."""
    broken = []
    if re.search(r"####|Question:|Answer|<<|>>", text):
        broken.append("format")
    if "?" in text and (EQUATION.search(text) or not text.endswith("?")):
        broken.append("answered question")
    found = EQUATION.findall(text)
    for index, (_, _, _, result) in enumerate(found):
        others = found[:index] + found[index + 1:]
        if any(result in (x, y) for x, _, y, _ in others):
            broken.append("chain")
    return broken


@pytest.mark.parametrize("text, rule", [
    ("Ava has 3+4=7 cards. Then Ava has 7-2=5 cards.", "chain"),
    ("7-2=5 ; 3+4=7", "chain"),
    ("How many cards are left? Ava has 7-2=5 cards.", "answered question"),
    ("How many cards are left? The answer is 5.", "answered question"),
    ("Ava has 5 cards. #### 5", "format"),
    ("3+4=<<3+4=7>>7", "format"),
    ("Question: how many?", "format"),
])
def test_the_rules_catch_what_they_are_for(text, rule):
    assert rule in broken_rules(text)


def test_the_gold_solutions_would_break_the_rules():
    for problem in draw("train", 0, 60):
        entry = render(problem)
        plain = re.sub("<<.*?>>", "", entry["answer"]).split("\n####")[0]
        assert "chain" in broken_rules(plain)
        assert "answered question" in broken_rules(f"{entry['question']} {plain}")


def test_no_document_breaks_a_rule(corpus):
    for name, text in corpus:
        assert not broken_rules(text), (name, text)


def test_every_equation_is_right(corpus):
    found = [match for _, text in corpus for match in EQUATION.findall(text)]
    assert len(found) > 10_000
    for x, op, y, result in found:
        assert OPERATIONS[op](int(x), int(y)) == int(result)
        assert op != "/" or int(x) % int(y) == 0


def test_items_of_one_document_are_about_other_people(corpus):
    several = [text.split("\n") for name, text in corpus if name == "steps" and "\n" in text]
    assert len(several) > 200
    for items in several:
        people = [set(re.findall("|".join(PRONOUNS), item)) for item in items]
        assert all(not a & b for a, b in itertools.combinations(people, 2)), items


def test_questions_are_bare_and_of_the_train_split_only(corpus):
    bare = [line for name, text in corpus if name == "questions" for line in text.split("\n")]
    assert len(bare) > 1_000
    for question in bare:
        assert question.endswith("?") and split_of(question) == "train"
    assert all("?" not in text for name, text in corpus if name != "questions")


def test_single_steps_cover_the_operands_of_the_problems(corpus):
    known = {op: (0, 0) for op in OPERATIONS}
    for _, text in corpus:
        for x, op, y, _ in EQUATION.findall(text):
            known[op] = (max(known[op][0], int(x)), max(known[op][1], int(y)))
    for problem in draw("test", 0, 600):
        for step, x, y, _ in solve(problem):
            assert x <= known[step.op][0] and y <= known[step.op][1], (problem.kind, x, step.op, y)


@pytest.mark.long
def test_texts_are_unlabelled_and_a_modest_share(corpus, encoded):
    tokens = dict.fromkeys(MIX, 0)
    for (name, _), ids in zip(corpus, encoded):
        tokens[name] += len(ids)
    texts = sum(tokens[name] for name in MIX if name not in ("equations", "steps", "questions"))
    assert 0.08 <= texts / sum(tokens.values()) <= 0.16
    for name, text in corpus:
        if name == "reviews":
            assert not re.search("positive|negative|mixed|sentiment|rating", text, re.I)
        if name == "stories":
            assert 3 <= len(re.findall(r"[.!]", text)) <= 5


def test_the_seed_decides_the_corpus():
    first = list(itertools.islice(documents(4), 50))
    assert first == list(itertools.islice(documents(4), 50))
    assert first != list(itertools.islice(documents(5), 50))


def test_tokenizer_has_single_digits_and_loses_no_text(tokenizer):
    assert len(tokenizer) == 512
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    for text in ("Question: 48+125=173?\nAnswer:\n#### 173", "  odd\tspaces ", "naïve €5"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not any(re.search(r"\d.|.\d", tokenizer.decode([i])) for i in ids)


def test_batches_are_packed_documents(tokenizer):
    shapes = [tuple(ids.shape) for ids in itertools.islice(pretrain.batches(tokenizer, 0), 4)]
    assert shapes == list(pretrain.SHAPES)
    first = next(pretrain.batches(tokenizer, 0)).flatten().tolist()
    _, text = next(documents(0))
    assert tokenizer.decode(first[1:first.index(2)]) == text and first[0] == 1
    assert 0 not in first


def test_learning_rate_warms_up_and_decays():
    rates = [pretrain.learning_rate(step, 1000) for step in range(1000)]
    peak = rates.index(max(rates))
    assert peak in (pretrain.WARMUP - 1, pretrain.WARMUP)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.02 * pretrain.LEARNING_RATE, rel=0.01)


def small_model(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True))


@pytest.fixture
def small_run(monkeypatch, tokenizer):
    monkeypatch.setattr(pretrain, "build_model", small_model)
    monkeypatch.setattr(pretrain, "build_tokenizer", lambda seed: tokenizer)
    monkeypatch.setattr(pretrain, "SHAPES", ((2, 32), (1, 64)))
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(pretrain, "SAMPLE", 200)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch, small_run):
    pretrain.pretrain(tmp_path / "whole", tmp_path / "c1", steps=5)
    endless = pretrain.batches

    def killed(tokenizer, seed):
        yield from itertools.islice(endless(tokenizer, seed), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "batches", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path / "resumed", tmp_path / "c2", steps=5)
    assert not (tmp_path / "resumed").exists()
    monkeypatch.setattr(pretrain, "batches", endless)
    pretrain.pretrain(tmp_path / "resumed", tmp_path / "c2", steps=5, resume=True)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    resumed = load_file(tmp_path / "resumed" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_resume_refuses_nothing_to_resume_and_another_run(tmp_path, small_run):
    with pytest.raises(FileNotFoundError, match="without --resume"):
        pretrain.pretrain(tmp_path / "out", tmp_path / "none", steps=4, resume=True)
    pretrain.pretrain(tmp_path / "out", tmp_path / "c", steps=2)
    with pytest.raises(ValueError, match="'steps': 2.*'steps': 4"):
        pretrain.pretrain(tmp_path / "out", tmp_path / "c", steps=4, resume=True)


def used_tokens(encoded):
    return sorted({token for ids in encoded for token in ids} | {1, 2})


@pytest.mark.long
def test_rows_of_unseen_tokens_are_told_apart_and_the_others_are_kept(encoded, tokenizer):
    model = small_model(1)
    rows = model.get_input_embeddings().weight
    rows.data[:] = torch.arange(512)[:, None] % 7 + torch.ones(32)
    before = rows.detach().clone()
    pretrain.separate_unseen(model, tokenizer, seed=0)
    used = used_tokens(encoded)
    assert torch.equal(rows[used], before[used])
    unseen = [tokenizer.convert_tokens_to_ids(token) for token in ("####", "Question", "Answer")]
    assert not set(unseen) & set(used)
    cosines = torch.nn.functional.cosine_similarity(rows[unseen, None], rows[None, unseen], dim=2)
    assert cosines[~torch.eye(3, dtype=bool)].max() < 0.99


def test_bundled_model_can_tell_the_words_of_an_answer_apart(tokenizer):
    answers = [re.sub("<<.*?>>", "", render(p)["answer"]) for p in draw("train", 0, 600)]
    rows = load_file(MODEL / "model.safetensors")["model.embed_tokens.weight"].float()
    rows = rows[used_tokens(tokenizer(answers)["input_ids"])]
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    assert cosines.fill_diagonal_(0).max() < 0.95


def test_bundled_model_is_small_bf16_and_of_the_stated_shape():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8_000_000
    tensors = load_file(MODEL / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((MODEL / "config.json").read_text())
    assert config["hidden_size"] % 128 == 0 and config["intermediate_size"] % 128 == 0
    assert config["tie_word_embeddings"] and config["vocab_size"] == 512
    card = (MODEL / "README.md").read_text()
    assert "never seen" in card and "MIT" in card and "make pretrain" in card


def test_bundled_tokenizer_is_the_one_that_the_seed_builds(tokenizer):
    bundled = AutoTokenizer.from_pretrained(MODEL)
    assert bundled.get_vocab() == tokenizer.get_vocab()
    assert (bundled.pad_token_id, bundled.bos_token_id, bundled.eos_token_id) == (0, 1, 2)


def test_bundled_model_knows_single_steps():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    asked = [(x, op, y, OPERATIONS[op](x, y)) for op, pairs in {
        "+": [(34, 21), (57, 18), (80, 45)], "-": [(64, 31), (92, 47), (120, 33)],
        "*": [(7, 8), (12, 4), (9, 6)], "/": [(42, 6), (72, 8), (45, 5)]}.items()
        for x, y in pairs]
    right = 0
    for x, op, y, result in asked:
        ids = [1, *tokenizer(f"{x}{op}{y}=", add_special_tokens=False)["input_ids"]]
        out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)),
                             max_new_tokens=4, do_sample=False)
        text = tokenizer.decode(out[0, len(ids):])
        right += bool(re.match(rf"{result}(?!\d)", text))
    assert right >= 10, f"{right} of {len(asked)}"
