"""GPTQ that aims at the dense model's outputs: least squares, and the whole model by hand."""

import pytest
import torch

from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.models.batches import token_mask
from qlora_lib.models.checkpoint import load_quantized
from qlora_lib.models.load import load_model
from qlora_lib.models.quantize import quantize_model
from qlora_lib.quant.dense_target import dense_target
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from tests.support.calibrated_models import STAGES, batches, logits, same
from tests.support.small_models import small_model, small_tokenizer
from tests.support.streamed_models import CALIBRATION, store, stream
from tests.support.tensors import ar1, normal, relative

SPEC, MATCH = QuantSpec(2, 16, clip_search=False), GPTQOptions(match_dense=True)


def inputs(features=24, tokens=400):
    """x as the quantized model gives it, and x~ of the dense model: both (tokens, in)."""
    dense = ar1(tokens, features, seed=1).double()
    return dense + 0.3 * normal(tokens, features, seed=2).double(), dense


def seen(x, dense) -> Hessian:
    hessian = Hessian(x.shape[1], dtype=torch.float64)
    for part, before in zip(x.split(150), dense.split(150)):
        hessian.update(part, before)
    return hessian


def test_the_target_is_the_least_squares_solution():
    x, dense = inputs()
    w = normal(8, 24, seed=3).double()
    expected = torch.linalg.lstsq(x, dense @ w.T).solution.T  # knows neither H nor C
    assert relative(dense_target(w, seen(x, dense), 0.0), expected) < 1e-12


def test_what_is_left_beside_the_loss_of_the_target_is_the_same_for_every_weight():
    x, dense = inputs()
    w = normal(8, 24, seed=3).double()
    target = dense_target(w, seen(x, dense), 0.0)
    left = [
        float((dense @ w.T - x @ q.T).square().sum() - (x @ (target - q).T).square().sum())
        for q in (w, w.round(), normal(8, 24, seed=4).double())
    ]
    assert left[1:] == pytest.approx(2 * left[:1], rel=1e-9)


def test_equal_inputs_leave_the_weight_and_damping_pulls_towards_it():
    x, dense = inputs()
    w = normal(8, 24, seed=3).double()
    assert relative(dense_target(w, seen(x, x), 0.01), w) < 1e-12
    moved = [float((dense_target(w, seen(x, dense), d) - w).norm()) for d in (0.0, 0.1, 10.0)]
    assert moved[0] > moved[1] > moved[2] > 0


def test_a_weight_of_another_precision_than_the_hessian_s():
    x, dense = inputs()
    w = normal(8, 24, seed=3)
    got, want = (dense_target(v, seen(x, dense), 0.01) for v in (w, w.double()))
    assert got.dtype == torch.float32 and relative(got.double(), want) < 1e-5


def test_a_matrix_that_is_not_positive_definite_is_refused():
    few = normal(4, 24, dtype=torch.float64)  # tokens
    w, hessian = normal(8, 24, seed=3).double(), seen(few, few)
    with pytest.raises(ValueError, match="not positive definite; raise damp_percent"):
        dense_target(w - 1, hessian, -0.1)
    assert relative(dense_target(w, hessian, 0.1), w) < 1e-12


def test_quantizing_with_it_is_quantizing_the_target():
    x, dense = inputs(32)
    w, h = normal(8, 32, seed=3).double(), seen(x, dense)
    aimed = gptq_quantize(w, h, SPEC, MATCH)
    plain = gptq_quantize(dense_target(w, h, MATCH.damp_percent), h, SPEC)
    assert torch.equal(aimed.codes, plain.codes) and torch.equal(aimed.scale, plain.scale)

    def error(q):
        return float((dense @ w.T - x @ q.dequantize(torch.float64).T).norm())

    assert error(aimed) < error(gptq_quantize(w, h, SPEC))


def test_a_whole_model_by_hand():
    """Whole forward passes of both models, all layers before the next being quantized."""
    model, by_hand, dense, data = small_model(), small_model(), small_model(), batches()
    quantize_model(model, data, SPEC, options=MATCH)

    @torch.no_grad()
    def inputs_of(model, path):
        caught = []
        handle = model.get_submodule(path).register_forward_pre_hook(
            lambda _, args: caught.append(args[0])
        )
        for batch in data:
            model(**batch)
        handle.remove()
        return [x[token_mask(batch)] for x, batch in zip(caught, data)]

    for block in range(2):
        for stage in STAGES:
            paths = [f"model.layers.{block}.{name}" for name in stage]
            h = Hessian(by_hand.get_submodule(paths[0]).in_features)
            for x, before in zip(inputs_of(by_hand, paths[0]), inputs_of(dense, paths[0])):
                h.update(x, before)
            for path in paths:
                linear = by_hand.get_submodule(path)
                quantized = gptq_quantize(linear.weight, h, SPEC, MATCH)
                parent, _, name = path.rpartition(".")
                new = QuantizedLinear.from_linear(linear, quantized)
                setattr(by_hand.get_submodule(parent), name, new)
    assert same(model, by_hand)

    other = small_model()
    quantize_model(other, data, SPEC)
    assert not same(model, other)  # the control


@pytest.mark.long
@pytest.mark.parametrize("spilled", [False, True])
def test_streaming_gives_the_same_bits_also_after_a_kill(spilled, tmp_path):
    folder = store(tmp_path / "model", layers=3)
    model, _ = load_model(folder, "cpu", "fp32")
    quantize_model(model, CALIBRATION, SPEC, options=MATCH)
    spill = {"spill": tmp_path / "spill"} if spilled else {}
    rows = []

    def kill_in_the_second_block(row):
        rows.append(row)
        if len(rows) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(folder, tmp_path / "out", SPEC, options=MATCH, progress=kill_in_the_second_block)
    stream(folder, tmp_path / "out", SPEC, options=MATCH, **spill)
    streamed, _ = load_quantized(tmp_path / "out", "cpu", "fp32")
    assert same(model, streamed)
    ids = CALIBRATION[0]["input_ids"]
    assert torch.equal(logits(model, ids), logits(streamed, ids))


def test_it_refuses_what_it_cannot_use():
    x, dense = inputs(16)
    h = Hessian(16)
    h.update(x.float())
    with pytest.raises(ValueError, match="at every update"):
        h.update(x.float(), dense.float())
    with pytest.raises(ValueError, match="no inputs of the dense model"):
        gptq_quantize(normal(4, 16), h, SPEC, MATCH)
    with pytest.raises(ValueError, match="needs a Hessian"):
        gptq_quantize(normal(4, 16), h.matrix, SPEC, MATCH)
    with pytest.raises(ValueError, match="NaN"):
        Hessian(16).update(x.float(), dense.float() * float("nan"))


def zeros_somewhere(what, features=32):
    """A Hessian with halves whose inputs, dense inputs or both are all zero."""
    x, dense = (t.float() for t in inputs(features))
    for part in {"no inputs": (x,), "no inputs at all": (x, dense), "dense alone": (dense,)}[what]:
        part.zero_()
    hessian = Hessian(features, halves=True)
    hessian.update(x, dense)
    return hessian


@pytest.mark.parametrize("what", ["no inputs", "no inputs at all"])
@pytest.mark.parametrize("damp_percent", [0.0, 0.01])
def test_a_layer_that_no_input_reaches_keeps_its_weight(what, damp_percent):
    w = normal(8, 32, seed=3)
    assert torch.equal(dense_target(w, zeros_somewhere(what), damp_percent), w)


def test_columns_that_no_input_reaches_stay_and_the_others_are_corrected():
    (x, dense), w = inputs(), normal(8, 24, seed=3).double()
    x[:, [0, 7]] = 0
    for damp_percent in (0.0, 0.01):
        target = dense_target(w, seen(x, dense), damp_percent)
        assert torch.equal(target[:, [0, 7]], w[:, [0, 7]])
        live = [i for i in range(24) if i not in (0, 7)]
        assert (target[:, live] - w[:, live]).norm() > 0.01


@pytest.mark.parametrize("what", ["no inputs", "no inputs at all", "dense alone"])
@pytest.mark.parametrize("options", [MATCH, GPTQOptions.best(match_dense=True), GPTQOptions.best()])
def test_gptq_of_a_layer_that_no_input_reaches_rounds_to_nearest(what, options):
    w, spec = normal(8, 32, seed=3), QuantSpec(4, 16)
    hessian = zeros_somewhere(what)
    q = gptq_quantize(w, hessian, spec, options)
    if what != "dense alone":
        assert torch.equal(q.dequantize(), quantize_rtn(w, spec).dequantize())
    zero = gptq_quantize(torch.zeros_like(w), hessian, spec, options)
    assert not zero.dequantize().any()


@pytest.mark.parametrize("options", [MATCH, GPTQOptions.best(match_dense=True)])
def test_a_model_with_layers_of_zeros_is_quantized_and_streamed(options, tmp_path):
    """Without values the heads' output is zero, and so is all that the layer after them gets."""
    model = small_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "dense")
    small_tokenizer().save_pretrained(tmp_path / "dense")
    model, _ = load_model(tmp_path / "dense", "cpu", "fp32")
    quantize_model(model, CALIBRATION, SPEC, options=options)
    attention = model.model.layers[0].self_attn
    assert not attention.v_proj.dequantize().any() and attention.o_proj.dequantize().any()
    stream(tmp_path / "dense", tmp_path / "packed", SPEC, options=options)
    assert same(model, load_quantized(tmp_path / "packed", "cpu", "fp32")[0])
