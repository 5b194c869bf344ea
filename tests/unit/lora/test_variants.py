"""DoRA, LoRA+ and PEQA. test_peft_variants.py compares the first two with PEFT."""

import json

import pytest
import torch
from torch import nn

from qlora_lib import finetune, inject_lora
from qlora_lib import combine_adapters
from qlora_lib.lora.files import ADAPTER_CONFIG, load_adapter, save_adapter
from qlora_lib.lora.inject import trainable_parameters, use_adapter
from qlora_lib.lora.layer import LoRAConfig, LoRALinear, lora_layers
from qlora_lib.lora.merge import merge_into_original, merge_lora, unmerge_lora
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.lora.lora_plus import lora_plus_groups
from qlora_lib.train.config import TrainConfig
from tests.support.lora_models import IDS, base_of, files, logits, trained
from tests.support.small_models import PAIRS, small_model, small_tokenizer
from tests.support.tensors import LiveMemory, normal, relative

# --- DoRA ------------------------------------------------------------------------------------


def dora(kind="dense", **given):
    """A model with a DoRA adapter that does something: B and the magnitudes have moved."""
    model = base_of(kind)
    inject_lora(model, ALL_LINEAR, rank=4, use_dora=True, **given)
    trained(model, given.get("adapter", "default"), std=0.05)
    for i, layer in enumerate(lora_layers(model).values()):
        m = layer.magnitude[given.get("adapter", "default")]
        m.data *= 1 + normal(*m.shape, seed=i, std=0.05)
    return model


@pytest.mark.parametrize("kind", ["dense", "grid4", "nf4"])
def test_dora_starts_from_the_base_to_the_bit(kind):
    model = base_of(kind)
    before = logits(model)
    names = inject_lora(model, ALL_LINEAR, rank=4, use_dora=True)
    assert torch.equal(logits(model), before)
    want = {f"{n}.{part}.default" for n in names for part in ("lora_A", "lora_B", "magnitude")}
    assert set(trainable_parameters(model)) == want
    for layer in lora_layers(model).values():
        weight = layer.base.dequantize() if kind != "dense" else layer.base.weight
        assert torch.allclose(layer.magnitude["default"], weight.norm(dim=1), rtol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_dora_is_the_papers_equation_and_its_norm_is_a_constant(bias):
    """Eq. 5 in float64, and the gradients of a graph from which the norm is detached."""
    layer = LoRALinear(nn.Linear(48, 32, bias=bias))
    layer.add("d", LoRAConfig(rank=4, alpha=8, use_dora=True))
    layer.lora_B["d"].data = normal(32, 4, std=0.3)
    layer.magnitude["d"].data *= 1 + normal(32, seed=1, std=0.2)
    x, g = normal(5, 48, seed=2), normal(5, 32, seed=3)
    parts = [p.detach().double().requires_grad_() for p in layer.parameters_of("d")]
    a, b, m = parts
    moved = layer.base.weight.detach().double() + 2 * b @ a
    want = x.double() @ (m / moved.norm(dim=1).detach() * moved.t()) + (
        layer.base.bias.double() if bias else 0
    )
    assert relative(layer(x).double(), want) < 1e-6
    layer(x).backward(g)
    want.backward(g.double())
    for p, q in zip(layer.parameters_of("d"), parts):
        assert relative(p.grad.double(), q.grad) < 1e-5
    moved = layer.base.weight.detach().double() + 2 * b @ a
    follows = x.double() @ (m / moved.norm(dim=1) * moved.t())  # the norm in the graph
    (other,) = torch.autograd.grad(follows, a, g.double())
    assert relative(other, parts[0].grad) > 0.01  # the test would see it


def test_dora_forms_no_dense_sum_for_backward():
    layer = LoRALinear(nn.Linear(1024, 2048, bias=False))
    layer.add("d", LoRAConfig(rank=4, use_dora=True))
    x = normal(4, 1024)
    with LiveMemory(x, *layer.parameters()) as memory:
        layer(x).sum().backward()
    assert memory.peak < 2048 * 1024 * 4 / 1.5  # pieces of 512 rows: some at a time


@pytest.mark.parametrize("kind", ["dense", "grid4", "nf4"])
def test_dora_merges_into_what_it_computes(kind):
    model = dora(kind)
    before = logits(model)
    rows = merge_lora(model)
    assert (logits(model) - before).abs().max() < 1e-4 and max(r.lost for r in rows) < 1e-3
    unmerge_lora(model)
    assert torch.equal(logits(model), before)
    with use_adapter(model, ["default", None]), torch.no_grad():
        mixed = model(IDS).logits
    assert torch.allclose(mixed[0], before[0], atol=1e-4)
    assert torch.allclose(mixed[1], logits(base_of(kind))[1], atol=1e-4)


def test_dora_on_the_original_rescales_the_originals_rows():
    model, original = dora("grid4"), small_model()
    merge_into_original(model, original)
    for path, layer in lora_layers(model).items():
        b, a = layer.lora_B["default"], layer.lora_A["default"]
        moved = small_model().get_submodule(path).weight + 4 * b @ a
        want = (layer.magnitude["default"] / moved.norm(dim=1))[:, None] * moved
        assert relative(original.get_submodule(path).weight.detach(), want.detach()) < 1e-6


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_dora_is_saved_and_read_back(kind, tmp_path):
    model = dora(kind, adapter="d")
    save_adapter(model, tmp_path / "d", "d")
    assert json.loads((tmp_path / "d" / ADAPTER_CONFIG).read_text())["use_dora"] is True
    again = base_of(kind)
    load_adapter(again, tmp_path / "d")
    assert torch.equal(logits(again), logits(model))
    inject_lora(model, ("q_proj",), rank=2, adapter="plain")
    before = files(tmp_path / "d")
    inject_lora(model, ("k_proj",), rank=2, adapter="plain", use_dora=True)
    with pytest.raises(ValueError, match=r"the layers differ in use_dora, \[False, True\]"):
        save_adapter(model, tmp_path / "d", "plain")
    assert files(tmp_path / "d") == before


def test_dora_goes_with_a_whole_weight_and_with_no_sum_of_products():
    with pytest.raises(ValueError, match="init='pissa' takes apart"):
        inject_lora(small_model(), rank=4, init="pissa", use_dora=True)
    model = dora()
    for call in (
        lambda: combine_adapters(model, {"default": 1}, into="c"),
    ):
        with pytest.raises(ValueError, match="adapter 'default' uses DoRA"):
            call()


# --- LoRA+ -----------------------------------------------------------------------------------


def test_b_and_the_magnitudes_learn_faster():
    parameters = trainable_parameters(dora())
    slow, fast = lora_plus_groups(parameters, 1e-3, 16)
    assert (slow["lr"], fast["lr"], slow["lr_ratio"], fast["lr_ratio"]) == (1e-3, 16e-3, 1, 16)
    names = {id(p): n for n, p in parameters.items()}
    assert all(".lora_A." in names[id(p)] for p in slow["params"]) and len(slow["params"]) == 14
    assert {names[id(p)].split(".")[-2] for p in fast["params"]} == {"lora_B", "magnitude"}


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf")])
def test_bad_ratios_are_named(ratio):
    with pytest.raises(ValueError, match=f"ratio={ratio} must be a number above 0"):
        lora_plus_groups(trainable_parameters(dora()), 1e-3, ratio)
    with pytest.raises(ValueError, match="lora_plus_ratio"):
        TrainConfig(lora_plus_ratio=ratio)
    with pytest.raises(ValueError, match="no lora_B among the parameters"):
        lora_plus_groups(dict(small_model().named_parameters()), 1e-3, 2)


def plus(folder=None, ratio=4.0, callback=None, **given):
    torch.manual_seed(0)
    model = small_model()
    inject_lora(model, rank=2)
    settings = dict(max_steps=4, batch_size=4, lr=1e-3, warmup_ratio=0, compute_dtype="fp32",
                    save_every=2, folder=folder, lora_plus_ratio=ratio, **given)  # fmt: skip
    history = finetune(model, small_tokenizer(), PAIRS, TrainConfig(**settings), callback=callback)
    return trainable_parameters(model), history


def test_training_multiplies_the_rate_of_b_by_the_ratio():
    """Adam's first step is lr * sign(gradient): A moves by lr, B by ratio * lr."""
    model = small_model()
    inject_lora(model, rank=2)
    start = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
    lrs = []
    config = TrainConfig(max_steps=1, batch_size=4, lr=1e-3, warmup_ratio=0, lora_plus_ratio=4.0)
    finetune(model, small_tokenizer(), PAIRS, config, callback=lambda m: lrs.append(m["lr"]))
    for name, p in trainable_parameters(model).items():
        step = (p.detach() - start[name]).abs().max()
        want = 4 * lrs[0] if ".lora_B." in name else 0  # B = 0: the first gradient of A is 0
        assert step == pytest.approx(want, rel=1e-2, abs=1e-12), name


def test_a_ratio_of_one_is_plain_lora_to_the_bit():
    groups = lora_plus_groups(trainable_parameters(dora()), 1e-3, 1)
    assert {g["lr"] for g in groups} == {1e-3}
    (a, _), (b, _) = plus(ratio=1.0), plus(ratio=1.0000001)
    assert all(torch.allclose(a[n], b[n], rtol=1e-4, atol=1e-6) for n in a)


def test_a_resumed_run_with_lora_plus_is_the_uninterrupted_one(tmp_path):
    class Killed(Exception):
        pass

    def kill(metrics):
        if metrics["step"] == 3:
            raise Killed

    whole, expected = plus(tmp_path / "whole")
    with pytest.raises(Killed):
        plus(tmp_path / "killed", callback=kill)
    resumed, history = plus(tmp_path / "killed", resume=True)
    assert history.resumed_from == 2 and history.losses == expected.losses
    assert all(torch.equal(p, whole[n]) for n, p in resumed.items())
    assert any((p - whole[n]).abs().max() > 0 for n, p in plus(ratio=8.0)[0].items())
    with pytest.raises(ValueError, match="lora_plus_ratio was 4.0, is 2.0"):
        plus(tmp_path / "killed", ratio=2.0, resume=True)
