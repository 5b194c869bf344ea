"""What notebook 04 measures of a model's forward and backward pass."""
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experiments.measured_step import AllocationMeter
from qlora_lib.train.step import training_mode


def measured_pass(model, batch: dict[str, Tensor], recompute: bool) -> tuple[AllocationMeter, int]:
    """One forward and backward pass, under checkpointing if `recompute`, in the model's dtype ->
    its meter, and how many operations of its trace belong to the forward pass."""
    model.zero_grad(set_to_none=True)
    with training_mode(model, recompute), AllocationMeter() as meter, in_its_dtype(model):
        loss = model(**batch, use_cache=False).loss
        forward = len(meter.trace)
        loss.backward()
    return meter, forward


def in_its_dtype(model) -> torch.autocast:
    """Autocast to the model's dtype, where that has 16 bits."""
    return torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)


@contextmanager
def reentrant(model) -> Iterator[None]:
    """The older form of checkpointing, in training mode."""
    model.train()
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=True))
    try:
        yield
    finally:
        model._set_gradient_checkpointing(False)
        model.eval()


class Logits(nn.Module):
    """A model of transformers as a function of ids (batch, tokens) that gives its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def milliseconds(layer: nn.Module, x: Tensor, times: int = 5) -> float:
    """Of a forward and backward pass: the least of several, after one to warm up."""
    took = []
    for _ in range(times + 1):
        _wait()
        start = time.perf_counter()
        layer(x).sum().backward()
        _wait()
        took.append(time.perf_counter() - start)
    return 1000 * min(took[1:])


def _wait() -> None:
    if torch.cuda.is_available():  # a GPU works on after a call returns
        torch.cuda.synchronize()
