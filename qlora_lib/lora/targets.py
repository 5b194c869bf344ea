"""Which linear layers of a model are meant: by name, by word ("all", "attention"), by path."""

from torch import Tensor, nn

from ..layers.blocks import WORDS, linears_in_blocks
from ..layers.linear import QuantizedLinear
from .layer import LoRALinear, lora_layers

# Llama's names, which many families share.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = ATTENTION + ("gate_proj", "up_proj", "down_proj")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer, dense or quantized, by path; a LoRALinear stands for those inside it, and
    a subclass of nn.Linear that computes something else, as some routers do, is none."""
    kinds, adapted = (nn.Linear, QuantizedLinear, LoRALinear), lora_layers(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    one_of = {type(m): m for m in linears.values() if isinstance(m, nn.Linear)}
    others = tuple(kind for kind, layer in one_of.items() if not _is_linear(layer))
    linears = {n: m for n, m in linears.items() if type(m) not in others}
    return {n: m for n, m in linears.items() if n.rpartition(".")[0] not in adapted}


def _is_linear(layer: nn.Linear) -> bool:
    if type(layer).forward is nn.Linear.forward:
        return True
    try:
        given = type(layer).forward(layer, layer.weight.new_ones(2, layer.in_features))
    except (RuntimeError, ValueError, AttributeError, TypeError):
        return False
    return isinstance(given, Tensor) and given.shape == (2, layer.out_features)


def find_linears(model: nn.Module, target_modules) -> dict[str, nn.Module]:
    """The target layers, dense or quantized, by path. target_modules: "all" or "attention" (see
    blocks.py), or last path components, compared whole: "k_proj" does not match "block_proj".
    Raises ValueError when a target matches nothing."""
    linears = linear_layers(model)
    if target_modules in WORDS:
        return {n: linears[n] for n in linears_in_blocks(model, linears, target_modules)}
    targets = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    names = {n: n.rpartition(".")[2] for n in linears}
    missing = set(targets) - set(names.values())
    if missing or not targets:
        raise ValueError(f"target_modules {sorted(missing) or targets} match no linear layer; "
                         f"this model has {sorted(set(names.values()))}")  # fmt: skip
    return {n: m for n, m in linears.items() if names[n] in targets}


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` at a module path such as "model.layers.0.mlp.up_proj"."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
