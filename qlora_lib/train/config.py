"""The plan of a training run, which follows from its settings alone: a resumed run takes the same
steps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from ..base.devices import resolve_dtype
from ..base.ranges import ABOVE_ZERO, ANY_SEED, COUNT, SHARE_BELOW_ONE, ZERO_ON, check_fields

OPTIMIZERS = ("adamw", "adam8bit")
POOL = 16  # steps whose examples are sorted by length together


@dataclass(frozen=True)
class TrainConfig:
    """How a model is fine-tuned."""

    epochs: int = 3  # passes over the examples
    max_steps: int | None = None  # optimizer steps; when given, instead of epochs
    batch_size: int = 32  # examples in one forward pass: what memory allows
    accumulation: int = 1  # forward passes in one optimizer step
    optimizer: str = "adamw"  # or adam8bit: a quarter of the bytes of its moments
    lr: float = 2e-4  # peak learning rate
    lora_plus_ratio: float = 1.0  # B's learning rate over A's (LoRA+); the paper: about 16
    warmup_ratio: float = 0.05  # part of the steps in which lr rises to its peak
    weight_decay: float = 0.0  # decoupled (AdamW)
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    max_length: int = 512  # tokens of prompt and target; what exceeds it is cut
    seed: int = 0  # order of the data, and dropout
    compute_dtype: str = "auto"  # auto, bf16, fp16 or fp32: dtype of matrix products
    gradient_checkpointing: bool = False  # compute activations twice, keep one block's
    eval_every: int | None = None  # steps between two dev losses; None: each epoch's end
    save_every: int = 100  # steps between two checkpoints `last`
    folder: str | Path | None = None  # for checkpoints and metrics.jsonl; None: not written
    resume: bool = False  # go on from folder's `last` checkpoint where there is one
    progress: bool = True  # a line on stderr each half minute

    def __post_init__(self):
        counts = ("epochs", "max_steps", "batch_size", "accumulation", "eval_every", "save_every",
                  "max_length")  # fmt: skip
        check_fields(self, **dict.fromkeys(counts, COUNT), seed=ANY_SEED, lr=ABOVE_ZERO,
                     lora_plus_ratio=ABOVE_ZERO, warmup_ratio=SHARE_BELOW_ONE,
                     weight_decay=ZERO_ON, max_grad_norm=ABOVE_ZERO)  # fmt: skip
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} must be one of {', '.join(OPTIMIZERS)}")
        resolve_dtype(self.compute_dtype, "cpu")  # which raises for other names
        if self.resume and self.folder is None:
            raise ValueError("resume=True needs the folder of the run to resume")


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate at a step of 1..total: a line up over the warm-up, then half a cosine to zero."""
    warmup = round(config.warmup_ratio * total)
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - warmup) / (total - warmup + 1)  # + 1: the last step still moves
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def epoch_order(lengths: Sequence[int], window: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of the examples of each step of an epoch, `window` a step (the last has the rest):
    shuffled, sorted by length among POOL steps' so that a step pads little, the steps shuffled."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=draw).tolist()
    steps = []
    for start in range(0, len(order), POOL * window):
        pool = sorted(order[start : start + POOL * window], key=lambda i: lengths[i])
        steps += [pool[i : i + window] for i in range(0, len(pool), window)]
    return [steps[i] for i in torch.randperm(len(steps), generator=draw).tolist()]


def schedule(lengths: Sequence[int], window: int, seed: int, total: int,
             done: int = 0) -> Iterator[tuple[int, int, list[int]]]:  # fmt: skip
    """(step, epoch, indices of its examples) for the steps done + 1 to total."""
    step = 0
    for epoch in count():
        for chosen in epoch_order(lengths, window, seed, epoch):
            step += 1
            if step > done:
                yield step, epoch, chosen
            if step == total:
                return
