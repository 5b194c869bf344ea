"""What notebook 08 draws: next tokens, what k samples give and cost, what a verifier says.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare. Intervals are 95%: Wilson's for a share, paired for a difference.
"""
from collections.abc import Sequence

from torch import Tensor

from ..kit.picture import COLORS, interval, plain_ticks
from .next_token import token_probabilities

FP, MAJORITY, LIKELIHOOD, VERIFIER, WEIGHTED, BEST, MUTED = (
    COLORS[k] for k in ("fp", "gptq", "rtn", "lora", "other", "nf4", "muted"))
METHODS = {  # name: (label, colour), in the order of the legends
    "greedy": ("greedy", FP),
    "majority": ("majority", MAJORITY),
    "likelihood": ("likelihood", LIKELIHOOD),
    "verifier": ("verifier", VERIFIER),
    "weighted": ("weighted vote", WEIGHTED),
    "best": ("best of k", BEST),
}


def draw_next_token(ax, temperature: float, top_p: float, logits: Tensor,
                    tokens: Sequence[str]) -> None:
    """Probabilities of the next token. logits (vocab,); tokens: texts of the most likely ones,
    by falling logit. Without top-p no token is cut: one at 0 is too small for fp32."""
    p = token_probabilities(logits, temperature, top_p)
    order = logits.argsort(descending=True, stable=True)[:len(tokens)]
    shown = p[order].tolist()
    cut = [x == 0 and top_p < 1 for x in shown]
    ax.bar(range(len(tokens)), shown, color=[MUTED if c else MAJORITY for c in cut], width=0.7)
    for x, (value, gone) in enumerate(zip(shown, cut)):
        text = "cut" if gone else f"{value:.2f}" if value >= 0.005 else "<0.01"
        ax.text(x, value + 0.015, text, ha="center", fontsize=10,
                color=MUTED if gone else "black")
    rest = max(0.0, 1 - sum(shown))
    possible = int((p > 0).sum()) if top_p < 1 else len(p)
    ax.set(ylim=(0, 1.12), xticks=range(len(tokens)), ylabel="probability",
           title=f"{possible} tokens possible, {rest:.2f} not shown")
    ax.set_xticklabels(tokens, fontfamily="monospace")
    ax.grid(axis="x", visible=False)


def draw_temperature(axes, temperature: float, curves: dict[float, dict[str, Sequence[float]]],
                     greedy: tuple[float, float], ks: Sequence[int],
                     gaps: dict[float, tuple[float, float, float]]) -> None:
    """Left: accuracy over the number of samples at one temperature, and what they cost. Right: how
    far the vote is from greedy at every temperature.

    curves: {temperature: {"best" | "majority": accuracies at `ks`, "tokens": tokens through the
    model a question}}; greedy: (accuracy, tokens); gaps: {temperature: (difference, low, high)},
    shares.
    """
    left, right = axes
    curve, (accuracy, tokens) = curves[temperature], greedy
    at = range(len(ks))  # doublings, evenly spaced
    left.axhline(100 * accuracy, color=FP, linestyle="--", label=f"greedy, {tokens:.0f} tokens")
    for name, label, color in (("best", "best of k", BEST), ("majority", "majority", MAJORITY)):
        left.plot(at, [100 * a for a in curve[name]], "o-", color=color, label=label)
    left.set(xlim=(-0.2, len(ks) - 0.8), ylim=(30, 108), xticks=at,
             xticklabels=[f"{k}\n{t:.0f}" for k, t in zip(ks, curve["tokens"])],
             xlabel="samples k, and tokens a question", ylabel="right, %")
    left.legend(loc="upper left", fontsize=10)
    right.axhline(0, color=FP, linestyle="--")
    for x, (t, (gap, low, high)) in enumerate(gaps.items()):
        own = t == temperature
        _difference(right, x, gap, low, high, MAJORITY if own else MUTED, upright=True,
                    markersize=9 if own else 6)
    gap = gaps[temperature][0]
    right.set(xticks=range(len(gaps)), xticklabels=[f"{t:g}" for t in gaps], ylim=(-24, 12),
              xlabel="temperature", ylabel="points above greedy",
              title=f"majority of {ks[-1]} less greedy: {100 * gap:+.1f}")


def _difference(ax, at: float, gap: float, low: float, high: float, color: str,
                upright: bool = False, **style) -> None:
    """A difference of two shares with its interval, in points, at `at` of the other axis."""
    error = [[100 * max(0.0, gap - low)], [100 * max(0.0, high - gap)]]
    place = (at, 100 * gap) if upright else (100 * gap, at)
    style = {"markersize": 7, "capsize": 4, "linewidth": 2} | style
    ax.errorbar(*place, **{"yerr" if upright else "xerr": error}, fmt="o", color=color, **style)


def draw_reliability(ax, groups: dict[str, Sequence[dict[str, float]]]) -> None:
    """What a score says and how many are right, in bins: on the diagonal it is honest.

    groups: {label: rows with "says", "right", "low", "high", shares}, two at most.
    """
    ax.plot([0, 100], [0, 100], "--", color=MUTED, linewidth=1.5)
    for (label, rows), color, mark, shift in zip(groups.items(), (MAJORITY, COLORS["qlora"]),
                                                 ("o", "s"), (-0.7, 0.7)):
        ax.errorbar([100 * r["says"] + shift for r in rows], [100 * r["right"] for r in rows],
                    yerr=[[100 * max(0.0, r["right"] - r["low"]) for r in rows],
                          [100 * max(0.0, r["high"] - r["right"]) for r in rows]],
                    fmt=mark, color=color, label=label, markersize=6, capsize=3, linewidth=1.6)
    ax.text(62, 56, "honest", rotation=38, color=MUTED, fontsize=11, ha="center", va="center")
    ax.set(xlim=(0, 102), ylim=(0, 102), xlabel="the verifier says, % (mean of a bin)",
           ylabel="right, %")
    ax.legend(loc="upper left", fontsize=10)


def draw_compute(axes, k: int, costs: dict[str, dict[int, float]],
                 counts: dict[str, dict[int, tuple[int, int]]],
                 gaps: dict[int, dict[str, tuple[float, float, float]]]) -> None:
    """Left: accuracy over compute, a curve a method. Right: how far each is from greedy with k
    samples. Both with the first k samples.

    costs: {method: {k: thousand tokens through the model a question}}; counts: {method: {k:
    (right, n)}}; greedy has k = 1 alone; gaps: {k: {method: (difference, low, high)}}, shares.
    """
    left, right = axes
    for name, points in costs.items():
        label, color = METHODS[name]
        shares = [100 * right_ / n for right_, n in counts[name].values()]
        left.plot(list(points.values()), shares, ":" if name == "best" else "-", color=color)
        here = k if k in points else 1  # greedy has one point, whatever k
        correct, n = counts[name][here]
        interval(left, points[here], correct, n, color, upright=True, label=label)
    left.set(xscale="log", xlim=(0.075, 4.5), ylim=(62, 100),
             xlabel="thousand tokens through the model, a question", ylabel="right answers, %")
    left.legend(loc="upper left", fontsize=9)
    plain_ticks(left, [0.1, 0.3, 1, 3])
    unit = costs["greedy"][1]
    right.axvline(0, color=FP, linestyle="--")
    labels = []
    for y, (name, (gap, low, high)) in enumerate(gaps[k].items()):
        label, color = METHODS[name]
        _difference(right, y, gap, low, high, color)
        end, side = (high + 0.008, "left") if gap > 0 else (low - 0.008, "right")
        right.text(100 * end, y, f"{100 * gap:+.1f}", va="center", ha=side, fontsize=11)
        labels.append(f"{label}, {costs[name][k] / unit:.0f}×")
    right.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5),
              xlim=(-16, 23), xlabel="points above greedy, same questions",
              title=f"k = {k}; × greedy's compute")
