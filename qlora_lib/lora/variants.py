"""Variants of what is trained, and how fast: LoRA+ and PEQA. (DoRA, rsLoRA: lora_layer.py;
PiSSA, LoftQ: lora_init.py.)"""

import torch
from torch import nn

from ..layers.linear import QuantizedLinear
from ..quant.grid import SCALE_DTYPE
from ..quant.nf4 import NF4Spec


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


def train_scales(model: nn.Module) -> list[str]:
    """Freeze the model and make the scales of its packed weights trainable, in fp32.

    PEQA (Kim et al. 2023, arXiv 2305.14152, eq. 2):  W = (s + ds) (q - z): the integer codes q and
    zero-points z stay, shared by all tasks; a task is its scales, one number a group. The gradient
    is dL/ds = sum over the group of dL/dW (q - z). `freeze_scales` rounds them to what is
    stored. Returns the paths of the layers; their parameters are PATH.scale, fp32
    (out_features, groups). Raises ValueError, before anything is changed, when no layer is
    quantized on a grid and when one is NF4, which has no scale of a grid.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not layers:
        raise ValueError("no layer is quantized; call quantize_model(model, ...) with a QuantSpec")
    for path, layer in layers.items():
        if isinstance(layer.spec, NF4Spec):
            raise ValueError(f"{path} is NF4; scales are trained on grids: quantize as a QuantSpec")
    model.requires_grad_(False)
    for layer in layers.values():
        scale = layer.scale.detach().float()
        layer.hold_tiles(False)
        del layer.scale
        layer.scale = nn.Parameter(scale)
    return list(layers)


@torch.no_grad()
def freeze_scales(model: nn.Module) -> list[str]:
    """Round trained scales to the fp16 in which they are stored; the layers are frozen again.

    Returns the paths of the layers. Raises ValueError, before anything is changed, when no
    layer's scales are trained, and for a scale that fp16 can't hold, too large or rounded to 0.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    layers = {n: m for n, m in layers.items() if isinstance(getattr(m, "scale", 0), nn.Parameter)}
    if not layers:
        raise ValueError("no layer's scales are being trained; call train_scales first")
    stored = {path: layer.scale.detach().to(SCALE_DTYPE) for path, layer in layers.items()}
    for path, scale in stored.items():
        if not scale.isfinite().all() or ((scale == 0) & (layers[path].scale != 0)).any():
            raise ValueError(f"{path}: a trained scale is beyond fp16; lower the learning rate")
    for path, layer in layers.items():
        del layer.scale
        layer.register_buffer("scale", stored[path])
    return list(layers)


def check_scales_are_frozen(layers: dict[str, QuantizedLinear]) -> None:
    """Raises ValueError when scales of these layers are trained: files hold them in fp16."""
    for path, layer in layers.items():
        if isinstance(getattr(layer, "scale", None), nn.Parameter):
            raise ValueError(f"the scales of {path} are being trained; call freeze_scales first")
