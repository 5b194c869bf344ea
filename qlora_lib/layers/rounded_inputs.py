"""Linear layers whose inputs are rounded too: W8A8, W4A4, measured without kernels for them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ..quant.fp4 import BLOCK_SIZES, FP4Spec, quantize_fp4
from ..quant.grid import quantize_activations
from ..quant.minifloat import decode_float, quantize_fp8
from .blocks import decoder_blocks
from .linear import QuantizedLinear

FLOATS = ("e4m3", "e5m2", *BLOCK_SIZES)  # of 8 bits a scale a token, of 4 bits a scale a block


@contextmanager
def rounded_inputs(model: nn.Module, bits: int = 8, how: str = "int") -> Iterator[nn.Module]:
    """Within it, each linear layer of the decoder blocks, dense or packed, takes its input rounded,
    and computes the product of the rounded numbers; an adapter sees the input as it is.

    how: "int", an asymmetric grid of 2**bits levels a token; "e4m3" or "e5m2", a scale a token;
    "mxfp4" or "nvfp4", a scale for each block of 32 or 16 features. Floats have bits of their own.
    Raises ValueError for another `how`, and for blocks that do not divide an input."""
    if how not in ("int", *FLOATS):
        raise ValueError(f"how={how!r} must be one of int, {', '.join(FLOATS)}")

    def round_input(_, args):
        return (rounded_tokens(args[0], bits, how), *args[1:])

    path, blocks = decoder_blocks(model)
    with ExitStack() as hooks:
        for module in blocks.modules():
            if isinstance(module, (nn.Linear, QuantizedLinear)):
                hooks.enter_context(module.register_forward_pre_hook(round_input))
        yield model


def rounded_tokens(x: Tensor, bits: int = 8, how: str = "int") -> Tensor:
    """x (..., in_features), rounded as rounded_inputs says, in its own dtype."""
    tokens = x.detach().reshape(-1, x.shape[-1])
    if how == "int":
        codes, scale, zero = quantize_activations(tokens, bits)
        y = scale * (codes - zero)
    elif how in BLOCK_SIZES:
        y = quantize_fp4(tokens, FP4Spec(how)).dequantize()
    else:
        codes, scale = quantize_fp8(tokens, how)
        y = decode_float(codes, how) * scale
    return y.view(x.shape).to(x.dtype)
