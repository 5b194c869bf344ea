"""Adapters on a model: which layers get them, which one a call uses, what they take.

layer.py has the layer and its equation, choice.py the choice of a call.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..layers.linear import QuantizedLinear
from ..quant.grid import QuantSpec
from ..quant.nf4 import NF4Spec
from .choice import Rows, choose, keep_choice
from .init import RESIDUAL_INITS
from .layer import (
    LoRAConfig,
    LoRALinear,
    adapter_names,
    check_adapter,
    check_dense,
    check_names,
    lora_layers,
    named,
)  # fmt: skip
from .targets import ATTENTION, find_linears, linear_layers, replace_module


@contextmanager
def use_adapter(model: nn.Module, name: str | None | Sequence[str | None]):
    """Within the block, calls use this adapter (None: the base alone), or one a row.

    A list gives each row of the batch an adapter by name, or None. The base's product is
    computed once for all rows, then each adapter's on its rows; a row gets what it gets alone but
    for the last bits. The first axis of what the layers see must be the batch, one row a name;
    else the call raises ValueError. Where generate() repeats rows (num_return_sequences=k),
    repeat each name k times. Not handled: models that regroup rows between layers, as mixtures
    of experts do.

    The choice belongs to the block: other threads and asyncio tasks keep theirs. A block of
    the model under gradient checkpointing is recomputed with the adapter of its forward pass,
    wherever and whenever backward runs. Where you call torch's `checkpoint` yourself, wrap it
    in `keep_choice`. Raises ValueError when the model has no adapter of that name, and for
    an empty list.
    """
    rows = not (name is None or isinstance(name, str))
    check_names(model, *(name if rows else [name]))
    if rows and not name:
        raise ValueError("use_adapter was given no names; one a row of the batch is expected")
    for module in model.modules():  # those of transformers that checkpoint hold a function for it
        if hasattr(module, "_gradient_checkpointing_func"):
            kept = keep_choice(module._gradient_checkpointing_func)
            module._gradient_checkpointing_func = kept
    choice = Rows(name, next(model.parameters()).device) if rows else name
    with choose(lora_layers(model).values(), choice):
        yield model


def inject_lora(
    model: nn.Module,
    target_modules=ATTENTION,
    rank: int | dict[str, int] = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    init: str = "kaiming",
    spec: QuantSpec | NF4Spec | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    adapter: str = "default",
) -> list[str]:
    """Freeze the model and put an adapter on each target layer.

    target_modules: as for find_linears, e.g. "all" or ("q_proj", "v_proj"). rank: one for all, or
    {path: rank} with a rank a layer (as `allocate_ranks` returns): targets that it leaves out
    get no adapter; alpha is one, so that their scaling alpha / rank differs, as with PEFT's
    rank_pattern. use_dora: train each row's length apart (layer.weight_norm), at the price
    of about one more dequantization of the weight a call.
    init: with "kaiming" and "gaussian" the outputs do not change. "loftq" and "pissa" take dense
    layers, and replace their bases by residuals, quantized as `spec` says ("pissa" alone does
    without: a dense residual); outputs change by what rounding leaves (init.py). Calling
    it again with the same configuration changes nothing; with other targets it adds those to the
    adapter, which is trained in all its layers (settings may differ by layer). The model's first
    adapter becomes the default of calls; later ones leave the default as it is (`set_adapter`,
    `use_adapter`). Random draws come from torch's global generator. Returns the paths of the
    target layers. Raises ValueError, before anything is changed, for targets that match nothing,
    a rank out of range or of a path that is no target, a name in use, a spec with other inits,
    DoRA with "loftq" or "pissa", and layers that these two can't take.
    """
    found = find_linears(model, target_modules)
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(found, rank)
    strange = [path for path in ranks if path not in found]
    if strange or not ranks:
        raise ValueError(
            f"rank names {len(ranks)} layers, and {strange[:2] or 'none of them'} is not among "
            f"target_modules={target_modules!r}; give paths of target layers"
        )
    found = {path: m for path, m in found.items() if path in ranks}
    configs = {
        path: LoRAConfig(ranks[path], alpha, dropout, init, use_rslora, use_dora) for path in found
    }
    new = [path for path, m in found.items() if adapter not in getattr(m, "configs", {})]
    if init in RESIDUAL_INITS:
        for path in new:
            check_dense(path, found[path], configs[path], spec)
    elif spec is not None:
        raise ValueError(f"spec={spec} goes with {RESIDUAL_INITS}; quantize_model quantizes first")
    layers = add_adapters(model, configs, adapter)
    for path in new if init in RESIDUAL_INITS else ():
        layers[path].take_apart(adapter, spec)
    model.requires_grad_(False)  # embeddings, norms and head too
    for layer in lora_layers(model).values():  # those of earlier calls too
        for p in layer.parameters_of(adapter):
            p.requires_grad_(True)
    return list(found)


def add_adapters(
    model: nn.Module, configs: dict[str, LoRAConfig], adapter: str
) -> dict[str, LoRALinear]:
    """Put an adapter on the linear layers at these paths, each with its own configuration.

    The model's default stays what it is, on layers that are new to adapters too; the first
    adapter of a model becomes its default. Raises ValueError, with the layer's path, before the
    first layer is changed.
    """
    for path, config in configs.items():
        with named(path):
            check_adapter(model.get_submodule(path), adapter, config)
    have = lora_layers(model).values()
    default = next((m.active for m in have if m.active), None) if have else adapter
    for path, config in configs.items():
        layer = model.get_submodule(path)
        if isinstance(layer, LoRALinear):
            layer.add(adapter, config)
        else:
            layer = LoRALinear(layer)
            layer.add(adapter, config)
            layer.active = default
            replace_module(model, path, layer)
    return {path: model.get_submodule(path) for path in configs}


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make this adapter the default of every layer (None: the base alone).

    Layers that lack it have their base alone. Raises ValueError for an unknown name, and for a
    merged model, whose default is what was merged.
    """
    check_names(model, name)
    layers = lora_layers(model)
    for path, layer in layers.items():
        if layer.merged is not None:
            raise ValueError(f"{path} is merged with its adapter; call unmerge_lora first")
    for layer in layers.values():
        layer.active = name


def delete_adapter(model: nn.Module, name: str) -> list[str]:
    """Take one adapter off the model; a layer's last one leaves the bare base layer behind.

    Not for an adapter that a call is using. Layers whose default it was have the base alone
    as default then. Returns the paths of the layers that had it. Raises ValueError, and then
    changes nothing, for an unknown name, for merged layers, and for the adapter beside whose
    initialization (PiSSA, LoftQ) the base was made: that base is no model by itself.
    """
    check_names(model, name)
    layers = {path: m for path, m in lora_layers(model).items() if name in m.configs}
    for path, layer in layers.items():
        if layer.residual_of == name:
            raise ValueError(
                f"{path}: init={layer.configs[name].init!r} moved a part of the weight into "
                f"adapter {name!r}, and the base alone is no model; keep it, merge it "
                "(merge_lora(unload=True)), or load the model again"
            )
        if layer.merged is not None:
            raise ValueError(f"{path} is merged with its adapter; call unmerge_lora first")
    for layer in lora_layers(model).values():  # those without it too
        layer.active = None if layer.active == name else layer.active
    for path, layer in layers.items():
        layer.remove(name)
        if not layer.configs:
            replace_module(model, path, layer.base)
    return list(layers)


@dataclass(frozen=True)
class AdapterRow:
    """What one adapter takes; the row of name None is the base that all share."""

    name: str | None
    ranks: tuple[int, ...]  # that occur, in order; of the base none
    layers: int  # linear layers that it is in; of the base: that there are
    parameters: int  # of a quantized weight: its elements
    nbytes: int  # as held in memory


def adapter_table(model: nn.Module) -> list[AdapterRow]:
    """The base, then each adapter in the order in which they were added: sizes in memory.

    The base counts all that is not an adapter, embeddings and norms too, tied weights once;
    dense copies made by merge_lora are left out.
    """
    layers, rows, own = lora_layers(model), [], set()
    for name in adapter_names(model):
        having = [m for m in layers.values() if name in m.configs]
        tensors = [t for m in having for t in m.parameters_of(name)]
        own |= {id(t) for t in tensors}
        ranks = tuple(sorted({m.configs[name].rank for m in having}))
        count, size = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
        rows.append(AdapterRow(name, ranks, len(having), count, size))
    linears = linear_layers(model)
    packed = [getattr(m, "base", m) for m in linears.values()]
    packed = [m for m in packed if isinstance(m, QuantizedLinear)]
    for module in [*packed, *(m.merged for m in layers.values() if m.merged is not None)]:
        own |= {id(t) for t in [*module.parameters(), *module.buffers()]}
    dense = [t for t in model.parameters() if id(t) not in own]
    rest = dense + [t for t in model.buffers() if id(t) not in own]
    count = sum(t.numel() for t in dense) + sum(m.out_features * m.in_features for m in packed)
    size = sum(t.nbytes for t in rest) + sum(m.nbytes for m in packed)
    return [AdapterRow(None, (), len(linears), count, size), *rows]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that get a gradient, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}
