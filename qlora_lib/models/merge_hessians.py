"""Hessians of the adapted layers of a trained model, for merging by GPTQ."""

import torch
from torch import Tensor, nn

from ..lora.layer import lora_layers
from ..lora.merge import active_layers
from ..quant.hessian import Hessian
from .batches import Batch, batch_logits, real_tokens, token_mask
from .calibrate import SharedInputs, watch_inputs


def merge_hessians(model: nn.Module, batches: list[Batch], halves=False) -> dict[str, Hessian]:
    """Return the Hessian of each adapted layer's inputs, by path, for merge_lora(into="gptq").

    batches: input_ids and attention_mask, each (batch, seq); halves: as for a Hessian. All are
    alive together, one for layers that share an input; for a model too large for that, merge into
    "dense" and run quantize_model. Raises ValueError for no batches, a merged model, and inputs
    that do not hold a row for each token.
    """
    if not batches:
        raise ValueError("no calibration batches; pass at least one")
    check_unmerged(model)
    layers, hessians, mask, shared = active_layers(model), {}, None, SharedInputs()
    first: dict[str, str] = {}  # by path: the layer whose Hessian this one shares

    def see(path: str, x: Tensor) -> None:
        same_as = shared.first(path, x)
        if first.setdefault(path, same_as) != path:
            hessians[path] = hessians[first[path]]
            return
        if path not in hessians:
            hessians[path] = Hessian(layers[path].in_features, x.device, halves=halves)
        hessians[path].update(real_tokens(x, mask, path))

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), watch_inputs(layers, see):
            for batch in batches:
                mask = token_mask(batch)
                batch_logits(model, batch)
    finally:
        model.train(was_training)
    return hessians


def check_unmerged(model: nn.Module) -> None:
    """Raise ValueError for a model whose adapters are merged into copies of its weights."""
    if any(layer.merged is not None for layer in lora_layers(model).values()):
        raise ValueError("the model is merged; call unmerge_lora first")
