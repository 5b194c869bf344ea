"""Linear layers whose inputs are rounded too: W8A8, W4A4, measured without integer kernels."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ..quant.grid import quantize_activations
from .blocks import decoder_blocks
from .linear import QuantizedLinear


@contextmanager
def rounded_inputs(model: nn.Module, bits: int = 8, how: str = "int") -> Iterator[nn.Module]:
    """Within it, each linear layer of the decoder blocks, dense or packed, takes its input rounded
    token by token, to the levels of an asymmetric grid of 2**bits ("int"); what it computes is the
    product of the rounded numbers. The weight of an adapter sees the input as it is. Raises
    ValueError for another `how`."""
    if how != "int":
        raise ValueError(f"how={how!r} must be 'int'")

    def round_input(_, args):
        return (rounded_tokens(args[0], bits), *args[1:])

    path, blocks = decoder_blocks(model)
    with ExitStack() as hooks:
        for module in blocks.modules():
            if isinstance(module, (nn.Linear, QuantizedLinear)):
                hooks.enter_context(module.register_forward_pre_hook(round_input))
        yield model


def rounded_tokens(x: Tensor, bits: int = 8) -> Tensor:
    """x (..., in_features) as quantize_activations holds it, in its own dtype."""
    codes, scale, zero = quantize_activations(x.reshape(-1, x.shape[-1]), bits)
    return (scale * (codes - zero)).view(x.shape).to(x.dtype)
