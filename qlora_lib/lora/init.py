"""Adapters that start from the base: LoftQ and PiSSA.

Plain LoRA starts at B = 0 and leaves the base alone. These two take the dense weight W apart,
    W  ~  base + B A,      B (out, r), A (r, in), from the largest singular triplets,
so that the adapter holds from step 0 what matters most in W (PiSSA), or in the error that
quantization makes (LoftQ). The base is then a residual: without its adapter it is no model
that anybody trained, and no other adapter fits it.
"""

import hashlib

import torch
from torch import Tensor, nn

from ..layers.linear import Quantized, QuantizedLinear
from ..quant.grid import QuantSpec, check_weight, quantize_rtn
from ..quant.nf4 import NF4Spec, quantize_nf4

RESIDUAL_INITS = ("loftq", "pissa")
LOFTQ_STEPS = 5  # T of the paper's experiments


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best B A of this rank (Eckart-Young): fp32 B (out, rank) and A (rank, in).

    U sqrt(S) and sqrt(S) V^T of the largest singular values: both factors of one size.
    """
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)  # (out, k), (k,), (k, in)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]


def pissa(
    weight: Tensor, rank: int, spec: QuantSpec | NF4Spec | None = None
) -> tuple[Tensor | Quantized, Tensor, Tensor]:
    """PiSSA (Meng et al. 2024, arXiv 2404.02948, eq. 2-4): B A is the principal part of W.

    weight (out, in). Returns (base, B, A): the residual W - B A, dense fp32, or quantized
    as `spec` says (QPiSSA: without its largest directions W has a smaller range, and is
    rounded less).
    """
    b, a = low_rank(weight.detach(), rank)
    with torch.autocast(weight.device.type, enabled=False):
        residual = weight.detach().float() - b @ a
    return residual if spec is None else _quantize(residual, spec), b, a


def loftq(
    weight: Tensor, rank: int, spec: QuantSpec | NF4Spec, steps: int = LOFTQ_STEPS
) -> tuple[Quantized, Tensor, Tensor]:
    """LoftQ (Li et al. 2023, arXiv 2310.08659, Algorithm 1): B A mends what rounding breaks.

    weight (out, in). Alternates Q = quantize(W - B A) and B A = low_rank(W - Q), `steps`
    times from B A = 0. Returns (Q, B, A).
    """
    w, product = weight.detach().float(), 0
    with torch.autocast(w.device.type, enabled=False):
        for _ in range(steps):
            base = _quantize(w - product, spec)
            b, a = low_rank(w - base.dequantize(), rank)
            product = b @ a
    return base, b, a


def check_dense(path: str, layer: nn.Module, config, spec: QuantSpec | NF4Spec | None) -> None:
    """Raises ValueError when a layer can't be taken apart as a LoRAConfig says."""
    init, rank = config.init, config.rank
    if config.scaling <= 0:
        raise ValueError(f"alpha={config.alpha} with init={init!r}: scaling * B A needs alpha > 0")
    if init == "loftq" and spec is None:
        raise ValueError("init='loftq' needs spec=, how to quantize the base: NF4Spec(), QuantSpec")
    if getattr(layer, "configs", None):
        raise ValueError(
            f"{path} has adapters {list(layer.configs)}, and init={init!r} would take their base "
            "away; merge_lora(unload=True) first, or start from a fresh model"
        )
    base = getattr(layer, "base", layer)
    if not isinstance(base, nn.Linear):
        raise ValueError(
            f"{path} is quantized, and init={init!r} starts from the dense weight: load the model "
            "without quantizing it, and pass the spec here: inject_lora(..., spec=spec)"
        )
    if spec is None and 2 * rank > min(base.weight.shape):
        raise ValueError(
            f"{path} {tuple(base.weight.shape)}: on a dense base init='pissa' is saved as LoRA of "
            f"rank 2 r = {2 * rank}, which exceeds this layer's; choose a smaller rank"
        )
    try:
        check_weight(base.weight.detach())
        if isinstance(spec, QuantSpec):
            spec.groups(base.in_features)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@torch.no_grad()
def start_from_base(layer: nn.Module, name: str, spec: QuantSpec | NF4Spec | None) -> None:
    """Take a LoRALinear's dense base apart, into a residual base and its adapter `name`."""
    config, linear = layer.configs[name], layer.base
    take_apart = loftq if config.init == "loftq" else pissa
    base, b, a = take_apart(linear.weight.detach(), config.rank, spec)
    # The layer computes scaling * B A: half of 1 / scaling goes into each factor.
    root = config.scaling**-0.5
    layer.lora_A[name].copy_(a * root)
    layer.lora_B[name].copy_(b * root)
    if spec is None:
        linear.weight = nn.Parameter(base.to(linear.weight.dtype), requires_grad=False)
        # To say later what was learned, as an update of W: beside the model, not on its device.
        layer.start = (b * root).cpu(), (a * root).cpu()
    else:
        layer.base = QuantizedLinear.from_linear(linear, base)
    layer.residual_of = name


def residual_fingerprint(layers: dict[str, nn.Module]) -> str:
    """A hash of the packed weights of these layers, by path; "dense" where one is not packed."""
    digest = hashlib.sha256()
    for path, layer in sorted(layers.items()):
        base = getattr(layer, "base", layer)
        if not isinstance(base, QuantizedLinear):
            return "dense"
        digest.update(f"{path}{base.spec}".encode())
        for name, tensor in base.named_buffers():
            if name == "bias":  # it takes the dtype of the model
                continue
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _quantize(weight: Tensor, spec: QuantSpec | NF4Spec) -> Quantized:
    if isinstance(spec, NF4Spec):
        return quantize_nf4(weight, spec.block_size, spec.double_quant)
    return quantize_rtn(weight, spec)
