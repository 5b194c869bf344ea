"""Adapters on a quantized model that start from what rounding lost (lora/init.py has the math)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.progress import Progress
from ..layers.linear import QuantizedLinear
from ..lora.init import alternate, check_lost, lost_part
from ..lora.inject import inject_lora
from ..lora.layer import LoRAConfig, check_adapter, lora_layers, named
from ..lora.targets import find_linears
from ..quant.damping import choose_damping
from ..quant.dense_target import dense_target
from ..quant.gptq import output_error
from ..quant.hessian import Hessian
from ..quant.recipe import Recipe
from .checkpoint import read_weights

Dense = nn.Module | Mapping[str, Tensor] | Path | str


@dataclass
class StartRow:
    """One layer: how far its outputs are off the dense weight's, relative to these, on the inputs
    of its Hessian; without one, how far the weight is off."""

    name: str
    before: float  # of the quantized base alone
    after: float  # with the adapter


@torch.no_grad()
def inject_calibrated(
    model: nn.Module, dense: Dense, hessians: dict[str, Hessian] | None = None, init: str = "cloq",
    damp_percent: float | None = 0.01, target_modules="all", rank: int | dict[str, int] = 8,
    alpha: float = 16, adapter: str = "default", again: Recipe | None = None, steps: int = 5,
    **lora,
) -> list[StartRow]:  # fmt: skip
    """Do what inject_lora does on a quantized model, the adapter starting from what rounding lost;
    returns a row a layer.

    init: "svd", "qera" or "cloq" (lora/init.py: lost_part). dense: the weights that the base was
    quantized from: a model, a state dict, or a checkpoint's folder, of which one layer at a time is
    read. hessians: by path, as input_hessians gives them; those that know the dense model's inputs
    (match_dense) make the adapter aim at its outputs. Each layer is mended by itself, on inputs
    that the layers before it give unmended: the model need not gain what its layers do.
    damp_percent: as of GPTQ; None: chosen. The scaling (alpha / rank, rsLoRA's) is divided out;
    with use_dora the lengths start as those of the mended weight. lora: further arguments of
    inject_lora. The base stays as it is, and a saved adapter is plain LoRA beside it; but with
    `again`, by which W - B A is quantized again, up to `steps` times for as long as it helps
    (`alternate`), the bases are new ones that fit this adapter alone. Raises ValueError, before
    anything is changed, for a dense base, other shapes, NaN or Inf, missing weights or Hessians,
    and what inject_lora refuses.
    """
    found = find_linears(model, target_modules)
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(found, rank)
    todo = [path for path in found
            if path in ranks and adapter not in getattr(found[path], "configs", {})]  # fmt: skip
    for path in todo:  # before the first takes its time
        config = LoRAConfig(ranks[path], alpha, init=init, **lora)
        with named(path):
            check_lost(init, (hessians or {}).get(path))
            check_adapter(found[path], adapter, config)
            if not isinstance(_base(found[path]), QuantizedLinear):
                raise ValueError(f"init={init!r} starts from what rounding lost, and this base is "
                                 "dense; quantize the model first, or take init='kaiming'")
            if again and (config.use_dora or getattr(found[path], "configs", None)):
                raise ValueError("`again` makes a base for this adapter alone: leave use_dora out, "
                                 "and take a model without other adapters")  # fmt: skip
    read, again = _reader(dense, model), again and _aimed(again)
    starts, bases, rows = {}, {}, []
    progress = Progress(f"starting from {init}", len(todo), "layers")
    for path in todo:
        with named(path):
            base, hessian = _base(found[path]), (hessians or {}).get(path)
            w = read(path, base)
            choose = hessian is not None and damp_percent is None
            damping = choose_damping(hessian) if choose else damp_percent
            if init != "svd" and hessian.cross is not None:
                w = dense_target(w, hessian, damping)
            first = base.dequantize().to(w)
            if again is None:
                b, a = lost_part(w - first, ranks[path], init, hessian, damping)
                mended = first + b @ a
            else:
                quantize = lambda rest, h=hessian: again.quantize(rest, h)  # noqa: E731
                made = alternate(w, ranks[path], quantize, init, hessian, damping, steps)
                bases[path], b, a, _ = made
                mended = bases[path].dequantize() + b @ a
            starts[path] = b, a
            rows.append(StartRow(path, _error(w, first, hessian), _error(w, mended, hessian)))
        progress(len(rows), path)
    inject_lora(model, target_modules, rank, alpha, init=init, adapter=adapter, starts=starts,
                **lora)  # fmt: skip
    layers = lora_layers(model)
    for path, quantized in bases.items():
        layers[path].base = QuantizedLinear(quantized, layers[path].bias)
        layers[path].residual_of = adapter
    return rows


def _base(layer: nn.Module) -> nn.Module:
    return getattr(layer, "base", layer)


def _aimed(recipe: Recipe) -> Recipe:
    """Return the recipe for a weight that aims at the dense model's outputs already."""
    if not recipe.matches_dense:
        return recipe
    return replace(recipe, options=replace(recipe.options, match_dense=False))


def _reader(dense: Dense, model: nn.Module):
    """Return a function from a path and its packed base to the dense weight (out, in), in the dtype
    that the model computes in, which is what it was quantized from."""
    if isinstance(dense, nn.Module):
        linears = dict(dense.named_modules())
        held = {f"{p}.weight": m.weight for p, m in linears.items() if type(m) is nn.Linear}
    else:
        held = dense
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def read(path: str, base: QuantizedLinear) -> Tensor:
        name, shape = f"{path}.weight", (base.out_features, base.in_features)
        here = read_weights(Path(held), {name}) if isinstance(held, (str, Path)) else held
        weight = here.get(name)
        if weight is None or tuple(weight.shape) != shape:
            got = "nothing" if weight is None else tuple(weight.shape)
            raise ValueError(f"the dense weights should hold {name} {shape}, found {got}; give "
                             "those that the base was quantized from")  # fmt: skip
        return weight.detach().to(base.codes.device, dtype)

    return read


def _error(weight: Tensor, approx: Tensor, hessian: Hessian | None) -> float:
    if hessian is None:
        return float((weight - approx).norm() / weight.norm())
    return output_error(weight, approx, hessian)
