"""Texts to ids, labels and batches."""

from types import SimpleNamespace

import pytest
import torch

from qlora_lib.data import tokens as data
from qlora_lib.data.gsm8k import format_gsm8k
from tests.support.small_models import PAIRS, small_tokenizer

ENTRY = {
    "question": "Ava has 1,000 apples and sells half.",
    "answer": "She sells 1000/2=<<1000/2=500>>500 apples.\n#### 500",
}


def test_prompt_and_target_encode_apart_as_together():
    tokenizer, (prompt, target) = small_tokenizer(), format_gsm8k(ENTRY)
    together = tokenizer.encode(prompt + target, add_special_tokens=False)
    ids, _ = data.encode_example(tokenizer, prompt, target, 512)
    assert ids == [1, *together, 2]


def test_only_target_and_one_real_eos_are_supervised():
    tokenizer, (prompt, target) = small_tokenizer(), format_gsm8k(ENTRY)
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
    prompt, target = format_gsm8k(ENTRY)
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
    ids, labels = data.encode_example(bare, "ab", "c", 10)
    assert (ids, labels) == ([97, 98, 99, 9], [-100, -100, 99, 9])
    assert data.pad_id(bare) == 9


def test_pad_sides():
    assert data.pad([[1], [2, 3]], 0).tolist() == [[1, 0], [2, 3]]
    assert data.pad([[1], [2, 3]], 0, side="left").tolist() == [[0, 1], [2, 3]]
    assert data.pad([[1]], 0).dtype == torch.int64


def test_an_example_is_cut_as_if_it_had_been_encoded_so():
    pair = PAIRS[3]
    whole = data.encode_example(small_tokenizer(), *pair)
    start = whole.labels.count(data.IGNORE)
    for length in (start + 1, 512):
        assert whole.cut(length) == data.encode_example(small_tokenizer(), *pair, length)
        assert len(whole.cut(length).labels) == min(length, len(whole.labels))
    with pytest.raises(ValueError, match=f"first {start} tokens .* nothing to learn"):
        whole.cut(start)
    assert whole.teaches(start + 1) and not whole.teaches(start)
