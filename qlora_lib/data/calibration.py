"""Batches of token ids that GPTQ is calibrated on."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..base.hashes import content_hash
from .examples import read_examples
from .tokens import Example, Pair, batches, pad_id


def calibration_batches(
    tokenizer,
    examples: Iterable[Example | Pair],
    n: int = 128,
    max_length: int = 512,
    batch_size: int = 16,
) -> list[dict[str, Tensor]]:
    """Batches of the first `n` examples, for `quantize_model`.

    examples: of any kind that read_examples takes. Each batch has input_ids and attention_mask,
    int64 (batch, seq). Examples of like length share a batch, to keep padding small. Raises
    ValueError for no examples.
    """
    encoded = [e.cut(max_length) for e in read_examples(list(examples)[:n], tokenizer)]
    found = batches(encoded, batch_size, pad_id(tokenizer))
    return [{k: batch[k] for k in ("input_ids", "attention_mask")} for _, batch in found]


def calibration_hash(batches: Sequence[dict[str, Tensor]]) -> str:
    """SHA-256 of the token ids that GPTQ sees."""
    return content_hash([batch["input_ids"].tolist() for batch in batches])
