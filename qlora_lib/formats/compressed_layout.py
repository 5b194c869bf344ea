"""One layer as compressed-tensors stores it, to and from a packed weight.

A layer P with K inputs and N outputs is stored as
    P.weight_packed        uint8 (N, K / 2)          FP4: two codes a byte, the first one low
                           int32 (N, K * bits / 32)  integer grids: codes, packed along the inputs
    P.weight               E4M3 (N, K)               FP8
    P.weight_scale         uint8 (N, K / 32)         MXFP4: exponents, of 2**(scale - 127)
                           E4M3 (N, K / 16)          NVFP4
                           fp32 (N, 1)               FP8
                           fp16 (N, groups)          grids
    P.weight_global_scale  fp32 (1,)                 NVFP4: what the scales are divided by
    P.weight_shape         int64 (2,)                grids: N, K
These are the bytes of an FP4Tensor and an FP8Tensor as they are, of a QuantizedTensor as words.
(compressed-tensors 0.20.1: compressors/nvfp4, mxfp4, naive_quantized, pack_quantized.) Grids with
zero-points of their own are refused: the layout has them, but transformers 5.23 expects them
unpacked and fails.
"""

import torch
from torch import Tensor

from ..lora.layer import named
from ..quant.fp4 import FP4Spec, FP4Tensor
from ..quant.fp8 import FP8Spec, FP8Tensor
from ..quant.grid import QuantizedTensor, QuantSpec
from ..quant.packing import as_bytes, as_words
from ..quant.recipe import Quantized, Spec

# What quantization_config calls the layout, by a float spec's format
FORMATS = {
    "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "e4m3": "float-quantized",
}  # fmt: skip
GRIDS = "pack-quantized"  # of a QuantSpec


def check_grid(shape: torch.Size, spec: QuantSpec) -> None:
    """Raise ValueError for a grid that this layout can't hold here, so that all readers read it."""
    if not spec.symmetric:
        raise ValueError("compressed-tensors takes symmetric grids here; quantize with "
                         "QuantSpec(symmetric=True), or export_gptq this model")  # fmt: skip
    if shape[1] * spec.bits % 32:
        raise ValueError(f"codes of {spec.bits} bits of {shape[1]} inputs fill no whole words of "
                         "32 bits; leave this layer dense")  # fmt: skip


def to_compressed(path: str, quantized: Quantized) -> dict[str, Tensor]:
    """Return the tensors of a layer by what follows its path, contiguous, on the CPU: the very
    weights of `quantized`. Raises ValueError, naming the layer, for what can't be stored so."""
    spec = quantized.spec
    if isinstance(quantized, FP4Tensor):
        tensors = {"weight_packed": quantized.codes, "weight_scale": quantized.scale}
        if spec.format == "nvfp4":
            tensors["weight_scale"] = quantized.scale.view(torch.float8_e4m3fn)
            tensors["weight_global_scale"] = quantized.tensor_scale.view(1)
    elif isinstance(quantized, FP8Tensor):
        weight = quantized.codes.view(torch.float8_e4m3fn)
        tensors = {"weight": weight, "weight_scale": quantized.scale}
    else:
        with named(path):
            check_grid(quantized.shape, spec)
            if quantized.g_idx is not None:
                raise ValueError("compressed-tensors keeps groups in order; quantize with "
                                 "static_groups=True, or desc_act=False")  # fmt: skip
            if (quantized.zero_point != 2 ** (spec.bits - 1)).any():
                raise ValueError(f"symmetric grids have the zero-point {2 ** (spec.bits - 1)}")
        tensors = {
            "weight_packed": as_words(quantized.codes),
            "weight_scale": quantized.scale,
            "weight_shape": torch.tensor(quantized.shape),
        }
    return {name: t.cpu().contiguous() for name, t in tensors.items()}


def from_compressed(
    path: str, tensors: dict[str, Tensor], shape: torch.Size, spec: Spec
) -> Quantized:
    """Return the weight of `shape` (out, in) that a layer's tensors hold: the inverse of
    `to_compressed`. Raises ValueError, naming the tensor, for what is missing, misshapen or means
    nothing."""
    with named(path):
        wanted = _expected(shape, spec)
        for name, (dtype, size) in wanted.items():
            got = tensors.get(name)
            if got is None:
                raise ValueError(f"{name} is missing; export the checkpoint again")
            fits = got.dtype == dtype or dtype == torch.float16 and got.is_floating_point()
            if tuple(got.shape) != size or not fits:
                raise ValueError(f"{name} is {got.dtype} {tuple(got.shape)}, expected {dtype} "
                                 f"{size}; does config.json belong to these weights?")  # fmt: skip
        if other := sorted(tensors.keys() - wanted.keys()):
            raise ValueError(f"{other[0]} is not expected for {spec}")
        make = {FP4Spec: _fp4, FP8Spec: _fp8, QuantSpec: _grid}[type(spec)]
        quantized = make(tensors, torch.Size(shape), spec)
        quantized.check()
    return quantized


def _expected(shape: torch.Size, spec: Spec) -> dict[str, tuple]:
    """Return dtype and shape of each tensor of a layer."""
    out, n = shape
    groups = spec.groups(n)
    if isinstance(spec, FP4Spec):
        scale = torch.float8_e4m3fn if spec.format == "nvfp4" else torch.uint8
        wanted = {"weight_packed": (torch.uint8, (out, n // 2))}
        wanted["weight_scale"] = (scale, (out, groups))
        if spec.format == "nvfp4":
            wanted["weight_global_scale"] = (torch.float32, (1,))
        return wanted
    if isinstance(spec, FP8Spec):
        scale = (torch.float32, (out, groups))
        return {"weight": (torch.float8_e4m3fn, (out, n)), "weight_scale": scale}
    check_grid(shape, spec)
    return {
        "weight_packed": (torch.int32, (out, n * spec.bits // 32)),
        "weight_scale": (torch.float16, (out, groups)),
        "weight_shape": (torch.int64, (2,)),
    }


def _fp4(tensors: dict[str, Tensor], shape: torch.Size, spec: FP4Spec) -> FP4Tensor:
    whole = tensors.get("weight_global_scale")
    whole = None if whole is None else whole.view(())
    scale = tensors["weight_scale"].view(torch.uint8)
    return FP4Tensor(tensors["weight_packed"], scale, whole, shape, spec)


def _fp8(tensors: dict[str, Tensor], shape: torch.Size, spec: FP8Spec) -> FP8Tensor:
    return FP8Tensor(tensors["weight"].view(torch.uint8), tensors["weight_scale"], shape, spec)


def _grid(tensors: dict[str, Tensor], shape: torch.Size, spec: QuantSpec) -> QuantizedTensor:
    if tensors["weight_shape"].tolist() != list(shape):
        said = tensors["weight_shape"].tolist()
        raise ValueError(f"weight_shape is {said}, the layer of config.json {list(shape)}")
    scale = tensors["weight_scale"]
    zero = torch.full(scale.shape, 2 ** (spec.bits - 1), dtype=torch.uint8)
    return QuantizedTensor(as_bytes(tensors["weight_packed"]), scale, zero, None, shape, spec)
