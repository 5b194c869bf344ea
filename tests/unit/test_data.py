"""Problems, prompts, token ids."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from small_models import PAIRS, small_tokenizer

from qlora_lib import data

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


def test_there_is_one_bos():
    encoded = [data.encode_prompt(small_tokenizer(), text) for text in ("<s>Ava", "Ava", "")]
    assert encoded[0] == encoded[1] and encoded[2] == [1]
    assert encoded[0].count(small_tokenizer().bos_token_id) == 1


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


def test_pad_sides():
    assert data.pad([[1], [2, 3]], 0).tolist() == [[1, 0], [2, 3]]
    assert data.pad([[1], [2, 3]], 0, side="left").tolist() == [[0, 1], [2, 3]]
    assert data.pad([[1]], 0).dtype == torch.int64


def test_examples_that_are_encoded_already_are_only_cut():
    pair = PAIRS[3]
    whole = data.encode(small_tokenizer(), pair, 512)
    assert whole == data.encode_example(small_tokenizer(), *pair, 512)
    start = whole[1].count(data.IGNORE)
    for length in (start + 1, 512):
        cut = data.encode(small_tokenizer(), whole, length)
        assert cut == data.encode(small_tokenizer(), pair, length)
    with pytest.raises(ValueError, match=f"first {start} tokens .* nothing to learn"):
        data.encode(small_tokenizer(), whole, start)


def test_rows_are_lines_or_a_list_and_broken_ones_are_named(tmp_path):
    file = tmp_path / "rows.json"
    for text, places in (('\ufeff{"a": 1}\n\n{"a": 2}\n', ("line 1", "line 3")),
                         ('\n[{"a": 1},\n {"a": 2}]', ("entry 1", "entry 2"))):  # fmt: skip
        file.write_text(text, encoding="utf-8")
        assert data.read_rows(file) == [(f"{file}, {p}", {"a": i}) for i, p in enumerate(places, 1)]
    for text, message in (
        ('{"a": 1}\n{"a": ', "rows.json, line 2 is not JSON"),
        ('{"a": 1}\n3', "rows.json, line 2 is not a JSON object: 3"),
        ("[{}, []]", "rows.json, entry 2 is not a JSON object"),
        ("[{},", "rows.json is not JSON"),
        ("[]", "holds no entries"),
        (" \n", "holds no entries"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            data.read_rows(file)
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        data.read_rows(file)
