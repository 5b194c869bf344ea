"""QuantizedLinear: a linear layer that keeps its weight packed, in forward and backward."""

import torch
from torch import Tensor, nn

from .grid import QuantizedTensor, QuantSpec
from .nf4 import NF4Spec, NF4Tensor

Quantized = QuantizedTensor | NF4Tensor


class _DequantizedMatmul(torch.autograd.Function):
    """y = x W^T with W dequantized for the product, and again for its gradient.

    F.linear would save the dense W for backward: one full-precision weight a layer, alive
    from the forward pass to the backward pass, and the memory saving is gone. Here
    autograd saves nothing but the packed tensor that the layer holds anyway.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Quantized, dtype: torch.dtype) -> Tensor:
        ctx.weight, ctx.x_dtype = weight, x.dtype
        return x.to(dtype) @ weight.dequantize(dtype).t()  # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # dL/dx = dL/dy W; the weight is frozen and gets no gradient.
        grad_x = grad @ ctx.weight.dequantize(grad.dtype)  # (..., out) -> (..., in)
        return grad_x.to(ctx.x_dtype), None, None


class QuantizedLinear(nn.Module):
    """A drop-in for nn.Linear with a frozen, packed weight.

    Its buffers are the tensors of the quantized weight (`codes`, `scale`, ...), so that
    state_dict, .to(device) and safetensors see exactly what is stored. Computes in the
    autocast dtype where autocast is on, else in the dtype of its input. `.to(dtype)` and
    `.half()` leave the packed weight as it is.
    """

    def __init__(self, quantized: Quantized, bias: Tensor | None = None):
        super().__init__()
        self.spec: QuantSpec | NF4Spec = quantized.spec
        self.out_features, self.in_features = quantized.shape
        self._kind = type(quantized)
        for name in self._tensor_names():
            self.register_buffer(name, getattr(quantized, name))
        self.register_buffer("bias", bias)

    def _tensor_names(self) -> tuple[str, ...]:
        if self._kind is QuantizedTensor:
            return ("codes", "scale", "zero_point", "g_idx")
        return ("codes", "absmax", "nested_absmax", "offset")

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantized: Quantized) -> "QuantizedLinear":
        """Take over a linear layer's bias and shape; raises ValueError if shapes differ."""
        shape = (linear.out_features, linear.in_features)
        if tuple(quantized.shape) != shape:
            raise ValueError(f"the layer is {shape}, the quantized weight {tuple(quantized.shape)}")
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(quantized, bias)

    @property
    def quantized(self) -> Quantized:
        """The packed weight; a view on this layer's buffers, no copy."""
        tensors = {name: getattr(self, name) for name in self._tensor_names()}
        shape = torch.Size((self.out_features, self.in_features))
        return self._kind(**tensors, shape=shape, spec=self.spec)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense weight (out_features, in_features), made anew at each call."""
        return self.quantized.dequantize(dtype)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """A frozen nn.Linear that holds the dequantized weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and the bias."""
        return self.quantized.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        kind, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        y = _DequantizedMatmul.apply(x, self.quantized, dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse=True):
        # .half() and .to(dtype) cast every floating-point buffer, but the scales were
        # rounded to their dtype before the codes were computed: move them, never cast.
        kept = {name: getattr(self, name) for name in self._tensor_names()}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec}"
