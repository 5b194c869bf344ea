"""What Triton does with packed weights on a GPU: see `triton_product` and `triton_dense`."""

import torch

from .triton_dense import dense
from .triton_dense import serves as makes_dense
from .triton_language import INTERPRETED, tl, triton
from .triton_product import matmul, serves

__all__ = ["INTERPRETED", "dense", "makes_dense", "matmul", "serves", "try_out"]


@triton.jit
def _touch(x):
    tl.store(x, 1.0)


def try_out(device: torch.device) -> None:
    """Runs the smallest of kernels; raises whatever keeps Triton from compiling it."""
    x = torch.zeros(1, device=device)
    with torch.cuda.device_of(x):
        _touch[(1,)](x)
