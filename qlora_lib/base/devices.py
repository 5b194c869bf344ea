"""Which device and which dtype to compute in."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_device(device: torch.device | str | None = None) -> torch.device:
    """Return the device of a name, the default one for None. Raises ValueError for other names."""
    try:
        return torch.device(device or default_device())
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r:.60}: expected cpu, cuda, cuda:1 ...") from error


def resolve_dtype(compute_dtype: str, device: torch.device | str | None = None) -> torch.dtype:
    """Return the dtype of a name; "auto" is bf16 where the device has it natively (emulated bf16 is
    slower than fp32), else fp16 on a GPU, else fp32. Raises ValueError for other names."""
    if isinstance(compute_dtype, str) and compute_dtype in DTYPES:
        return DTYPES[compute_dtype]
    if compute_dtype != "auto":
        raise ValueError(f"compute_dtype={compute_dtype!r} must be auto, bf16, fp16 or fp32")
    kind = resolve_device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    native = kind == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bf16", "fp16" or "fp32" for the dtype of that name."""
    return next(name for name, d in DTYPES.items() if d == dtype)
