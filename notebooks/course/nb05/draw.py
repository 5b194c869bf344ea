"""What notebook 05 draws: padding, intervals, how many questions a claim needs, results.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare. A result is a (correct, n) pair; intervals are Wilson's, 95%.
"""
import math
from collections.abc import Sequence

from matplotlib.patches import Rectangle

from qlora_lib.base.statistics import wilson
from ..kit.picture import COLORS, interval

FP, RTN, GPTQ, MUTED, OTHER, BAD, GOOD = (
    COLORS[k] for k in ("fp", "rtn", "gptq", "muted", "other", "qlora", "nf4"))
Z = 1.959963984540054  # of a 95% interval
POWER = 0.8416212335729143  # how many standard errors give a power of 80%
GSM8K_TEST = 1319
HEAD, TAIL = 4, 6  # columns of a long prompt that are drawn
METHODS = {"gptq": ("GPTQ", GPTQ), "rtn": ("round to nearest", RTN)}


def draw_padding(ax, side: str, new_tokens: int, rows: dict[str, Sequence[Sequence[str]]],
                 generated: dict[str, Sequence[Sequence[str]]]) -> None:
    """Padded prompts as cells, first and last columns, and what the model writes after them.

    rows, generated: {"left" | "right": a list of token texts a row}; rows are equally long,
    and a padding token is the text "pad".
    """
    width = HEAD + 1 + TAIL
    for y, (row, fresh) in enumerate(zip(rows[side], generated[side])):
        shown = [*row[:HEAD], "…", *row[-TAIL:], *fresh[:new_tokens]]
        for x, text in enumerate(shown):
            color = "white" if x < width else "#D6E8F5"
            if text == "pad":
                color = "#D9D9D9"
            if x != HEAD:
                ax.add_patch(Rectangle((x, -y - 0.8), 0.94, 0.8, facecolor=color,
                                       edgecolor=MUTED, linewidth=1))
            ax.text(x + 0.47, -y - 0.42, text, ha="center", va="center", fontsize=11,
                    color=MUTED if text == "pad" else "black")
        last = row[-1]
        ax.add_patch(Rectangle((width - 1, -y - 0.8), 0.94, 0.8, fill=False, linewidth=3,
                               edgecolor=BAD if last == "pad" else GOOD))
    ax.text(width - 0.53, 0.12, "predicts the\nfirst new token", ha="center", va="bottom",
            fontsize=11)
    ax.text(0, 0.12, f"padded on the {side}", va="bottom", fontsize=12, fontweight="bold")
    longest = max(len(fresh) for fresh in generated[side])
    ax.set(xlim=(-0.1, width + longest + 0.1), ylim=(-len(rows[side]) - 0.05, 0.85))
    ax.axis("off")


def half_width(p: float, n: float) -> float:
    """Half of Wilson's interval at accuracy p, for any positive n."""
    return Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))


def draw_interval(axes, n: int, accuracy: float) -> None:
    """Left: the interval of round(n * accuracy) right answers, Wilson's and the normal one.
    Right: its half-width in points over n, with the n from which it is at most 2 points."""
    correct = round(n * accuracy)
    p = correct / n
    spread = Z * math.sqrt(p * (1 - p) / n)
    intervals = {"normal": (p - spread, p + spread), "Wilson": wilson(correct, n)}
    left, right = axes
    for y, (name, (low, high)) in enumerate(intervals.items()):
        color = MUTED if name == "normal" else GPTQ
        left.plot([100 * low, 100 * high], [y, y], color=color, linewidth=7,
                  solid_capstyle="butt")
        left.plot(100 * p, y, "o", color=FP, markersize=7)
        left.text(50, y + 0.2, f"{name}: {100 * low:.1f} to {100 * high:.1f}", ha="center",
                  fontsize=11)
    left.axvspan(-30, 0, color="#F3F3F3")
    left.axvspan(100, 130, color="#F3F3F3")
    left.set(xlim=(-16, 116), ylim=(-0.5, 1.7), yticks=[], xlabel="accuracy in %",
             xticks=range(0, 101, 25), title=f"{correct} of {n} right")
    sizes = [round(10 * 10 ** (i / 20)) for i in range(61)]  # 10 to 10,000
    right.plot(sizes, [100 * half_width(p, s) for s in sizes], color=GPTQ)
    right.plot(n, 100 * half_width(p, n), "o", color=FP, markersize=8)
    enough = next(s for s in range(1, 10_001) if half_width(p, s) <= 0.02)
    right.axhline(2, color=BAD, linestyle=":")
    right.set(xscale="log", xlim=(10, 10_000), ylim=(0, 22), xlabel="questions n",
              ylabel="± points", title=f"±{100 * half_width(p, n):.1f} points; "
                                       f"±2 from n = {enough:,}")


def questions_unpaired(p: float, difference: float) -> float:
    """Questions for each of two models, each with its own, to tell p from p + difference at
    95% with a power of 80%: (z + z')^2 (p q + p' q') / d^2, the usual approximation."""
    other = p + difference
    return (Z + POWER) ** 2 * (p * (1 - p) + other * (1 - other)) / difference**2


def questions_paired(discordant: float, difference: float) -> float:
    """The same on shared questions, of which a share `discordant` is answered rightly by one
    model only (Connor 1987): (z sqrt(s) + z' sqrt(s - d^2))^2 / d^2."""
    root = math.sqrt(discordant - difference**2)
    return (Z * math.sqrt(discordant) + POWER * root) ** 2 / difference**2


def most_discordant(p: float, difference: float) -> float:
    """The largest share of questions that one model only can have right, at accuracies p and
    p + difference: the worse one's own are at most p, and at most what the other has wrong."""
    return 2 * min(p, 1 - p - difference) + difference


def draw_claim(ax, points_better: int, accuracy: float) -> None:
    """Questions that a claim of so many points needs, over how much the two models differ: as
    far as they can, up to 50%. The square: models that have nothing in common."""
    p, d = accuracy, points_better / 100
    apart, last = questions_unpaired(p, d), min(0.5, most_discordant(p, d))
    shares = [d + (last - d) * i / 60 for i in range(61)]
    unrelated = p * (1 - p - d) + (p + d) * (1 - p)
    ax.axhline(apart, color=RTN, label=f"each its own questions: {apart:,.0f}")
    ax.plot([100 * s for s in shares], [questions_paired(s, d) for s in shares], color=GPTQ,
            label=f"the same questions: from {questions_paired(d, d):,.0f}")
    ax.plot(100 * unrelated, questions_paired(unrelated, d), "s", color=GPTQ, markersize=8,
            label=f"unrelated models: {unrelated:.0%} differ")
    ax.axhline(GSM8K_TEST, color=MUTED, linestyle=":", label="GSM8K's test: 1,319")
    ax.set(yscale="log", xlim=(0, 50), ylim=(30, 1_000_000_000), ylabel="questions needed",
           xlabel="right in one of the two only, %")
    ax.set_yticks([100, 1000, 10_000, 100_000], ["100", "1,000", "10,000", "100,000"])
    ax.legend(loc="upper left", fontsize=10.5,
              title=f"{100 * accuracy:.0f}% against {100 * accuracy + points_better:.0f}%",
              alignment="left")


def draw_rows(ax, rows: dict[str, dict[str, tuple[int, int]]]) -> None:
    """Strict and flexible accuracy of each row, with intervals.

    rows: {label: {"strict" | "flexible": (correct, n)}}
    """
    for y, modes in enumerate(rows.values()):
        for shift, (name, color) in zip((-0.16, 0.16), (("strict", GPTQ), ("flexible", RTN))):
            interval(ax, y + shift, *modes[name], color, label=None if y else name)
    ax.set(yticks=range(len(rows)), yticklabels=list(rows), xlim=(-2, 102),
           ylim=(len(rows) - 0.5, -0.5), xlabel="right answers in %, 95% intervals")
    ax.legend(loc="center", bbox_to_anchor=(0.5, 1.06), ncols=2)


def draw_widths(axes, bits: int, one_scale_for: str,
                rows: dict[tuple[int, str], dict[str, tuple[int, int]]],
                pairs: dict[tuple[int, str], dict[str, float]], full: tuple[int, int]) -> None:
    """Left: accuracy over bits, with intervals. Right: the two methods on the same questions.

    rows: {(bits, "a row" | "64 weights"): {"gptq" | "rtn": (correct, n)}}; pairs: for the same
    keys the counts "gptq" and "rtn" (right there only) and "p" (McNemar); full: the fp32 model.
    """
    left, right = axes
    low, high = wilson(*full)
    left.axhspan(100 * low, 100 * high, color="#D9D9D9", label="fp32")
    widths = sorted({b for b, _ in rows})
    for shift, (method, (label, color)) in zip((0.1, -0.1), METHODS.items()):
        for x, b in enumerate(widths):
            interval(left, x + shift, *rows[b, one_scale_for][method], color, upright=True,
                     label=None if x else label)
    left.axvspan(widths.index(bits) - 0.4, widths.index(bits) + 0.4, color=OTHER, alpha=0.15)
    left.set(xticks=range(len(widths)), xticklabels=widths, xlabel="bits", ylim=(-3, 103),
             xlim=(-0.5, len(widths) - 0.5), ylabel="right answers in %",
             title=f"one scale for {one_scale_for}")
    left.legend(loc="lower right", fontsize=10)
    pair = pairs[bits, one_scale_for]
    for y, method in enumerate(METHODS):
        label, color = METHODS[method]
        right.barh(y, pair[method], color=color, height=0.55)
        right.text(pair[method] + 8, y, f"{pair[method]:.0f}", va="center")
    p = pair["p"]
    right.set(yticks=[0, 1], yticklabels=["GPTQ\nonly", "RTN\nonly"], ylim=(1.6, -0.6),
              xlim=(0, full[1]), xlabel=f"of {full[1]} questions",
              title=f"{bits} bits: p {'< 0.0001' if p < 1e-4 else f'= {p:.4f}'}")


def draw_coverage(ax, n: int, rates: Sequence[float],
                  coverage: dict[str, Sequence[float]]) -> None:
    """How often an interval that claims 95% holds the truth, over the true accuracy."""
    for (name, values), color in zip(coverage.items(), (MUTED, GPTQ)):
        ax.plot([100 * r for r in rates], [100 * v for v in values], color=color, label=name)
    ax.axhline(95, color=BAD, linestyle=":")
    ax.set(xlim=(0, 50), ylim=(35, 101), xlabel="true accuracy in %",
           ylabel="intervals that hold it, %", title=f"n = {n}")
    ax.legend(loc="lower right")


def draw_published(ax, rows: dict[str, float], leak: tuple[str, float]) -> None:
    """Published accuracies (label: %) on GSM8K's test with intervals, and one that leaked."""
    for y, (label, percent) in enumerate([*rows.items(), leak]):
        interval(ax, y, round(percent / 100 * GSM8K_TEST), GSM8K_TEST,
                 BAD if label == leak[0] else GPTQ)
        ax.text(percent + 4.5, y, f"{percent:.1f}", va="center", fontsize=11)
    labels = [*rows, leak[0]]
    ax.set(yticks=range(len(labels)), yticklabels=labels, xlim=(0, 85),
           ylim=(len(labels) - 0.5, -0.5), xlabel="right answers in %, n = 1,319")
