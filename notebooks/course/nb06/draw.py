"""What notebook 06 draws: the roofline, tiles, the memory of decoding, channels, recorded GPUs.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare.
"""
import math
from collections.abc import Sequence

import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from qlora_lib import CacheSpec
from qlora_lib.generation.kv_cache import cache_bytes
from ..kit.picture import COLORS

FP, PACKED, MEMORY, CHOSEN, MUTED = (COLORS[k] for k in ("fp", "gptq", "other", "qlora", "muted"))
WIDTHS = {32: FP, 16: COLORS["rtn"], 8: MEMORY, 4: PACKED}  # bits a weight


def product_cost(tokens: int, out: int, n: int, bits: float, size: int = 2) -> tuple[int, float]:
    """(operations, bytes) of x W^T: tokens inputs of n numbers, a weight of out x n with `bits`
    a weight; inputs and outputs of `size` bytes a number."""
    return 2 * tokens * out * n, out * n * bits / 8 + size * tokens * (n + out)


def draw_roofline(ax, tokens: int, bits: int, flops: float, bandwidth: float,
                  shape: tuple[int, int] = (4096, 4096), measured: dict | None = None) -> None:
    """Attainable operations a second over operations a byte, and where a linear layer stands.

    flops, bandwidth: the ceilings, operations and bytes a second. shape: (out, in). measured:
    {(tokens, bits): seconds} of the dense layer on this machine, drawn as crosses.
    """
    ridge = flops / bandwidth
    x = torch.logspace(-1, 4, 200)
    roof = torch.minimum(x * bandwidth, torch.tensor(flops)) / 1e9
    ax.plot(x.tolist(), roof.tolist(), color=MUTED)
    ax.axvline(ridge, color=MUTED, linestyle=":", linewidth=1.5)
    for width, color in WIDTHS.items():
        work, moved = product_cost(tokens, *shape, width)
        rate = min(flops, work / moved * bandwidth)
        chosen = width == bits
        ax.plot(work / moved, rate / 1e9, "o", color=color, markersize=12 if chosen else 6,
                markeredgecolor="black" if chosen else color, label=f"{width} bits", zorder=3)
    for (count, width), time in (measured or {}).items():
        work, moved = product_cost(count, *shape, width, width // 8)
        ax.plot(work / moved, work / time / 1e9, "x", color=CHOSEN, markersize=9,
                markeredgewidth=2.5, zorder=4)
        ax.annotate(f"{count}", (work / moved, work / time / 1e9), (5, -14),
                    textcoords="offset points", color=CHOSEN, fontsize=10)
    work, moved = product_cost(tokens, *shape, bits)
    by = "memory" if work / moved < ridge else "arithmetic"
    time = max(work / flops, moved / bandwidth)
    ax.set(xscale="log", yscale="log", xlim=(0.1, 1e4), ylim=(bandwidth / 1e10, 4 * flops / 1e9),
           xlabel="operations a byte", ylabel="billion operations a second",
           title=f"bound by {by}: {_time(time)}")
    ax.minorticks_off()
    ax.legend(loc="lower right", fontsize=10)


def draw_expected(ax, rows: Sequence[dict], flops: float, bandwidth: float, title: str,
                  bits: float = 4, measured: Sequence[dict] = ()) -> None:
    """A GPU's roofline by its data sheet, and where products with a packed layer are expected.

    rows: {"shape": [out, in], "tokens": int, "microseconds": predicted}, drawn as rings. bits: a
    weight's, with its scale and zero-point. measured: rows of benchmarks/gpu.py, as crosses.
    """
    x = torch.logspace(-1, 4, 200)
    ax.plot(x.tolist(), (torch.minimum(x * bandwidth, torch.tensor(flops)) / 1e12).tolist(),
            color=MUTED)
    ax.axvline(flops / bandwidth, color=MUTED, linestyle=":", linewidth=1.5)
    points = [(row, row["microseconds"] / 1e6, "o", "none", "PREDICTED") for row in rows]
    points += [(row, row["milliseconds"]["rtn"] / 1e3, "x", CHOSEN, "measured")
               for row in measured]
    for row, time, marker, face, label in points:
        work, moved = product_cost(row["tokens"], *row["shape"], bits)
        color = CHOSEN if marker == "x" else PACKED
        ax.plot(work / moved, work / time / 1e12, marker, color=color, markerfacecolor=face,
                markersize=9, markeredgewidth=2, label=label, linestyle="none")
        ax.annotate(f"{row['tokens']}", (work / moved, work / time / 1e12), (7, -12),
                    textcoords="offset points", color=color, fontsize=10)
    handles = {h.get_label(): h for h in ax.lines if not h.get_label().startswith("_")}
    ax.legend(handles=handles.values(), loc="lower right", fontsize=10)
    ax.set(xscale="log", yscale="log", xlim=(1, 1e4), ylim=(bandwidth / 1e12, 2 * flops / 1e12),
           xlabel="operations a byte", ylabel="10¹² operations a second", title=title)
    ax.minorticks_off()


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.1f} µs"


def tile_counts(out: int, tokens: int, n: int, block_out: int, block_tokens: int,
                bits: int = 4) -> dict[str, float]:
    """What a product tiled in block_out x block_tokens costs.

    "programs"; "weight" and "inputs": bytes read, the inputs in 16 bits; "waste": the share of
    the tiles' area that masks cut off.
    """
    rows, columns = math.ceil(out / block_out), math.ceil(tokens / block_tokens)
    area = rows * block_out * columns * block_tokens
    return {"programs": rows * columns, "weight": columns * out * n * bits / 8,
            "inputs": rows * tokens * n * 2, "waste": 1 - out * tokens / area}


def draw_tiles(axes, block_out: int, block_tokens: int, out: int, tokens: int, n: int) -> None:
    """Left: the tiles over the output, what is masked hatched. Right: bytes read."""
    left, right = axes
    counts = tile_counts(out, tokens, n, block_out, block_tokens)
    rows, columns = math.ceil(out / block_out), math.ceil(tokens / block_tokens)
    wide, high = 128 * math.ceil(tokens / 128), 256 * math.ceil(out / 256)
    for i in range(rows):
        for j in range(columns):
            left.add_patch(Rectangle((j * block_tokens, i * block_out), block_tokens, block_out,
                                     facecolor="none", edgecolor=MUTED, hatch="///", linewidth=0))
    left.add_patch(Rectangle((0, 0), tokens, out, facecolor=MEMORY, edgecolor="none"))
    for i in range(rows + 1):
        left.plot([0, columns * block_tokens], [i * block_out] * 2, color="black", linewidth=0.8)
    for j in range(columns + 1):
        left.plot([j * block_tokens] * 2, [0, rows * block_out], color="black", linewidth=0.8)
    left.set(xlim=(0, wide), ylim=(high, 0), xlabel="tokens", ylabel="output features",
             title=f"{counts['programs']} programs, {100 * counts['waste']:.0f}% masked")
    left.grid(False)
    reads = [counts["weight"] / 1e3, counts["inputs"] / 1e3]
    once = [out * n / 2 / 1e3, tokens * n * 2 / 1e3]
    right.barh([1, 0], reads, color=[PACKED, COLORS["rtn"]], height=0.6)
    right.plot(once, [1, 0], "|", color="black", markersize=30, markeredgewidth=2)
    for y, read, least in zip((1, 0), reads, once):
        right.text(read, y + 0.36, f"{read:,.0f} kB, {read / least:.0f}×", fontsize=11,
                   ha="right" if read > 1500 else "left")
    most = tile_counts(out, tokens, n, 16, 16)
    right.set(yticks=[1, 0], yticklabels=["weight", "inputs"], ylim=(-0.5, 1.6),
              xlim=(0, 1.05 * max(most["weight"], most["inputs"]) / 1e3),
              xlabel="kB read; |: each byte once")
    right.grid(axis="y", visible=False)


def draw_pointers(ax, program: int, start: int, out: int = 10, row_bytes: int = 8, block: int = 4,
                  piece: int = 4) -> None:
    """The bytes of a packed weight in memory, and which of them one pass of a program loads.

    A cell is a byte, its number the offset from the first; masked rows hang below the matrix.
    """
    rows = range(program * block, (program + 1) * block)
    for row in range(max(out, rows[-1] + 1)):
        for at in range(row_bytes):
            mine = row in rows and start <= at < start + piece
            if row >= out and not mine:
                continue
            outside = row >= out
            ax.add_patch(Rectangle((at, row), 1, 1, edgecolor="white", linewidth=1.5,
                                   facecolor="none" if outside else MEMORY if mine else "#E8E8E8"))
            if outside:
                ax.add_patch(Rectangle((at, row), 1, 1, edgecolor=MUTED, facecolor="none",
                                       hatch="///", linewidth=0))
            ax.text(at + 0.5, row + 0.5, row * row_bytes + at, ha="center", va="center",
                    color="black" if mine else MUTED, fontsize=10)
    ax.set(xlim=(-0.1, row_bytes + 0.1), ylim=(12.2, -0.2), xlabel="byte of a row (at)",
           ylabel="row", yticks=[r + 0.5 for r in range(12)], yticklabels=range(12),
           xticks=[a + 0.5 for a in range(row_bytes)], xticklabels=range(row_bytes),
           title=f"bytes {start} to {start + piece - 1} of rows {rows[0]} to {rows[-1]}")
    ax.grid(False)


METHODS = {  # of the cache: (spec, colour)
    "16 bits": (None, COLORS["rtn"]),
    "8 bits": (CacheSpec(8), MEMORY),
    "4 bits": (CacheSpec(4), PACKED),
    "2 bits": (CacheSpec(2), COLORS["lora"]),
}


def draw_cache(ax, method: str, context: int, batch: int, config, weights: float) -> None:
    """GB of the cache over the context, a line a method; the chosen one at `context` in words.

    weights: bytes of the packed weights beside it, drawn as a level.
    """
    contexts = [2**i for i in range(6, 18)]
    for name, (spec, color) in METHODS.items():
        held = [cache_bytes(config, c, spec, batch) / 1e9 for c in contexts]
        ax.plot(contexts, held, color=color, linewidth=3 if name == method else 1.2, label=name)
    ax.axhline(weights / 1e9, color=FP, linestyle="--", linewidth=1.5,
               label=f"packed weights,\n{weights / 1e9:.1f} GB")
    spec, color = METHODS[method]
    held = cache_bytes(config, context, spec, batch) / 1e9
    ax.plot(context, held, "o", color=color, markersize=10, markeredgecolor="black", zorder=4)
    ax.set(xscale="log", yscale="log", xlim=(contexts[0], contexts[-1]), ylim=(0.01, 2000),
           ylabel="GB", xlabel="tokens of context",
           title=f"{method}, {batch} x {context:,} tokens: {held:.2f} GB")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    ax.set_xticks(contexts[::2], [f"{c // 1024}k" if c >= 1024 else c for c in contexts[::2]])
    ax.minorticks_off()


def draw_channels(axes, keys: Tensor, values: Tensor) -> None:
    """The absolute values of one head's keys and values, (tokens, head_dim) each."""
    top = max(float(x.abs().quantile(0.99)) for x in (keys, values))  # one scale for both
    for ax, x, name in zip(axes, (keys, values), ("keys", "values")):
        ax.imshow(x.abs().double().numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=top)
        ax.set(xlabel=f"channel; darkest: |x| of {top:.1f} or more", ylabel="token", title=name)
        ax.grid(False)


def draw_recorded(ax, rows: Sequence[dict], dense: str, packed: str, title: str) -> None:
    """Speed of the packed product over the dense one by tokens, a line a shape.

    rows: {"shape": [out, in], "tokens": int, "milliseconds": {name: time}}, as
    benchmarks/gpu.py stores them.
    """
    shapes = sorted({tuple(row["shape"]) for row in rows})
    for shape, color in zip(shapes, (PACKED, CHOSEN, COLORS["nf4"], COLORS["lora"])):
        own = sorted((row["tokens"], row["milliseconds"]) for row in rows
                     if tuple(row["shape"]) == shape)
        ax.plot([t for t, _ in own], [ms[dense] / ms[packed] for _, ms in own], "o-", color=color,
                label=f"{shape[0]} x {shape[1]}")
    ax.axhline(1, color=FP, linestyle="--", linewidth=1.5)
    ax.set(xscale="log", xlabel="tokens", ylabel=f"times as fast as {dense}", title=title,
           ylim=(0, None))
    ax.legend(fontsize=10)
