"""An adapter that is trained on the base's grid, and merges into it without loss.

The layer multiplies by what would be stored after a merge: the base's codes, moved by the update
and rounded again, with its own scales and zero-points,
    W' = scale * (clamp(round(q + scaling * B A / scale), 0, 2**bits - 1) - zero_point).
So training knows what rounding makes of the update (LR-QAT, Bondarenko et al. 2024, arXiv
2406.06385; L4Q, Jeon et al. 2024, arXiv 2402.04902, also trains the scales). Rounding has the
gradient of the identity (straight-through, Bengio et al. 2013, arXiv 1308.3432), and a weight that
is clamped has none. Every call makes the packed weight anew, and backward one dense gradient of a
weight's size: training takes more time and memory than LoRA's, the merged model neither.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..layers.kernels import dense_matmul_back, product
from ..layers.linear import QuantizedLinear
from ..quant.grid import QuantizedTensor, QuantSpec, assemble, spread
from .layer import LoRAConfig, check_rank, named
from .targets import ATTENTION, find_linears, replace_module


class OnGridLinear(QuantizedLinear):
    """A packed layer whose codes are moved by lora_B (out, rank) times lora_A (rank, in), fp32.

    `quantized` is the base, which stays; `moved` what a call multiplies by."""

    def __init__(self, layer: QuantizedLinear, config: LoRAConfig):
        super().__init__(layer.quantized, layer.bias)
        self.train(layer.training)
        self.config = config
        fp32 = {"dtype": torch.float32, "device": self.codes.device}
        self.lora_A = nn.Parameter(torch.empty(config.rank, self.in_features, **fp32))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.rank, **fp32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def update(self) -> Tensor:
        """scaling * B A (out, in): what the weight shall change by before it is rounded."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.config.scaling * (self.lora_B @ self.lora_A)

    @property
    def moved(self) -> QuantizedTensor:
        """The packed weight that a call multiplies by, and `merge_on_grid` leaves."""
        return move_codes(self.quantized, self.update().detach())[0]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.moved.dequantize(dtype)

    def multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return _OnGridMatmul.apply(x, self.update(), self.quantized, dtype)


class _OnGridMatmul(torch.autograd.Function):
    """y = x W'^T, whose backward takes rounding for the identity."""

    @staticmethod
    def forward(ctx, x: Tensor, update: Tensor, base: QuantizedTensor, dtype) -> Tensor:
        ctx.weight, inside = move_codes(base, update)
        ctx.save_for_backward(x, inside)
        return product(x, ctx.weight, dtype)  # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, inside = ctx.saved_tensors
        grad_x = dense_matmul_back(grad, ctx.weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        down = grad.reshape(-1, grad.shape[-1]).float()  # (tokens, out)
        with torch.autocast(x.device.type, enabled=False):
            of_weight = down.t() @ x.reshape(-1, x.shape[-1]).float()  # (out, in)
        return grad_x, of_weight * inside, None, None


def move_codes(base: QuantizedTensor, update: Tensor) -> tuple[QuantizedTensor, Tensor]:
    """The packed weight whose codes are those of `base`, moved by update (out, in) in the weight's
    units and rounded; and where it lies on the grid, bool (out, in): not beyond its ends."""
    wanted = base.unpacked(slice(None)).float() + update / spread(base.scale.float(), base)
    codes = wanted.round()
    kept = codes.clamp(0, base.spec.max_code)
    new = assemble(kept, base.scale, base.zero_point, base.g_idx, base.spec)
    return replace(new, scale=base.scale), codes == kept


def inject_on_grid(
    model: nn.Module, target_modules=ATTENTION, rank: int = 8, alpha: float = 16
) -> list[str]:
    """Freeze a quantized model and let adapters move the codes of its target layers; returns their
    paths. Logits do not change, as B = 0. Train it as with `inject_lora`; `merge_on_grid` leaves a
    quantized model, which alone can be saved. Raises ValueError, before anything is changed, for
    targets that match nothing, a layer that is not packed on a grid, and a rank out of range."""
    config, found = LoRAConfig(rank, alpha), find_linears(model, target_modules)
    for path, layer in found.items():
        with named(path):
            if type(layer) is not QuantizedLinear or not isinstance(layer.spec, QuantSpec):
                raise ValueError(f"codes are moved on a grid, and the layer is {type(layer).__name__}; "
                                 "quantize the model as a QuantSpec, without adapters")  # fmt: skip
            check_rank(layer, config)
    model.requires_grad_(False)
    for path, layer in found.items():
        replace_module(model, path, OnGridLinear(layer, config))
    return list(found)


def merge_on_grid(model: nn.Module) -> dict[str, float]:
    """Leave the packed weights that the layers of `inject_on_grid` multiply by: the same logits, to
    the bit. Returns the share of codes that moved, by path; ValueError without such layers."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, OnGridLinear)}
    if not layers:
        raise ValueError("no layer's codes are being moved; call inject_on_grid first")
    shares = {}
    for path, layer in layers.items():
        moved, everything = layer.moved, slice(None)
        differ = moved.unpacked(everything) != layer.quantized.unpacked(everything)
        shares[path] = float(differ.float().mean())
        new = QuantizedLinear(moved, layer.bias).train(layer.training)
        replace_module(model, path, new)
    return shares
