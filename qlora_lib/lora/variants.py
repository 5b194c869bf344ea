"""Variants of what is trained, and how fast: LoRA+ and PEQA. (DoRA, rsLoRA: layer.py; PiSSA,
LoftQ: init.py.)"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..layers.kernels import product, product_back
from ..layers.linear import Quantized, QuantizedLinear
from ..quant.grid import SCALE_DTYPE, QuantizedTensor, row_slices
from ..quant.nf4 import NF4Spec
from .targets import replace_module


def lora_plus_groups(parameters: dict[str, nn.Parameter], lr: float, ratio: float) -> list[dict]:
    """Parameter groups for an optimizer: B learns `ratio` times as fast as A.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4):  lr_B = ratio * lr_A. In a wide model
    one rate for both lets A or B hardly learn, as B starts at 0; the paper recommends about 16
    with lr_A small.

    parameters: by name, as `trainable_parameters` returns them. DoRA's magnitudes go with B,
    as in PEFT; all others with A. Each group has "params", "lr" and "lr_ratio", by which a
    schedule multiplies its rate. Raises ValueError for a ratio that is not above 0, and when
    there is no B.
    """
    if not 0 < ratio < float("inf"):
        raise ValueError(f"ratio={ratio} must be a number above 0; LoRA+ recommends about 16")
    fast = [n for n in parameters if ".lora_B." in f".{n}" or ".magnitude." in f".{n}"]
    if not any(".lora_B." in f".{n}" for n in fast):
        raise ValueError("there is no lora_B among the parameters; call inject_lora first")
    slow = [n for n in parameters if n not in set(fast)]
    groups = [(slow, 1.0), (fast, float(ratio))]
    return [
        {"params": [parameters[n] for n in names], "lr": lr * r, "lr_ratio": r}
        for names, r in groups
        if names
    ]


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
        grad_x = product_back(grad, ctx.weight).to(x.dtype) if ctx.needs_input_grad[0] else None
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


def check_scales_are_frozen(layers: dict[str, QuantizedLinear]) -> None:
    """Raises ValueError when scales of these layers are trained: files hold them in fp16."""
    for path, layer in layers.items():
        if isinstance(layer, PEQALinear):
            raise ValueError(f"the scales of {path} are being trained; call freeze_scales first")
