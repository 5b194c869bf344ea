"""From texts to token ids and labels, and from those to padded batches: in training, calibration
and evaluation alike, so a model is asked exactly as it was taught."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .rows import check_text

Pair = tuple[str, str]  # prompt, target

IGNORE = -100  # a label that cross-entropy leaves out
PAD = 0  # the id that fills up a batch. It is masked: any will do that every model has.


@dataclass(frozen=True)
class Example:
    """A training example in tokens, made once. It unpacks into (input_ids, labels)."""

    input_ids: list[int]
    labels: list[int]  # the ids themselves where they are learned, IGNORE elsewhere
    texts: tuple[str, ...] = field(default=(), compare=False)  # to compare with test questions
    problem: str = field(default="", compare=False)  # the same for rephrasings of one problem

    def __iter__(self) -> Iterator[list[int]]:
        return iter((self.input_ids, self.labels))

    def teaches(self, max_length: int) -> bool:
        """Return whether anything is learned from the first max_length tokens."""
        return any(label != IGNORE for label in self.labels[:max_length])

    def cut(self, max_length: int) -> "Example":
        """Return the first max_length tokens; ValueError when none that is learned is left."""
        if not self.teaches(max_length):
            said = f" ({self.texts[0][:60]!r}...)" if self.texts else ""
            raise ValueError(f"the first {max_length} tokens of an example of {len(self.input_ids)}"
                             f" hold nothing to learn: its prompt{said} fills the context; raise "
                             "max_length, or shorten it")  # fmt: skip
        ids, labels = (part[:max_length] for part in self)
        return replace(self, input_ids=ids, labels=labels)


def _ids(tokenizer, text: str) -> list[int]:
    """Return a text's ids, without special tokens; ValueError for what check_text refuses."""
    check_text(text)
    if not hasattr(tokenizer, "encode"):
        raise ValueError(f"expected a tokenizer, got {tokenizer!r:.60}")
    return tokenizer.encode(text, add_special_tokens=False)


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Return [bos] + ids of the prompt; no bos where the tokenizer has none, or the prompt begins
    with it, as chat templates write it."""
    return _after_bos(tokenizer, _ids(tokenizer, prompt))


def _after_bos(tokenizer, ids: list[int]) -> list[int]:
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return ids if ids[:1] == bos else bos + ids


def encode_after(tokenizer, before: str, text: str, ids: list[int] | None = None) -> list[int]:
    """Return the ids of `text` as it stands after `before`, whose own `ids` stay as they are alone
    (None: they are not known yet).

    Both are encoded together, since SentencePiece puts a space before a text by itself. Where a
    token lies across the border (two newlines, say), a newline stands in for `before`.
    """
    for prefix, known in ((before, ids), ("\n", None)):
        given = _ids(tokenizer, prefix) if known is None else known
        whole = _ids(tokenizer, prefix + text)
        if whole[: len(given)] == given:
            return whole[len(given) :]
    return _ids(tokenizer, text)


def encode_example(tokenizer, prompt: str, target: str, max_length: int | None = None) -> Example:
    """Return [bos] + prompt + target + [eos] as an Example, cut to `max_length` tokens if given.

    Labels are -100 on the prompt and the ids themselves on target and eos. A bos or eos that the
    text itself writes is not doubled. Raises ValueError when no target token fits.
    """
    ids = _ids(tokenizer, prompt)
    start, end = _after_bos(tokenizer, ids), encode_after(tokenizer, prompt, target, ids)
    if not prompt and end[:1] == start:  # the text writes its bos
        end = end[1:]
    if end[-1:] != [tokenizer.eos_token_id]:
        end = end + [tokenizer.eos_token_id]
    example = Example(start + end, [IGNORE] * len(start) + end, (prompt, target))
    return example if max_length is None else example.cut(max_length)


def pad(sequences: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Return int64 (batch, longest), filled up with `value` on one side."""
    width = max(map(len, sequences))
    fills = [[value] * (width - len(s)) for s in sequences]
    rows = [[*s, *f] if side == "right" else [*f, *s] for s, f in zip(sequences, fills)]
    return torch.tensor(rows)


def collate(batch: Sequence[Example], pad_id: int = PAD, device="cpu") -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels, int64 (batch, seq), padded on the right.

    batch: Examples, or plain (input_ids, labels). Padding has label -100 and mask 0 whatever its
    id: where pad is eos, the real eos stays supervised and the padding does not.
    """
    inputs, labels = zip(*batch)
    mask = [[1] * len(ids) for ids in inputs]
    parts = {"input_ids": (inputs, pad_id), "attention_mask": (mask, 0), "labels": (labels, IGNORE)}
    return {name: pad(rows, fill).to(device) for name, (rows, fill) in parts.items()}


def by_length(sequences: Sequence[Sequence[int]], size: int, longest_first=False):
    """Return the indices of the sequences, in batches of like length, as lists."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]) * (-1) ** longest_first)
    return [order[start : start + size] for start in range(0, len(order), size)]


def batches(examples: Sequence[Example], size: int, device="cpu") -> Iterator[tuple[list, dict]]:
    """Yield (indices, their batch) for all examples, those of like length together."""
    for chosen in by_length([example.input_ids for example in examples], size):
        yield chosen, collate([examples[i] for i in chosen], device=device)


def pad_id(tokenizer) -> int:
    """Return the id that others pad with: eos where the tokenizer has no pad token (Llama-2)."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
