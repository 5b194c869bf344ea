"""Adam with its two moments in 8 bits: 2.03 bytes a parameter instead of 8.

Each moment is stored as 8-bit codes of the dynamic map in blocks of 256 with an absmax each, as in
bitsandbytes' AdamW8bit (Dettmers et al. 2022, arXiv 2110.02861). One rule is not theirs: a second
moment above 0 is never rounded to 0, but up to the lowest level, 3e-7 of its block's absmax: after
one much smaller gradient the first moment would be divided by next to nothing.
"""

import math
from functools import cache, partial

import torch
from torch import Tensor

from ..quant.nf4 import NESTED_BLOCK, dequantize_8bit, dynamic_map, quantize_8bit

SMALLEST = 4096  # elements; a smaller tensor keeps fp32 moments
SLICE = 2**22  # elements whose moments are fp32 at the same time; a multiple of the block
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name, and whether its map is signed


class Adam8bit(torch.optim.Optimizer):
    """AdamW (decoupled weight decay; Loshchilov and Hutter, arXiv 1711.05101), 8-bit moments.

    State of a parameter of n elements: `step` (fp32 scalar, on the CPU); `exp_avg` and
    `exp_avg_sq` (uint8 (n,)), `exp_avg_absmax` and `exp_avg_sq_absmax` (fp32 (ceil(n / 256),));
    below 4096 elements fp32 (n,) moments alone. Raises ValueError for settings out of range.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            expected = "lr >= 0, 0 <= beta < 1, eps > 0, weight_decay >= 0"
            raise ValueError(f"{settings}: expected {expected}")
        super().__init__(params, settings)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)  # which casts codes to the parameter's dtype
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, own):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[p][key] = value.clone().to("cpu" if key == "step" else p.device)

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state |= _new_state(p.numel(), p.device)
        state["step"] += 1
        flat, grad = p.reshape(-1), p.grad.reshape(-1)  # in the order of the elements
        for start in range(0, p.numel(), SLICE):
            part = slice(start, start + SLICE)
            blocks = slice(start // NESTED_BLOCK, part.stop // NESTED_BLOCK)
            m, v = (_read(state, name, part, blocks) for name in MOMENTS)
            _adamw(flat[part], grad[part].float(), m, v, int(state["step"]), group)
            for name, moment in zip(MOMENTS, (m, v)):
                _write(state, name, part, blocks, moment)
        if not p.is_contiguous():  # then `flat` may be a copy
            p.copy_(flat.view(p.shape))


def _new_state(n: int, device) -> dict[str, Tensor]:
    zeros = partial(torch.zeros, device=device)
    state = {"step": torch.zeros((), dtype=torch.float32)}
    for name in MOMENTS:
        state[name] = zeros(n, dtype=torch.uint8 if n >= SMALLEST else torch.float32)
        if n >= SMALLEST:  # an absmax of 0 makes the first decoded moments 0, whatever the codes
            state[f"{name}_absmax"] = zeros(math.ceil(n / NESTED_BLOCK), dtype=torch.float32)
    return state


def _read(state: dict, name: str, part: slice, blocks: slice) -> Tensor:
    """Moments of a slice in fp32; a view where they are stored so."""
    if state[name].dtype == torch.float32:
        return state[name][part]
    absmax = state[f"{name}_absmax"][blocks]
    return dequantize_8bit(state[name][part], absmax, _levels(name, absmax.device))


def _write(state: dict, name: str, part: slice, blocks: slice, moment: Tensor) -> None:
    if state[name].dtype == torch.float32:
        return  # was updated in place
    codes, absmax = quantize_8bit(moment, _levels(name, moment.device))
    if name == "exp_avg_sq":
        codes = torch.where(moment > 0, codes.clamp(min=1), codes)
    state[name][part] = codes
    state[f"{name}_absmax"][blocks] = absmax


@cache
def _levels(name: str, device: torch.device) -> Tensor:
    return dynamic_map(MOMENTS[name]).to(device)


def _adamw(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, group: dict) -> None:
    """Update moments (fp32) and parameter in place; grad fp32, all (elements,)."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    spread = (v.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
    new = p.float()  # p itself, unless p is of 16 bits
    new.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, spread, value=-lr / (1 - beta1**step))
    p.copy_(new)
