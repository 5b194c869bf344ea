"""From texts to token ids and labels, and from those to padded batches.

Training, calibration and evaluation all encode with `encode_prompt`, so a model is asked exactly
as it was taught.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[str, str]  # prompt, target
Encoded = tuple[list[int], list[int]]  # input_ids, labels

IGNORE = -100  # a label that cross-entropy leaves out


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """[bos] + ids of the prompt; no bos for a tokenizer that has none, nor a second one where the
    prompt begins with it, as those that chat templates write do."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    return ids if ids[:1] == bos else bos + ids


def encode_example(
    tokenizer, prompt: str, target: str, max_length: int
) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of [bos] + prompt + target + [eos], built by hand.

    Labels are -100 on the prompt and the ids themselves on target and eos: the model
    must learn to stop, so the one real eos is supervised. What exceeds `max_length` is
    cut from the end, and then there is no eos. Raises ValueError when the prompt leaves
    no room for a single target token.
    """
    start = encode_prompt(tokenizer, prompt)
    if len(start) >= max_length:
        raise ValueError(
            f"a prompt of {len(start)} tokens fills the context of {max_length}: "
            f"{prompt[:60]!r}...; raise max_length or shorten the prompt"
        )
    end = tokenizer.encode(target, add_special_tokens=False) + [tokenizer.eos_token_id]
    input_ids = (start + end)[:max_length]
    labels = ([IGNORE] * len(start) + end)[:max_length]
    return input_ids, labels


def encode(tokenizer, example: Pair | Encoded, max_length: int) -> Encoded:
    """(input_ids, labels) of a training example, a (prompt, target) pair or encoded before.

    What exceeds `max_length` is cut from the end. Raises ValueError when nothing supervised
    is left.
    """
    if isinstance(example[0], str):
        return encode_example(tokenizer, *example, max_length)
    input_ids, labels = (ids[:max_length] for ids in example)
    if all(label == IGNORE for label in labels):
        raise ValueError(
            f"the first {max_length} tokens of an example of {len(example[0])} hold nothing to "
            "learn; raise max_length or shorten the prompt"
        )
    return input_ids, labels


def pad(sequences: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """int64 (batch, longest), filled up with `value` on one side."""
    width = max(map(len, sequences))
    fills = [[value] * (width - len(s)) for s in sequences]
    rows = [[*s, *f] if side == "right" else [*f, *s] for s, f in zip(sequences, fills)]
    return torch.tensor(rows)


def collate(batch: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, int64 (batch, seq), padded on the right.

    Padding has label -100 and mask 0 whatever its id: where pad is eos, the real eos
    stays supervised and the padding does not.
    """
    inputs, labels = zip(*batch)
    return {
        "input_ids": pad(inputs, pad_id),
        "attention_mask": pad([[1] * len(ids) for ids in inputs], 0),
        "labels": pad(labels, IGNORE),
    }


def pad_id(tokenizer) -> int:
    """The padding id: eos where the tokenizer has no pad token (Llama-2)."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
