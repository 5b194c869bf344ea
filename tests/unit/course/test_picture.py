"""Pictures: their bytes, sizes, colours and words."""
import io

import numpy as np
import pytest
import torch
from PIL import Image

from course.kit import picture
from course.kit.picture import COLORS, matrix, render


def draw_stairs(ax, bits, symmetric=False):
    x = np.linspace(-1, 1, 400)
    for i, color in enumerate(COLORS.values()):
        levels = 2 ** bits + i
        ax.plot(x, np.round(x * levels) / levels + i / 8, color=color, label=f"method {i}")
    ax.set(xlim=(-1, 1), ylim=(-1, 2), xlabel="weight", ylabel="dequantized",
           title="symmetric" if symmetric else "")
    ax.legend(ncols=2, fontsize=9)


def opened(png):
    return Image.open(io.BytesIO(png))


def test_a_picture_has_few_colours_and_the_same_bytes_each_time():
    png = render(draw_stairs, [{"bits": 2}], size=(6, 3.6))
    assert png == render(draw_stairs, [{"bits": 2}], size=(6, 3.6))
    image = opened(png)
    assert image.size == (600, 360) and image.mode == "P" and image.info.keys() <= {"dpi"}
    assert len(image.convert("RGB").getcolors()) <= 64


def test_a_film_strip_of_three_busy_panels_stays_small():
    strip = render(draw_stairs, [{"bits": b} for b in (2, 3, 8)], size=(6, 3.6), titles="abc")
    assert len(strip) < 40_000 and opened(strip).width > 900


def test_wide_panels_go_below_each_other():
    wide = opened(render(draw_stairs, [{"bits": 2}, {"bits": 3}], size=(10, 3), titles="ab"))
    assert wide.height > 2 * 3 * 70


def test_drawing_leaves_pyplot_alone():
    import matplotlib.pyplot as plt
    before = dict(plt.rcParams)
    render(draw_stairs, [{"bits": 2}], size=(6, 3.6))
    assert plt.get_fignums() == [] and dict(plt.rcParams) == before


def test_several_axes_reach_draw_as_an_array():
    seen = []
    render(lambda axes: seen.append(axes.shape), [{}], size=(6, 3), axes=(2, 3))
    assert seen == [(2, 3)]


def test_colors_differ_by_method():
    assert len(set(COLORS.values())) == len(COLORS)


def texts_of(values, **options):
    texts = []

    def draw(ax):
        matrix(ax, values, **options)
        texts.extend(t.get_text() for t in ax.texts)
    render(draw, [{}], size=(4, 3))
    return texts


def test_a_small_matrix_shows_its_numbers():
    assert texts_of(torch.tensor([[1.0, -2.5]])) == ["1.00", "-2.50"]
    assert texts_of(torch.tensor([[3, 15]])) == texts_of([[3, 15]]) == ["3", "15"]
    assert texts_of(torch.tensor([[1.0]], dtype=torch.bfloat16), fmt=".1f") == ["1.0"]
    assert len(texts_of(torch.zeros(8, 8))) == 64 and texts_of(torch.zeros(9, 8)) == []
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        texts_of(torch.zeros(3))


def test_show_gives_the_words_with_the_picture(monkeypatch):
    import IPython.display
    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, **k: shown.append((data, k)))
    picture.show(draw_stairs, bits=2, alt="Stairs")
    (data, options), = shown
    assert data["text/plain"] == "Stairs" and options["metadata"]["image/png"]["alt"] == "Stairs"
    assert set(data) == {"image/png", "text/plain"}
