"""QuantizedLinear: a linear layer that keeps its weight packed, in forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor, nn

from ..quant.grid import row_slices
from ..quant.recipe import Quantized, Spec
from .fragments import Fragments
from .kernels import (
    HeldDense,
    Int4Tiles,
    dense_matmul_back,
    laid_out,
    matmul,
    product,
    serves_few,
)
from .shared_input import SharedInput, share_inputs

TILED = (Int4Tiles, Fragments)  # the layouts of `decoding_layout`
HELD_BYTES = 2**26  # of dense weights that a small model may hold beside its packed ones


class _DequantizedMatmul(torch.autograd.Function):
    """y = x W^T with W dequantized for the product, and again for its gradient: F.linear would
    save the dense W for backward, here autograd saves nothing that the layer does not hold."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Quantized, dtype) -> Tensor:
        ctx.weight, ctx.x_dtype = weight, x.dtype
        return product(x, weight, dtype)  # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # dL/dx = dL/dy W; the weight is frozen and gets no gradient.
        return dense_matmul_back(grad, ctx.weight).to(ctx.x_dtype), None, None


class WeightRead(AttributeError, ValueError):
    """A model reads the weight of a layer that keeps none, instead of calling the layer."""


class QuantizedLinear(nn.Module):
    """A drop-in for nn.Linear with a frozen, packed weight.

    Its buffers are the tensors of the quantized weight (`codes`, `scale`, ...), which `.to(dtype)`
    and `.half()` leave as they are. Computes in the autocast dtype where autocast is on, else in
    the dtype of its input. Within `decoding_layout` only the buffers lie in another order. Raises
    ValueError for a packed weight whose tensors do not fit each other or mean nothing.
    """

    def __init__(self, quantized: Quantized, bias: Tensor | None = None):
        super().__init__()
        quantized.check()
        self.spec: Spec = quantized.spec
        self.out_features, self.in_features = quantized.shape
        self._kind = type(quantized)
        self._packed = [f.name for f in fields(quantized) if f.name not in ("shape", "spec")]
        for name in self._packed:
            self.register_buffer(name, getattr(quantized, name))
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("op_grids", None, persistent=False)  # see decoding_layout
        self.dense: HeldDense | None = None  # see held_dense
        self.shared: SharedInput | None = None  # see decoding_layout

    def __getattr__(self, name: str):
        if name == "weight":  # some models' forward reads it
            raise WeightRead("a QuantizedLinear keeps no dense weight; dequantize() makes it. "
                             "Leave layers that are read so out of target_modules")  # fmt: skip
        return super().__getattr__(name)

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantized: Quantized) -> "QuantizedLinear":
        """The layer with a linear layer's bias. Raises ValueError if shapes differ."""
        shape = (linear.out_features, linear.in_features)
        if tuple(quantized.shape) != shape:
            raise ValueError(f"the layer is {shape}, the quantized weight {tuple(quantized.shape)}")
        return cls(quantized, linear.bias)

    @property
    def held(self) -> Quantized:
        """The packed weight as this layer's buffers hold it; no copy."""
        known = {name: getattr(self, name) for name in self._packed}
        known |= {"shape": torch.Size((self.out_features, self.in_features)), "spec": self.spec}
        if known["codes"].dim() == 3:  # the codes tell their own layout: 3 axes are tiles
            kind = Fragments if known["codes"].dtype == torch.int32 else Int4Tiles
            return kind(**known, op_grids=self.op_grids)
        return self._kind(**known)

    @property
    def quantized(self) -> Quantized:
        """The packed weight; a view on the buffers, or a copy in `decoding_layout`."""
        held = self.held
        return held.in_order() if isinstance(held, TILED) else held

    @property
    def laid_out(self) -> bool:
        """Whether the codes are in the order in which a few tokens are fast."""
        return self.op_grids is not None

    @torch.inference_mode(False)  # buffers must not become inference tensors
    def lay_out(self, decoding: bool) -> None:
        """Change between the two layouts of the codes, where there are two for this weight."""
        held = self.held
        if decoding and not isinstance(held, TILED) and (tiled := laid_out(held)) is not None:
            self.op_grids, self.codes = tiled.op_grids, tiled.codes
        elif not decoding and isinstance(held, TILED):
            self.codes, self.op_grids, self.shared = held.in_order().codes, None, None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense weight (out_features, in_features), made anew at each call."""
        return self.held.dequantize(dtype)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """A frozen nn.Linear that holds the dequantized weight."""
        return frozen_linear(self.dequantize(dtype), self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, as held, and the bias."""
        return self.held.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        y = self.multiply(x, torch.get_autocast_dtype(kind) if autocast else x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (..., in_features) @ W^T -> (..., out_features), computed in `dtype`."""
        weight = self.dense if self.dense and dtype == torch.float32 else self.held
        if torch.is_grad_enabled() and x.requires_grad:
            return _DequantizedMatmul.apply(x, weight, dtype)
        if self.shared and serves_few(x, weight, dtype):
            if (y := self.shared.product(self, x, dtype)) is not None:
                return y
        return matmul(x, weight, dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "codes"] = self.quantized.codes

    def _load_from_state_dict(self, *args):
        self.lay_out(decoding=False)
        self.dense = None
        super()._load_from_state_dict(*args)

    def _apply(self, fn, recurse=True):
        self.lay_out(decoding=False)  # tiles are for one device
        self.dense = None
        # .half() and .to(dtype) cast all floating-point tensors of a module, but the scales were
        # rounded to their dtype before the codes were computed: move them, never cast.
        packed = {id(getattr(self, name)) for name in self._packed}

        def move(t: Tensor) -> Tensor:
            new = fn(t)
            return t.to(new.device) if id(t) in packed and new.dtype != t.dtype else new

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec}"


def check_scales_are_frozen(layers: dict[str, QuantizedLinear]) -> None:
    """Raises ValueError when scales of these layers are trained, which files hold in fp16, or codes
    are moved by an adapter, which they do not hold."""
    for path, layer in layers.items():
        trained = {name for name, _ in layer.named_parameters()}
        if "scale" in trained:
            raise ValueError(f"the scales of {path} are being trained; call freeze_scales first")
        if trained:
            raise ValueError(f"the codes of {path} are being moved; call merge_on_grid first")


def frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear that holds this weight (out, in), and a copy of the bias in its dtype."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        bias = bias.detach().to(weight.dtype, copy=True)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def dense_weight(layer: nn.Linear | QuantizedLinear) -> Tensor:
    """The dense fp32 weight (out, in) of a linear layer; of a dense fp32 one a view."""
    packed = isinstance(layer, QuantizedLinear)
    return layer.dequantize() if packed else layer.weight.detach().float()


def dense_pieces(layer: nn.Linear | QuantizedLinear) -> Iterator[tuple[slice, Tensor]]:
    """The dense fp32 weight of a linear layer, some rows at a time: which, and (rows, in)."""
    if isinstance(layer, QuantizedLinear):
        yield from layer.held.pieces(torch.float32)
    else:
        for rows in row_slices(layer.weight.shape, layer.weight.device):
            yield rows, layer.weight.detach()[rows].float()


@contextmanager
def decoding_layout(model: nn.Module):
    """Within it, a few tokens at a time in bf16, without gradients, are several times as fast; on a
    GPU in fp16 too.

    4-bit grids that torch's int4 operator can serve on a CPU, or our Triton kernel on a GPU (groups
    in order, of 32 to 256 features or a multiple of 32) then hold their codes in its layout, and
    adapters a copy of A and B in the autocast dtype. On a GPU q, k and v, and gate and up, are
    multiplied in one launch. May be nested: the layers change when the outermost block begins and
    ends.
    """
    layers = [m for m in model.modules() if hasattr(m, "lay_out") and not m.laid_out]
    try:
        for layer in layers:
            layer.lay_out(decoding=True)
        packed = {path.removesuffix(".base"): m for path, m in model.named_modules()
                  if isinstance(m, QuantizedLinear) and m.shared is None}  # fmt: skip
        share_inputs(packed)
        yield model
    finally:
        for layer in layers:
            layer.lay_out(decoding=False)


@contextmanager
def held_dense(model: nn.Module):
    """Within it, a small model on a CPU is up to a third faster in fp32: where they take at most
    HELD_BYTES together, its packed layers hold their dense weights too, which every product would
    make anew. Products are the same to the bit; weights must not change meanwhile."""
    packed = (m for m in model.modules() if isinstance(m, QuantizedLinear))
    layers = [m for m in packed if not any(True for _ in m.parameters())]  # no trained scales
    nbytes = sum(4 * layer.out_features * layer.in_features for layer in layers)
    if nbytes > HELD_BYTES or any(layer.codes.device.type != "cpu" for layer in layers):
        layers = []
    layers = [layer for layer in layers if layer.dense is None]  # else the caller holds them
    try:
        for layer in layers:
            layer.dense = HeldDense(layer.held)
        yield model
    finally:
        for layer in layers:
            layer.dense = None
