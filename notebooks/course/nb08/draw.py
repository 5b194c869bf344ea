"""What notebook 08 draws: next tokens, votes, what k samples give and what they cost.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare. Intervals are Wilson's, 95%.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_lib.base.statistics import wilson
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
        ax.text(x, value + 0.015, "cut" if gone else f"{value:.2f}", ha="center", fontsize=10,
                color=MUTED if gone else "black")
    rest = max(0.0, 1 - sum(shown))
    possible = int((p > 0).sum()) if top_p < 1 else len(p)
    ax.set(ylim=(0, 1.12), xticks=range(len(tokens)), ylabel="probability",
           title=f"{possible} tokens possible, {rest:.2f} not shown")
    ax.set_xticklabels(tokens, fontfamily="monospace")
    ax.grid(axis="x", visible=False)


def draw_votes(ax, temperature: float, samples: dict[float, Sequence[str | None]], gold: str,
               greedy: str | None) -> None:
    """How many samples of one question give each answer, most first; the right one in green.

    samples: {temperature: the answers}, equally many each.
    """
    answers = samples[temperature]
    counts: dict[str, int] = {}
    for answer in answers:
        counts[answer or "none"] = counts.get(answer or "none", 0) + 1
    rows = sorted(counts.items(), key=lambda item: -item[1])
    ax.barh(range(len(rows)), [n for _, n in rows], height=0.6,
            color=[BEST if a == gold else MUTED for a, _ in rows])
    labels = [f"{a} (greedy)" if a == (greedy or "none") else a for a, _ in rows]
    ax.set(yticks=range(len(rows)), yticklabels=labels, ylim=(len(answers) - 0.4, -0.6),
           xlim=(0, len(answers) + 0.3), xticks=range(0, len(answers) + 1, 2),
           xlabel=f"of {len(answers)} samples", title=f"right: {gold}")
    ax.grid(axis="y", visible=False)


def draw_temperature(ax, temperature: float,
                     curves: dict[float, dict[str, Sequence[float]]], greedy: tuple[float, float],
                     ks: Sequence[int]) -> None:
    """Accuracy over the number of samples at one temperature, and what they cost.

    curves: {temperature: {"best" | "majority": accuracies at `ks`, "tokens": tokens through the
    model a question}}; greedy: (accuracy, tokens).
    """
    curve, (accuracy, tokens) = curves[temperature], greedy
    at = range(len(ks))  # doublings, evenly spaced
    ax.axhline(100 * accuracy, color=FP, linestyle="--", label=f"greedy, {tokens:.0f} tokens")
    for name, label, color in (("best", "best of k", BEST), ("majority", "majority", MAJORITY)):
        ax.plot(at, [100 * a for a in curve[name]], "o-", color=color, label=label)
    ax.set(xlim=(-0.2, len(ks) - 0.8), ylim=(0, 102), xticks=at,
           xticklabels=[f"{k}\n{t:.0f}" for k, t in zip(ks, curve["tokens"])],
           xlabel="samples k, and tokens a question", ylabel="right, %")
    ax.legend(loc="lower right", fontsize=10)


def draw_compute(axes, k: int, curves: dict[str, dict[int, tuple[float, float]]],
                 counts: dict[int, dict[str, tuple[int, int]]]) -> None:
    """Left: accuracy over compute, a curve a method. Right: all of them at k samples.

    curves: {method: {k: (thousand tokens through the model a question, accuracy)}};
    counts: {k: {method: (right, n)}}, whole samples, for the intervals.
    """
    left, right = axes
    for name, points in curves.items():
        color = METHODS[name][1]
        xs, ys = zip(*points.values())
        left.plot(xs, [100 * y for y in ys], ":" if name == "best" else "-", color=color)
        x, y = points.get(k, (xs[0], ys[0]))  # greedy has one point, whatever k
        left.plot(x, 100 * y, "s" if name == "greedy" else "o", color=color, markersize=8)
    left.set(xscale="log", xlabel="thousand tokens through the model, a question",
             ylabel="right answers in %", ylim=(65, 100), title="colours as on the right")
    plain_ticks(left, [0.1, 0.3, 1, 3])
    (unit, _), = curves["greedy"].values()
    names = list(counts[k])
    labels = []
    for y, name in enumerate(names):
        (label, color), (correct, n) = METHODS[name], counts[k][name]
        interval(right, y, correct, n, color)
        right.text(100 * wilson(correct, n)[1] + 0.8, y, f"{100 * correct / n:.1f}", va="center",
                   fontsize=11)
        spent = curves[name][k][0] if name != "greedy" else unit
        labels.append(f"{label}, {spent / unit:.0f}×")
    right.set(yticks=range(len(names)), yticklabels=labels, ylim=(len(names) - 0.5, -0.5),
              xlim=(65, 102), xlabel="right answers in %",
              title=f"k = {k}; × greedy's compute; 95% intervals")


def draw_scores(ax, scores: Sequence[float], right: Sequence[bool]) -> None:
    """Histograms of a score for right and wrong solutions, each scaled to its own number."""
    values = torch.tensor(scores)
    edges = torch.linspace(0, 1, 21)
    for wanted, color, label in ((True, BEST, "right"), (False, COLORS["qlora"], "wrong")):
        own = values[torch.tensor([r == wanted for r in right])]
        shares = torch.histogram(own, edges).hist / max(len(own), 1)
        ax.stairs((100 * shares).tolist(), edges.tolist(), color=color, linewidth=2.2,
                  label=f"{label}, {len(own):,}", fill=False)
    ax.set(xlim=(0, 1), ylim=(0, None), xlabel="verifier: probability of being right",
           ylabel="% of these solutions")
    ax.legend(loc="upper center")
