"""Triton, whose kernels run in its interpreter, in NumPy, where there is no GPU.

The interpreter's +, * and tl.dot of bf16 are wrong, without an error: kernels compute in fp32, or
in the dtype that DOT names.
"""

import os
import sys

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

__all__ = ["INTERPRETED", "KINDS", "triton", "tl"]

INTERPRETED = bool(triton.knobs.runtime.interpret)
KINDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
