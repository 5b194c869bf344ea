"""Batches of token ids that GPTQ is calibrated on."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..base.hashes import content_hash
from .tokens import Encoded, Pair, collate, encode, pad_id


def calibration_batches(
    tokenizer,
    examples: Iterable[Pair | Encoded],
    n: int = 128,
    max_length: int = 512,
    batch_size: int = 16,
) -> list[dict[str, Tensor]]:
    """The first `n` examples, as `encode` takes them, as batches for `quantize_model`.

    Each batch has input_ids and attention_mask, int64 (batch, seq). Examples of equal
    length share a batch, to keep padding small. Raises ValueError for no examples.
    """
    pairs = list(examples)[:n]
    if not pairs:
        raise ValueError("calibration needs at least one example; got none")
    encoded = [encode(tokenizer, example, max_length) for example in pairs]
    encoded.sort(key=lambda example: len(example[0]))
    batches = []
    for i in range(0, len(encoded), batch_size):
        batch = collate(encoded[i : i + batch_size], pad_id(tokenizer))
        batches.append({k: batch[k] for k in ("input_ids", "attention_mask")})
    return batches


def calibration_hash(batches: Sequence[dict[str, Tensor]]) -> str:
    """SHA-256 of the token ids that GPTQ sees."""
    return content_hash([batch["input_ids"].tolist() for batch in batches])
