"""Adapters made of trained adapters: combined, cut to a lower rank, ranks shared out."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from .layer import (
    LoRAConfig,
    LoRALinear,
    adapter_names,
    check_adapter,
    check_names,
    lora_layers,
    named,
)  # fmt: skip
from .low_rank import balanced, product_svd
from .targets import replace_module

HOW = ("linear", "cat", "svd")


@torch.no_grad()
def combine_adapters(
    model: nn.Module,
    weights: dict[str, float],
    into: str,
    how: str = "cat",
    rank: int | None = None,
) -> list[str]:
    """Add an adapter `into` that is a weighted sum of others, within the layers of any of them.

    With updates D_i = s_i B_i A_i (s_i the scaling) and weights w_i, negative ones too:
      "cat"     sum w_i D_i, exactly: A's below one another, B's side by side; the ranks add up
      "svd"     the best approximation of that sum of rank `rank` (None: a layer's largest of
                theirs)
      "linear"  B A with A = sum sign(w_i) sqrt(|w_i| s_i) A_i, B = sum sqrt(|w_i| s_i) B_i:
                one rank, and cross terms B_i A_j that no adapter ever was
    These are PEFT's add_weighted_adapter with the combination types of these names. Weights
    that sum to 1 average the updates with "cat". Averaging A's and B's apart is *not* that, since
    mean(B) mean(A) != mean(B A), and "linear" is neither: two equal adapters at 1/2 each come
    out doubled. Who averages the adapters of federated learning's clients wants "cat", or
    "svd" to keep the rank.

    The new adapter is frozen, without dropout, with scaling 1, and not made the default. Returns
    the paths of its layers. Raises ValueError, before anything is changed, for unknown adapters,
    a name in use, weights that are not finite, an unknown `how`, different ranks with "linear",
    a rank with others than "svd", one below 1 or above a layer's own, and adapters with DoRA.
    """
    if how not in HOW:
        raise ValueError(f"how={how!r} must be one of {', '.join(HOW)}")
    if not weights:
        raise ValueError("weights is empty; give {adapter: weight}")
    check_names(model, *weights)
    bad = {n: w for n, w in weights.items() if n is None or not math.isfinite(w)}
    if bad:
        raise ValueError(f"weights {bad} must be {{name of an adapter: finite number}}")
    _check_free(model, into)
    if rank is not None and how != "svd":
        raise ValueError(f"rank={rank} goes with how='svd'; that of {how!r} follows from theirs")
    layers = {p: m for p, m in lora_layers(model).items() if set(weights) & set(m.configs)}
    made = {}
    for path, layer in layers.items():
        parts = {n: w for n, w in weights.items() if n in layer.configs}
        with named(path):
            _check_plain(layer, parts)
            most = max(layer.configs[n].rank for n in parts) if rank is None else rank
            made[path] = b, a = _combined(layer, parts, how, most)
            check_adapter(layer, into, LoRAConfig(a.shape[0], alpha=a.shape[0]))
    for path, (b, a) in made.items():
        _put(layers[path], into, LoRAConfig(a.shape[0], alpha=a.shape[0]), b, a)
    return list(made)


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
    _check_free(model, into)
    layers = {p: m for p, m in lora_layers(model).items() if name in m.configs}
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(layers, rank)
    strange = [path for path in ranks if path not in layers]
    if strange or not ranks:
        raise ValueError(f"rank names {strange[:2] or 'no layers'}, where {name!r} is not")
    target, made, kept = into or name, {}, {}
    for path, layer in layers.items():
        with named(path):
            _check_plain(layer, [name])
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
    starts a new adapter of these ranks, `prune_adapter(model, adapter, ranks)` cuts this
    one. (AdaLoRA, arXiv 2303.10512, prunes by singular values during training; this is the
    one-shot version after a short training at a higher rank.) Raises ValueError for an
    unknown adapter, DoRA, and a budget that pays for no rank at all.
    """
    check_names(model, adapter)
    layers = {p: m for p, m in lora_layers(model).items() if adapter in m.configs}
    offers = []
    for path, layer in layers.items():
        _check_plain(layer, [adapter])
        cost = layer.in_features + layer.out_features
        values = product_svd(layer.lora_B[adapter], layer.lora_A[adapter])[1]
        values = values * layer.configs[adapter].scaling
        offers += [(-(s * s) / cost, path, cost) for s in values.tolist() if s > 0]
    ranks, left = dict.fromkeys(layers, 0), budget
    for _, path, cost in sorted(offers):  # a layer's own in the order of its singular values
        if cost <= left:
            ranks[path] += 1
            left -= cost
    ranks = {path: rank for path, rank in ranks.items() if rank}
    if not ranks:
        least = min(m.in_features + m.out_features for m in layers.values())
        raise ValueError(
            f"budget={budget} parameters pays for no rank of adapter {adapter!r}; one costs "
            f"{least} or more, and an untrained adapter (B = 0) has nothing to keep"
        )
    return ranks


def _check_free(model: nn.Module, name: str | None) -> None:
    if name in adapter_names(model):
        raise ValueError(f"adapter {name!r} exists; delete_adapter it, or choose another name")


def _check_plain(layer: LoRALinear, names) -> None:
    dora = [n for n in names if layer.configs[n].use_dora]
    if dora:
        raise ValueError(
            f"adapter {dora[0]!r} uses DoRA, whose update is no product B A: it rescales the rows "
            "of the weight; merge it instead (merge_lora)"
        )


def _combined(layer: LoRALinear, weights: dict[str, float], how: str, rank: int):
    """B (out, r) and A (r, in) with scaling 1."""
    factors = []
    for name, weight in weights.items():
        scale = weight * layer.configs[name].scaling
        factors.append((scale, layer.lora_B[name].detach(), layer.lora_A[name].detach()))
    if how == "linear":
        ranks = {n: layer.configs[n].rank for n in weights}
        if len(set(ranks.values())) > 1:
            raise ValueError(
                f"how='linear' adds A to A and B to B, of one rank; these have {ranks}: take "
                "how='cat' or 'svd'"
            )
        a = sum(math.copysign(math.sqrt(abs(s)), s) * a for s, _, a in factors)
        return sum(math.sqrt(abs(s)) * b for s, b, _ in factors), a
    b = torch.cat([b for _, b, _ in factors], dim=1)  # (out, sum of ranks)
    a = torch.cat([s * a for s, _, a in factors])  # (sum of ranks, in)
    if how == "cat":
        return b, a
    LoRAConfig(rank)  # at least 1
    if rank > min(layer.out_features, layer.in_features):
        shape = (layer.out_features, layer.in_features)
        raise ValueError(f"rank={rank} exceeds the rank of a layer {shape}")
    return balanced(*product_svd(b, a), rank)


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
