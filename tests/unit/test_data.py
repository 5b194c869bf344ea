"""Problems, prompts, token ids."""

import json
import sys
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from small_models import PAIRS, small_tokenizer

from qlora_lib import data
from qlora_lib.extraction import equals, is_correct

ENTRY = {
    "question": "Ava has 1,000 apples and sells half.",
    "answer": "She sells 1000/2=<<1000/2=500>>500 apples.\n#### 500",
}


def test_format_strips_calculator_notes_unless_told():
    prompt, target = data.format_gsm8k(ENTRY)
    assert prompt == "Question: Ava has 1,000 apples and sells half.\nAnswer:\n"
    assert target == "She sells 1000/2=500 apples.\n#### 500"
    assert data.format_gsm8k(ENTRY, notes=True)[1] == ENTRY["answer"]


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("#### 5", 5),
        ("a\n#### 1,234", 1234),
        ("#### -3", -3),
        ("#### \u22127", -7),
        ("####12", 12),
        ("#### 2.50", Fraction(5, 2)),
        ("#### $2,880,000", 2880000),
    ],
)
def test_gold_answer(answer, gold):
    assert data.gold_answer({"answer": answer}) == gold


@pytest.mark.parametrize("answer", ["42", "#### ", "#### many", "#### 3 or 4", "", "#### 1,2"])
def test_unparsable_gold_is_an_error(answer):
    with pytest.raises(ValueError, match="N`|`answer`"):
        data.format_gsm8k({"question": "Q?", "answer": answer})


def test_entry_without_question_is_an_error():
    with pytest.raises(ValueError, match="`question`"):
        data.format_gsm8k({"answer": "#### 1"})


def test_prompt_and_target_encode_apart_as_together():
    tokenizer, (prompt, target) = small_tokenizer(), data.format_gsm8k(ENTRY)
    together = tokenizer.encode(prompt + target, add_special_tokens=False)
    ids, _ = data.encode_example(tokenizer, prompt, target, 512)
    assert ids == [1, *together, 2]


def test_only_target_and_one_real_eos_are_supervised():
    tokenizer, (prompt, target) = small_tokenizer(), data.format_gsm8k(ENTRY)
    ids, labels = data.encode_example(tokenizer, prompt, target, 512)
    start = len(data.encode_prompt(tokenizer, prompt))
    assert labels[:start] == [data.IGNORE] * start and labels[start:] == ids[start:]
    assert tokenizer.decode(labels[start:-1]) == target
    assert labels.count(tokenizer.eos_token_id) == 1 and labels[-1] == tokenizer.eos_token_id


def test_padding_is_masked_even_where_pad_is_eos():
    eos = small_tokenizer().eos_token_id
    examples = [data.encode_example(small_tokenizer(), *pair, 256) for pair in PAIRS[:8]]
    batch = data.collate(examples, pad_id=eos)
    width = max(len(ids) for ids, _ in examples)
    assert batch["input_ids"].shape == batch["labels"].shape == (8, width)
    assert (batch["labels"] == eos).sum(1).tolist() == [1] * 8
    assert batch["attention_mask"].sum(1).tolist() == [len(ids) for ids, _ in examples]
    assert (batch["labels"][batch["attention_mask"] == 0] == data.IGNORE).all()
    assert all(row[0] == 1 for row in batch["attention_mask"].tolist())  # padded on the right


def test_too_long_examples_are_cut_and_full_prompts_refused():
    tokenizer = small_tokenizer()
    prompt, target = data.format_gsm8k(ENTRY)
    start = len(data.encode_prompt(tokenizer, prompt))
    ids, labels = data.encode_example(tokenizer, prompt, target, start + 1)
    assert len(ids) == start + 1 and labels[-1] != data.IGNORE
    with pytest.raises(ValueError, match="fills the context"):
        data.encode_example(tokenizer, prompt, target, start)


def test_tokenizer_without_bos_or_pad():
    bare = SimpleNamespace(
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=9,
        encode=lambda text, add_special_tokens: [ord(c) for c in text],
    )
    assert data.encode_example(bare, "ab", "c", 10) == ([97, 98, 99, 9], [-100, -100, 99, 9])
    assert data.pad_id(bare) == 9


def test_calibration_batches_hold_every_example_once():
    batches = data.calibration_batches(small_tokenizer(), PAIRS, n=10, batch_size=4)
    assert [b["input_ids"].shape[0] for b in batches] == [4, 4, 2]
    assert all(set(b) == {"input_ids", "attention_mask"} for b in batches)
    ids = [data.encode_example(small_tokenizer(), *pair, 512)[0] for pair in PAIRS[:10]]
    kept = [
        row[mask.bool()].tolist()
        for b in batches
        for row, mask in zip(b["input_ids"], b["attention_mask"])
    ]
    assert sorted(kept) == sorted(ids)
    with pytest.raises(ValueError, match="at least one"):
        data.calibration_batches(small_tokenizer(), [])


def test_minigsm_is_parsable_and_its_splits_share_no_question():
    splits = {s: data.load_minigsm(s) for s in ("train", "dev", "test")}
    questions = [e["question"] for entries in splits.values() for e in entries]
    assert len(questions) == len(set(questions))
    for entries in splits.values():
        for entry in entries:
            prompt, target = data.format_gsm8k(entry)
            assert prompt.endswith("Answer:\n") and "<<" not in target
    with pytest.raises(ValueError, match="train, dev and test"):
        data.load_minigsm("validation")


def test_gsm8k_folder(tmp_path):
    line = '{"question": "A\u2028b?", "answer": "#### 1"}\n\n'
    (tmp_path / "test.jsonl").write_text(line, encoding="utf-8")
    assert data.load_gsm8k("test", tmp_path) == [{"question": "A\u2028b?", "answer": "#### 1"}]
    with pytest.raises(FileNotFoundError, match="train.jsonl"):
        data.load_gsm8k("train", tmp_path)
    with pytest.raises(ValueError, match="train and test"):
        data.load_gsm8k("dev", tmp_path)
    (tmp_path / "train.jsonl").write_text(line + '{"question": "cut')
    with pytest.raises(ValueError, match="line 3"):
        data.load_gsm8k("train", tmp_path)
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no entries"):
        data.load_gsm8k("train", tmp_path)


def test_gsm8k_without_folder_and_hub_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(data, "DATA", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(FileNotFoundError, match="GSM8K_DIR"):
        data.load_gsm8k("test")
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "q", "answer": "#### 1"}')
    assert len(data.load_gsm8k("test")) == 1


@pytest.mark.parametrize(
    "target, gold",
    [
        (9867630.0, "9867630"),
        (-9867630.0, "-9867630"),
        (14053029.666666666, "14053029.666666666"),
        (0.0016791648, "0.0016791648"),
        (9284017268534.4, "9284017268534.4"),
        (1e22, "10000000000000000000000"),
        (1.5e-7, "0.00000015"),
        (0.0, "0"),
    ],
)
def test_gsm_hard_golds_are_the_floats_to_the_digit(tmp_path, target, gold):
    row = {"input": "How many?", "target": target, "code": "def solution(): ..."}
    (tmp_path / "gsmhardv2.jsonl").write_text(json.dumps(row) + "\n")
    (entry,) = data.load_gsm_hard(tmp_path)
    assert entry == {"question": "How many?", "answer": f"#### {gold}"}
    assert float(data.gold_answer(entry)) == target
    assert is_correct(entry["answer"], entry["answer"])
    # An integer is compared exactly, any other gold within 1e-6.
    near = data.gold_answer(entry) + Fraction(9, 10**7)
    assert equals(near, data.gold_answer(entry)) == (target != int(target))
    assert not equals(near + Fraction(2, 10**7), data.gold_answer(entry))


def test_gsm_hard_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gsmhardv2.jsonl"):
        data.load_gsm_hard(tmp_path)
    (tmp_path / "gsmhardv2.jsonl").write_text('{"input": "q", "target": Infinity}')
    with pytest.raises(data.GoldError, match="inf"):
        data.load_gsm_hard(tmp_path)

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(FileNotFoundError, match="no route.*--data"):
        data.load_gsm_hard()


def test_pad_sides():
    assert data.pad([[1], [2, 3]], 0).tolist() == [[1, 0], [2, 3]]
    assert data.pad([[1], [2, 3]], 0, side="left").tolist() == [[0, 1], [2, 3]]
    assert data.pad([[1]], 0).dtype == torch.int64
