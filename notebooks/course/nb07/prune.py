"""A trained adapter cut to a lower rank, and ranks shared out among its layers."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from qlora_lib.lora.combine import check_free, check_plain
from qlora_lib.lora.init import balanced, product_svd
from qlora_lib.lora.layer import (
    LoRAConfig,
    LoRALinear,
    check_adapter,
    check_names,
    layers_with,
    named,
)
from qlora_lib.lora.targets import replace_module


@torch.no_grad()
def prune_adapter(
    model: nn.Module, name: str, rank: int | dict[str, int], into: str | None = None
) -> dict[str, float]:
    """Cut a trained adapter to a lower rank: the largest singular values of each update.

    The best update of that rank (Eckart-Young), with the scaling it had. rank: one for all, or
    {path: rank} as `allocate_ranks` returns it; layers that it leaves out lose the adapter.
    into: the name of the result; None replaces the adapter, whose parameters are then new ones
    (make a new optimizer). Returns the kept energy, a layer: the sum of the kept squared
    singular values over that of all (1.0 for an update of zeros). Raises ValueError, before
    anything is changed, for an unknown adapter, a name in use, a rank below 1 or above the
    adapter's in a layer, unknown paths, DoRA, merged layers, and an adapter that holds a part
    of the weight (PiSSA, LoftQ).
    """
    check_names(model, name)
    check_free(model, into)
    layers = layers_with(model, name)
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(layers, rank)
    strange = [path for path in ranks if path not in layers]
    if strange or not ranks:
        raise ValueError(f"rank names {strange[:2] or 'no layers'}, where {name!r} is not")
    target, made, kept = into or name, {}, {}
    for path, layer in layers.items():
        with named(path):
            check_plain(layer, [name])
            if layer.residual_of == name:
                raise ValueError(f"adapter {name!r} holds a part of the weight itself; merge it")
            if layer.merged is not None:
                raise ValueError("the layer is merged; call unmerge_lora first")
            if path not in ranks:
                kept[path] = 0.0
                continue
            made[path], kept[path] = _pruned(layer, name, ranks[path])
            if into is not None:
                check_adapter(layer, into, made[path][0])
    for path, layer in layers.items():
        if path in made:
            _put(layer, target, *made[path])
        elif into is None:
            layer.remove(name)
            if not layer.configs:
                replace_module(model, path, layer.base)
    return kept


@torch.no_grad()
def allocate_ranks(model: nn.Module, adapter: str, budget: int) -> dict[str, int]:
    """Share a budget of parameters out among the layers of a trained adapter: {path: rank}.

    A layer's next rank costs in + out parameters and keeps the square of the update's next
    singular value; ranks go, one by one, to the layer with the most energy a parameter, until
    nothing fits. Layers with no rank are left out. `inject_lora(model, targets, rank=ranks)`
    starts a new adapter of these ranks, `prune_adapter(model, adapter, ranks)` cuts this one.
    (AdaLoRA, arXiv 2303.10512, does so all along the training.) Raises ValueError for an
    unknown adapter, DoRA, and a budget that pays for no rank at all.
    """
    check_names(model, adapter)
    layers = layers_with(model, adapter)
    costs = {path: m.in_features + m.out_features for path, m in layers.items()}
    offers = []
    for path, layer in layers.items():
        check_plain(layer, [adapter])
        values = product_svd(layer.lora_B[adapter], layer.lora_A[adapter])[1]
        values = values * layer.configs[adapter].scaling
        offers += [(-(s * s) / costs[path], path) for s in values.tolist() if s > 0]
    ranks, left = dict.fromkeys(layers, 0), budget
    for _, path in sorted(offers):  # a layer's own in the order of its singular values
        if costs[path] <= left:
            ranks[path] += 1
            left -= costs[path]
    ranks = {path: rank for path, rank in ranks.items() if rank}
    if not ranks:
        raise ValueError(
            f"budget={budget} parameters pays for no rank of adapter {adapter!r}; one costs "
            f"{min(costs.values())} or more, and an untrained adapter (B = 0) has nothing to keep"
        )
    return ranks


def _pruned(layer: LoRALinear, name: str, rank: int):
    """((configuration, B, A) of the adapter at this rank, part of the energy that it keeps)."""
    config = layer.configs[name]
    if not 1 <= rank <= config.rank:
        raise ValueError(f"rank={rank} must be 1 to {config.rank}, the rank of adapter {name!r}")
    u, s, vh = product_svd(layer.lora_B[name], layer.lora_A[name])
    b, a = balanced(u, s, vh, rank)
    part = rank / config.rank  # alpha so that the scaling stays
    alpha = config.alpha * (math.sqrt(part) if config.use_rslora else part)
    energy = s.square().sum()
    kept = float(s[:rank].square().sum() / energy) if energy > 0 else 1.0
    return (replace(config, rank=rank, alpha=alpha), b, a), kept


def _put(layer: LoRALinear, name: str, config: LoRAConfig, b: Tensor, a: Tensor) -> None:
    """Store the adapter, frozen, or trainable as the one it replaces."""
    trained = name in layer.lora_A and layer.lora_A[name].requires_grad
    layer.put(name, config, a.contiguous(), b.contiguous())
    for p in layer.parameters_of(name):
        p.requires_grad_(trained)
