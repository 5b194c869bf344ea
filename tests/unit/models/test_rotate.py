"""Rotated hidden states: the function stays, outliers do not."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_lib.formats.gptq_checkpoint import export_gptq
from qlora_lib.layers.hadamard_input import HadamardInput
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.targets import find_linears
from qlora_lib.models.checkpoint import load_quantized, save_quantized
from qlora_lib.models.input_sizes import input_absmax
from qlora_lib.models.quantize import quantize_model
from qlora_lib.models.rescale import norm_gain, plant_outliers
from qlora_lib.models.rotate import fold_norms, rotate_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.hadamard import random_orthogonal
from tests.support.calibrated_models import batches, logits
from tests.support.families import build
from tests.support.known_layout import EXACT, FAMILIES, change, known
from tests.support.small_models import small_model, small_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_norms_have_no_gain_and_leave_the_function_alone(family):
    model = known(family)
    before = copy.deepcopy(model)
    fold_norms(model)
    assert change(model, before) < EXACT
    norms = {n: m for n, m in model.named_modules()
             if n.endswith("layernorm") or n == "model.norm"}  # fmt: skip
    assert len(norms) == 5 and all((norm_gain(m) == 1).all() for m in norms.values())
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_leave_the_function_alone_and_nothing_else(family, online):
    model = known(family)
    before = copy.deepcopy(model)
    rotate_model(model, seed=1, online=online)
    assert change(model, before) < EXACT
    with torch.no_grad():
        ids = batches(1)[0]["input_ids"]
        was, new = (m.model.embed_tokens(ids) for m in (before, model))
        r1 = random_orthogonal(48, 1).float()
        assert (new - was @ r1).abs().max() < 1e-4
    linears, old = find_linears(model, "all"), find_linears(before, "all")
    inner = [path for path in linears if path.endswith("down_proj.down_proj")]
    assert len(inner) == (2 if online else 0) and len(linears) == len(old)
    for path, layer in old.items():
        twin = path + ".down_proj" if online and "down_proj" in path else path
        assert (linears[twin].weight - layer.weight).abs().max() > 0.1, path


def test_another_seed_is_another_rotation():
    a, b, c = (small_model() for _ in range(3))
    rotate_model(a, seed=0)
    rotate_model(b, seed=0)
    rotate_model(c, seed=1)
    weights = [m.model.layers[1].mlp.gate_proj.weight for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def spread(model, path: str) -> float:
    """The largest input of a layer over its median one."""
    x = input_absmax(model, batches(2))[path]
    return float(x.amax() / x.median())


def test_each_rotation_spreads_the_outliers_of_its_place():
    """R1 those of what norms put out, R2 of values, the online one of what down_proj reads."""
    model = small_model()
    plant_outliers(model, 64, seed=2)
    offline, online = copy.deepcopy(model), copy.deepcopy(model)
    rotate_model(offline)
    rotate_model(online, online=True)
    at = "model.layers.1."
    for path in ("self_attn.q_proj", "mlp.gate_proj", "self_attn.o_proj"):
        assert spread(offline, at + path) < spread(model, at + path) / 2, path
    down = at + "mlp.down_proj"
    assert spread(offline, down) > 0.9 * spread(model, down)
    assert spread(online, down + ".down_proj") < spread(model, down) / 4


def test_a_rotated_model_is_quantized_stored_and_loaded_like_any_other(tmp_path):
    model = small_model()  # with tied embeddings
    rotate_model(model)
    before = logits(model)
    model.tie_weights()  # as transformers does when it loads: there is nothing to tie any more
    assert torch.equal(logits(model), before) and not model.config.tie_word_embeddings
    assert not model.all_tied_weights_keys
    model.save_pretrained(tmp_path / "dense")
    same = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, trust_remote_code=False
    )
    assert torch.equal(logits(same), logits(model))
    report = quantize_model(model, batches(2), QuantSpec(4, 16))
    assert len(report) == 14
    save_quantized(model, None, tmp_path / "packed")
    loaded, _ = load_quantized(tmp_path / "packed", compute_dtype="fp32")
    assert torch.equal(logits(loaded), logits(model))


def test_an_online_rotation_is_calibrated_quantized_and_adapted_but_not_stored(tmp_path):
    model = small_model()
    rotate_model(model, online=True)
    quantize_model(model, batches(2), QuantSpec(4, 16))
    assert all(isinstance(b.mlp.down_proj, HadamardInput) for b in model.model.layers)
    for save in (save_quantized, export_gptq):
        with pytest.raises(ValueError, match="rotated online"):
            save(model, folder=tmp_path / "packed", tokenizer=small_tokenizer())
    assert not (tmp_path / "packed").exists()
    names = inject_lora(model, ("down_proj",), rank=2)
    assert names == [f"model.layers.{i}.mlp.down_proj.down_proj" for i in range(2)]


def test_what_cannot_be_rotated_is_refused_by_name():
    with pytest.raises(ValueError, match="'gemma3_text'"):
        rotate_model(build("gemma3"))
    with pytest.raises(ValueError, match="'opt'"):
        fold_norms(build("opt"))
    model = small_model()
    rotate_model(model, online=True)
    with pytest.raises(ValueError, match="is a HadamardInput"):
        rotate_model(model)
