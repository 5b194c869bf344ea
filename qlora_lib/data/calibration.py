"""Batches of token ids that GPTQ is calibrated on."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from ..base.hashes import content_hash
from ..base.ranges import COUNT
from .examples import read_examples
from .rows import listed
from .tokens import Example, Pair, batches


def calibration_batches(
    tokenizer, examples: str | Path | Iterable[Example | Pair], n: int = 128,
    max_length: int = 512, batch_size: int = 16,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Return batches of the first `n` examples, of like length: input_ids and attention_mask, int64
    (batch, seq). examples: whatever read_examples takes, with its errors."""
    for name, count in {"n": n, "max_length": max_length, "batch_size": batch_size}.items():
        COUNT.check(name, count)
    if not isinstance(examples, (str, Path)):
        examples = listed(examples, "examples")[:n]
    encoded = [e.cut(max_length) for e in read_examples(examples, tokenizer)[:n]]
    found = batches(encoded, batch_size)
    return [{k: batch[k] for k in ("input_ids", "attention_mask")} for _, batch in found]


def calibration_hash(batches: Sequence[dict[str, Tensor]]) -> str:
    """Return the SHA-256 of the token ids that GPTQ sees."""
    return content_hash([batch["input_ids"].tolist() for batch in batches])
