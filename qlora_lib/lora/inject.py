"""Adapters on a model: which layers get them, and which one a call uses."""

from collections.abc import Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ..quant.recipe import Spec
from .choice import Rows, choose, keep_choice
from .fingerprint import dense_hash
from .init import LOST_INITS, RESIDUAL_INITS
from .layer import (
    LoRAConfig,
    LoRALinear,
    check_adapter,
    check_dense,
    check_names,
    layers_with,
    lora_layers,
    named,
)  # fmt: skip
from .targets import ATTENTION, find_linears, replace_module


@contextmanager
def use_adapter(model: nn.Module, name: str | None | Sequence[str | None]):
    """Within the block, calls use this adapter (None: the base alone), or one a row.

    A list gives each row of the batch an adapter by name, or None. The first axis of what the
    layers see must be the batch, one row a name, else the call raises ValueError: models that
    regroup rows between layers, as mixtures of experts do, are not handled.

    Other threads and asyncio tasks keep their choice. Where you call torch's `checkpoint` yourself,
    wrap it in `keep_choice`. Raises ValueError for an unknown adapter and for an empty list.
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
    with choose(dict.fromkeys(lora_layers(model).values(), choice)):
        yield model


def inject_lora(
    model: nn.Module, target_modules=ATTENTION, rank: int | dict[str, int] = 8, alpha: float = 16,
    dropout: float = 0.0, init: str = "kaiming", spec: Spec | None = None,
    use_rslora: bool = False, use_dora: bool = False, adapter: str = "default",
    starts: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> list[str]:  # fmt: skip
    """Freeze the model and put an adapter on each target layer; returns the paths of these.

    target_modules: as for find_linears, e.g. "all" or ("q_proj", "v_proj"). rank: one for all, or
    {path: rank}: targets that it leaves out get no adapter. use_dora: train each row's length
    apart (layer.weight_norm), for one more dequantization a call. init: with "kaiming" and
    "gaussian" the outputs do not change; "loftq" and "pissa" replace dense bases by residuals,
    quantized as `spec` says (init.py). "svd", "qera" and "cloq" start from the products `starts`,
    {path: (B, A)}, which inject_calibrated computes from what rounding lost. Draws come from
    torch's global generator. Called again with
    other targets, it adds those to the adapter. The model's first adapter becomes its default.
    Raises ValueError, before anything is changed, for targets that match nothing, a rank out of
    range or of no target, a name in use, and an init that does not go with spec, DoRA or layers.
    """
    found = find_linears(model, target_modules)
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(found, rank)
    strange = [path for path in ranks if path not in found]
    if strange or not ranks:
        raise ValueError(f"rank names {len(ranks)} layers, and {strange[:2] or 'none of them'} is "
                         f"not among target_modules={target_modules!r}; give paths of target "
                         "layers")  # fmt: skip
    configs = {
        path: LoRAConfig(ranks[path], alpha, dropout, init, use_rslora, use_dora)
        for path in found if path in ranks
    }  # fmt: skip
    split = []  # layers to take apart
    if init in RESIDUAL_INITS:
        split = [path for path in configs if adapter not in getattr(found[path], "configs", {})]
    elif spec is not None:
        raise ValueError(f"spec={spec} goes with {RESIDUAL_INITS}; quantize_model quantizes first")
    if (init in LOST_INITS) != (starts is not None):
        raise ValueError(f"init={init!r}, and starts is {'not ' if starts is None else ''}given: "
                         f"{LOST_INITS} start from products that inject_calibrated computes of the "
                         "dense weights; call that")  # fmt: skip
    for path in split:
        with named(path):
            check_dense(found[path], configs[path], spec)
    layers = add_adapters(model, configs, adapter)
    for path in split:
        layers[path].original = dense_hash(layers[path].base)
        layers[path].take_apart(adapter, spec)
    for path, (b, a) in (starts or {}).items():
        layers[path].start_from(adapter, b, a)
    model.requires_grad_(False)  # embeddings, norms and head too
    for layer in lora_layers(model).values():  # those of earlier calls too
        for p in layer.parameters_of(adapter):
            p.requires_grad_(True)
    return list(configs)


def add_adapters(
    model: nn.Module, configs: dict[str, LoRAConfig], adapter: str
) -> dict[str, LoRALinear]:
    """The linear layers at these paths, each with an adapter of its own configuration; the first
    adapter of a model becomes its default. Raises ValueError before a layer is changed."""
    layers = {path: model.get_submodule(path) for path in configs}
    for path, config in configs.items():
        with named(path):
            check_adapter(layers[path], adapter, config)
    have = lora_layers(model).values()
    default = next((m.active for m in have if m.active), None) if have else adapter
    for path, config in configs.items():
        new = not isinstance(layers[path], LoRALinear)
        if new:
            layers[path] = LoRALinear(layers[path])
            replace_module(model, path, layers[path])
        layers[path].add(adapter, config)
        layers[path].active = default if new else layers[path].active
    return layers


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make this adapter the default of every layer (None: the base alone). Raises ValueError for
    an unknown name, and for a merged model, whose default is what was merged."""
    check_names(model, name)
    layers = lora_layers(model)
    check_not_merged(layers)
    for layer in layers.values():
        layer.active = name


def delete_adapter(model: nn.Module, name: str) -> list[str]:
    """Take one adapter, which no call is using, off the model, where a layer's last one leaves the
    bare base layer behind; returns the paths of the layers that had it. Raises ValueError, and
    then changes nothing, for an unknown name, merged layers, and PiSSA's or LoftQ's adapter."""
    check_names(model, name)
    layers = layers_with(model, name)
    for path, layer in layers.items():
        if layer.residual_of == name:
            raise ValueError(f"{path}: adapter {name!r} holds a part of the weight, and the base "
                             "alone is no model; keep it, or merge_lora(unload=True)")  # fmt: skip
    check_not_merged(layers)
    for layer in lora_layers(model).values():  # those without it too: it may be their default
        layer.remove(name)
    for path, layer in layers.items():
        if not layer.configs:
            replace_module(model, path, layer.base)
    return list(layers)


def check_not_merged(layers: dict[str, LoRALinear]) -> None:
    """Raises ValueError for layers, by path, of which one is merged."""
    for path, layer in layers.items():
        if layer.merged is not None:
            raise ValueError(f"{path} is merged with its adapter; call unmerge_lora first")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that get a gradient, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}
