"""Sliders: what each control does, what is drawn of all settings, and bad ones."""
import base64
import io

import pytest
from PIL import Image

from course.kit import GRID_VARIABLE, OUTPUTS_VARIABLE, grids
from course.kit.slider import SliderPlot


def draw_line(ax, bits, symmetric=False):
    ax.plot([-1 if symmetric else 0, 1], [0, bits])
    ax.set(xlim=(-1, 1), ylim=(0, 4), xticks=[], yticks=[])


@pytest.fixture
def line():
    return SliderPlot(draw_line, {"bits": [2, 3, 4], "symmetric": [False, True]}, alt="A line",
                      start={"bits": 3}, still=[{"bits": 2}, {"bits": 4}], size=(2, 1))


def test_each_control_redraws(line):
    for name, value in (("bits", 4), ("symmetric", True)):
        before = line.image.value
        line.move(**{name: value})
        assert line.image.value != before and line.error == ""
    assert line.image.value == line.picture(bits=4, symmetric=True)


def test_one_output_three_forms(line):
    data, metadata = line._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= set(data)
    assert data["text/plain"] == "[controls: bits: 2, 3, 4; symmetric: off, on] A line"
    assert metadata["image/png"]["alt"] == "A line" and line.image.tooltip is None


def test_the_grid_is_every_combination(line):
    assert len(list(line.grid())) == 6
    assert {"bits": 4, "symmetric": True} in list(line.grid())


def failing(ax, bits):
    if bits > 3:
        raise ValueError("no such <bits>")
    ax.plot([0, bits])


def test_an_error_after_a_move_is_shown_and_goes_away():
    plot = SliderPlot(failing, {"bits": (2, 4)}, alt="x", size=(2, 1))
    plot.controls["bits"].value = 4   # the widget itself, as the browser sets it
    assert "ValueError: no such &lt;bits&gt;" in plot.error
    plot.move(bits=3)
    assert plot.error == ""


def test_an_error_is_never_swallowed_where_it_can_be_raised(monkeypatch, tmp_path):
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path))
    plot = SliderPlot(failing, {"bits": (2, 4)}, alt="x", size=(2, 1))
    with pytest.raises(ValueError, match="no such"):
        plot.draw_grid()
    for setting in ({"start": {"bits": 4}}, {"still": [{"bits": 4}]}):
        with pytest.raises(ValueError, match="no such"):
            SliderPlot(failing, {"bits": (2, 4)}, alt="x", size=(2, 1), **setting)
    monkeypatch.setenv(GRID_VARIABLE, "1")
    with pytest.raises(ValueError, match="no such"):
        SliderPlot(failing, {"bits": (2, 4)}, alt="x", size=(2, 1))


def test_a_control_without_effect_is_found(quick_pictures, line):
    line.draw_grid()
    idle = SliderPlot(lambda ax, a, b: ax.plot([0, a]), {"a": [1, 2], "b": [1, 2]}, alt="x",
                      size=(2, 1))
    with pytest.raises(ValueError, match="the control 'b' never changes"):
        idle.draw_grid()


def test_what_a_page_needs_is_kept_under_the_film_strip(tmp_path, monkeypatch):
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path))
    monkeypatch.setenv(GRID_VARIABLE, "1")

    def draw(ax, bits, mirrored, name):
        draw_line(ax, bits, mirrored and name == "b")

    plot = SliderPlot(draw, {"bits": (2, 3), "mirrored": [False, True], "name": ["a", "b"]},
                      start={"bits": 3, "name": "b"}, alt="x", size=(2, 1))
    kept = grids.kept(plot.strip)
    assert kept["controls"] == [
        {"name": "bits", "kind": "slider", "labels": ["2", "3"], "start": 1},
        {"name": "mirrored", "kind": "box", "labels": ["off", "on"], "start": 0},
        {"name": "name", "kind": "choice", "labels": ["a", "b"], "start": 1}]
    # Of eight settings, two look different from the other two of their bits.
    assert kept["shown"] == [0, 0, 0, 1, 2, 2, 2, 3] and len(kept["pictures"]) == 4
    for setting, at in zip(plot.grid(), kept["shown"]):
        assert base64.b64decode(kept["pictures"][at]) == plot.picture(**setting)
    assert grids.kept(b"another") is None


def test_an_address_holds_the_picture_to_the_pixel(line):
    png = line.picture(bits=2, symmetric=False)
    kind, data = grids.address(png).removeprefix("data:image/").split(";base64,")
    assert kind in ("png", "webp") and len(base64.b64decode(data)) <= len(png)
    ours, before = (Image.open(io.BytesIO(x)).convert("RGB") for x in (base64.b64decode(data), png))
    assert ours.tobytes() == before.tobytes()


@pytest.mark.long
@pytest.mark.parametrize("spec, kind, values", [
    ([False, True], "Checkbox", [False, True]),
    (["rtn", "gptq"], "Dropdown", ["rtn", "gptq"]),
    ([2, 3, 4, 8], "SelectionSlider", [2, 3, 4, 8]),
    ([None, 32, 64], "SelectionSlider", [None, 32, 64]),
    ((2, 5), "IntSlider", [2, 3, 4, 5]),
    ((0, 10, 5), "IntSlider", [0, 5, 10]),
    ((0.0, 0.3, 0.1), "SelectionSlider", [0.0, 0.1, 0.2, 0.3]),
])
def test_a_control_for_each_kind_of_values(spec, kind, values, quick_pictures):
    drawn = []
    plot = SliderPlot(lambda ax, x: drawn.append(x), {"x": spec}, alt="x", size=(2, 1))
    assert type(plot.controls["x"]).__name__ == kind and plot.values["x"] == values
    for value in [*values[1:], values[0]]:
        plot.move(x=value)
        assert drawn[-1] == value and type(drawn[-1]) is type(value)
    with pytest.raises(ValueError, match="got the setting x='nowhere'"):
        plot.move(x="nowhere")


@pytest.mark.parametrize("spec", [[1], (0.0, 1.0), (0, 1, 0), 5, (1, 2, 3, 4)])
def test_a_control_that_makes_no_sense_is_named(spec):
    with pytest.raises(ValueError, match="control 'x'"):
        SliderPlot(lambda ax, x: None, {"x": spec}, alt="x")


@pytest.mark.parametrize("options", [{"start": {"x": 9}}, {"still": [{"y": 1}]}])
def test_a_setting_outside_the_controls_is_named(options):
    with pytest.raises(ValueError, match="got the setting"):
        SliderPlot(lambda ax, x: None, {"x": [1, 2]}, alt="x", **options)
