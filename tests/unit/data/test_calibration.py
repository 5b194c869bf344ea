"""Batches for GPTQ."""

import pytest

from qlora_lib.data.calibration import calibration_batches
from qlora_lib.data.tokens import encode_example
from tests.support.small_models import PAIRS, small_tokenizer


def test_calibration_batches_hold_every_example_once():
    batches = calibration_batches(small_tokenizer(), PAIRS, n=10, batch_size=4)
    assert [b["input_ids"].shape[0] for b in batches] == [4, 4, 2]
    assert all(set(b) == {"input_ids", "attention_mask"} for b in batches)
    ids = [encode_example(small_tokenizer(), *pair).input_ids for pair in PAIRS[:10]]
    kept = [
        row[mask.bool()].tolist()
        for b in batches
        for row, mask in zip(b["input_ids"], b["attention_mask"])
    ]
    assert sorted(kept) == sorted(ids)
    with pytest.raises(ValueError, match="at least one"):
        calibration_batches(small_tokenizer(), [])
