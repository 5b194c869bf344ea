"""Pictures, sliders and checks of exercises; then every exercise that the course registers."""
import io

import numpy as np
import pytest
import torch
from PIL import Image

from qlora_lib.classroom import GRID_VARIABLE, checks, plots
from qlora_lib.classroom.checks import Exercise, check, example
from qlora_lib.classroom.plots import COLORS, matrix, render
from qlora_lib.classroom.widgets import SliderPlot


# --- pictures -----------------------------------------------------------------------------

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
    plots.show(draw_stairs, bits=2, alt="Stairs")
    (data, options), = shown
    assert data["text/plain"] == "Stairs" and options["metadata"]["image/png"]["alt"] == "Stairs"
    assert set(data) == {"image/png", "text/plain"}


# --- sliders ------------------------------------------------------------------------------

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


def test_an_error_is_never_swallowed_where_it_can_be_raised(monkeypatch):
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


# --- checks -------------------------------------------------------------------------------

def rescale(x, bits):
    return torch.round(x * 2 ** bits) / 2 ** bits


def floored(x, bits):
    return torch.floor(x * 2 ** bits) / 2 ** bits


def in_place(x, bits):
    return x.mul_(2 ** bits).round_().div_(2 ** bits)


def flattened(x, bits):
    return rescale(x, bits).flatten()


def whole(x, bits):
    return torch.round(x * 2 ** bits)


def for_positive_only(x, bits):
    return rescale(x, bits) if (x >= 0).all() else floored(x, bits)


TOY = Exercise(
    name="toy", reference=rescale,
    cases=[(lambda g: (torch.rand(2, 3, generator=g), 2), "positive numbers"),
           (lambda g: (torch.randn(2, 3, generator=g), 3), "numbers of both signs")],
    mistakes=[(floored, "floor is not rounding"), (in_place, "make a copy first"),
              (flattened, "keep the shape"), (whole, "divide again"),
              (for_positive_only, "what about negative numbers?")])


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(checks, "_EXERCISES", dict(checks.registered()))
    return checks.register(TOY)


def test_a_right_answer_is_used(toy, capsys):
    def mine(x, bits):
        return (x * 2 ** bits).round() * 0.5 ** bits
    assert check("toy", mine) is mine
    assert capsys.readouterr().out == "✓ toy: all 2 cases pass; going on with yours\n"


def raising_stub(x, bits):
    raise NotImplementedError


@pytest.mark.parametrize("stub", [None, lambda x, b: None, lambda x, b: ..., raising_stub])
def test_unsolved_goes_on_with_the_reference(toy, capsys, stub):
    assert check("toy", stub) is rescale
    said = capsys.readouterr().out
    assert said.startswith("… toy: not solved yet") and said.count("\n") == 1


def test_wrong_shows_yours_beside_expected_and_how_to_try(toy, capsys):
    assert check("toy", floored) is rescale
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("✗ toy: case 1 of 2 (positive numbers): correct shape, but wrong")
    assert lines[1].strip() == "diagnosis: floor is not rounding"
    assert lines[2].split() == ["yours", "expected"] and len(lines[3].split()) == 6
    assert 'example("toy", 1)' in lines[-1] and max(map(len, lines[1:])) <= 76
    x, bits = example("toy", 1)
    assert x.shape == (2, 3) and torch.equal(x, example("toy", 1)[0])


def test_a_mistake_alike_in_some_cases_is_a_guess_the_likest_of_all(monkeypatch, capsys):
    monkeypatch.setattr(checks, "_EXERCISES", dict(checks.registered()))
    checks.register(Exercise(
        name="steps", reference=lambda x: x, cases=[(lambda g, x=x: (x,), "") for x in (1, 2, 3)],
        mistakes=[(lambda x: 2 if x == 1 else 0, "once"), (lambda x: 2 * x, "twice"),
                  (lambda x: x + (x > 1), "not in the failing case")]))
    check("steps", lambda x: 2 * x if x < 3 else 4)
    assert "    perhaps: twice\n" in capsys.readouterr().out
    check("steps", lambda x: -x)
    assert "perhaps" not in capsys.readouterr().out


@pytest.mark.parametrize("wrong, problem", [
    (flattened, "it returns shape (6,), expected (2, 3)"),
    (lambda x, b: rescale(x, b).double(), "right values, but dtype torch.float64"),
    (in_place, "it wrote into its arguments"),
    (lambda x, b: rescale(x, b).tolist(), "it returns a list of 2, expected a Tensor"),
    (lambda x, b: 1 / 0, "it raises ZeroDivisionError: division by zero"),
    (lambda x: x, "it raises TypeError"),
    (lambda x, b: rescale(x, b) * float("nan"), "wrong values at 6 of 6 places"),
    (lambda x, b: rescale(x, b) if b == 2 else None, "case 2 of 2"),
])
def test_the_first_thing_wrong_is_said_in_words(toy, capsys, wrong, problem):
    assert check("toy", wrong) is rescale
    assert problem in capsys.readouterr().out


@pytest.mark.parametrize("want, right, wrong", [
    (3, torch.tensor(3), 4), (0.5, np.float64(0.5), 0.6), (True, True, 1), ("a", "a", "b"),
    (None, None, 0), ((1, torch.ones(2)), [1, torch.ones(2)], (1, torch.zeros(2))),
    ((1, 2), (1, 2), (1, 2, 3)), (1.0, 1, "1"), (1, 1, True)])
def test_values_of_every_kind_are_compared(want, right, wrong):
    assert checks._mismatch(right, want, TOY) == ""
    assert checks._mismatch(wrong, want, TOY) != ""


def test_a_check_leaves_the_notebooks_random_numbers_alone(toy):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    check("toy", lambda x, b: x + torch.rand_like(x))
    assert torch.equal(torch.rand(1), expected)


def test_a_function_draws_the_same_random_numbers_in_each_check(toy):
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        check("toy", lambda x, b: drawn.append(torch.rand(3)))
    assert torch.equal(drawn[0], drawn[len(TOY.cases)])


def test_names_are_unique_and_unknown_ones_are_named(toy):
    with pytest.raises(ValueError, match="'toy' is already registered"):
        checks.register(TOY)
    with pytest.raises(ValueError, match="no exercise is named 'toj'"):
        check("toj", rescale)
    with pytest.raises(ValueError, match="case 3 of 'toy'"):
        example("toy", 3)


# --- every exercise of the course, and the toy --------------------------------------------

ALL = [*checks.registered().values(), TOY]
MISTAKES = [pytest.param(e, w, m, id=f"{e.name}-{i}")
            for e in ALL for i, (w, m) in enumerate(e.mistakes, 1)]


@pytest.fixture
def all_exercises(monkeypatch):
    monkeypatch.setattr(checks, "_EXERCISES", {e.name: e for e in ALL})


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_the_reference_passes_its_own_cases(all_exercises, exercise, capsys):
    def mine(*arguments):
        return exercise.reference(*arguments)
    assert check(exercise.name, mine) is mine, capsys.readouterr().out


@pytest.mark.parametrize("exercise, wrong, message", MISTAKES)
def test_each_mistake_is_told_with_its_own_message(all_exercises, exercise, wrong, message, capsys):
    assert check(exercise.name, wrong) is exercise.reference
    assert f"    diagnosis: {message}\n" in capsys.readouterr().out


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_an_exercise_knows_five_mistakes_each_with_words_of_its_own(exercise):
    assert len({message for _, message in exercise.mistakes}) == len(exercise.mistakes) >= 5
