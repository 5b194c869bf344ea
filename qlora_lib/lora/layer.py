"""One adapted layer: a frozen weight plus a trained product of two thin matrices.

Hu et al. 2021 (arXiv 2106.09685), eq. 3:  y = x W^T + (alpha / r) (x A^T) B^T,
with A (r, in) random and B (out, r) zero, so that the model is unchanged at step 0.

Beside PEFT 0.21.2 (tuners/lora/layer.py, dora.py and bnb.py, 3,644 lines; here this file,
choice.py and init.py, 486): adapter files go there and back to the bit, logits and gradients
agree to 1e-5, DoRA's and PiSSA's to 1e-4. An adapter is chosen for a call, not set on the model.
Left out: all but linear layers, a bias beside B, other quantizers, other initializations.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base.ranges import COUNT, SHARE_BELOW_ONE, Range, check_fields
from ..layers.linear import QuantizedLinear, dense_pieces, dense_weight
from ..quant.float_weights import FloatSpec
from ..quant.grid import QuantSpec, check_weight
from ..quant.recipe import Spec
from .choice import DEFAULT, Rows, chosen
from .init import LOST_INITS, RESIDUAL_INITS, loftq, pissa

INITS = ("kaiming", "gaussian", *RESIDUAL_INITS, *LOST_INITS)
TINY = torch.finfo(torch.float32).tiny
ALPHA = Range(0, 10**6, above=True)  # beyond it fp32 may overflow, and nobody trains
MERGED = object()  # what a call uses where base and adapter are one layer


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is made of in one layer."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    init: str = "kaiming"
    use_rslora: bool = False  # alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732)
    use_dora: bool = False  # a trained length for each row of the weight (`weight_norm`)

    def __post_init__(self):
        check_fields(self, rank=COUNT, alpha=ALPHA, dropout=SHARE_BELOW_ONE)
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r} is not one of {INITS}")
        if self.use_dora and self.init in RESIDUAL_INITS:
            raise ValueError(f"use_dora needs the whole weight, which init={self.init!r} takes "
                             "apart; take init='kaiming', or leave use_dora out")  # fmt: skip

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@contextmanager
def named(path: str):
    """Within the block, a ValueError begins with the path of the layer that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_adapter(layer: nn.Module, name: str, config: LoRAConfig) -> None:
    """Raises ValueError when a linear layer can't take this adapter."""
    if not name or "." in name:  # names of parameters can't hold a dot
        raise ValueError(f"adapter={name!r} must be a name without dots")
    if hasattr(nn.ParameterDict, name):  # a parameter of that name would hide it
        raise ValueError(f"adapter={name!r} is the name of a method of torch; take another")
    taken = layer.configs.get(name, config) if isinstance(layer, LoRALinear) else config
    if taken != config:
        raise ValueError(f"adapter {name!r} exists with {taken}, not {config}")
    if getattr(layer, "residual_of", None) not in (None, name):
        raise ValueError(f"the base is what init left beside adapter {layer.residual_of!r}, no "
                         "model by itself; merge that one first (merge_lora(unload=True)), or "
                         "start from a fresh model")  # fmt: skip
    check_rank(layer, config)


def check_rank(layer: nn.Module, config: LoRAConfig) -> None:
    """Raises ValueError for a rank above the layer's own."""
    shape = (layer.out_features, layer.in_features)
    if config.rank > min(shape):
        raise ValueError(f"rank={config.rank} exceeds the rank of a layer {shape}")


def check_dense(layer: nn.Module, config: LoRAConfig, spec: Spec | None) -> None:
    """Raises ValueError when a layer can't be taken apart as a LoRAConfig says."""
    init, base = config.init, getattr(layer, "base", layer)
    if init == "loftq" and spec is None:
        raise ValueError("init='loftq' needs spec=, how to quantize the base: NF4Spec(), QuantSpec")
    if getattr(layer, "configs", None):
        raise ValueError(f"init={init!r} would take the base of adapters {list(layer.configs)} "
                         "away; merge_lora(unload=True), or take a fresh model")  # fmt: skip
    if not isinstance(base, nn.Linear):
        raise ValueError(f"the layer is quantized, and init={init!r} starts from the dense weight: "
                         "load the model without quantizing it, and pass the spec here: "
                         "inject_lora(..., spec=spec)")  # fmt: skip
    if spec is None and 2 * config.rank > min(base.weight.shape):
        raise ValueError("on a dense base init='pissa' is saved as LoRA of rank "
                         f"2 r = {2 * config.rank}, which exceeds this layer's "
                         f"{tuple(base.weight.shape)}; choose a smaller rank")  # fmt: skip
    check_weight(base.weight.detach())
    if isinstance(spec, (QuantSpec, FloatSpec)):
        spec.groups(base.in_features)


class LoRALinear(nn.Module):
    """A linear layer (dense or quantized) with named adapters beside it.

    base      nn.Linear or QuantizedLinear, frozen
    lora_A    {name: (rank, in_features)}, fp32
    lora_B    {name: (out_features, rank)}, fp32
    magnitude {name: (out_features,)}, fp32, of the adapters with use_dora
    merged    None, or the layer that stands for base and adapter together
    residual_of  None, or the adapter that `take_apart` made together with the base
    start     None, or B and A at step 0 of that adapter, beside a dense base
    original  None, or a hash of the weight that was taken apart
    casts     None, or while text is decoded (`decoding_layout`), A and B in the autocast dtype
    """

    def __init__(self, base: nn.Linear | QuantizedLinear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.training = base.training  # a model in eval mode stays so
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.magnitude = nn.ParameterDict()
        self.configs: dict[str, LoRAConfig] = {}
        self.active: str | None = None
        self.merged: nn.Module | None = None
        self.residual_of: str | None = None
        self.start: tuple[Tensor, Tensor] | None = None
        self.original: str | None = None
        self.casts: dict | None = None

    def __getattr__(self, name: str):
        # No property: nn.Module would hide what its AttributeError says.
        return self._weight() if name == "weight" else super().__getattr__(name)

    def _weight(self) -> Tensor:
        """`weight` (out, in), which some models' forward reads: what a call now multiplies by.
        Raises AttributeError for a packed base, and where rows have adapters of their own."""
        name = self._choice()
        if isinstance(name, Rows):
            raise AttributeError("no single weight: use_adapter gave each row an adapter")
        if name is MERGED or name not in self.configs:
            return (self.merged if name is MERGED else self.base).weight
        config, a, b = self.configs[name], self.lora_A[name], self.lora_B[name]
        weight = self.base.weight
        moved = weight + config.scaling * (b @ a)
        if config.use_dora:
            length = weight_norm(self.base, b, a, config.scaling)
            moved = (self.magnitude[name] / length).unsqueeze(1) * moved
        return moved.to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias (out,)."""
        return self.base.bias

    def add(self, name: str, config: LoRAConfig) -> None:
        """Add an adapter, B = 0; a layer's first one is its default. Raises as check_adapter."""
        check_adapter(self, name, config)
        if name in self.configs:
            return
        device = next(t.device for t in [*self.base.parameters(), *self.base.buffers()])
        # fp32 even on a bf16 base: an update of 1e-4 would vanish in bf16's 8 bits.
        fp32 = {"dtype": torch.float32, "device": device}
        a = torch.empty(config.rank, self.in_features, **fp32)
        if config.init == "gaussian":
            nn.init.normal_(a, std=1 / config.rank)
        else:  # U(-1/sqrt(in), 1/sqrt(in)), as PEFT; LoftQ and PiSSA overwrite it
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.active = self.active if self.configs else name
        self.put(name, config, a, torch.zeros(self.out_features, config.rank, **fp32))

    @torch.no_grad()
    def take_apart(self, name: str, spec: Spec | None) -> None:
        """Split the dense base into a residual, quantized as `spec` says, and adapter `name`."""
        config, linear = self.configs[name], self.base
        split = loftq if config.init == "loftq" else pissa
        base, b, a = split(linear.weight.detach(), config.rank, spec)
        # The layer computes scaling * B A: half of 1 / scaling goes into each factor.
        root = config.scaling**-0.5
        self.lora_A[name].copy_(a * root)
        self.lora_B[name].copy_(b * root)
        if spec is None:
            linear.weight = nn.Parameter(base.to(linear.weight.dtype), requires_grad=False)
            # To say later what was learned, as an update of W: beside the model, not on its device.
            self.start = (b * root).cpu(), (a * root).cpu()
        else:
            self.base = QuantizedLinear.from_linear(linear, base)
        self.residual_of = name

    def start_from(self, name: str, b: Tensor, a: Tensor) -> None:
        """Let adapter `name` add the product B A at step 0: B (out, rank), A (rank, in)."""
        config = self.configs[name]
        root, old = config.scaling**-0.5, self.lora_A[name]
        # With use_dora the lengths are then those of the mended weight: it is what calls use.
        self.put(name, config, (a * root).to(old), (b * root).to(old))

    def put(self, name: str, config: LoRAConfig, a: Tensor, b: Tensor) -> None:
        """Store an adapter's factors as new parameters, over any that have its name."""
        self.lora_A[name], self.lora_B[name] = nn.Parameter(a), nn.Parameter(b)
        self.lay_out(decoding=self.casts is not None)  # no casts of another's
        if config.use_dora:  # with B = 0 the lengths are those of W: nothing changes at step 0
            self.magnitude[name] = nn.Parameter(weight_norm(self.base, b, a, config.scaling))
        self.configs[name] = config

    def remove(self, name: str) -> None:
        """Drop an adapter; where it was the default, the base alone is the default then."""
        for held in (self.lora_A, self.lora_B, self.magnitude, self.configs):
            if name in held:
                del held[name]
        self.active = None if self.active == name else self.active

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """A, B and, with use_dora, the magnitude of an adapter."""
        return [held[name] for held in (self.lora_A, self.lora_B, self.magnitude) if name in held]

    def delta(self, name: str, weight: Tensor | None = None) -> Tensor:
        """What the adapter adds to the base's weight: scaling * B A, fp32 (out, in). With use_dora
        it depends on the weight that it is added to, `weight` (out, in; None: the base's)."""
        config = self.configs[name]
        update = dense_update(self.lora_B[name], self.lora_A[name], config.scaling)
        if not config.use_dora:
            return update
        weight = dense_weight(self.base) if weight is None else weight
        weight = weight.detach().float().to(update.device)
        moved = weight + update
        length = moved.norm(dim=1).clamp(min=TINY)
        return (self.magnitude[name].detach() / length).unsqueeze(1) * moved - weight

    def _choice(self):
        """What a call uses: an adapter's name, None for the base alone, Rows, or MERGED."""
        choice = chosen(self)
        if choice is DEFAULT:
            return self.active if self.merged is None else MERGED
        return choice

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        choice = self._choice()
        if choice is MERGED:
            return self.merged(x)
        y = self.base(x)
        if not isinstance(choice, Rows):
            return self._adapted(choice, x, y)
        choice.check(x)
        if self._added_in_place(choice, x, y):
            return y
        return choice.join([self._adapted(name, x[rows], y[rows]) for name, rows in choice.groups])

    def _added_in_place(self, choice: Rows, x: Tensor, y: Tensor) -> bool:
        """Whether the updates were added into y itself: without gradients, in fp32, no DoRA."""
        groups = [(name, rows) for name, rows in choice.groups if name in self.configs]
        plain = x.dtype == y.dtype == torch.float32 and y.is_contiguous()
        autocast = torch.is_autocast_enabled(x.device.type)
        if torch.is_grad_enabled() or self.training or autocast or not plain:
            return False
        if any(self.configs[n].use_dora or not isinstance(rows, slice) for n, rows in groups):
            return False
        for name, rows in groups:
            h = x[rows].flatten(0, -2) @ self.lora_A[name].t()  # (rows * tokens, rank)
            part = y[rows].flatten(0, -2)  # a view
            part.addmm_(h, self.lora_B[name].t(), alpha=self.configs[name].scaling)
        return True

    def _adapted(self, name: str | None, x: Tensor, y: Tensor) -> Tensor:
        """y = base(x), with what an adapter adds."""
        if name not in self.configs:  # None, or an adapter that leaves this layer alone
            return y
        config, (a, b) = self.configs[name], self._factors(name, x.device.type)
        # Autocast casts for itself; a cast here would give every layer a copy of x to keep.
        h = x if torch.is_autocast_enabled(x.device.type) else x.to(a.dtype)
        h = nn.functional.dropout(h, config.dropout, self.training)
        h = h @ a.t()  # (..., in) -> (..., rank): thin first, B A is never formed
        if config.use_dora:
            update = config.scaling * (h @ b.t())  # (..., rank) -> (..., out)
            length = weight_norm(self.base, self.lora_B[name], self.lora_A[name], config.scaling)
            ratio = self.magnitude[name] / length  # (out,)
            product = y if self.base.bias is None else y - self.base.bias  # x W^T alone
            return y + ((ratio - 1) * product + ratio * update).to(y.dtype)
        if y.dtype != h.dtype:
            return y + (h @ (config.scaling * b).t()).to(y.dtype)
        # One operation: a product, a scaling and a sum would each pass over (tokens, out) numbers.
        flat = y.reshape(-1, len(b)), h.reshape(-1, len(a))  # (tokens, out), (tokens, rank)
        return torch.addmm(*flat, b.t(), alpha=config.scaling).view(y.shape)

    def _factors(self, name: str, device: str) -> tuple[Tensor, Tensor]:
        """A and B; while text is decoded, cast once: autocast keeps no cast of a view."""
        a, b = self.lora_A[name], self.lora_B[name]
        if self.casts is None or torch.is_grad_enabled() or not torch.is_autocast_enabled(device):
            return a, b
        dtype = torch.get_autocast_dtype(device)
        if (name, dtype) not in self.casts:
            self.casts[name, dtype] = a.to(dtype), b.to(dtype)
        return self.casts[name, dtype]

    @property
    def laid_out(self) -> bool:
        """Whether A and B are held cast."""
        return self.casts is not None

    def lay_out(self, decoding: bool) -> None:
        """Begin or end to hold A and B cast (`decoding_layout`); they must not change then."""
        self.casts = {} if decoding else None


@torch.no_grad()
def dense_update(b: Tensor, a: Tensor, scaling: float) -> Tensor:
    """scaling * B A (out, in), in the dtype of the factors, whatever autocast is on."""
    with torch.autocast(b.device.type, enabled=False):
        return scaling * (b @ a)


@torch.no_grad()
def weight_norm(base: nn.Module, b: Tensor, a: Tensor, scaling: float) -> Tensor:
    """Length of each row of W + scaling * B A, fp32 (out,): the divisor of DoRA.

    DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) trains length m and direction apart:
        W' = m (W + B A) / ||W + B A||,
    where (section 4.3) the norm counts as a constant in backward; hence no gradient here.
    """
    norms = []
    with torch.autocast(a.device.type, enabled=False):
        for rows, w in dense_pieces(base):
            norms.append(torch.addmm(w, b[rows].float(), a.float(), alpha=scaling).norm(dim=1))
    return torch.cat(norms).clamp(min=TINY)  # a row of zeros stays one


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear by its module path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def layers_with(model: nn.Module, adapter: str) -> dict[str, LoRALinear]:
    """The layers that have this adapter, by path."""
    return {path: m for path, m in lora_layers(model).items() if adapter in m.configs}


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters in the model, in the order in which they were added."""
    return list(dict.fromkeys(n for m in lora_layers(model).values() for n in m.configs))


def check_names(model: nn.Module, *names: str | None) -> None:
    """Raises ValueError for an adapter that the model does not have (None is the base)."""
    have = adapter_names(model)
    for name in names:
        if name is not None and name not in have:
            raise ValueError(f"no adapter {name!r}; the model has {have}")
