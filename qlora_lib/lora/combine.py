"""Adapters made of trained adapters: weighted sums."""

import math

import torch
from torch import nn

from .init import balanced, product_svd
from .layer import (
    LoRAConfig,
    LoRALinear,
    adapter_names,
    check_adapter,
    check_names,
    check_rank,
    lora_layers,
    named,
)  # fmt: skip


@torch.no_grad()
def combine_adapters(
    model: nn.Module, weights: dict[str, float], into: str, how: str = "cat",
    rank: int | None = None,
) -> list[str]:  # fmt: skip
    """Add an adapter `into` that is a weighted sum of others; returns the paths of its layers.

    With updates D_i = s_i B_i A_i (s_i the scaling) and weights w_i, negative ones too, as PEFT's
    add_weighted_adapter has them:
      "cat"     sum w_i D_i, exactly: A's below one another, B's side by side; the ranks add up
      "svd"     the best approximation of that sum of rank `rank` (None: a layer's largest one)
      "linear"  B A with A = sum sign(w_i) sqrt(|w_i| s_i) A_i, B = sum sqrt(|w_i| s_i) B_i: one
                rank, cross terms B_i A_j; two equal adapters at 1/2 each come out doubled

    The new adapter is frozen, without dropout, with scaling 1, and not made the default. Raises
    ValueError, before anything is changed, for unknown adapters, a name in use, a weight, `how` or
    rank that is out of range, ranks that differ with "linear", and adapters with DoRA.
    """
    if how not in ("linear", "cat", "svd"):
        raise ValueError(f"how={how!r} must be one of linear, cat, svd")
    if not weights:
        raise ValueError("weights is empty; give {adapter: weight}")
    check_names(model, *weights)
    bad = {n: w for n, w in weights.items() if n is None or not math.isfinite(w)}
    if bad:
        raise ValueError(f"weights {bad} must be {{name of an adapter: finite number}}")
    check_free(model, into)
    if rank is not None and how != "svd":
        raise ValueError(f"rank={rank} goes with how='svd'; that of {how!r} follows from theirs")
    layers, made = lora_layers(model), {}
    for path, layer in layers.items():
        parts = {n: w for n, w in weights.items() if n in layer.configs}
        if parts:
            with named(path):
                check_plain(layer, parts)
                b, a = _combined(layer, parts, how, rank)
                made[path] = LoRAConfig(len(a), alpha=len(a)), b, a
                check_adapter(layer, into, made[path][0])
    for path, (config, b, a) in made.items():
        layers[path].put(into, config, a, b)
        for p in layers[path].parameters_of(into):
            p.requires_grad_(False)
    return list(made)


def check_free(model: nn.Module, name: str | None) -> None:
    """Raises ValueError for the name of an adapter that the model has."""
    if name in adapter_names(model):
        raise ValueError(f"adapter {name!r} exists; delete_adapter it, or choose another name")


def check_plain(layer: LoRALinear, names) -> None:
    """Raises ValueError for adapters of a layer whose update is no product B A."""
    dora = [n for n in names if layer.configs[n].use_dora]
    if dora:
        raise ValueError(f"adapter {dora[0]!r} uses DoRA, whose update is no product B A; merge it "
                         "instead (merge_lora)")  # fmt: skip


def _combined(layer: LoRALinear, weights: dict[str, float], how: str, rank: int | None):
    """B (out, r) and A (r, in) with scaling 1."""
    scales = {n: weight * layer.configs[n].scaling for n, weight in weights.items()}
    ranks = {n: layer.configs[n].rank for n in weights}
    if how == "linear":
        if len(set(ranks.values())) > 1:
            raise ValueError(f"how='linear' adds A to A and B to B, of one rank; these have "
                             f"{ranks}: take how='cat' or 'svd'")  # fmt: skip
        b = sum(math.sqrt(abs(s)) * layer.lora_B[n] for n, s in scales.items())
        a = sum(math.copysign(math.sqrt(abs(s)), s) * layer.lora_A[n] for n, s in scales.items())
        return b, a
    b = torch.cat([layer.lora_B[n] for n in scales], dim=1)  # (out, sum of ranks)
    a = torch.cat([s * layer.lora_A[n] for n, s in scales.items()])  # (sum of ranks, in)
    if how == "cat":
        return b, a
    rank = max(ranks.values()) if rank is None else rank
    check_rank(layer, LoRAConfig(rank))
    return balanced(*product_svd(b, a), rank)
