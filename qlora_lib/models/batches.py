"""Batches that a model is called with: token ids, their mask, and what they lead to."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]  # input_ids and attention_mask, each (batch, seq)


def check_tokens(model, ids: Iterable[int]) -> None:
    """Raise ValueError for a token id that the model has no embedding for."""
    rows, ids = model.get_input_embeddings().weight.shape[0], list(ids)
    if (least := min(ids, default=0)) < 0:
        raise ValueError(f"token id {least} is negative")
    if (largest := max(ids, default=0)) >= rows:
        raise ValueError(f"token id {largest}, but the model has embeddings of {rows} tokens: is "
                         "the tokenizer its own? (model.resize_token_embeddings for more)")


def token_mask(batch: Batch) -> Tensor:
    """Return a bool mask (batch, seq), False for padding; without attention_mask all is True.
    Raises ValueError for a batch without input_ids, or with a mask of another shape."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"a batch holds {got}, but needs input_ids, a tensor (batch, seq)")
    if ids.is_floating_point():
        raise ValueError(f"input_ids are {ids.dtype}, but must be of whole numbers")
    mask = batch.get("attention_mask", torch.ones_like(ids))
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {tuple(mask.shape)} for input_ids {tuple(ids.shape)}")
    return mask.bool()


def real_tokens(x: Tensor, mask: Tensor, path: str) -> Tensor:
    """Return the rows of a layer's input that belong to real tokens: (tokens, in). x: (batch, seq,
    in), (batch * seq, in) in OPT, (batch, 1, seq, in) in DeepSeek's latent attention. mask: bool
    (batch, seq). Raises ValueError, naming the layer, for other axes."""
    axes = [n for n in x.shape[:-1] if n != 1]
    if axes not in ([n for n in mask.shape if n != 1], [n for n in [mask.numel()] if n != 1]):
        raise ValueError(f"{path}: its input {tuple(x.shape)} does not hold a row for each of the "
                         f"{tuple(mask.shape)} tokens (batch, seq) to calibrate on; leave it out "
                         "of target_modules, or quantize by 'rtn' or 'nf4'")  # fmt: skip
    return x.reshape(-1, x.shape[-1])[mask.flatten().to(x.device)]


def batch_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits (batch, seq, vocab) that a model gives for a batch."""
    device = next(model.parameters()).device
    return model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).logits
