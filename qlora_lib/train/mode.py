"""The mode that a model is trained in."""

from contextlib import contextmanager
from functools import partial

from torch.utils.checkpoint import checkpoint

from ..lora.choice import keep_choice


@contextmanager
def training_mode(model, checkpointing: bool):
    """Training mode, with activations recomputed if `checkpointing`; as before afterwards."""
    was_training = model.training
    model.train()
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
