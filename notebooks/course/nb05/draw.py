"""What notebook 05 draws: padding, coverage, the power of a paired test, results.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare. A result is a (correct, n) pair; intervals are Wilson's, 95%.
"""
import functools
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
            ax.text(x + 0.47, -y - 0.42, text, ha="center", va="center",
                    fontsize=11 if len(text) < 6 else 9 if len(text) < 8 else 7.5,
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


def questions_unpaired(p: float, difference: float) -> float:
    """Questions for each of two models, each with its own, to tell p from p + difference at
    95% with a power of 80%: (z + z')^2 (p q + p' q') / d^2, the usual approximation."""
    other = p + difference
    return (Z + POWER) ** 2 * (p * (1 - p) + other * (1 - other)) / difference**2


def power_unpaired(n: int, p: float, difference: float) -> float:
    """The power of that test with n questions for each model, by the same approximation."""
    other = p + difference
    error = math.sqrt((p * (1 - p) + other * (1 - other)) / n)
    return 0.5 * math.erfc((Z - difference / error) / math.sqrt(2))


@functools.cache
def _critical(most: int) -> list[int]:
    """For 0 to `most` tosses: up to how many on the smaller side give an exact two-sided p of at
    most 5%; -1 where none does."""
    found, count, chance = [], -1, 0.0  # chance: of at most `count` heads in `tosses` tosses
    for tosses in range(most + 1):
        while chance + _binomial(tosses, count + 1, 0.5) <= 0.025:
            count += 1
            chance += _binomial(tosses, count, 0.5)
        found.append(count)
        if count >= 0:  # one more toss
            chance -= 0.5 * _binomial(tosses, count, 0.5)
    return found


def _binomial(n: int, k: int, p: float) -> float:
    if p <= 0:
        return float(k == 0)
    return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
                    + k * math.log(p) + (n - k) * math.log1p(-p))


def power_paired(n: int, discordant: float, difference: float) -> float:
    """How often McNemar's exact test at 5% finds the better of two models on n shared questions.

    discordant: the share of questions that one model only gets right; difference: the better one's
    share of them minus the other's. Summed over all counts of discordant questions."""
    worse = (discordant - difference) / (2 * discordant)  # of a discordant one
    most = min(n, round(n * discordant + 8 * math.sqrt(n * discordant)) + 8)
    power, count, chance = 0.0, -1, 0.0  # chance: the worse has at most `count` of `tosses`
    for tosses, critical in enumerate(_critical(most)):
        while count < critical:
            count += 1
            chance += _binomial(tosses, count, worse)
        power += _binomial(n, tosses, discordant) * chance
        if count >= 0:
            chance -= worse * _binomial(tosses, count, worse)
    return power


def draw_power(ax, questions: int, points_better: int, accuracy: float) -> None:
    """The power over the share of discordant questions: how often so many questions show that a
    model is so many points better. Dashed: the models are asked questions of their own, at
    `accuracy` and so many points more."""
    d = points_better / 100
    shares = [d + (0.5 - d) * (i / 50) ** 2 for i in range(51)]  # denser where the curve is steep
    apart = power_unpaired(questions, accuracy, d)
    ax.plot([100 * s for s in shares], [100 * power_paired(questions, s, d) for s in shares],
            color=GPTQ, label="the same questions, McNemar's exact test")
    ax.axhline(100 * apart, color=RTN, linestyle="--",
               label=f"each its own questions: {apart:.0%}")
    ax.axhline(80, color=MUTED, linestyle=":")
    ax.set(xlim=(0, 50), ylim=(0, 103), xlabel="right in one of the two only, %",
           ylabel="power, %")
    ax.set_title(f"{questions:,} questions, {points_better} points better", pad=48)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.01), fontsize=10.5)


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
    """Accuracy with intervals at 8, 4 and 3 bits, at 2 bits on an axis of its own; then the two
    methods on the same questions.

    rows: {(bits, "a row" | "64 weights"): {"gptq" | "rtn": (correct, n)}}; pairs: for the same
    keys the counts "gptq" and "rtn" (right there only) and "p", adjusted; full: the fp32 model.
    """
    high, low, both = axes
    widths = sorted({b for b, _ in rows}, reverse=True)
    for ax, shown in ((high, [b for b in widths if b > 2]), (low, [b for b in widths if b == 2])):
        ends = wilson(*full)
        ax.axhspan(100 * ends[0], 100 * ends[1], color="#D9D9D9")
        for shift, (method, (label, color)) in zip((-0.15, 0.15), METHODS.items()):
            for x, b in enumerate(shown):
                interval(ax, x + shift, *rows[b, one_scale_for][method], color, upright=True,
                         label=None if x else label)
        if bits in shown:
            at = shown.index(bits)
            ax.axvspan(at - 0.45, at + 0.45, color=OTHER, alpha=0.15)
        ax.set(xticks=range(len(shown)), xticklabels=shown, xlabel="bits",
               xlim=(-0.5, len(shown) - 0.5))
    high.set(ylim=(86, 98), ylabel="right answers in %, gray: fp32")
    high.set_title(f"one scale for {one_scale_for}", pad=30)
    high.legend(loc="lower center", bbox_to_anchor=(0.5, 0.99), fontsize=10, ncols=2)
    low.set(ylim=(40, 100))
    pair = pairs[bits, one_scale_for]
    most = max(max(p["gptq"], p["rtn"]) for p in pairs.values())
    for y, method in enumerate(METHODS):
        both.barh(y, pair[method], color=METHODS[method][1], height=0.55)
        both.text(pair[method] + 0.03 * most, y, f"{pair[method]:.0f}", va="center")
    p = pair["p"]
    both.set(yticks=[0, 1], yticklabels=["GPTQ\nonly", "RTN\nonly"], ylim=(1.6, -0.6),
             xlim=(0, 1.2 * most), xlabel=f"right, of {full[1]} questions")
    both.set_title(f"{bits} bits: adjusted p {'< 0.0001' if p < 1e-4 else f'= {p:.2g}'}", pad=30)


def draw_coverage(ax, n: int, rates: Sequence[float],
                  coverage: dict[str, Sequence[float]]) -> None:
    """How often an interval that claims 95% holds the truth, over the true accuracy."""
    for (name, values), color in zip(coverage.items(), (MUTED, GPTQ)):
        ax.plot([100 * r for r in rates], [100 * v for v in values], color=color, label=name)
    ax.axhline(95, color=BAD, linestyle=":")
    ax.set(xscale="log", xlim=(0.05, 50), ylim=(0, 101), xlabel="true accuracy in %",
           xticks=[0.1, 1, 10, 50], xticklabels=["0.1", "1", "10", "50"],
           ylabel="intervals that hold it, %", title=f"n = {n}")
    ax.legend(loc="lower right")


def draw_published(ax, rows: dict[str, float]) -> None:
    """Published accuracies (label: %) on GSM8K's test, with intervals."""
    for y, (label, percent) in enumerate(rows.items()):
        interval(ax, y, round(percent / 100 * GSM8K_TEST), GSM8K_TEST, GPTQ)
        ax.text(percent + 4.5, y, f"{percent:.1f}", va="center", fontsize=11)
    ax.set(yticks=range(len(rows)), yticklabels=list(rows), xlim=(0, 85),
           ylim=(len(rows) - 0.5, -0.5), xlabel="right answers in %, n = 1,319")
