"""What notebook 03 draws: memory, factors, spectra, scales, budgets, learning rates."""
import numpy as np

from ..kit.picture import COLORS, PARTS, PLAIN, matrix, plain_ticks

SPECTRA = {"update": COLORS["lora"], "weight": COLORS["fp"], "random": COLORS["muted"]}
SCALES = {"alpha / r": COLORS["lora"], "alpha / sqrt(r)": PLAIN[0]}
KINDS = {"Adam's moments": "optimizer", "adapter": "adapters"}  # notebook 04's names of parts


def _handles(ax, **options):
    ax.legend(fontsize=10, handlelength=1.4, borderaxespad=0.2, **options)


def draw_memory(ax, rows: dict[str, dict[str, float]], cards: tuple[int, ...] = (24, 80)) -> None:
    """Stacked bars of gigabytes: {row: {part: GB}}; dashed lines are the sizes of GPUs."""
    named = set()
    for y, parts in enumerate(rows.values()):
        left = 0.0
        for part, size in parts.items():
            ax.barh(y, size, left=left, color=PARTS[KINDS.get(part, part)], height=0.6,
                    label=None if part in named else part)
            named.add(part)
            left += size
        ax.text(left, y - 0.33, f"{left:.1f} GB", va="bottom", ha="center", fontsize=11)
    for size in cards:  # a line ends below its name
        ax.plot([size, size], [-0.62, len(rows)], color="black", linestyle=":", linewidth=1.3)
        ax.text(size, -0.66, f"{size} GB GPU", fontsize=10, ha="center", va="bottom")
    ax.set(yticks=range(len(rows)), yticklabels=list(rows), xlim=(0, 130),
           ylim=(len(rows) - 0.4, -0.95), xlabel="GB before the first activation")
    ax.grid(axis="y", visible=False)
    _handles(ax, loc="lower right")


def draw_product(axes, a, b) -> None:
    """B (out, r), A (r, in), whole numbers, and their product, cells of one size."""
    product = b @ a  # (out, in)
    top = float(product.abs().max())
    rows, cols = product.shape
    for ax, values, name in zip(axes, (b, a, product), ("B", "A", "B A")):
        matrix(ax, values.long(), limits=(-top, top), title=f"{name}  {tuple(values.shape)}")
        x, y = (values.shape[1] - 1) / 2, (values.shape[0] - 1) / 2  # the middle
        ax.set(xlim=(x - cols / 2, x + cols / 2), ylim=(y + rows / 2, y - rows / 2),
               aspect="equal")


def draw_starts(ax, curves: dict[str, list[float]]) -> None:
    """Loss over the first steps, a curve for each way to initialize A and B."""
    styles = [(COLORS["lora"], "-"), (PLAIN[0], "--"), (PLAIN[1], "-")]
    for (name, losses), (color, line) in zip(curves.items(), styles):
        ax.plot(losses, line, color=color, label=name)
    ax.set(xlabel="step", ylabel="loss", ylim=(0, None))
    _handles(ax)


def _spectrum(ax, name: str, values: np.ndarray) -> None:
    ax.plot(np.arange(1, len(values) + 1), values, color=SPECTRA[name],
            linestyle="--" if name == "random" else "-", label=name)


def _energy_axes(ax, energy: dict[str, np.ndarray]) -> None:
    for name, values in energy.items():
        _spectrum(ax, name, 100 * np.asarray(values))
    ax.set(xscale="log", xlim=(1, len(values)), ylim=(0, 102), xlabel="rank kept",
           ylabel="energy kept, %")
    plain_ticks(ax, [1, 4, 16, 64, 256])
    ax.set_xlim(1, len(values))


def draw_spectra(axes, values: dict[str, np.ndarray], energy: dict[str, np.ndarray]) -> None:
    """Left: singular values over the largest one. Right: energy kept by the first r."""
    for name, s in values.items():
        _spectrum(axes[0], name, np.asarray(s) / float(s[0]))
    axes[0].set(xlabel="index", ylabel="singular value / largest", xlim=(1, len(s)),
                ylim=(0, 1.02))
    _handles(axes[0], loc="upper right")
    _energy_axes(axes[1], energy)
    _handles(axes[1], loc="lower right")


def draw_update(axes, layer: str, rank: int, spectra: dict[str, dict]) -> None:
    """Energy kept by `rank`; a corner of the update, and of its best rank-r approximation.

    spectra: {layer: u (out, k), s (k,), v (k, in), energy {name: (k,)}}, all arrays.
    """
    u, s, v, energy = (spectra[layer][k] for k in ("u", "s", "v", "energy"))
    _energy_axes(axes[0], energy)
    _handles(axes[0], loc="upper left")
    kept = 100 * float(energy["update"][rank - 1])
    axes[0].plot(rank, kept, "o", color=COLORS["lora"], markersize=10)
    axes[0].set_title(f"r = {rank} keeps {kept:.0f}%")
    outputs, inputs = u.shape[0], v.shape[1]
    corner = (slice(0, 16), slice(0, 16))
    exact = ((u * s) @ v)[corner]
    thin = ((u[:, :rank] * s[:rank]) @ v[:rank])[corner]
    top = np.abs(exact).max()
    numbers = rank * (outputs + inputs)
    titles = (f"update: {outputs * inputs:,} numbers",
              f"rank {rank}: {numbers:,} ({4 * numbers / 1000:,.0f} kB)")
    for ax, values, title in zip(axes[1:], (exact, thin), titles):
        # 17 shades: the PNG's palette has to serve the curves as well
        matrix(ax, (8 * values / top).round(), title=title, limits=(-8, 8))
        ax.title.set_fontsize(11)


def draw_regained(ax, kept: dict[str, list[float]], losses: dict[str, list[float]], start: float,
                  whole: float) -> None:
    """Dev loss over the directions that were kept of every update: up to three ways, of which the
    last is the control. whole: with all directions of the first way."""
    styles = ((COLORS["lora"], "o-"), (PLAIN[0], "s-"), (COLORS["muted"], "o:"))
    for (name, values), (color, style) in zip(losses.items(), styles):
        ax.plot(kept[name], values, style, color=color, label=name)
    ax.axhline(start, color=PLAIN[2], linestyle="--", label="before fine-tuning")
    ax.axhline(whole, color=COLORS["fp"], linestyle="--", label="all linears, whole")
    ax.set_xscale("symlog", linthresh=1)
    plain_ticks(ax, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256])
    ax.set(xlim=(0, 256), xlabel="directions kept, in the mean over the layers",
           ylabel="dev loss", ylim=(0, 1.7 * start))
    _handles(ax, loc="upper right", ncols=2)


def draw_scaling(axes, alpha: int, rank: int, use_rslora: bool, runs: dict) -> None:
    """After the first step: the update's norm, and its progress against the gradient; then the
    loss, the setting over all others.

    runs: {(alpha, rank, use_rslora): (norm, progress, losses)}.
    """
    ranks = sorted({r for _, r, _ in runs})
    for i, (ax, what) in enumerate(zip(axes, ("norm of the update", "progress"))):
        every = [run[i] for run in runs.values()]
        for rs, name in ((False, "alpha / r"), (True, "alpha / sqrt(r)")):
            ax.plot(ranks, [runs[alpha, r, rs][i] for r in ranks], "o-", color=SCALES[name],
                    alpha=1 if rs == use_rslora else 0.35, label=name)
        ax.plot(rank, runs[alpha, rank, use_rslora][i], "o", markersize=14, fillstyle="none",
                color="black", markeredgewidth=2)
        ax.set(xscale="log", yscale="log", xlabel="rank", title=f"first step: {what}",
               ylim=(min(every) / 1.5, max(every) * (1.5 if i else 8)))
        plain_ticks(ax, ranks)
    _handles(axes[0], loc="upper left")
    for _, _, losses in runs.values():
        axes[2].plot(losses, color="#DDDDDD", linewidth=1)
    name = "alpha / sqrt(r)" if use_rslora else "alpha / r"
    axes[2].plot(runs[alpha, rank, use_rslora][2], color=SCALES[name], linewidth=3)
    scale = alpha / (rank**0.5 if use_rslora else rank)
    top = 1.3 * runs[alpha, rank, use_rslora][2][0]
    axes[2].set(xlabel="step", ylim=(0, top), title=f"loss at scale {scale:.3g}")


def draw_budget(axes, rank: int, targets: str, per_rank: dict[str, int], total: int) -> None:
    """Top: adapter parameters over ranks, by targets; below: what the setting takes.

    per_rank: {targets: sum of in + out over the layers}; total: parameters of the model.
    """
    ranks = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
    for (name, each), color in zip(per_rank.items(), PLAIN):
        axes[0].plot(ranks, each * ranks, color=color, label=name,
                     alpha=1 if name == targets else 0.4)
        if name == targets:
            axes[0].plot(rank, each * rank, "o", markersize=12, color=color)
    axes[0].axhline(total / 1000, color="black", linestyle=":", linewidth=1.5)
    axes[0].text(256, total / 1000, "1000x fewer", ha="right", va="top", fontsize=10)
    axes[0].set(xscale="log", yscale="log", xlabel="rank", ylabel="parameters",
                ylim=(3e5, 3e10))
    plain_ticks(axes[0], ranks[::2])
    _handles(axes[0], loc="upper left")
    count = per_rank[targets] * rank
    names = ("file, fp32", "gradients", "Adam's moments")
    sizes = np.array([4, 4, 8]) * count / 1e6
    colors = (PARTS["adapters"], PARTS["gradients"], PARTS["optimizer"])
    for y, (size, color) in enumerate(zip(sizes, colors)):  # no bars: a log axis has no zero
        axes[1].plot(size, y, "o", markersize=11, color=color)
        axes[1].text(size * 2, y, f"{size:,.1f} MB", va="center", fontsize=11)
    axes[1].set(xscale="log", xlim=(0.5, 2e5), ylim=(2.6, -0.6), xlabel="MB",
                yticks=range(len(names)), yticklabels=names,
                title=f"{count:,}: {total / count:,.0f}x fewer ({count / total:.2%})")
    axes[1].title.set_fontsize(11)


def draw_rates(ax, sweep: dict[str, dict[float, list[float]]], top: float = 2.2) -> None:
    """Dev loss over the learning rate for each way to train: a small point a seed, a line through
    the means, a ring around the lowest mean. What lies above `top` is drawn at the upper edge.

    sweep: {way: {rate: [a loss a seed]}}.
    """
    colors = (COLORS["fp"], COLORS["lora"], PLAIN[2], PLAIN[0], PLAIN[1])
    for (way, rates), color in zip(sweep.items(), colors):
        means = [min(top, sum(losses) / len(losses)) for losses in rates.values()]
        for rate, losses in rates.items():
            for loss in losses:
                ax.plot(rate, min(loss, top), "o" if loss < top else "^", color=color,
                        markersize=4, alpha=0.6)
        line = "--" if way.startswith("q") else "-"
        ax.plot(list(rates), means, line, color=color, label=way)
        low = min(means)
        ax.plot(list(rates)[means.index(low)], low, "o", markersize=13, fillstyle="none",
                color=color, markeredgewidth=2)
    every = sorted({rate for rates in sweep.values() for rate in rates})
    lowest = min(loss for rates in sweep.values() for losses in rates.values() for loss in losses)
    ax.set(xscale="log", xlabel="learning rate", ylabel=f"dev loss (triangles: above {top:g})",
           ylim=(lowest - 0.1, top + 0.02))
    ax.set_xticks(every, labels=[f"{rate:g}" for rate in every])
    ax.minorticks_off()
    ax.legend(fontsize=10, loc="center left", bbox_to_anchor=(1, 0.5))
