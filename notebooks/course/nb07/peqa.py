"""PEQA: no B A at all; the scales of a quantized model are trained, its codes stay."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from qlora_lib.layers.kernels import dense_matmul_back, product
from qlora_lib.layers.linear import Quantized, QuantizedLinear
from qlora_lib.lora.targets import replace_module
from qlora_lib.quant.grid import SCALE_DTYPE, QuantizedTensor, row_slices
from qlora_lib.quant.nf4 import NF4Spec


class PEQALinear(QuantizedLinear):
    """A packed layer whose scales are trained: an fp32 parameter (out_features, groups)."""

    def __init__(self, layer: QuantizedLinear):
        super().__init__(layer.quantized, layer.bias)
        self.train(layer.training)
        scale = self.scale.float()
        del self.scale  # the buffer
        self.scale = nn.Parameter(scale)

    @property
    def held(self) -> Quantized:
        held = super().held
        return replace(held, scale=held.scale.detach())

    def multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if torch.is_grad_enabled() and self.scale.requires_grad:
            return _ScaledMatmul.apply(x, self.scale, self.quantized, dtype)
        return super().multiply(x, dtype)


class _ScaledMatmul(torch.autograd.Function):
    """y = x W^T, whose backward knows the gradient of W's scales (out, groups) too."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, weight: Quantized, dtype) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return product(x, weight, dtype)  # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = dense_matmul_back(grad, ctx.weight).to(x.dtype)
        return grad_x, scale_grad(x, grad, ctx.weight), None, None


def scale_grad(x: Tensor, grad: Tensor, weight: QuantizedTensor) -> Tensor:
    """The gradient of the scales, fp32 (out, groups), where grad (..., out) is that of y = x W^T.

    With w = s (q - z), dL/ds is the sum over a group of dL/dw (q - z). x: (..., in). Computed
    some rows at a time, so that no dense gradient of the weight's size is made.
    """
    flat = x.reshape(-1, x.shape[-1]).float()  # (tokens, in)
    down = grad.reshape(-1, grad.shape[-1]).float()  # (tokens, out)
    zero, total = weight.zero_point.float(), torch.zeros_like(weight.scale, dtype=torch.float32)
    in_order = torch.arange(zero.shape[1], device=x.device)  # each group's features side by side
    in_order = in_order.repeat_interleave(weight.shape[1] // zero.shape[1])
    g_idx = in_order if weight.g_idx is None else weight.g_idx.long()
    with torch.autocast(x.device.type, enabled=False):
        for rows in row_slices(weight.shape, x.device):
            steps = weight.unpacked(rows).float() - zero[rows][:, g_idx]  # q - z, (rows, in)
            steps *= down[:, rows].t() @ flat  # dL/dw (q - z)
            total[rows] = total[rows].index_add(1, g_idx, steps)
    return total


def train_scales(model: nn.Module) -> list[str]:
    """Freeze the model and make the scales of its packed weights trainable, in fp32.

    PEQA (Kim et al. 2023, arXiv 2305.14152, eq. 2):  W = (s + ds) (q - z): the integer codes q and
    zero-points z stay, shared by all tasks; a task is its scales, one number a group. The gradient
    is dL/ds = sum over the group of dL/dW (q - z). `freeze_scales` rounds them to what is
    stored. Returns the paths of the layers; their parameters are PATH.scale, fp32
    (out_features, groups). Raises ValueError, before anything is changed, when no layer is
    quantized on a grid and when one is NF4, which has no scale of a grid.
    """
    layers = {n: m for n, m in model.named_modules() if n and isinstance(m, QuantizedLinear)}
    if not layers:
        raise ValueError("no layer is quantized; call quantize_model(model, ...) with a QuantSpec")
    for path, layer in layers.items():
        if isinstance(layer.spec, NF4Spec):
            raise ValueError(f"{path} is NF4; scales are trained on grids: quantize as a QuantSpec")
    model.requires_grad_(False)
    for path, layer in layers.items():
        replace_module(model, path, PEQALinear(layer))
    return list(layers)


@torch.no_grad()
def freeze_scales(model: nn.Module) -> list[str]:
    """Round trained scales to the fp16 in which they are stored; the layers are frozen again.

    Returns the paths of the layers. Raises ValueError, before anything is changed, when no
    layer's scales are trained, and for a scale that fp16 can't hold, too large or rounded to 0.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PEQALinear)}
    if not layers:
        raise ValueError("no layer's scales are being trained; call train_scales first")
    stored = {path: layer.scale.detach().to(SCALE_DTYPE) for path, layer in layers.items()}
    for path, scale in stored.items():
        if not scale.isfinite().all() or ((scale == 0) & (layers[path].scale != 0)).any():
            raise ValueError(f"{path}: a trained scale is beyond fp16; lower the learning rate")
    for path, layer in layers.items():
        packed = replace(layer.quantized, scale=stored[path])
        replace_module(model, path, QuantizedLinear(packed, layer.bias).train(layer.training))
    return list(layers)
