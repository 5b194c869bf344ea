"""Pictures: one style, one way to make a PNG, and what several notebooks draw alike.

Every picture of the course is a pure function `draw(ax, **values)` that is drawn here, on a
Figure of its own: no pyplot, so no state and nothing left open. The PNG has at most 64 colours,
which is a third of the usual size, and the same bytes each time.
"""
import base64
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from qlora_lib.base.statistics import wilson

# Okabe and Ito's palette tells apart for the colour-blind too. One method, one colour, all course.
COLORS = {
    "fp": "#000000",      # full precision, the reference
    "rtn": "#E69F00",     # round to nearest
    "gptq": "#0072B2",
    "nf4": "#009E73",
    "lora": "#CC79A7",
    "qlora": "#D55E00",
    "other": "#56B4E9",
    "muted": "#8C8C8C",   # grids, guides, what is not the point
}
# Bytes of a training run by part, and lines that stand for no method, take none of those colors:
# Paul Tol's "muted" palette, likewise for all eyes.
PARTS = {
    "weights": "#5A5A5A", "packed weights": "#332288", "scales": "#88CCEE",
    "adapters": COLORS["lora"], "gradients": "#DDCC77", "optimizer": "#882255",
    "activations": "#44AA99", "logits": "#117733", "dequantized layer": "#999933",
    "fp32 copy": "#AA4499",
}
PLAIN = ("#332288", "#44AA99", "#882255", "#999933", "#88CCEE")
STYLE = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=list(COLORS.values())),
    "grid.color": "#E5E5E5",
    "lines.linewidth": 2.2,
    "legend.frameon": False,
}
DPI = 100                 # of one picture
STRIP_DPI = 80            # of a film strip
STRIP_WIDTH = 13.5        # inches; more panels go to the next row
STRIP_SCALE = 0.7         # panels beside each other are this much smaller; the letters are not
PALETTE = 64

Draw = Callable[..., None]


def render(draw: Draw, settings: Sequence[dict[str, Any]], *, size: tuple[float, float],
           axes: tuple[int, int] = (1, 1), titles: Sequence[str] | None = None) -> bytes:
    """PNG bytes of `draw(ax, **values)` for each dict of values in `settings`.

    `size` is a panel's (width, height) in inches. With `axes=(rows, cols)` other than (1, 1),
    `draw` gets the array that `Figure.subplots(rows, cols)` returns. Several settings make a
    film strip, each panel under its title.
    """
    columns = min(len(settings), max(1, int(STRIP_WIDTH // (size[0] * STRIP_SCALE))))
    scale = STRIP_SCALE if columns > 1 else 1
    rows = math.ceil(len(settings) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * scale * columns, size[1] * scale * rows),
                        dpi=DPI if len(settings) == 1 else STRIP_DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        panels = figure.subfigures(rows, columns, squeeze=False, wspace=0.04).flat
        for panel, values, title in zip(panels, settings, titles or [""] * len(settings)):
            draw(panel.subplots(*axes), **values)
            if title:
                panel.suptitle(title, fontsize=12, fontweight="bold")
        canvas.draw()
        return _png(np.asarray(canvas.buffer_rgba()))


def _png(pixels: np.ndarray) -> bytes:
    """pixels (height, width, 4), uint8 -> a PNG with a palette, without date or software name."""
    image = Image.fromarray(pixels).convert("RGB")
    image = image.quantize(PALETTE, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def bundle(png: bytes, text: str, alt: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(data, metadata) of a notebook output: the picture, its words, and the words as its alt."""
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": text}
    return data, {"image/png": {"alt": alt}}


def show(draw: Draw, *, alt: str, size: tuple[float, float] = (6, 3.6),
         axes: tuple[int, int] = (1, 1), **values: Any) -> None:
    """Display `draw(ax, **values)` as a picture. `alt` says in words what there is to see."""
    from IPython.display import display

    data, metadata = bundle(render(draw, [values], size=size, axes=axes), alt, alt)
    display(data, metadata=metadata, raw=True)


def matrix(ax, values, *, title: str = "", fmt: str | None = None, cmap: str | None = None,
           limits: tuple[float, float] | None = None) -> None:
    """Draw values (rows, cols) as coloured cells; up to 8 x 8 the number stands in each cell.

    Numbers with a sign get a diverging map centred on 0, others a sequential one. Give `limits`
    (low, high) so that the colours of several settings compare.
    Raises ValueError unless `values` has two dimensions.
    """
    values = values if hasattr(values, "dtype") else np.asarray(values)
    whole = "int" in str(values.dtype)
    if hasattr(values, "detach"):  # a tensor; NumPy knows no bfloat16
        values = values.detach().double().cpu().numpy()
    if values.ndim != 2:
        raise ValueError(f"got values of shape {values.shape}; expected (rows, cols)")
    signed = values.min() < 0 or (limits is not None and limits[0] < 0)
    if limits is None:
        top = np.abs(values).max() or 1.0
        limits = (-top, top) if signed else (0, top)
    colors = matplotlib.colormaps[cmap or ("RdBu_r" if signed else "Blues")]
    level = Normalize(*limits, clip=True)(values)
    # The ends of both maps are too dark to read a number on: use their inner part.
    level = 0.15 + 0.7 * level if signed else 0.75 * level
    shades = colors(level)  # (rows, cols, 4)
    ax.imshow(shades, aspect="auto", interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    rows, cols = values.shape
    if max(rows, cols) > 8:
        return
    fmt = fmt or ("d" if whole else ".2f")
    light = shades[..., :3] @ (0.299, 0.587, 0.114) > 0.5  # (rows, cols)
    for i in range(rows):
        for j in range(cols):
            number = int(values[i, j]) if fmt == "d" else values[i, j]
            ax.text(j, i, format(number, fmt), ha="center", va="center",
                    fontsize=11 if cols <= 6 else 9, color="black" if light[i, j] else "white")


def plain_ticks(ax, ticks: Sequence[float]) -> None:
    """Ticks of a logarithmic x axis at these numbers alone, written out."""
    ax.set_xticks(ticks, labels=list(map(str, ticks)))
    ax.minorticks_off()


def interval(ax, at: float, correct: int, n: int, color: str, *, upright: bool = False,
             **style: Any) -> None:
    """A point at `at` for correct of n answers in %, with its 95% interval, Wilson's; along the
    x axis, or upright along the y axis."""
    p, (low, high) = correct / n, wilson(correct, n)
    error = [[100 * max(0.0, p - low)], [100 * max(0.0, high - p)]]
    place = (at, 100 * p) if upright else (100 * p, at)
    style = {"markersize": 6, "capsize": 4, "linewidth": 2} | style
    ax.errorbar(*place, **{"yerr" if upright else "xerr": error}, fmt="o", color=color, **style)


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """The mean of each loss and of those before it, `window` at the most."""
    return [np.mean(losses[max(0, i - window + 1):i + 1]) for i in range(len(losses))]
