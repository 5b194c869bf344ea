"""What notebook 01 draws: grids, their errors, bit layouts, NF4 levels.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare.
"""
from collections.abc import Sequence

import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from ..kit.picture import COLORS, matrix

RTN, NF4, MUTED, OTHER = (COLORS[k] for k in ("rtn", "nf4", "muted", "other"))


def draw_reconstruction(axes, weight: Tensor, codes: Tensor, reconstructed: Tensor) -> None:
    """Three matrices side by side; axes (3,), each tensor (out, in)."""
    top = float(weight.abs().max())
    matrix(axes[0], weight, title="weights w", limits=(-top, top))
    matrix(axes[1], codes.int(), title="codes q", cmap="Greys")
    matrix(axes[2], reconstructed, title="s (q - z)", limits=(-top, top))


def draw_staircase(axes, low: float, high: float, scale: float, zero_point: int,
                   max_code: int) -> None:
    """Left what a weight becomes, right how far off it is; the range is [low, high]."""
    margin = 0.25 * (high - low)
    w = torch.linspace(low - margin, high + margin, 2000)
    decoded = scale * ((w / scale + zero_point).round().clamp(0, max_code) - zero_point)
    axes[0].plot(w, w, color=COLORS["fp"], linewidth=1, label="w")
    axes[0].plot(w, decoded, color=RTN, label="s (q - z)")
    axes[0].set(xlabel="weight", title="decoded weight")
    axes[0].legend(loc="upper left")
    axes[1].axhspan(-scale / 2, scale / 2, color=MUTED, alpha=0.25, label="half a step")
    axes[1].plot(w, decoded - w, color=RTN, linewidth=1.4)
    axes[1].set(xlabel="weight", title="error", ylim=(-2 * scale, 2 * scale))
    axes[1].legend(loc="upper right")
    for ax in axes:
        for end in (low, high):
            ax.axvline(end, color=MUTED, linestyle=":", linewidth=1.4)


WIDTHS = {2: COLORS["qlora"], 3: RTN, 4: COLORS["gptq"], 8: COLORS["other"]}  # bits a weight


def draw_granularity(ax, bits: int, group_size: int | None, symmetric: bool, errors: dict,
                     costs: dict) -> None:
    """Relative error over bits a weight, a color a number of bits, and one setting in words.

    errors, costs: {(bits, group_size, symmetric): relative error, bits a weight}. The other
    symmetry is drawn thin and gray.
    """
    for b, color in WIDTHS.items():
        for s in (not symmetric, symmetric):
            own = sorted((costs[key], errors[key]) for key in errors
                         if key[0] == b and key[2] == s)
            style = {"color": color, "label": f"{b} bits"} if s == symmetric else \
                {"color": MUTED, "linewidth": 1, "markersize": 3}
            if own:
                ax.plot(*zip(*own), "o-", **style)
    cost, error = costs[bits, group_size, symmetric], errors[bits, group_size, symmetric]
    ax.plot(cost, error, "o", color=WIDTHS[bits], markersize=13, markeredgecolor="black")
    sharing = f"groups of {group_size}" if group_size else "one group a row"
    ax.set(yscale="log", xlim=(1.8, 9.2), ylim=(3e-3, 1.2), xlabel="bits a weight",
           ylabel="relative error", xticks=range(2, 10),
           title=f"{bits} bits, {sharing}: {cost:.3f} bits a weight, error {error:.4f}")
    ax.legend(loc="upper right")


def draw_clipping(axes, bits: int, clip_ratio: float, row: Tensor, ratios: Sequence[float],
                  errors: dict[int, Sequence[float]]) -> None:
    """Top one row of weights and its grid, below the error of the layer over the clip ratio.

    row: (in,); errors: {bits: the relative error at each of `ratios`}.
    """
    low, high = float(row.min()), float(row.max())
    step = clip_ratio * (high - low) / (2**bits - 1)
    zero = round(-clip_ratio * low / step)
    levels = step * (torch.arange(2**bits) - zero)
    counts = axes[0].hist(row, bins=60, range=(low, high), color=OTHER)[0]
    axes[0].vlines(levels, 0, 1.1 * counts.max(), color=RTN, linewidth=0.3 if bits == 8 else 1.2)
    for start, end in ((low, float(levels[0])), (float(levels[-1]), high)):
        if end > start:
            axes[0].axvspan(start, end, color=MUTED, alpha=0.35, linewidth=0)
    axes[0].set(xlim=(1.05 * low, 1.05 * high), ylim=(0, 1.1 * counts.max()), yticks=[],
                title=f"one row, its {2**bits} levels; gray: clipped")
    ax, error = axes[1], errors[bits]
    best = min(range(len(error)), key=error.__getitem__)
    here = error[min(range(len(ratios)), key=lambda i: abs(ratios[i] - clip_ratio))]
    for b in sorted(errors):
        over = [e / min(errors[b]) for e in errors[b]]
        ax.plot(ratios, over, color=RTN if b == bits else MUTED,
                linewidth=2.2 if b == bits else 1)
    ax.axvline(ratios[best], color=RTN, linestyle=":")
    ax.plot(clip_ratio, min(here / error[best], 2), "o", color=RTN, markersize=11, clip_on=False)
    ax.set(xlim=(0.18, 1.02), ylim=(0.97, 2), xlabel="clip ratio; gray: other numbers of bits",
           ylabel="error / the best's",
           title=f"here {here:.4f}, best {error[best]:.4f} at {ratios[best]:.2f}")


def draw_bit_layout(ax, bits: int, order: str, codes: Tensor) -> None:
    """Three bytes of a packed stream, the most significant bit of each on the left.

    codes: integers (24,), reduced to `bits` bits. order: "low bits first", as in `pack`, or
    "high bits first". A color belongs to a code; a code that straddles bytes is orange.
    """
    low_first = order == "low bits first"
    used = codes[: -(-24 // bits)] % 2**bits
    stream = [int(c) >> (j if low_first else bits - 1 - j) & 1 for c in used for j in range(bits)]
    blues = ("#D6E9F7", "#A9CFEC")
    for byte in range(3):
        owners = [(8 * byte + j) // bits for j in range(8)]  # of the byte's bits in the stream
        value = sum(stream[8 * byte + j] << (j if low_first else 7 - j) for j in range(8))
        for j, owner in enumerate(owners):
            x = 9 * byte + (7 - j if low_first else j)
            straddles = owner * bits // 8 != (owner * bits + bits - 1) // 8
            color = RTN if straddles else blues[owner % 2]
            ax.add_patch(Rectangle((x, 0), 1, 1, facecolor=color, edgecolor="white"))
            ax.text(x + 0.5, 0.5, stream[8 * byte + j], ha="center", va="center")
        for owner in sorted(set(owners)):
            xs = [9 * byte + (7 - j if low_first else j) for j in range(8) if owners[j] == owner]
            ax.text(sum(xs) / len(xs) + 0.5, 1.15, f"q{owner}\n{int(used[owner])}",
                    ha="center", va="bottom", fontsize=10)
        ax.text(9 * byte + 4, -0.2, f"byte {byte} = {value}", ha="center", va="top")
    ax.set(xlim=(-0.3, 26.3), ylim=(-1.0, 2.3))
    ax.set_axis_off()


def draw_nf4(axes, positive: Tensor, negative: Tensor, grids: dict[str, Tensor]) -> None:
    """Left: evenly spaced probabilities, carried to the normal's distribution function and down
    to the levels. Right: the values of grids on one number line, in this order from below.

    positive: (9,), from the outermost probability down to 1/2; negative: (8,), up to 1/2.
    """
    ax, x = axes[0], torch.linspace(-2.3, 2.3, 400)
    ax.plot(x, torch.special.ndtr(x), color=COLORS["fp"])
    for p, color in ((positive, NF4), (negative, OTHER)):
        z = torch.special.ndtri(p.double())
        ax.hlines(p, -2.3, z, color=color, linewidth=1.1)
        ax.vlines(z, 0, p, color=color, linewidth=1.1)
    ax.set(title="9 probabilities from 1/2 up, 8 down",
           xlabel="z (divided by its largest: the levels)",
           ylabel="probability below z", xlim=(-2.3, 2.3), ylim=(0, 1.0))
    ax, colors = axes[1], {"NF4": NF4, "int4": RTN, "int4, symmetric": COLORS["gptq"]}
    for y, (name, values) in enumerate(grids.items()):
        ax.plot(values, [y] * len(values), "|", color=colors.get(name, COLORS["fp"]),
                markersize=24, markeredgewidth=2.2 if name in colors else 1)
    ax.set(yticks=range(len(grids)), yticklabels=list(grids), ylim=(-0.5, len(grids) - 0.5),
           xlim=(-1.25, 1.25), xlabel="weight / absmax", title="one block, three grids")
    ax.grid(axis="y", visible=False)


def draw_level_use(axes, unit: Tensor, levels: Tensor, counts: Tensor) -> None:
    """Left the normalized weights (n,) under the levels (16,), right the share of each code."""
    axes[0].hist(unit, bins=101, range=(-1, 1), color=OTHER)
    bottom, top = axes[0].get_ylim()
    axes[0].vlines(levels, 0, top, color=NF4, linewidth=1.2)
    axes[0].set(title="weights / absmax, NF4 levels", xlabel="normalized weight", yticks=[],
                xlim=(-1.05, 1.05), ylim=(bottom, top))
    share = (counts / counts.sum()).tolist()
    axes[1].bar(range(16), share, color=NF4)
    axes[1].axhline(1 / 16, color=MUTED, linestyle=":", label="equal use")
    axes[1].set(title="share of each code", xlabel="code", xticks=range(0, 16, 3))
    axes[1].legend(loc="upper right")


CURVES = {  # name: color, line style
    "int4": (RTN, "--"), "int4, clip search": (RTN, "-"),
    "NF4": (NF4, "--"), "NF4, double quant": (NF4, "-"),
}


def draw_nf4_int4(axes, block_size: int, against: str, weights: str,
                  units: dict, curves: dict, levels: Tensor) -> None:
    """Top the normalized weights of a block size, below error against block size or bits.

    units: {(weights, block_size): normalized weights (n,)}; curves: {weights: {name of
    CURVES: [(block_size, bits a weight, relative error), ...]}}; levels: (16,).
    """
    axes[0].hist(units[weights, block_size], bins=61, range=(-1, 1), density=True, color=OTHER)
    axes[0].vlines(levels, 0, 2.2, color=NF4, linewidth=1)
    axes[0].set(xlim=(-1.05, 1.05), ylim=(0, 2.2), yticks=[],
                title=f"weights / absmax in blocks of {block_size}")
    ax, by_bits = axes[1], against == "bits a weight"
    top = max(p[2] for points in curves[weights].values() for p in points)
    for name, (color, style) in CURVES.items():
        points = curves[weights][name]
        ax.plot([p[1] if by_bits else p[0] for p in points], [p[2] for p in points], style,
                color=color, label=name)
        here = next(p for p in points if p[0] == block_size)
        ax.plot(here[1] if by_bits else here[0], here[2], "o", color=color, markersize=8)
    ax.set(ylim=(0.055, 1.3 * top), ylabel="relative error", xlabel=against)
    if by_bits:
        ax.set(xlim=(3.95, 6.1))
    else:
        sizes = [p[0] for p in curves[weights]["NF4"]]
        ax.set_xscale("log", base=2)
        ax.set(xlim=(sizes[0] / 1.2, sizes[-1] * 1.2))
        ax.set_xticks(sizes, sizes)
    ax.legend(loc="upper center", ncols=2, fontsize=9, columnspacing=1)


def draw_absmax(axes, absmax: Tensor, unit: Tensor, code_values: Tensor) -> None:
    """Left the absmax of each block (n,), right the same centered and scaled, on the 8-bit map."""
    axes[0].hist(absmax, bins=60, color=NF4)
    axes[0].axvline(float(absmax.mean()), color=COLORS["fp"], linestyle=":", label="mean")
    axes[0].set(title="absmax of each block", yticks=[], xlim=(0, float(absmax.max()) * 1.05))
    axes[0].legend(loc="upper right")
    axes[1].hist(unit, bins=60, color=NF4)
    height = axes[1].get_ylim()[1]
    axes[1].vlines(code_values, -0.18 * height, -0.03 * height, color=COLORS["fp"], linewidth=0.5)
    axes[1].set(title="(absmax - mean) / nested absmax", yticks=[], xlim=(-1.05, 1.05),
                xticks=(-1, -0.5, 0, 0.5, 1), ylim=(-0.2 * height, height),
                xlabel="ticks: the 256 values of the 8-bit map")


def draw_losses(ax, points: dict[str, list[tuple[float, float]]], reference: float) -> None:
    """Loss over bits a weight. points: {name: [(bits a weight, loss), ...]}."""
    styles = {"RTN, per row": (RTN, "o:"), "RTN, group 64": (RTN, "o--"),
              "RTN, group 64, clip search": (RTN, "o-"), "NF4": (NF4, "s")}
    ax.axhline(reference, color=COLORS["fp"], linewidth=1.4, label="16 bits")
    for name, values in points.items():
        color, style = styles[name]
        ax.plot(*zip(*sorted(values)), style, color=color, label=name)
    ax.set(xlabel="bits a weight of the linears", ylabel="loss (nats a token)",
           xlim=(1.8, 8.8), xticks=range(2, 9))
    ax.legend(loc="upper right")
