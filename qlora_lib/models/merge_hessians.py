"""Hessians of the adapted layers of a trained model, for merging by GPTQ."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..lora.layer import lora_layers
from ..lora.merge import active_layers
from ..quant.hessian import Hessian
from .calibrate import token_mask, watch_inputs

Batch = dict[str, Tensor]


def merge_hessians(
    model: nn.Module, batches: Sequence[Batch], halves: bool = False
) -> dict[str, Hessian]:
    """The Hessian of each adapted layer's inputs, by path, as merge_lora(into="gptq") takes them.

    batches: input_ids and attention_mask, each (batch, seq); halves: as for a Hessian. One pass
    of the trained model, base and adapter apart: all layers are calibrated on its own
    activations, not on those of layers that are merged already, and all Hessians are alive
    together (layers that share an input share one). For a model too large for that, merge into
    "dense" and run quantize_model. Raises ValueError for no batches and for a merged model.
    """
    if not batches:
        raise ValueError("no calibration batches; pass at least one")
    _refuse_merged(model)
    layers, hessians, first = active_layers(model), {}, {}
    last, mask = (None, None), None

    def see(path: str, x: Tensor) -> None:
        nonlocal last
        if path not in hessians:  # q, k and v are called with one tensor
            first[path] = last[0] if x is last[1] else path
            shared = hessians.get(first[path])
            width = layers[path].in_features
            hessians[path] = shared or Hessian(width, x.device, halves=halves)
        if first[path] == path:
            hessians[path].update(x[mask.to(x.device)])  # (batch, seq, in) -> (tokens, in)
            last = (path, x)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), watch_inputs(layers, see):
            for batch in batches:
                mask = token_mask(batch)
                _forward(model, batch)
    finally:
        model.train(was_training)
    return hessians


def _refuse_merged(model: nn.Module) -> None:
    if any(layer.merged is not None for layer in lora_layers(model).values()):
        raise ValueError("the model is merged; call unmerge_lora first")


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    return model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).logits
