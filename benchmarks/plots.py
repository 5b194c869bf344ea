"""The page of plots: bars of the ratios, with quartiles."""

from pathlib import Path

from matplotlib.figure import Figure


def _bars(ax, rows: list[tuple[str, dict, str]], title: str) -> None:
    """Rows of (label, seconds by name, the name that is 1)."""
    names = list(dict.fromkeys(n for _, seconds, _ in rows for n in seconds))
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        for y, (_, seconds, unit) in enumerate(rows):
            if name not in seconds:
                continue
            one, t = seconds[unit]["median"], seconds[name]
            low, high = (q / one for q in t["quartiles"])
            ax.barh(
                y + (k - len(names) / 2 + 0.5) * height, t["median"] / one, height,
                xerr=[[t["median"] / one - low], [high - t["median"] / one]],
                color=f"C{k}", label=name if y == 0 else None,
            )  # fmt: skip
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=7)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_title(title, fontsize=9)
    handles = {h.get_label(): h for h in ax.containers if not h.get_label().startswith("_")}
    ax.legend(handles.values(), handles.keys(), fontsize=7)


def draw(result: dict, path: Path) -> None:
    """One PNG with what was measured."""
    panels = []
    if "solver" in result:
        rows = [
            (f"{r['out']} x {r['in']}{', clip' if r['clip_search'] else ''}", r["seconds"], "ours")
            for r in result["solver"]
        ]
        panels.append((rows, "GPTQ, time over ours (more: slower)"))
    for dtype in ("bfloat16", "float32"):
        rows = [
            (
                f"{r['out']} x {r['in']}, {r['tokens']}{' fwd+bwd' if r['backward'] else ''}",
                r["seconds"], "F.linear",
            )  # fmt: skip
            for r in result.get("layers", []) if r["dtype"] == dtype
        ]
        if rows:
            panels.append((rows, f"A linear layer in {dtype}, time over F.linear"))
    if "step" in result:
        panels.append(([("step", result["step"]["seconds"], "ours")], "QLoRA step, time over ours"))
    heights = [max(3, len(rows)) for rows, _ in panels]
    figure = Figure(figsize=(8, 1.5 + 0.45 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (rows, title) in zip(axes, panels):
        _bars(ax, rows, title)
    load = result["load_at_start"]
    figure.suptitle(f"{result['machine']}; load at start {load}", fontsize=8)
    figure.savefig(path, dpi=80)
