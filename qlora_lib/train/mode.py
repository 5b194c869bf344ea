"""The mode that a model is trained in."""

from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from ..lora.choice import keep_choice

HALF = (torch.bfloat16, torch.float16)


def check_widths(model, compute_dtype: torch.dtype) -> None:
    """Raises ValueError where trained parameters, in fp32, would meet frozen layers of 16 bits
    outside of autocast, which alone joins them."""
    half = {p.requires_grad: n for n, p in model.named_parameters() if p.dtype in HALF}
    if len(half) == 2 and compute_dtype == torch.float32:
        raise ValueError(f"{half[True]} is trained, in fp32, beside frozen weights of 16 bits such "
                         f"as {half[False]}; give their compute_dtype, or load the model in fp32")


@contextmanager
def training_mode(model, checkpointing: bool):
    """Training mode, with activations recomputed if `checkpointing`, trained parameters in fp32.

    In 16 bits most small updates would be rounded away. Afterwards the mode is as before;
    parameters beside frozen ones of 16 bits return to their dtype, as layers compute in one.
    """
    was_training = model.training
    model.train()
    narrow = {p: p.dtype for p in model.parameters() if p.requires_grad and p.dtype in HALF}
    for p in narrow:
        p.data = p.data.float()
    if checkpointing:
        # Not gradient_checkpointing_enable: it also makes the frozen embeddings' output need
        # a gradient, for good. Only reentrant checkpointing would want that: it gives no
        # gradient to a block whose input needs none.
        recompute = keep_choice(partial(checkpoint, use_reentrant=False))
        model._set_gradient_checkpointing(True, recompute)
    try:
        yield
    finally:
        model.train(was_training)
        if checkpointing:
            model._set_gradient_checkpointing(False)
        if any(not p.requires_grad and p.dtype in HALF for p in model.parameters()):
            for p, dtype in narrow.items():
                p.grad, p.data = None, p.data.to(dtype)
