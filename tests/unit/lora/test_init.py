"""LoftQ and PiSSA: what base and adapter hold together, and which base an adapter fits."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.files import ABOUT, ADAPTER, load_adapter, save_adapter
from qlora_lib.lora.fingerprint import residual_fingerprint
from qlora_lib.lora.init import loftq, low_rank, pissa
from qlora_lib.lora.inject import inject_lora, trainable_parameters
from qlora_lib.lora.layer import LoRALinear, lora_layers
from qlora_lib.lora.merge import merge_lora
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.models.checkpoint import load_quantized, save_quantized
from qlora_lib.models.quantize import quantize_model
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.nf4 import NF4Spec, quantize_nf4
from tests.support.lora_models import IDS, base_of, logits
from tests.support.small_models import small_model, small_tokenizer
from tests.support.tensors import bf16_autocast, normal, relative

SPECS = [NF4Spec(32), QuantSpec(4, 16, clip_search=False), QuantSpec(2, 16, clip_search=False)]
WEIGHT = normal(64, 96, seed=3) * torch.logspace(0, -1, 96)  # singular values that differ


def quantized(weight, spec):
    if isinstance(spec, NF4Spec):
        return quantize_nf4(weight, spec.block_size, spec.double_quant).dequantize()
    return quantize_rtn(weight, spec).dequantize()


def train_a_little(model, lr=0.05):
    """Two steps of gradient descent, so that A and B are no longer what they began as."""
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for p in trainable_parameters(model).values():
                p -= lr * p.grad
                p.grad = None
    return model


def test_low_rank_is_the_best_one():
    b, a = low_rank(WEIGHT, 5)
    s = torch.linalg.svdvals(WEIGHT)
    assert b.shape == (64, 5) and a.shape == (5, 96)
    assert torch.allclose((WEIGHT - b @ a).norm(), s[5:].norm(), rtol=1e-4)  # Eckart-Young
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-4)  # factors of one size
    assert torch.allclose(b.norm(dim=0).square(), s[:5], rtol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_loftq_mends_more_with_each_step(spec):
    """Algorithm 1 does not promise it; on this weight it does, and stays below plain rounding."""
    plain = relative(quantized(WEIGHT, spec), WEIGHT)
    errors = []
    for steps in (1, 2, 5):
        base, b, a = loftq(WEIGHT, 8, spec, steps)
        errors.append(relative(base.dequantize() + b @ a, WEIGHT))
    assert plain > errors[0] > errors[1] > errors[2]


def test_loftq_is_algorithm_1_written_out():
    q1 = quantized(WEIGHT, SPECS[0])
    u, s, vh = torch.linalg.svd(WEIGHT - q1)
    q2 = quantized(WEIGHT - u[:, :4] @ torch.diag(s[:4]) @ vh[:4], SPECS[0])
    u, s, vh = torch.linalg.svd(WEIGHT - q2)
    base, b, a = loftq(WEIGHT, 4, SPECS[0], steps=2)
    # A sum in another order can send a weight to the neighbouring level: not to the bit.
    assert relative(base.dequantize(), q2) < 0.01
    assert relative(b @ a, u[:, :4] @ torch.diag(s[:4]) @ vh[:4]) < 0.02


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_principal_part_makes_the_rest_easier_to_round(spec):
    base, b, a = pissa(WEIGHT, 8, spec)
    assert relative(base.dequantize() + b @ a, WEIGHT) < relative(quantized(WEIGHT, spec), WEIGHT)
    dense, b2, a2 = pissa(WEIGHT, 8)
    assert torch.equal(b2 @ a2, b @ a) and relative(dense + b @ a, WEIGHT) < 1e-6


@pytest.mark.parametrize("make", [
    lambda w: pissa(w, 8), lambda w: pissa(w, 8, SPECS[1]), lambda w: loftq(w, 8, SPECS[0])
])  # fmt: skip
def test_a_trained_weight_and_autocast_change_nothing(make):
    with bf16_autocast():
        base, b, a = make(nn.Parameter(WEIGHT))
    want, b_want, a_want = make(WEIGHT)
    assert torch.equal(b, b_want) and torch.equal(a, a_want)
    dense = [t if isinstance(t, torch.Tensor) else t.dequantize() for t in (base, want)]
    assert torch.equal(*dense) and not any(t.requires_grad for t in (b, a, dense[0]))


@pytest.mark.parametrize("scale", [dict(), dict(alpha=2), dict(use_rslora=True, alpha=9)], ids=str)
@pytest.mark.parametrize(
    "init, spec", [("pissa", None), ("pissa", NF4Spec(32)), ("loftq", SPECS[1])]
)
def test_scaling_times_b_a_is_the_intended_product(init, spec, scale):
    """Whatever alpha, and with rsLoRA's alpha / sqrt(r): base + scaling * B A is the same."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 64)
    linear.weight.data = WEIGHT.clone()
    model = nn.ModuleDict({"q_proj": linear})
    inject_lora(model, "q_proj", rank=8, init=init, spec=spec, **scale)
    layer = model["q_proj"]
    base, b, a = (loftq if init == "loftq" else pissa)(WEIGHT, 8, spec)
    assert relative(layer.delta("default"), b @ a) < 1e-5
    kind = nn.Linear if spec is None else QuantizedLinear
    assert isinstance(layer, LoRALinear) and type(layer.base) is kind
    x = normal(5, 96, seed=1)
    dense = base if spec is None else base.dequantize()
    want = x @ (dense + b @ a).T + linear.bias
    assert torch.allclose(layer(x), want, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in layer.base.parameters())


def test_pissa_on_a_dense_base_leaves_the_outputs():
    model = small_model()
    before = logits(model)
    assert len(inject_lora(model, ALL_LINEAR, rank=4, init="pissa")) == 14
    assert relative(logits(model), before) < 1e-5
    assert all(layer.lora_B["default"].any() for layer in lora_layers(model).values())
    state = {n: p.clone() for n, p in model.named_parameters()}
    inject_lora(model, ALL_LINEAR, rank=4, init="pissa")  # again: nothing changes
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("init, spec", [("loftq", QuantSpec(3, 16, clip_search=False)),
                                        ("pissa", NF4Spec(32))])  # fmt: skip
def test_each_layer_comes_closer_to_the_dense_one(init, spec):
    plain, model, dense = small_model(), small_model(), small_model()
    quantize_model(plain, None, spec, "nf4" if init == "pissa" else "rtn")
    inject_lora(model, ALL_LINEAR, rank=8, init=init, spec=spec)
    with torch.no_grad():
        for path, layer in lora_layers(model).items():
            x = normal(32, layer.in_features, seed=1)
            want = dense.get_submodule(path)(x)
            assert relative(layer(x), want) < relative(plain.get_submodule(path)(x), want), path


# --- on disk --------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_dense_pissa_is_saved_as_plain_lora_of_twice_the_rank(rslora, tmp_path):
    """For the original model: the residual need not be kept."""
    model = small_model()
    inject_lora(model, rank=4, alpha=6, init="pissa", use_rslora=rslora)
    save_adapter(train_a_little(model), tmp_path / "a")
    again = small_model()
    load_adapter(again, tmp_path / "a")
    config = next(iter(lora_layers(again).values())).configs["default"]
    assert config.rank == 8 and config.init == "kaiming" and config.use_rslora == rslora
    assert relative(logits(again), logits(model)) < 1e-4
    assert relative(logits(small_model()), logits(model)) > 0.01  # training did something
    with pytest.raises(ValueError, match="16 bits would lose; save it as float32"):
        save_adapter(model, tmp_path / "b", dtype=torch.bfloat16)


@pytest.mark.parametrize("init, spec", [("loftq", NF4Spec(32)), ("pissa", QuantSpec(4, 16, clip_search=False))])
def test_an_adapter_fits_its_own_quantized_base_alone(init, spec, tmp_path):
    model = small_model()
    inject_lora(model, ALL_LINEAR, rank=4, init=init, spec=spec)
    train_a_little(model)
    save_quantized(model, small_tokenizer(), tmp_path / "base")
    save_adapter(model, tmp_path / "a")
    with safe_open(tmp_path / "a" / ADAPTER, "pt") as file:
        said = json.loads(file.metadata()[ABOUT])
    assert said["init"] == init and len(said["residual base"]) == 16
    again, _ = load_quantized(tmp_path / "base", "cpu", "fp32")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="no model by itself; merge that one first"):
        inject_lora(again, rank=2, adapter="second")
    plain = small_model()
    quantize_model(plain, None, spec, "nf4" if isinstance(spec, NF4Spec) else "rtn")
    for other in (plain, small_model()):
        with pytest.raises(ValueError, match=f"init='{init}' made this adapter together with its"):
            load_adapter(other, tmp_path / "a")
        assert not lora_layers(other)


def test_no_other_adapter_goes_on_a_residual_base(tmp_path):
    other = small_model()
    inject_lora(other, rank=2)
    save_adapter(other, tmp_path / "plain")
    model = small_model()
    inject_lora(model, rank=4, init="pissa")
    for add in (
        lambda: load_adapter(model, tmp_path / "plain", "second"),
        lambda: inject_lora(model, rank=2, adapter="second"),
        lambda: inject_lora(model, rank=2, adapter="second", init="pissa"),
    ):
        with pytest.raises(ValueError, match="merge"):
            add()
    want = logits(model)
    merge_lora(model, unload=True)  # as the message says
    inject_lora(model, rank=2, adapter="second")
    assert relative(logits(model), want) < 1e-5


def test_the_fingerprint_is_of_every_code():
    layers = {"q_proj": QuantizedLinear(quantize_nf4(WEIGHT)), "v_proj": nn.Linear(4, 4)}
    assert residual_fingerprint(layers) == "dense"
    del layers["v_proj"]
    before = residual_fingerprint(layers)
    changed = copy.deepcopy(layers)
    changed["q_proj"].codes[-1] ^= 1
    assert residual_fingerprint(changed) != before
    assert residual_fingerprint({"q_proj": layers["q_proj"].half()}) == before


@pytest.mark.parametrize(
    "kind, given, message",
    [
        ("dense", dict(init="loftq"), "init='loftq' needs spec="),
        ("nf4", dict(init="loftq", spec=NF4Spec()), "is quantized.*load the model without quant"),
        ("grid4", dict(init="pissa"), "is quantized.*starts from the dense weight"),
        ("dense", dict(init="pissa", rank=20), r"rank 2 r = 40, which exceeds this layer's"),
        ("dense", dict(init="pissa", alpha=-1), "alpha=-1: expected a number above 0"),
        ("dense", dict(init="pissa", spec=QuantSpec(4, 48)), "q_proj: group_size=48 does not"),
        ("dense", dict(spec=NF4Spec()), "goes with .*quantize_model quantizes first"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(kind, given, message):
    model = base_of(kind)
    with pytest.raises(ValueError, match=message):
        inject_lora(model, **given)
    assert not lora_layers(model)


def test_a_weight_with_nan_is_named():
    model = small_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: the weight holds 1 NaN"):
        inject_lora(model, ALL_LINEAR, init="pissa")
    assert not lora_layers(model)
