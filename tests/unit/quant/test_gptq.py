"""GPTQ against three slow derivations of the same weights, and what it promises besides."""

import pytest
import torch
from torch import Tensor

from qlora_lib.quant.damping import choose_damping
from qlora_lib.quant.dense_target import dense_target
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize, output_error
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.packing import unpack
from qlora_lib.quant.refit import refit_scales
from tests.support.slow_gptq import (
    column_by_column,
    least_squares,
    objective,
    optimal_brain_surgeon,
)
from tests.support.tensors import ar1, normal, relative

OUT, IN = 24, 96


def layer(dtype=torch.float64, out=OUT, features=IN) -> tuple[Tensor, Tensor]:
    """A weight and the matrix of a Hessian whose columns differ in size and correlate."""
    x = ar1(600, features, seed=1) * normal(features, seed=2, std=0.7).exp()  # (tokens, in)
    h = Hessian(features, dtype=torch.float64)
    h.update(x)
    return normal(out, features, seed=3, std=0.02, dtype=dtype), h.matrix.to(dtype)


@pytest.mark.parametrize("group_size", [32, 8, None])
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("desc_act", [True, False], ids=["act-order", "in-order"])
def test_blocked_equals_column_by_column(group_size, static, desc_act):
    """Blocks of any size: smaller and larger than a group, not dividing the width, all of it."""
    w, h = layer()
    spec = QuantSpec(4, group_size, clip_search=False)
    want = column_by_column(w, h, spec, GPTQOptions(desc_act, static))
    for block_size in (1, 7, 16, 32, 96, 128):
        options = GPTQOptions(desc_act, static, block_size=block_size)
        got = gptq_quantize(w, h, spec, options).dequantize(torch.float64)
        assert (got - want).abs().max() < 1e-10


def test_neither_autocast_nor_a_parameter_s_graph_reaches_it():
    w, h = layer(torch.float32)
    want = gptq_quantize(w, h, QuantSpec(4, 32))
    with torch.autocast("cpu", torch.bfloat16):
        got = gptq_quantize(torch.nn.Parameter(w), h, QuantSpec(4, 32))
    assert torch.equal(got.codes, want.codes) and not got.scale.requires_grad


@pytest.mark.long
@pytest.mark.parametrize("threads", [2, 6])
def test_threads_that_share_a_column_do_not_disturb_each_other(threads):
    """896 columns: the share of one thread of six ends within a column."""
    w, h = layer(torch.float32, 8, 896)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = objective(w, gptq_quantize(w, h, QuantSpec(4, 64)).dequantize(), h)
        torch.set_num_threads(threads)
        for _ in range(3):
            got = objective(w, gptq_quantize(w, h, QuantSpec(4, 64)).dequantize(), h)
            assert abs(got / want - 1) < 1e-3  # in fp32 a code may flip
    finally:
        torch.set_num_threads(before)


@pytest.mark.long
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("weighed", [True, False], ids=["weighed", "alike"])
def test_blocked_equals_column_by_column_at_every_width_with_clipping(bits, static, weighed):
    w, h = layer()
    spec = QuantSpec(bits, 16)
    options = GPTQOptions(static_groups=static, block_size=32, weigh_columns=weighed)
    got = gptq_quantize(w, h, spec, options).dequantize(torch.float64)
    assert (got - column_by_column(w, h, spec, options)).abs().max() < 1e-10


@pytest.mark.parametrize("reference", [optimal_brain_surgeon, least_squares])
@pytest.mark.parametrize("group_size", [8, None])
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_equals_the_dense_references(reference, group_size, static):
    w, h = layer(out=12, features=32)
    spec = QuantSpec(3, group_size, clip_search=False)
    options = GPTQOptions(desc_act=False, static_groups=static, block_size=8)
    want = reference(w, h, spec, options)
    assert (column_by_column(w, h, spec, options) - want).abs().max() < 1e-10
    got = gptq_quantize(w, h, spec, options).dequantize(torch.float64)
    assert (got - want).abs().max() < 1e-10


@pytest.mark.parametrize("desc_act", [True, False])
def test_fp32_reaches_the_same_objective(desc_act):
    """A code may flip in fp32, so that objectives are compared, not codes."""
    w, h = layer(out=64, features=128)
    spec, want = QuantSpec(4, 32), None
    for block_size in (1, 32, 128):
        options = GPTQOptions(desc_act, block_size=block_size)
        want = want or objective(w, column_by_column(w, h, spec, options), h)
        got = gptq_quantize(w.float(), h.float(), spec, options).dequantize()
        assert abs(objective(w, got, h) / want - 1) < 1e-4


def test_held_out_error_is_at_most_055_of_rounding_to_nearest():
    x = ar1(8192, 512)
    w, h = normal(512, 512, seed=1, std=0.02), Hessian(512)
    h.update(x[:4096])
    spec = QuantSpec(4, 64)
    held_out = x[4096:] @ w.T
    rtn, gptq = quantize_rtn(w, spec).dequantize(), gptq_quantize(w, h, spec).dequantize()
    error = [relative(x[4096:] @ q.T, held_out) for q in (rtn, gptq)]
    print(f"round to nearest {error[0]:.4f}, GPTQ {error[1]:.4f}: {error[1] / error[0]:.3f}")
    assert error[1] <= 0.55 * error[0]
    # and the weights themselves are farther away: it is the output that GPTQ cares for
    assert relative(gptq, w) > relative(rtn, w)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weighing_columns_in_the_clip_search_lowers_the_held_out_error(bits):
    """With some channels ten times as large as others, as in language models; and it changes
    nothing where there is no search to weigh."""
    sizes = normal(256, seed=2, std=0.7).exp()
    sizes[::50] *= 10
    x = ar1(8192, 256) * sizes
    w, h = normal(256, 256, seed=1, std=0.02), Hessian(256)
    h.update(x[:4096])
    weighed, alike = GPTQOptions(weigh_columns=True), GPTQOptions()

    def error(options, clip_search=True):
        q = gptq_quantize(w, h, QuantSpec(bits, 64, clip_search=clip_search), options)
        return relative(x[4096:] @ q.dequantize().T, x[4096:] @ w.T)

    ratio = error(weighed) / error(alike)
    print(f"{bits} bits: {ratio:.3f} of the error")
    assert ratio < 0.9
    assert error(weighed, clip_search=False) == error(alike, clip_search=False)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_never_worse_than_round_to_nearest_here(bits):
    w, h = layer()
    for options in (GPTQOptions(), GPTQOptions(False, False), GPTQOptions(True, False)):
        spec = QuantSpec(bits, 16)
        gptq = gptq_quantize(w, h, spec, options).dequantize(torch.float64)
        rtn = quantize_rtn(w, spec).dequantize(torch.float64)
        assert objective(w, gptq, h) < 0.7 * objective(w, rtn, h)


def test_uncorrelated_inputs_reduce_it_to_round_to_nearest():
    w, _ = layer()
    for scales in (torch.ones(IN), torch.arange(1.0, IN + 1)):
        got = gptq_quantize(w, torch.diag(scales.double()), QuantSpec(4, 16))
        assert torch.equal(got.codes, quantize_rtn(w, QuantSpec(4, 16)).codes)


@pytest.mark.parametrize("static", [True, False])
def test_columns_come_back_to_their_places(static):
    """At 8 bits Q is close to W column by column; a wrong permutation is not."""
    w, h = layer()
    w = w * torch.linspace(1, 30, IN)  # columns that can't be taken for one another
    q = gptq_quantize(w, h, QuantSpec(8, 16), GPTQOptions(static_groups=static))
    d = q.dequantize(torch.float64)
    assert ((d - w).norm(dim=0) / w.norm(dim=0)).max() < 0.2
    if static:
        assert q.g_idx is None
        return
    assert q.g_idx.dtype == torch.int32 and q.g_idx.bincount().tolist() == [16] * (IN // 16)
    order = torch.argsort(-h.diagonal(), stable=True)
    assert torch.equal(q.g_idx[order].long(), torch.arange(IN) // 16)
    # the same by hand: each column with the grid that g_idx names
    codes = unpack(q.codes, 8, q.shape).double()
    for j in range(IN):
        g = int(q.g_idx[j])
        column = q.scale[:, g].double() * (codes[:, j] - q.zero_point[:, g].double())
        assert torch.equal(d[:, j], column)


def test_in_order_needs_no_group_index():
    w, h = layer()
    for static in (True, False):
        options = GPTQOptions(desc_act=False, static_groups=static)
        assert gptq_quantize(w, h, QuantSpec(4, 16), options).g_idx is None
    assert gptq_quantize(w, h, QuantSpec(4, None), GPTQOptions(True, False)).g_idx is None


def test_dead_columns_are_rounded_to_nearest_and_disturb_nothing():
    w, h = layer()
    dead = torch.tensor([0, 17, 95])
    h[dead] = h[:, dead] = 0
    for options in (GPTQOptions(), GPTQOptions(False), GPTQOptions(True, False)):
        q = gptq_quantize(w, h, QuantSpec(4, 16, clip_search=False), options).dequantize()
        assert torch.isfinite(q).all()
    q = gptq_quantize(w, h, QuantSpec(4, 16)).dequantize()
    assert torch.equal(q[:, dead], quantize_rtn(w, QuantSpec(4, 16)).dequantize()[:, dead])
    # nothing but zeros: every column is dead
    q = gptq_quantize(w, torch.zeros_like(h), QuantSpec(4, 16))
    assert torch.equal(q.codes, quantize_rtn(w, QuantSpec(4, 16)).codes)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0, 2.0**20])
def test_scaling_the_hessian_changes_nothing(factor):
    """Damping is relative to the mean diagonal. Powers of two are exact, so codes are equal."""
    w, h = layer(torch.float32)
    a, b = (gptq_quantize(w, m, QuantSpec(4, 16)) for m in (h, factor * h))
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


def test_the_weight_and_the_hessian_are_left_as_they_were():
    for w, h in (layer(), layer(torch.float32)):
        before = w.clone(), h.clone()
        gptq_quantize(w, h, QuantSpec(4, 16))
        assert torch.equal(w, before[0]) and torch.equal(h, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_worked_on_in_fp32(dtype):
    w, h = layer(torch.float32)
    a, b = (gptq_quantize(v, h, QuantSpec(4, 16)) for v in (w.to(dtype), w.to(dtype).float()))
    assert torch.equal(a.codes, b.codes)


def test_one_and_two_threads_reach_the_same_objective():
    w, h = layer(torch.float32, out=64, features=128)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(objective(w, gptq_quantize(w, h, QuantSpec(4, 32)).dequantize(), h))
    finally:
        torch.set_num_threads(before)
    assert abs(found[0] / found[1] - 1) < 1e-4


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="has seen no tokens"):
        gptq_quantize(normal(4, 8), Hessian(8), QuantSpec(4, None))
    with pytest.raises(ValueError, match=r"takes 8 inputs, the Hessian is \(9, 9\)"):
        gptq_quantize(normal(4, 8), torch.eye(9), QuantSpec(4, None))
    with pytest.raises(ValueError, match="1 NaN or Inf"):
        gptq_quantize(torch.tensor([[1.0, float("nan")]]), torch.eye(2), QuantSpec(4, None))


@pytest.mark.parametrize("desc_act", [True, False])
def test_not_positive_definite_names_the_column_and_what_to_do(desc_act):
    h = torch.diag(torch.linspace(1, 2, 8))  # act-order: 7, 6, ... 0
    # An indefinite pair. The factor is made from the loop's end: its earlier one fails.
    h[2, 5] = h[5, 2] = 3.0
    with pytest.raises(ValueError) as info:
        gptq_quantize(normal(4, 8), h, QuantSpec(4, None), GPTQOptions(desc_act))
    failed = 5 if desc_act else 2
    assert f"not positive definite at column {failed} " in str(info.value)
    assert "damp_percent=0.01" in str(info.value) and "raise it" in str(info.value)


def test_fewer_tokens_than_features_work_with_damping_and_fail_without():
    x, w = normal(20, 64), normal(16, 64, seed=1)
    h = Hessian(64)
    h.update(x)
    q = gptq_quantize(w, h, QuantSpec(4, 16)).dequantize()
    assert relative(x @ q.T, x @ w.T) < 0.05
    with pytest.raises(ValueError, match="damp_percent=0.0"):
        gptq_quantize(w, h, QuantSpec(4, 16), GPTQOptions(damp_percent=0.0))


def test_output_error_is_the_relative_error_on_the_inputs():
    x, w = ar1(300, 32, dtype=torch.float64), normal(12, 32, dtype=torch.float64)
    q = quantize_rtn(w, QuantSpec(3, 16)).dequantize(torch.float64)
    h = Hessian(32, dtype=torch.float64)
    h.update(x)
    assert abs(output_error(w, q, h) - relative(x @ q.T, x @ w.T)) < 1e-10
    assert output_error(w, w, h) == 0.0
    assert output_error(torch.zeros_like(w), q, h) == 0.0


def test_changed_names_what_differs_from_the_defaults():
    assert GPTQOptions().changed() == GPTQOptions(True, damp_percent=0.01).changed() == {}
    options = GPTQOptions(damp_percent=0.05, weigh_columns=True)
    assert options.changed() == {"damp_percent": 0.05, "weigh_columns": True}


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(block_size=0), "block_size=0"),
        (dict(damp_percent=-0.1), "damp_percent=-0.1"),
    ],
)
def test_bad_options_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        GPTQOptions(**given)


def test_the_usual_options():
    usual = GPTQOptions(True, True, 0.01, 128, False, False, False)
    assert GPTQOptions() == usual and {usual: 1}[GPTQOptions()] == 1


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(match_dense=True), "match_dense needs a Hessian"),
        (dict(damp_percent=None), "damp_percent=None needs a Hessian"),
        (dict(match_dense=True, damp_percent=None), "needs a Hessian"),
    ],
)
def test_what_needs_more_than_the_matrix_of_a_hessian_says_so(given, message):
    x = ar1(300, 32)
    hessian, w, spec = Hessian(32, halves=True), normal(8, 32), QuantSpec(3, 16)
    hessian.update(x, x)
    with pytest.raises(ValueError, match=message):
        gptq_quantize(w, hessian.matrix, spec, GPTQOptions(**given))
    gptq_quantize(w, hessian, spec, GPTQOptions(**given))


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_options_are_steps_before_and_after_the_loop(desc_act, static):
    """Damping chosen, the dense target rounded, scales fitted again: each as if done by hand."""
    x, w, spec = ar1(200, 32).double(), normal(8, 32, dtype=torch.float64), QuantSpec(3, 16)
    hessian = Hessian(32, dtype=torch.float64, halves=True)
    hessian.update(x, x + 0.2 * normal(200, 32, seed=4).double())
    damping = choose_damping(hessian, desc_act)
    target = dense_target(w, hessian, damping)
    known = GPTQOptions(desc_act, static, damping)
    plain = gptq_quantize(target, hessian, spec, known)
    want = refit_scales(target, plain, hessian.matrix, damping)
    options = GPTQOptions(desc_act, static, None, match_dense=True, refit_scales=True)
    got = gptq_quantize(w, hessian, spec, options)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scale, want.scale)
    assert not torch.equal(got.scale, plain.scale)


def test_hessians_are_taken_in_any_precision():
    w, h = layer()
    spec = QuantSpec(3, 16, clip_search=False)
    want = objective(w, gptq_quantize(w, h, spec).dequantize(), h)
    for a, b in ((w.float(), h), (w, h.float())):
        got = gptq_quantize(a, b, spec).dequantize()
        assert abs(objective(w, got, h) / want - 1) < 1e-4
        assert abs(output_error(a, got, b) / output_error(w, got.double(), h) - 1) < 1e-4


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_what_it_returns_can_be_stored_as_it_is(static, desc_act):
    w, h = layer()
    spec = QuantSpec(3, 16)
    q = gptq_quantize(w, h, spec, GPTQOptions(desc_act, static))
    assert all(t.is_contiguous() for t in vars(q).values() if isinstance(t, Tensor))
    assert (q.scale.dtype, q.zero_point.dtype) == (torch.float16, torch.uint8)
    assert q.scale.shape == q.zero_point.shape == (OUT, IN // 16)
    assert q.shape == w.shape and q.spec == spec
