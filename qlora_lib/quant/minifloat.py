"""Floating-point numbers of 4 and 8 bits: sign, exponent, mantissa, and no more.

    E2M1   4 bits   0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives: neither NaN nor Inf
    E4M3   8 bits   up to 448; the code with all bits set is NaN, and there is no Inf
    E5M2   8 bits   up to 57344; the largest exponent is Inf and NaN, as in IEEE 754

(E4M3, E5M2: Micikevicius et al. 2022, arXiv 2209.05433, table 1; E2M1: OCP Microscaling Formats
1.0, section 5.3.3.) Unlike an integer grid's, the steps grow with the values: by a factor of two
from one exponent to the next.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class MiniFloat:
    """A format: how many bits exponent and mantissa have, and its largest finite value."""

    exponent: int
    mantissa: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def least(self) -> int:
        """The exponent of the smallest normal value; smaller ones keep its steps (subnormals)."""
        return 2 - 2 ** (self.exponent - 1)


MINIFLOATS = {
    "e2m1": MiniFloat(2, 1, 6.0),
    "e4m3": MiniFloat(4, 3, 448.0),
    "e5m2": MiniFloat(5, 2, 57344.0),
}


def minifloat(name: str) -> MiniFloat:
    """The format of a name. Raises ValueError for another one."""
    if name not in MINIFLOATS:
        raise ValueError(f"the format {name!r} must be one of {', '.join(MINIFLOATS)}")
    return MINIFLOATS[name]


@cache
def code_values(name: str, device: torch.device | None = None) -> Tensor:
    """fp32 (2**bits,): what each code stands for, NaN and Inf among them."""
    form = minifloat(name)
    codes = torch.arange(2 ** (form.bits - 1), device=device)
    exponent, fraction = codes >> form.mantissa, codes & (2**form.mantissa - 1)
    # A subnormal has no leading 1, and the smallest normal one's exponent.
    whole = fraction + 2**form.mantissa * (exponent > 0)
    steps = (exponent.clamp(min=1) - 1 + form.least - form.mantissa).double()
    values = whole * 2.0**steps
    # Behind the largest value: in E4M3 a NaN, in E5M2 Inf and then NaNs.
    values[values > form.largest] = torch.nan
    if name == "e5m2":
        values[0b11111 << form.mantissa] = torch.inf
    return torch.cat([values, -values]).float()


def float_levels(name: str, device: torch.device | None = None) -> Tensor:
    """All finite values of "e2m1", "e4m3" or "e5m2" in the order of their codes, the negative ones
    (sign bit set) last, -0 among them; fp32 (16,), (254,) or (248,)."""
    values = code_values(name, device)
    return values[values.isfinite()]


def nearest_codes(x: Tensor, name: str) -> Tensor:
    """What encode_float returns, without looking for NaN."""
    form = minifloat(name)
    magnitude = x.abs().clamp_(max=form.largest)
    exponent = torch.frexp(magnitude.clamp(min=2.0**form.least)).exponent.sub_(1)
    # Codes count the steps from 0 on. Between 2**exponent and the next power of two they are
    # 2**(exponent - mantissa) wide, and the exponents below have 2**mantissa steps each.
    steps = torch.ldexp(magnitude, form.mantissa - exponent).round_()  # ties to even
    codes = exponent.sub_(form.least).bitwise_left_shift_(form.mantissa).add_(steps.int())
    return codes.bitwise_or_(x.signbit().int() << (form.bits - 1)).to(torch.uint8)


def encode_float(x: Tensor, name: str) -> Tensor:
    """The codes, uint8 as x, of the nearest values of "e2m1", "e4m3" or "e5m2". Halfway between two
    it is the even code, -0 keeps its sign, and what lies beyond the largest value gets its code.
    Raises ValueError for NaN, another name and no floating-point x."""
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if x.isnan().any():
        raise ValueError("x holds NaN, which has no nearest value")
    return nearest_codes(x if x.dtype == torch.float64 else x.float(), name)


def decode_float(codes: Tensor, name: str) -> Tensor:
    """The values, fp32 as codes, of uint8 codes; NaN and Inf where E4M3 and E5M2 have them. Raises
    ValueError for another dtype and for codes of 16 and more of E2M1."""
    values = code_values(name, codes.device)
    if codes.dtype != torch.uint8 or codes.numel() and int(codes.max()) >= len(values):
        raise ValueError(f"codes of {name} are uint8 below {len(values)}, got {codes.dtype}")
    return values.index_select(0, codes.flatten().int()).view(codes.shape)


def quantize_fp8(x: Tensor, name: str = "e4m3", dim: int | None = -1) -> tuple[Tensor, Tensor]:
    """Weights or activations x in 8 bits, x ~ decode_float(codes, name) * scale: codes uint8 as x;
    scale fp32, with size 1 along `dim`, whose absmax it brings to the format's largest value (-1: a
    scale a row or token), or () for one scale in all where `dim` is None. Raises ValueError for NaN
    and Inf, and for names of no 8-bit format."""
    form = minifloat(name)
    if form.bits != 8:
        raise ValueError(f"quantize_fp8 takes e4m3 or e5m2, not {name!r}")
    if not torch.isfinite(x).all():
        raise ValueError("x holds NaN or Inf")
    x = x.detach().float()
    most = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = most / form.largest
    scale = torch.where(scale > 0, scale, 1)  # all zeros: any scale decodes to 0
    return nearest_codes(x / scale, name), scale
