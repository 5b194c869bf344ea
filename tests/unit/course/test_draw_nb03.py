"""The pictures of notebook 03: what their controls change, and what they state."""
import pytest
import torch

from course.nb03 import draw
from tests.support.controls import axes_of, check_controls

pytestmark = pytest.mark.usefixtures("quick_pictures")

RANDOM = torch.Generator().manual_seed(0)


def factors(outputs, inputs):
    u, s, v = torch.linalg.svd(torch.randn(outputs, inputs, generator=RANDOM), False)
    share = ((s**2).cumsum(0) / (s**2).sum()).numpy()
    energy = {"update": share, "weight": share**2, "random": share**3}
    return {"u": u.numpy(), "s": s.numpy(), "v": v.numpy(), "energy": energy}


SPECTRA = {"q_proj": factors(32, 32), "down_proj": factors(32, 48)}
RUNS = {(alpha, rank, rs): (alpha / rank ** (0.5 if rs else 1.0), alpha * rank**(rs / 2),
                            [1.0, 1 / alpha, 1 / rank + rs])
        for alpha in (4, 64) for rank in (1, 4, 16) for rs in (False, True)}
PER_RANK = {"q, v": 524_288, "q, k, v, o": 1_048_576, "all seven": 2_498_560}


def test_controls_of_update():
    check_controls(draw.draw_update, {"layer": list(SPECTRA), "rank": [1, 8, 32]},
                   spectra=SPECTRA, axes=(1, 3))


def test_controls_of_scaling():
    check_controls(draw.draw_scaling,
                   {"alpha": [4, 64], "rank": [1, 4, 16], "use_rslora": [False, True]},
                   runs=RUNS, axes=(1, 3))


def test_controls_of_budget():
    check_controls(draw.draw_budget, {"rank": [1, 16, 256], "targets": list(PER_RANK)},
                   per_rank=PER_RANK, total=6_738_415_616, axes=(1, 2))


def test_update_states_energy_and_size():
    axes = axes_of(draw.draw_update, (1, 3), layer="down_proj", rank=8, spectra=SPECTRA)
    share = 100 * SPECTRA["down_proj"]["energy"]["update"][7]
    assert axes[0].get_title() == f"r = 8 keeps {share:.0f}%"
    assert axes[2].get_title() == "rank 8: 640 (3 kB)"   # 8 * (32 + 48) numbers of 4 bytes


def test_budget_states_the_configurations_own_factor():
    axes = axes_of(draw.draw_budget, (1, 2), rank=16, targets="q, k, v, o",
                   per_rank=PER_RANK, total=6_738_415_616)
    assert axes[1].get_title() == "16,777,216: 402x fewer (0.25%)"
    assert [t.get_text() for t in axes[1].texts] == ["67.1 MB", "67.1 MB", "134.2 MB"]


def test_scaling_states_the_scale_of_the_setting():
    titles = {rs: axes_of(draw.draw_scaling, (1, 3), alpha=64, rank=16, use_rslora=rs,
                          runs=RUNS)[2].get_title() for rs in (False, True)}
    assert titles == {False: "loss at scale 4", True: "loss at scale 16"}


def test_scaling_draws_norm_and_progress():
    axes = axes_of(draw.draw_scaling, (1, 3), alpha=4, rank=1, use_rslora=False, runs=RUNS)
    for i, ax in enumerate(axes[:2]):
        drawn = [line.get_ydata().tolist() for line in ax.lines[:2]]
        assert drawn == [[RUNS[4, r, rs][i] for r in (1, 4, 16)] for rs in (False, True)]


def test_the_control_stands_at_the_directions_it_took():
    kept = {"all": [0, 1, 8], "random": [0, 17, 138]}
    ax = axes_of(draw.draw_regained, kept=kept, losses={"all": [3, 2, 1.2], "random": [3, 2, 1.3]},
                 start=3.0, whole=1.0)
    assert [line.get_xdata().tolist() for line in ax.lines[:2]] == list(kept.values())


def test_the_best_rate_of_each_way_is_ringed_and_divergence_stays_at_the_edge():
    sweep = {"all weights": {0.001: [0.9, 1.0], 0.002: [0.8, 0.7], 0.004: [9.0, 0.9]},
             "q, k, v, o, r = 5": {0.002: [1.5, 1.6], 0.004: [1.2, 1.2]}}
    ax = axes_of(draw.draw_rates, sweep=sweep, top=2.0)
    rings = [line for line in ax.lines if line.get_markersize() == 13]
    assert [(ring.get_xdata()[0], ring.get_ydata()[0]) for ring in rings] == \
        [(0.002, pytest.approx(0.75)), (0.004, pytest.approx(1.2))]
    assert max(max(line.get_ydata()) for line in ax.lines) == 2.0
    assert [line.get_marker() for line in ax.lines].count("^") == 1


def test_memory_adds_up():
    ax = axes_of(draw.draw_memory, rows={
        "full": {"weights": 2.0, "gradients": 2.0, "fp32 copy": 4.0, "Adam's moments": 8.0},
        "LoRA": {"weights": 2.0, "adapter": 0.1}})
    assert {"16.0 GB", "2.1 GB"} <= {t.get_text() for t in ax.texts}
