"""What notebook 07 draws: who solves what, ranks, mixtures, budgets, bytes served.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare. Intervals are Wilson's, 95%.
"""

from collections.abc import Sequence

import numpy as np

from qlora_lib.base.statistics import wilson
from ..kit.picture import COLORS, interval, matrix, plain_ticks

FP, BASE, ADAPTER, OTHER, MUTED = (COLORS[k] for k in ("fp", "gptq", "lora", "rtn", "muted"))
PARTS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate",
         "up_proj": "up", "down_proj": "down"}


def draw_matrix(ax, accuracy: dict[str, dict[str, float]]) -> None:
    """{adapter: {task: accuracy}} as coloured cells, percents in them."""
    tasks = list(next(iter(accuracy.values())))
    values = np.array([[100 * row[task] for task in tasks] for row in accuracy.values()])
    matrix(ax, values, fmt=".0f", limits=(0, 100))
    ax.set_xticks(range(len(tasks)), labels=[t.replace("_", "\n") for t in tasks])
    ax.set_yticks(range(len(accuracy)), labels=[a.replace("_", " ") for a in accuracy])
    ax.set(xlabel="task, right answers in %", ylabel="adapter")


def draw_rank(axes, rank: int, rows: dict[int, dict], base_bytes: int) -> None:
    """Left: dev accuracy over ranks with intervals, one chosen. Right: what that one takes.

    rows: {rank: {"correct", "n", "parameters"}}; base_bytes: of the base that all share.
    """
    left, right = axes
    ranks = list(rows)
    at = {r: i for i, r in enumerate(ranks)}
    shares = {r: 100 * row["correct"] / row["n"] for r, row in rows.items()}
    left.plot(range(len(ranks)), list(shares.values()), "o-", color=ADAPTER)
    for r, row in rows.items():
        sizes = {"capsize": 6, "markersize": 9, "linewidth": 2.5} if r == rank else \
            {"capsize": 4, "markersize": 5, "linewidth": 1.2}
        interval(left, at[r], row["correct"], row["n"], FP if r == rank else ADAPTER,
                 upright=True, **sizes)
    low, high = (100 * x for x in wilson(rows[rank]["correct"], rows[rank]["n"]))
    left.set(xticks=range(len(ranks)), xticklabels=ranks, xlabel="rank", ylim=(-2, 106),
             ylabel="dev, right in %", title=f"{shares[rank]:.1f}% [{low:.1f}, {high:.1f}]")
    size = 2 * rows[rank]["parameters"]  # bf16
    right.barh(["base, 4 bits", "adapter"], [base_bytes / 1e3, size / 1e3],
               color=[BASE, ADAPTER], height=0.55)
    for y, kilo in enumerate((base_bytes / 1e3, size / 1e3)):
        right.text(kilo + base_bytes / 5e4, y, f"{kilo:,.0f} kB", va="center", fontsize=11)
    right.set(xlim=(0, 1.35 * base_bytes / 1e3), xlabel="kB", ylim=(1.6, -0.6),
              title=f"{size / base_bytes:.1%} of the base's bytes")
    right.grid(axis="y", visible=False)


def draw_mixture(axes, first: float, second: float,
                 grid: dict[tuple[float, float], dict[str, float]]) -> None:
    """A map a task: its accuracy at all weights of two adapters; the setting is framed.

    grid: {(first weight, second weight): {task: accuracy}}.
    """
    rows, cols = (sorted({pair[i] for pair in grid}) for i in (0, 1))
    names = list(next(iter(grid.values())))
    for ax, task in zip(axes, names):
        values = np.array([[100 * grid[a, b][task] for b in cols] for a in rows])
        here = 100 * grid[first, second][task]
        matrix(ax, values, fmt=".0f", limits=(0, 100), title=f"{task}: {here:.0f}%")
        ax.set_xticks(range(len(cols)), labels=[f"{b:g}" for b in cols])
        ax.set_yticks(range(len(rows)), labels=[f"{a:g}" for a in rows])
        ax.set(xlabel=f"weight of {names[1]}", ylabel=f"weight of {names[0]}")
        ax.plot(cols.index(second), rows.index(first), "s", markersize=30, fillstyle="none",
                color=FP, markeredgewidth=2.5, clip_on=False)


def draw_budget(ax, budget: int, ranks: dict[int, dict[str, int]]) -> None:
    """Ranks of the layers under a budget of parameters, block after block.

    ranks: {budget: {module path: rank}}; a layer that is left out has rank 0.
    """
    paths = sorted({path for found in ranks.values() for path in found}, key=_place)
    top = max(max(found.values()) for found in ranks.values())
    heights = [ranks[budget].get(path, 0) for path in paths]
    colors = [BASE if _place(path)[1] < 4 else OTHER for path in paths]
    ax.bar(range(len(paths)), heights, color=colors, width=0.75)
    ax.set_xticks(range(len(paths)), labels=[PARTS[p.rpartition(".")[2]] for p in paths],
                  rotation=90, fontsize=9)
    ax.set(ylim=(0, top + 0.5), xlim=(-0.7, len(paths) - 0.3), ylabel="rank",
           xlabel="linears, block after block; attention blue, MLP orange",
           title=f"{budget:,} parameters, {sum(h > 0 for h in heights)} of {len(paths)} layers")
    ax.grid(axis="x", visible=False)


def _place(path: str) -> tuple[int, int]:
    """(block, which linear) of a path like model.layers.0.self_attn.q_proj."""
    block = next(int(part) for part in path.split(".") if part.isdigit())
    return block, list(PARTS).index(path.rpartition(".")[2])


def draw_served(ax, adapters: int, base: dict[str, int], adapter: int,
                counts: Sequence[int]) -> None:
    """Bytes over the number of tasks served: a model for each task, or one base and adapters.

    base: {"16 bits" | "4 bits": bytes of the base}; adapter: bytes of one.
    """
    ways = {
        "a 16-bit model for each": ([n * base["16 bits"] for n in counts], FP),
        "a merged 4-bit model for each": ([n * base["4 bits"] for n in counts], OTHER),
        "one 4-bit base, adapters": ([base["4 bits"] + n * adapter for n in counts], ADAPTER),
    }
    i = list(counts).index(adapters)
    for name, (sizes, color) in ways.items():
        ax.plot(counts, [s / 1e6 for s in sizes], "o-", color=color, markersize=3,
                label=f"{name}: {sizes[i] / 1e6:,.1f} MB")
        ax.plot(adapters, sizes[i] / 1e6, "o", color=color, markersize=10)
    ax.set(xscale="log", yscale="log", xlabel="tasks", ylabel="MB", ylim=(1, 2e5))
    plain_ticks(ax, list(counts))
    ax.legend(loc="upper left", fontsize=10)
