"""Damping chosen from halves of the calibration tokens: the formula, the choice, its users."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from experiments.merge_report import merge_report
from qlora_lib.lora.merge import merge_lora, unmerge_lora
from qlora_lib.models.checkpoint import load_quantized
from qlora_lib.models.load import load_model
from qlora_lib.models.merge_hessians import merge_hessians
from qlora_lib.models.quantize import quantize_model
from qlora_lib.quant import damping
from qlora_lib.quant.damping import DAMPINGS, choose_damping, expected_loss
from qlora_lib.quant.dense_target import dense_target
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.hessian import Hessian, act_order, hessian_factor
from qlora_lib.quant.refit import refit_scales
from tests.support.calibrated_models import same
from tests.support.lora_models import IDS, adapted, base_of
from tests.support.streamed_models import CALIBRATION, store, stream
from tests.support.tensors import ar1, normal

IN = 48


def inputs(tokens: int, seed: int = 1) -> Tensor:
    """Correlated, their columns of different sizes, fp64 (tokens, IN)."""
    return ar1(tokens, IN, seed=seed).double() * normal(IN, seed=2, std=0.7).exp()


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def seen(x: Tensor, parts: int = 4) -> Hessian:
    hessian = Hessian(x.shape[1], dtype=x.dtype, halves=True)
    for part in x.split(-(-len(x) // parts)):
        hessian.update(part)
    return hessian


def add_damping(h: Tensor, damp_percent: float) -> Tensor:
    return h + damp_percent * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("damp_percent", [0.01, 0.3])
def test_the_expected_loss_is_the_trace_that_it_stands_for(damp_percent, ordered):
    one, two = moment(inputs(60)), moment(inputs(60, seed=5))
    order = act_order(one) if ordered else torch.arange(IN)
    r = hessian_factor(one, damp_percent, order)
    v = torch.linalg.inv(r / r.diagonal())
    want = (v @ two[order][:, order] @ v.T).trace()
    got = expected_loss(one, two, damp_percent, order if ordered else None)
    assert got == pytest.approx(float(want), rel=1e-10)


def test_on_the_tokens_of_its_own_factor_it_is_the_sum_of_the_pivots():
    h = moment(inputs(200))
    r = hessian_factor(h, 0.05)
    got = expected_loss(h, add_damping(h, 0.05), 0.05)
    assert got == pytest.approx(float(r.diagonal().square().sum()), rel=1e-10)


@pytest.mark.parametrize("tokens", [30, 400])
def test_gptq_on_a_grid_without_ends_loses_what_is_expected(tokens):
    """4,000 rows, so the mean of their losses is known to about a percent: each is a sum of 48
    squares. The grid is one for all columns, 8 bits, and nothing is clipped: s^2 / 12."""
    one, two = moment(inputs(tokens)), moment(inputs(4000, seed=5))
    w = normal(4000, IN, seed=3, dtype=torch.float64).clamp(-2, 2)
    w[:, 0], w[:, 1] = 8.0, -8.0  # every row has the same grid, with room at its ends
    for damp_percent in (0.01, 0.2):
        options = GPTQOptions(damp_percent=damp_percent)
        q = gptq_quantize(w, one, QuantSpec(8, None, clip_search=False), options)
        d = w - q.dequantize(torch.float64)
        loss = float(((d @ two) * d).sum(1).mean())
        step = float(q.scale.double().unique().item())
        expected = expected_loss(one, two, damp_percent, act_order(one)) * step**2 / 12
        assert loss == pytest.approx(expected, rel=0.04)


def test_the_search_begins_at_the_usual_damping():
    assert DAMPINGS[0] == GPTQOptions().damp_percent and sorted(set(DAMPINGS)) == [*DAMPINGS]
    assert DAMPINGS[-1] == 0.5  # beyond which GPTQ is nearly rounding to nearest


def test_few_tokens_ask_for_more_damping_than_many():
    chosen = [choose_damping(seen(inputs(n))) for n in (40, 200, 20_000)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] >= 0.05 and chosen[-1] == DAMPINGS[0]


def test_the_choice_is_the_last_before_the_first_rise_in_the_loop_s_own_order():
    found = []
    for seed in range(8):
        hessian = seen(inputs(30, seed) + normal(IN, seed=seed).double())
        for desc_act in (True, False):
            order = act_order(hessian.matrix) if desc_act else None
            losses = [
                expected_loss(a, b, d, order) + expected_loss(b, a, d, order)
                for d in DAMPINGS
                for a, b in [hessian.halves]
            ]
            rise = next((i for i, (x, y) in enumerate(zip(losses, losses[1:])) if y >= x), -1)
            found.append(choose_damping(hessian, desc_act))
            assert found[-1] == DAMPINGS[rise]
            assert hessian.chosen[desc_act] == found[-1]
    assert found[::2] != found[1::2]  # the order matters


@pytest.mark.parametrize("tokens", [40, 100, 400])
@pytest.mark.parametrize("desc_act", [True, False])
def test_the_choice_is_nearly_the_best_for_tokens_that_nobody_has_seen(tokens, desc_act):
    """Judged by quantized weights on 20,000 other tokens, at 3 bits: within 6% of the best of
    DAMPINGS, of which the worst loses 15 to 80%. Halves have half the tokens, and so ask for
    a little more damping than all of them would."""
    hessian, other = seen(inputs(tokens)), moment(inputs(20_000, seed=9))
    w, spec = normal(256, IN, seed=3, dtype=torch.float64), QuantSpec(3, 16)

    def loss(damp_percent):
        q = gptq_quantize(w, hessian, spec, GPTQOptions(desc_act, damp_percent=damp_percent))
        d = w - q.dequantize(torch.float64)
        return float(((d @ other) * d).sum())

    losses = {d: loss(d) for d in DAMPINGS}
    chosen = choose_damping(hessian, desc_act)
    assert losses[chosen] <= 1.06 * min(losses.values()), (chosen, losses)
    assert max(losses.values()) > 1.1 * losses[chosen]


@pytest.mark.parametrize("desc_act", [True, False])
def test_no_damping_is_gptq_with_the_chosen_one_in_all_its_parts(desc_act, monkeypatch):
    x, w, spec = inputs(80), normal(16, IN, seed=3, dtype=torch.float64), QuantSpec(3, 16)
    hessian = Hessian(IN, dtype=torch.float64, halves=True)
    hessian.update(x, x + 0.1 * normal(80, IN, seed=4).double())
    chosen = {True: 0.3, False: 0.02}  # made up: the orders' own choices may be the same
    monkeypatch.setattr("qlora_lib.quant.gptq.choose_damping", lambda h, order: chosen[order])
    known = GPTQOptions(desc_act, damp_percent=chosen[desc_act])
    options = GPTQOptions(desc_act, damp_percent=None)

    def equal(got, want):
        assert torch.equal(got.codes, want.codes) and torch.equal(got.scale, want.scale)

    plain = gptq_quantize(w, hessian, spec, known)
    equal(gptq_quantize(w, hessian, spec, options), plain)
    refit = refit_scales(w, plain, hessian.matrix, known.damp_percent)
    equal(gptq_quantize(w, hessian, spec, replace(options, refit_scales=True)), refit)
    target = dense_target(w, hessian, known.damp_percent)
    aimed = gptq_quantize(target, hessian, spec, known)
    equal(gptq_quantize(w, hessian, spec, replace(options, match_dense=True)), aimed)


def test_a_choice_is_made_once_and_forgotten_with_the_next_token(monkeypatch):
    calls, real = [], expected_loss

    def counted(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(damping, "expected_loss", counted)
    hessian = seen(inputs(40))
    first = choose_damping(hessian)
    made = len(calls)
    assert choose_damping(hessian) == first and len(calls) == made > 0
    for one, other in zip(calls[::2], calls[1::2]):  # each half is once the unseen one
        assert one[0] is other[1] and one[1] is other[0] and one[2] == other[2]
    choose_damping(hessian, desc_act=False)
    assert len(calls) > made
    for seed in range(20, 30):
        hessian.update(inputs(4000, seed))
    assert choose_damping(hessian) < first


def test_what_it_needs_is_said():
    x, w = inputs(60), normal(16, IN, seed=3, dtype=torch.float64)
    plain, single = Hessian(IN), Hessian(IN, halves=True)
    plain.update(x)
    for row in x[:5]:
        single.update(row)
    options = GPTQOptions(damp_percent=None)
    for hessian, words in (
        (plain, "halves=True"),
        (single, "no update had two tokens"),
        (plain.matrix, "not its matrix"),
    ):
        with pytest.raises(ValueError, match=words):
            gptq_quantize(w, hessian, QuantSpec(4, 16), options)


def test_a_dead_column_and_dead_halves_are_no_obstacle():
    x = inputs(60)
    x[:, 3] = 0  # dead
    x[:30, 5] = 0  # dead in one half
    assert choose_damping(seen(x, parts=1)) in DAMPINGS


BEST = GPTQOptions.best()


def test_the_best_options_are_one_setting():
    assert BEST == GPTQOptions(damp_percent=None, weigh_columns=True, refit_scales=True)
    assert GPTQOptions.best(match_dense=True, damp_percent=0.1) == GPTQOptions(
        damp_percent=0.1, weigh_columns=True, refit_scales=True, match_dense=True
    )
    assert BEST.needs_halves and not GPTQOptions().needs_halves
    assert BEST.changed() == {"damp_percent": None, "weigh_columns": True, "refit_scales": True}


@pytest.mark.long
@pytest.mark.parametrize("match_dense", [False, True])
def test_a_model_in_memory_and_streamed_gets_a_damping_of_its_own(tmp_path, match_dense):
    options, spec = GPTQOptions.best(match_dense=match_dense), QuantSpec(3, 16)
    folder = store(tmp_path / "model")
    stream(folder, tmp_path / "out", spec, options=options)
    streamed, _ = load_quantized(tmp_path / "out", "cpu", "fp32")
    chosen, fixed = (load_model(folder, "cpu", "fp32")[0] for _ in range(2))
    quantize_model(chosen, CALIBRATION, spec, options=options)
    quantize_model(fixed, CALIBRATION, spec, options=replace(options, damp_percent=0.01))
    assert same(chosen, streamed) and not same(chosen, fixed)


def test_merging_takes_hessians_with_halves_and_the_report_makes_its_own():
    model = adapted(base_of("grid4"))
    batch = [{"input_ids": IDS}]
    with pytest.raises(ValueError, match="halves=True"):
        merge_lora(model, "gptq", merge_hessians(model, batch), BEST)
    rows = merge_lora(model, "gptq", merge_hessians(model, batch, halves=True), BEST)
    lost = sum(row.lost for row in rows) / len(rows)
    unmerge_lora(model)
    (row,) = merge_report(model, batch, ("gptq",), batch, BEST)
    assert row.update_lost == pytest.approx(lost, rel=1e-6)
