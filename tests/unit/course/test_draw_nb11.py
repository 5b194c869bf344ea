"""The pictures of notebook 11: what their controls change, and what they state."""
import pytest
import torch

from course.nb11 import draw
from course.nb11.exercises import best_product, weighed_loss
from tests.support.controls import axes_of, check_controls

pytestmark = pytest.mark.usefixtures("quick_pictures")

LOST = torch.tensor([[1.0, 0.3], [0.2, -0.6]])


# --- directions ---------------------------------------------------------------------------

@pytest.mark.parametrize("correlation, input_1", [(0.0, 1.0), (0.8, 2.0), (-0.8, 0.25)])
def test_the_least_along_all_angles_is_what_the_closed_form_leaves(correlation, input_1):
    h = draw.input_moments(correlation, input_1)
    angles = torch.linspace(-torch.pi / 2, torch.pi / 2, 20_001)
    left = draw.left_along(LOST, h, angles)
    best = weighed_loss(LOST - best_product(LOST, h, 1), h) / weighed_loss(LOST, h)
    assert left.min().item() == pytest.approx(best, abs=1e-5)
    _, _, vh = torch.linalg.svd(LOST @ torch.linalg.cholesky(h))
    a = torch.linalg.solve(torch.linalg.cholesky(h).T, vh[0])  # A = V^T R^-1
    angle = torch.atan(a[1] / a[0])
    assert abs(angles[left.argmin()] - angle) < 1e-2


def test_controls_of_directions():
    check_controls(draw.draw_directions,
                   {"correlation": [0.4, -0.8, 0.0], "input_1": [2.0, 0.25, 3.0]},
                   lost=LOST, axes=(1, 2))


def test_with_equal_inputs_both_choices_are_one():
    _, ax = axes_of(draw.draw_directions, (2,), correlation=0.0, input_1=1.0, lost=LOST)
    one, two = (line for line in ax.get_lines() if len(line.get_xdata()) == 1)
    assert one.get_xydata().tolist() == two.get_xydata().tolist()


# --- what is left -------------------------------------------------------------------------

def test_controls_of_what_is_left():
    shares = {name: [1.0, 0.5] for name in ("svd", "qera", "cloq", "foretold")}
    curves = {(layer, base, bits): shares | {"loss": 0.1 * bits + 0.2 * (base == "GPTQ"),
                                             "svd": [1.0, 0.9 if layer == "q_proj" else 0.6]}
              for layer in ("q_proj", "o_proj") for base in ("RTN", "GPTQ") for bits in (4, 2)}
    check_controls(draw.draw_left, {"layer": ["q_proj", "o_proj"], "base": ["RTN", "GPTQ"],
                                    "bits": [4, 2]}, curves=curves, ranks=[0, 8])
    ax = axes_of(draw.draw_left, layer="q_proj", base="GPTQ", bits=4, curves=curves, ranks=[0, 8])
    assert ax.get_title() == "q_proj, GPTQ: loss 0.600 of RTN's"


def test_questions_are_a_line_each_in_a_panel_a_rank():
    lines = {rank: {"cloq": ([0.9, rank / 100], "-", "cloq"), "svd": ([0.95, 0.95], "--", "svd")}
             for rank in (8, 32)}
    axes = axes_of(draw.draw_questions, (2,), lines=lines, counts=[2, 96])
    for ax, rank in zip(axes, (8, 32)):
        assert [list(line.get_ydata()) for line in ax.get_lines()] == [[0.9, rank / 100],
                                                                       [0.95, 0.95]]
        assert [t.get_text() for t in ax.get_xticklabels()] == ["2", "96"]


# --- starts -------------------------------------------------------------------------------

STARTS = {"words": "share answered, %", "limits": (50, 100), "rows": {
    ("2 bits", 8): {"zero": (13.0, 70.0, [80.0, 82.0]), "cloq": (9.0, 80.0, [84.0, 88.0])},
    ("2 bits", 32): {"zero": (13.0, 70.0, []), "cloq": (4.0, 90.0, [])},
    ("4 bits", 8): {"zero": (0.13, None, []), "cloq": (0.11, None, [])},
    ("4 bits", 32): {"zero": (0.13, None, []), "cloq": (0.07, None, [])}}}  # fmt: skip


def test_controls_of_starts():
    check_controls(draw.draw_starts, {"base": ["2 bits", "4 bits"], "rank": [8, 32],
                                      "start": ["zero", "cloq"]}, axes=(1, 2), **STARTS)


def test_a_start_is_shown_before_and_with_each_seed_after():
    def shown(base, rank, start):
        left, right = axes_of(draw.draw_starts, (2,), base=base, rank=rank, start=start, **STARTS)
        return left, right, [line.get_xydata().tolist() for line in right.get_lines()]

    left, right, drawn = shown("2 bits", 8, "cloq")
    assert left.get_title() == "cloq: KL 9.00"
    assert right.get_title() == "80 before, 86 after training"
    assert [[84.0, 1], [88.0, 1]] in drawn and [[80.0, 1]] in drawn
    assert [t.get_text() for t in left.get_yticklabels()] == ["zero", "cloq"]
    _, right, drawn = shown("2 bits", 32, "zero")
    assert right.get_title() == "70 before, not trained" and len(drawn) == 2
    _, right, drawn = shown("4 bits", 8, "zero")
    assert right.get_title() == "not trained" and not drawn


# --- codes --------------------------------------------------------------------------------

def test_controls_of_codes():
    g = torch.Generator().manual_seed(0)
    check_controls(draw.draw_codes, {"update": [0.3, 0.1, 4.0], "bits": [4, 3, 2]},
                   rescaled_by=("bits",), weights=torch.rand(12, generator=g),
                   change=torch.randn(12, generator=g), axes=(1, 2))


def test_rounding_takes_a_small_update_whole_and_of_a_large_one_half_a_step():
    codes = torch.full((1000,), 500.0)
    change = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert draw.lost_share(codes, 0.1 * change, 1000) == pytest.approx(1, abs=1e-4)
    share = draw.lost_share(codes, 20 * change, 1000)
    assert 20 * share == pytest.approx(12**-0.5, rel=0.1)  # uniform over a step
    assert draw.lost_share(codes, 20 * change, 500) > 0.5  # half of them run off the grid
    left, _ = axes_of(draw.draw_codes, (2,), update=0.1, bits=4, weights=torch.rand(12),
                      change=torch.ones(12))
    assert left.get_title() == "0 of 12 codes move"
