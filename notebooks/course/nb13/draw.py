"""What notebook 13 draws: an error that depends on the block size, and what a token counts.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare.
"""

from ..kit.picture import COLORS

LINES = {"round to nearest": ("rtn", "o:"), "faulty": ("qlora", "s-"), "mended": ("gptq", "o-")}


def draw_blocks(ax, block: int, errors: dict[str, dict[int, float]]) -> None:
    """Output error over the block size, a line a way to quantize; one block size is marked.

    errors: {"round to nearest", "faulty" and "mended": {block size: error in percent}}
    """
    sizes = list(next(iter(errors.values())))
    for name, (color, style) in LINES.items():
        values = errors[name]
        ax.plot(range(len(sizes)), list(values.values()), style, color=COLORS[color], label=name)
        ax.plot(sizes.index(block), values[block], "o", color=COLORS[color], markersize=11)
    ax.axvline(sizes.index(block), color=COLORS["muted"], linewidth=1, zorder=0)
    top = max(max(values.values()) for values in errors.values())
    ax.set(xticks=range(len(sizes)), xticklabels=sizes, ylim=(0, 1.45 * top),
           xlabel="columns a block (256 are one block)", ylabel="output error, %",
           title=", ".join(f"{name} {errors[name][block]:.1f}%" for name in LINES))
    ax.legend(loc="upper left", ncols=3, fontsize=10)


def draw_shares(ax, short: int, long: int) -> None:
    """What one token counts in a step of two micro-batches, by two ways to divide the loss."""
    ways = {"mean of means": ("qlora", {"short": 1 / (2 * short), "long": 1 / (2 * long)}),
            "all tokens alike": ("gptq", dict.fromkeys(("short", "long"), 1 / (short + long)))}
    for place, (name, (color, shares)) in enumerate(ways.items()):
        at = [i + 0.16 * (2 * place - 1) for i in range(2)]
        ax.plot(at, [100 * s for s in shares.values()], "o", color=COLORS[color], markersize=11,
                label=name)
        for x, share in zip(at, shares.values()):
            ax.annotate(f"{share:.1%}", (x, 100 * share), (0, 10), textcoords="offset points",
                        ha="center", fontsize=11)
    ratio = long / short
    ax.set(xticks=range(2), yscale="log", xlim=(-0.6, 1.6), ylim=(1, 200),
           xticklabels=[f"one of the {n} tokens" if n > 1 else "the only token"
                        for n in (short, long)],
           ylabel="share of the step, %",
           title="each token counts the same" if ratio == 1 else
           f"mean of means: the left counts {ratio:g} times the right")
    ax.set_yticks((1, 2, 5, 10, 20, 50, 100), labels=("1", "2", "5", "10", "20", "50", "100"))
    ax.minorticks_off()
    ax.legend(loc="upper right", fontsize=10)
