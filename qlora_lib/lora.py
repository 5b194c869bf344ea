"""LoRA: a frozen weight plus a trained product of two thin matrices.

Hu et al. 2021 (arXiv 2106.09685), eq. 3:  y = x W^T + (alpha / r) (x A^T) B^T,
with A (r, in) random and B (out, r) zero, so that the model is unchanged at step 0.
"""

import hashlib
import math
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import WORDS, linears_in_blocks
from .grid import QuantSpec
from .linear import QuantizedLinear
from .lora_init import RESIDUAL_INITS, check_dense, start_from_base
from .nf4 import NF4Spec

# Llama's names, which many families share.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = ATTENTION + ("gate_proj", "up_proj", "down_proj")
INITS = ("kaiming", "gaussian", *RESIDUAL_INITS)

# The adapter of the current call, by layer: a name, or None for the bare base; a layer that
# is not in it makes its own choice. By layer, so that a second model in the same block keeps
# its adapter; a context variable, so that threads and tasks do not see each other's.
_DEFAULT = object()
_chosen: ContextVar[dict] = ContextVar("chosen adapters", default={})


@contextmanager
def use_adapter(model: nn.Module, name: str | None):
    """Within the block, calls use this adapter (None: the base alone).

    A block of the model under gradient checkpointing is recomputed with the adapter of its
    forward pass, wherever and whenever backward runs. Where you call torch's `checkpoint`
    yourself, wrap it in `keep_choice`.
    Raises ValueError when the model has no adapter of that name.
    """
    if name is not None and name not in adapter_names(model):
        raise ValueError(f"no adapter {name!r}; the model has {adapter_names(model)}")
    for module in model.modules():  # those of transformers that checkpoint hold a function for it
        if hasattr(module, "_gradient_checkpointing_func"):
            kept = keep_choice(module._gradient_checkpointing_func)
            module._gradient_checkpointing_func = kept
    token = _chosen.set({**_chosen.get(), **dict.fromkeys(lora_layers(model).values(), name)})
    try:
        yield model
    finally:
        _chosen.reset(token)


def keep_choice(checkpoint):
    """A checkpoint function like the given one, recomputing with the adapter of the forward pass.

    Backward recomputes a block after `use_adapter` has ended, or in a thread of autograd's
    own (CUDA), which inherits no context variable: the block would run with the default
    adapter, and the gradients would be those of another model.
    """
    if getattr(checkpoint, "keeps_choice", False):
        return checkpoint

    def checkpointed(function, *args, **kwargs):
        chosen = _chosen.get()  # at the forward pass

        def run(*args, **kwargs):
            token = _chosen.set(chosen)
            try:
                return function(*args, **kwargs)
            finally:
                _chosen.reset(token)

        return checkpoint(run, *args, **kwargs)

    checkpointed.keeps_choice = True
    return checkpointed


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is made of; the same in each layer."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    init: str = "kaiming"
    use_rslora: bool = False  # alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732)

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r} is not one of {INITS}")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def check_adapter(layer: nn.Module, name: str, config: LoRAConfig) -> None:
    """Raises ValueError when a linear layer can't take this adapter."""
    if not name or "." in name:  # names of parameters can't hold a dot
        raise ValueError(f"adapter={name!r} must be a name without dots")
    taken = layer.configs.get(name, config) if isinstance(layer, LoRALinear) else config
    if taken != config:
        raise ValueError(f"adapter {name!r} exists with {taken}, not {config}")
    if getattr(layer, "residual_of", None) not in (None, name):
        raise ValueError(
            f"the base is what init left beside adapter {layer.residual_of!r}, no model by itself; "
            "merge that one first (merge_lora(unload=True)), or start from a fresh model"
        )
    shape = (layer.out_features, layer.in_features)
    if config.rank > min(shape):
        raise ValueError(f"rank={config.rank} exceeds the rank of a layer {shape}")


class LoRALinear(nn.Module):
    """A linear layer (dense or quantized) with named adapters beside it.

    base      nn.Linear or QuantizedLinear, frozen
    lora_A    {name: (rank, in_features)}, fp32
    lora_B    {name: (out_features, rank)}, fp32
    merged    None, or the layer that stands for base and adapter together
    residual_of  None, or the adapter whose initialization made the base (lora_init.py)
    start     None, or B and A at step 0 of that adapter, beside a dense base
    """

    def __init__(self, base: nn.Linear | QuantizedLinear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.configs: dict[str, LoRAConfig] = {}
        self.active: str | None = None
        self.merged: nn.Module | None = None
        self.residual_of: str | None = None
        self.start: tuple[Tensor, Tensor] | None = None

    def add(self, name: str, config: LoRAConfig) -> None:
        """Add an adapter, B = 0. The first one becomes the active one.

        Raises ValueError for a name in use with another configuration and for a rank
        above the layer's own.
        """
        check_adapter(self, name, config)
        if name in self.configs:
            return
        device = next(t.device for t in [*self.base.parameters(), *self.base.buffers()])
        # fp32 even on a bf16 base: an update of 1e-4 would vanish in bf16's 8 bits.
        a = torch.empty(config.rank, self.in_features, device=device)
        if config.init == "gaussian":
            nn.init.normal_(a, std=1 / config.rank)
        else:  # U(-1/sqrt(in), 1/sqrt(in)), as PEFT; LoftQ and PiSSA overwrite it
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(a)
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, config.rank, device=device))
        self.configs[name] = config
        self.active = self.active or name

    def delta(self, name: str) -> Tensor:
        """The adapter as a dense update of the weight: scaling * B A, fp32 (out, in)."""
        return self.configs[name].scaling * (self.lora_B[name] @ self.lora_A[name]).detach()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        chosen = _chosen.get().get(self, _DEFAULT)
        name = self.active if chosen is _DEFAULT else chosen
        if self.merged is not None and chosen is _DEFAULT:
            return self.merged(x)
        y = self.base(x)
        if name not in self.configs:  # None, or an adapter that leaves this layer alone
            return y
        config, a, b = self.configs[name], self.lora_A[name], self.lora_B[name]
        # Autocast casts for itself; a cast here would give every layer a copy of x to keep.
        h = x if torch.is_autocast_enabled(x.device.type) else x.to(a.dtype)
        h = nn.functional.dropout(h, config.dropout, self.training)
        h = h @ a.t()  # (..., in) -> (..., rank): thin first, B A is never formed
        return y + (config.scaling * (h @ b.t())).to(y.dtype)  # (..., rank) -> (..., out)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear by its module path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters in the model, in the order in which they were added."""
    return list(dict.fromkeys(n for m in lora_layers(model).values() for n in m.configs))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer, dense or quantized, by path; a LoRALinear stands for those inside it."""
    kinds, adapted = (nn.Linear, QuantizedLinear, LoRALinear), lora_layers(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    return {n: m for n, m in linears.items() if n.rpartition(".")[0] not in adapted}


def find_linears(model: nn.Module, target_modules) -> dict[str, nn.Module]:
    """Linear layers, dense or quantized, by path: the targets.

    target_modules: "all" or "attention" (blocks.py says which these are in any family), or
    last path components. Whole components are compared: "k_proj" does not match
    "block_proj". Layers inside a LoRALinear are found under the LoRALinear's path. Raises
    ValueError, listing what the model has, when a target matches nothing.
    """
    linears = linear_layers(model)
    if target_modules in WORDS:
        return {n: linears[n] for n in linears_in_blocks(model, linears, target_modules)}
    targets = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    names = {n: n.rpartition(".")[2] for n in linears}
    missing = set(targets) - set(names.values())
    if missing or not targets:
        raise ValueError(
            f"target_modules {sorted(missing) or targets} match no linear layer; "
            f"this model has {sorted(set(names.values()))}"
        )
    return {n: m for n, m in linears.items() if names[n] in targets}


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` at a module path such as "model.layers.0.mlp.up_proj"."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def inject_lora(
    model: nn.Module,
    target_modules=ATTENTION,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    init: str = "kaiming",
    spec: QuantSpec | NF4Spec | None = None,
    use_rslora: bool = False,
    adapter: str = "default",
) -> list[str]:
    """Freeze the model and put an adapter on each target layer.

    target_modules: as for find_linears, e.g. "all" or ("q_proj", "v_proj"). init: with "kaiming"
    and "gaussian" the outputs do not change. "loftq" and "pissa" take dense layers, and
    replace their bases by residuals, quantized as `spec` says ("pissa" alone does without:
    a dense residual); outputs change by what rounding leaves (lora_init.py). Calling it
    again with the same configuration changes nothing. Random draws come from torch's global
    generator. Returns the paths of the adapted layers. Raises ValueError, before anything
    is changed, for targets that match nothing, a rank out of range, a name in use, a spec
    with other inits, and layers that "loftq" and "pissa" can't take.
    """
    config = LoRAConfig(rank, alpha, dropout, init, use_rslora)
    found = find_linears(model, target_modules)
    new = [path for path, m in found.items() if adapter not in getattr(m, "configs", {})]
    if init in RESIDUAL_INITS:
        for path in new:
            check_dense(path, found[path], config, spec)
    elif spec is not None:
        raise ValueError(f"spec={spec} goes with {RESIDUAL_INITS}; quantize_model quantizes first")
    layers = add_adapters(model, dict.fromkeys(found, config), adapter)
    for path in new if init in RESIDUAL_INITS else ():
        start_from_base(layers[path], adapter, spec)
    model.requires_grad_(False)  # embeddings, norms and head too
    for layer in layers.values():
        layer.lora_A[adapter].requires_grad_(True)
        layer.lora_B[adapter].requires_grad_(True)
    return list(found)


def add_adapters(
    model: nn.Module, configs: dict[str, LoRAConfig], adapter: str
) -> dict[str, LoRALinear]:
    """Put an adapter on the linear layers at these paths, each with its own configuration.

    Raises ValueError, with the layer's path, before the first layer is changed.
    """
    for path, config in configs.items():
        try:
            check_adapter(model.get_submodule(path), adapter, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    for path, config in configs.items():
        layer = model.get_submodule(path)
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer)
            replace_module(model, path, layer)
        layer.add(adapter, config)
    return {path: model.get_submodule(path) for path in configs}


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make this adapter the default of every layer (None: the base alone)."""
    if name is not None and name not in adapter_names(model):
        raise ValueError(f"no adapter {name!r}; the model has {adapter_names(model)}")
    for layer in lora_layers(model).values():
        layer.active = name


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that get a gradient, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def base_fingerprint(model: nn.Module) -> str:
    """A hash of the base's parameters outside of linear layers: embeddings and norms.

    It names the model whatever its linears are stored in, so that an adapter trained on
    a 4-bit base is recognised on the dense one. Values are hashed as what bf16 and fp16
    can both hold, so that weights published in either are recognised in every dtype.
    """
    digest, linears = hashlib.sha256(), tuple(f"{path}." for path in linear_layers(model))
    for name, p in sorted(model.named_parameters()):
        if not name.startswith(linears):
            digest.update(f"{name}{tuple(p.shape)}".encode())
            bits = p.detach().cpu().bfloat16().half().contiguous().view(torch.int16)
            digest.update(bits.numpy().tobytes())
    return digest.hexdigest()[:16]
