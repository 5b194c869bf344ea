"""Hessians of what a whole model's layers get: for merging by GPTQ, and for adapters that start
from what rounding lost."""

import torch
from torch import Tensor, nn

from ..lora.layer import lora_layers
from ..lora.merge import active_layers
from ..quant.hessian import Hessian
from .batches import Batch, batch_logits, real_tokens, token_mask
from .calibrate import SharedInputs, watch_inputs


def merge_hessians(model: nn.Module, batches: list[Batch], halves=False) -> dict[str, Hessian]:
    """Return the Hessian of each adapted layer's inputs, by path, for merge_lora(into="gptq").

    As input_hessians; for a model too large for that, merge into "dense" and run quantize_model.
    Raises ValueError for a merged model too.
    """
    check_unmerged(model)
    return input_hessians(model, active_layers(model), batches, halves)


def input_hessians(
    model: nn.Module, layers: dict[str, nn.Module], batches: list[Batch], halves=False,
    dense: nn.Module | None = None,
) -> dict[str, Hessian]:  # fmt: skip
    """Return the Hessian of the inputs of each of these layers of the model, {path: Linear}.

    batches: input_ids and attention_mask, each (batch, seq); halves: as for a Hessian. dense: the
    model before quantization, whose inputs to the same layers the Hessians shall know. All are
    alive together, one for layers that share an input. Raises ValueError for no batches, and
    inputs that do not hold a row for each token.
    """
    if not batches:
        raise ValueError("no calibration batches; pass at least one")
    hessians, mask, shared = {}, None, SharedInputs()
    first: dict[str, str] = {}  # by path: the layer whose Hessian this one shares
    before: dict[str, Tensor] = {}  # what the layers get in the dense model

    def see(path: str, x: Tensor) -> None:
        same_as = shared.first(path, x)
        if first.setdefault(path, same_as) != path:
            hessians[path] = hessians[first[path]]
            return
        if path not in hessians:
            hessians[path] = Hessian(layers[path].in_features, x.device, halves=halves)
        own = real_tokens(before.pop(path), mask, path) if dense is not None else None
        hessians[path].update(real_tokens(x, mask, path), own)

    twins = {} if dense is None else {path: dense.get_submodule(path) for path in layers}
    states = [(m, m.training) for m in (model, dense) if m is not None]
    for m, _ in states:
        m.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                mask = token_mask(batch)
                if dense is not None:
                    with watch_inputs(twins, before.__setitem__):
                        batch_logits(dense, batch)
                with watch_inputs(layers, see):
                    batch_logits(model, batch)
    finally:
        for m, was_training in states:
            m.train(was_training)
    return hessians


def check_unmerged(model: nn.Module) -> None:
    """Raise ValueError for a model whose adapters are merged into copies of its weights."""
    if any(layer.merged is not None for layer in lora_layers(model).values()):
        raise ValueError("the model is merged; call unmerge_lora first")
