"""What notebook 12 draws: number lines of 4-bit formats, the error over AWQ's exponent, what
rounding takes of a token whose channels are not alike, and what each text to calibrate on costs.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qlora_lib.layers.rounded_inputs import rounded_tokens
from qlora_lib.quant.minifloat import float_levels
from qlora_lib.quant.nf4 import nf4_levels

from ..kit.picture import COLORS, PLAIN

RTN, QLORA, MUTED = (COLORS[k] for k in ("rtn", "qlora", "muted"))
FORMATS = {"INT4": COLORS["rtn"], "NF4": COLORS["nf4"], "E2M1": COLORS["other"]}
REPAIRS = {"none": COLORS["fp"], "SmoothQuant": PLAIN[1], "AWQ": PLAIN[0], "rotation": PLAIN[2]}


def unit_levels() -> dict[str, Tensor]:
    """The values of each format over its largest, ascending: (15,), (16,) and (15,)."""
    whole, floats = torch.arange(-7, 8) / 7, float_levels("e2m1").unique() / 6
    return {"INT4": whole, "NF4": nf4_levels(), "E2M1": floats}


def block_scale(absmax: Tensor, scale: str) -> Tensor:
    """What the unit levels of a block are multiplied by: its absmax "exact", or as "E8M0" (a power
    of two) or "E4M3" (beside a tensor whose absmax is 8) store it for levels up to 6."""
    if scale == "E8M0":
        return 6 * 2 ** (torch.floor(torch.log2(absmax / 7)) + 1)
    if scale == "E4M3":
        return 8 * (absmax / 8 * 448).to(torch.float8_e4m3fn).float() / 448
    return absmax


def rounded_to(weights: Tensor, levels: Tensor) -> Tensor:
    """Each weight (n,) as the nearest of the levels (k,)."""
    return levels[(weights.unsqueeze(1) - levels).abs().argmin(1)]


def draw_lines(axes, outlier: float, scale: str, weights: Tensor) -> None:
    """Left the values of three formats beside a block of weights (n,), right the error of all of
    them but the outlier, which is put first; axes (2,). outlier: its size, 0: none."""
    block = torch.cat([torch.tensor([outlier]), weights[1:]]) if outlier else weights
    lines, bars = axes
    for row, (name, unit) in enumerate(unit_levels().items()):
        levels, color = unit * block_scale(block.abs().max(), scale), FORMATS[name]
        lines.vlines(levels, row - 0.3, row + 0.15, color=color, linewidth=2)
        new = rounded_to(block, levels)
        kept = slice(1, None) if outlier else slice(None)
        lines.plot(block[kept], torch.full_like(block[kept], row + 0.3), "o", color=COLORS["fp"],
                   markersize=3.5)
        error = float((new - block)[kept].square().mean().sqrt())
        bars.barh(row, error, color=color, height=0.6)
        bars.text(error + 0.02, row, f"{error:.3f}", va="center")
    lines.set(xlim=(-4, 4), ylim=(-0.6, 2.7), yticks=range(3), yticklabels=list(FORMATS),
              xlabel="value; dots: the weights", title=f"absmax {block.abs().max():.1f}")
    lines.grid(False)
    bars.set(xlim=(0, 0.6), ylim=(-0.6, 2.7), yticks=[], xlabel="error",
             title="error of the others")


def draw_exponents(ax, errors: dict[int, Sequence[float]], exponents: Sequence[float]) -> None:
    """The error of the outputs over AWQ's exponent, a line a planted size, with its least."""
    for (size, found), color in zip(errors.items(), PLAIN):
        least = min(range(len(found)), key=found.__getitem__)
        ax.plot(exponents, found, color=color, label=f"{size} times as large")
        ax.plot(exponents[least], found[least], "o", color=color, markersize=9)
    ax.set(ylim=(0, None), xlabel="exponent", ylabel="error of the outputs")
    ax.legend(loc="upper right", fontsize=10)


def token_rounding(name: str) -> Callable[[Tensor], Tensor] | None:
    """How a kind of rounding takes one token (channels,); None: it leaves inputs as they are."""
    if name.startswith("INT") and "inputs" in name:
        return lambda x: rounded_tokens(x, int(name[3]))
    if name.startswith(("MXFP4", "NVFP4")):
        return lambda x: rounded_tokens(x, how=name[:5].lower())
    return None


def draw_outliers(axes, size: int, repair: str, rounding: str, tokens: dict, costs: dict) -> None:
    """Left the channels of one token and those that rounding makes 0, right what it costs the model
    with each repair; axes (2,).

    tokens: {(size, repair): x (channels,)}; costs: {(size, repair, rounding): KL in nats}.
    """
    ax, x = axes[0], tokens[size, repair]
    place, how = torch.arange(len(x)), token_rounding(rounding)
    gone = how(x) == 0 if how else torch.zeros_like(x, dtype=torch.bool)
    for some, color in ((~gone, REPAIRS[repair]), (gone, RTN)):
        ax.vlines(place[some], 1e-3, x[some].abs(), color=color, linewidth=1.2)
    ax.set(yscale="log", ylim=(1e-2, 300), xlim=(-2, len(x) + 1), xlabel="channel",
           ylabel="|x|", title=f"{int(gone.sum())} of {len(x)} become 0" if how else
           "inputs are not rounded")
    ax = axes[1]
    for row, name in enumerate(REPAIRS):
        cost = costs[size, name, rounding]
        ax.barh(row, cost, color=REPAIRS[name], alpha=1 if name == repair else 0.3, height=0.6)
        ax.text(cost * 1.3, row, f"{cost:.1e}", va="center")
    ax.set(xscale="log", xlim=(1e-5, 1e3), xticks=[1e-4, 1e-2, 1], yticks=range(len(REPAIRS)),
           yticklabels=list(REPAIRS), xlabel="KL, nats a token", title=rounding)
    ax.minorticks_off()
    ax.invert_yaxis()


def draw_texts(axes, lost: dict[tuple[str, str], Sequence[tuple[float, float]]],
               counts: Sequence[int], none: tuple[float, float]) -> None:
    """The loss above the dense model's over the windows of text that were seen, a line a text with
    its intervals, beside what no text costs; axes (2,), one a method.

    lost: {(method, text): [(mean, half an interval) a count]}; none: (mean, half an interval).
    """
    texts, methods = (dict.fromkeys(key[i] for key in lost) for i in (1, 0))
    for ax, method in zip(axes, methods):
        ax.axhspan(none[0] - none[1], none[0] + none[1], color=MUTED, alpha=0.25, linewidth=0)
        ax.axhline(none[0], color=MUTED, linestyle="--", linewidth=1.2, label="no text")
        for row, (text, color) in enumerate(zip(texts, PLAIN)):
            beside = 1.07 ** (row - (len(texts) - 1) / 2)  # bars do not cover each other
            mean, half = zip(*lost[method, text])
            ax.errorbar([n * beside for n in counts], mean, half, color=color, marker="o",
                        markersize=5, linewidth=1.6, capsize=3, label=text)
        ax.set(xscale="log", ylim=(0, 0.18), xticks=counts, xticklabels=counts,
               title=method.upper(), xlabel="windows of text",
               ylabel="loss above the dense model's")
        ax.minorticks_off()
    axes[-1].legend(loc="upper right", fontsize=10)
