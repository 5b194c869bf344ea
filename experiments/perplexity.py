"""Perplexity: how many tokens a model hesitates between, on average, over a text.

exp of the mean negative log-likelihood a token, in windows that follow each other without
overlap; the first token of a window is given, not predicted. It depends on tokenizer, window
and text: compare figures of one run only.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lib.train.loss import chunk_for, token_losses


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, and what it was measured on."""

    value: float
    tokens: int  # predicted
    window: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.tokens:,} tokens, windows of {self.window})"


@torch.inference_mode()
def perplexity(model, ids: Tensor | list[int], window: int = 1024) -> Perplexity:
    """Perplexity of `model` on the token ids (tokens,); logits in the model's dtype, the
    log-softmax in fp32, the sum in float64.

    A rest shorter than the window counts too, if it has two tokens. Raises ValueError for fewer
    than two tokens, and for a window below 2 or beyond the model's context.
    """
    ids = torch.as_tensor(ids).reshape(-1)
    context = getattr(model.config, "max_position_embeddings", None) or 2**31
    if len(ids) < 2 or not 2 <= window <= context:
        raise ValueError(
            f"got {len(ids)} tokens and window={window}; expected at least 2 tokens and a window "
            f"from 2 to the context, {context}"
        )
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    chunk = chunk_for(model, torch.float32)  # no autocast
    for part in ids[None].to(device).split(window, dim=1):  # (1, window)
        (losses,) = token_losses(model, {"input_ids": part, "labels": part}, chunk)
        total, count = total + losses.double().sum().item(), count + len(losses)
    model.train(was_training)
    return Perplexity(math.exp(total / count), count, window)
