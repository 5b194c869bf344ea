"""Codes that an adapter moves on their grid: nothing is lost when it is merged."""

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from qlora_lib import finetune
from qlora_lib.formats.gptq_checkpoint import export_gptq
from qlora_lib.layers.linear import QuantizedLinear, decoding_layout
from qlora_lib.lora.inject import inject_lora, trainable_parameters
from qlora_lib.lora.on_grid import OnGridLinear, inject_on_grid, merge_on_grid, move_codes
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.models.checkpoint import load_quantized, save_quantized
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.train.config import TrainConfig
from tests.support.lora_models import base_of, logits
from tests.support.small_models import PAIRS, small_tokenizer
from tests.support.tensors import normal, relative

KINDS = ["grid2", "grid3", "grid4", "grid8", "symmetric", "g_idx"]
ALL = slice(None)


def on_grid(kind: str, std: float = 0.1):
    """A quantized model whose codes an adapter moves."""
    model = base_of(kind)
    inject_on_grid(model, ALL_LINEAR, rank=4)
    layers = [m for m in model.modules() if isinstance(m, OnGridLinear)]
    for seed, layer in enumerate(layers):
        layer.lora_B.data = normal(*layer.lora_B.shape, seed=seed, std=std)
    return model, layers


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_nothing_changes_and_a_merge_keeps_every_bit_of_the_logits(kind, tmp_path):
    base = base_of(kind)
    before, grids = logits(base), {n: m for n, m in base.named_modules() if hasattr(m, "spec")}
    model = base_of(kind)
    paths = inject_on_grid(model, ALL_LINEAR, rank=4)
    assert paths == list(grids) and torch.equal(logits(model), before)
    assert not any(merge_on_grid(model).values())

    model, _ = on_grid(kind)
    trained = logits(model)
    assert relative(trained, before) > 0.01
    moved = merge_on_grid(model)
    assert list(moved) == paths and all(0 < share < 1 for share in moved.values())
    assert torch.equal(logits(model), trained)
    for path, old in grids.items():
        new = model.get_submodule(path)
        assert type(new) is QuantizedLinear and new.spec == old.spec
        assert torch.equal(new.scale, old.scale) and torch.equal(new.zero_point, old.zero_point)
    save_quantized(model, small_tokenizer(), tmp_path / "model")
    assert torch.equal(logits(load_quantized(tmp_path / "model")[0]), trained)


def test_a_merge_keeps_every_bit_in_bf16_too():
    model, _ = on_grid("grid4")
    with torch.autocast("cpu", torch.bfloat16):
        trained = logits(model)
    merge_on_grid(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_float64_autograd_with_rounding_straight_through(kind):
    _, layers = on_grid(kind, std=1.0)
    layer = layers[0]
    x, g = normal(3, 5, layer.in_features), normal(3, 5, layer.out_features, seed=1)
    x.requires_grad_()
    layer(x).backward(g)

    q = layer.quantized
    groups = q.scale.shape[1]
    in_order = torch.arange(layer.in_features) // (layer.in_features // groups)
    g_idx = in_order if q.g_idx is None else q.g_idx.long()
    scale, zero = (t.double()[:, g_idx] for t in (q.scale, q.zero_point))
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    wanted = q.unpacked(ALL).double() + layer.config.scaling * (b @ a) / scale
    rounded = wanted + (wanted.round() - wanted).detach()
    codes = rounded.clamp(0, q.spec.max_code)
    assert 0 < (codes != rounded).double().mean() < 1  # some beyond the ends
    x64 = x.detach().double().requires_grad_()
    (x64 @ (scale * (codes - zero)).t()).backward(g.double())
    for mine, theirs in ((layer.lora_A, a), (layer.lora_B, b), (x, x64)):
        assert relative(mine.grad.double(), theirs.grad) < 1e-5  # sums of fp32


@settings(deadline=None, max_examples=40)
@drawn(st.sampled_from([2, 3, 4, 8]), st.integers(0, 100), st.floats(0, 2))
def test_codes_go_to_the_nearest_point_of_the_grid(bits, seed, size):
    spec = QuantSpec(bits, 8)
    base = quantize_rtn(normal(6, 16, seed=seed), spec)
    update = normal(6, 16, seed=seed + 1, std=size)
    moved, inside = move_codes(base, update)
    scale = base.scale.float().repeat_interleave(8, 1)
    zero = base.zero_point.float().repeat_interleave(8, 1)
    wanted = base.dequantize() + update
    off = (moved.dequantize() - wanted).abs()
    assert (off[inside] <= scale[inside] * 0.5001).all()  # half a step, and a bit of fp32
    points = scale.unsqueeze(-1) * (torch.arange(2**bits) - zero.unsqueeze(-1))
    assert torch.allclose(off, (points - wanted.unsqueeze(-1)).abs().amin(-1), atol=1e-4)


def test_training_moves_codes_and_lowers_the_loss():
    model = base_of("grid4")
    paths = inject_on_grid(model, ALL_LINEAR, rank=4)
    learning = trainable_parameters(model)
    assert {n.rpartition(".")[2] for n in learning} == {"lora_A", "lora_B"}
    assert len(learning) == 2 * len(paths)
    config = TrainConfig(max_steps=30, batch_size=8, lr=2e-2, progress=False, compute_dtype="fp32")
    history = finetune(model, small_tokenizer(), PAIRS, config)
    assert history.losses[-1] < 0.8 * history.losses[0]
    assert any(merge_on_grid(model).values())


def test_what_is_not_merged_can_not_be_saved_and_answers_alike_in_any_layout(tmp_path):
    model, layers = on_grid("grid4")
    codes = [layer.codes.clone() for layer in layers]
    trained = logits(model)
    with decoding_layout(model):
        assert torch.equal(logits(model), trained)
    assert all(torch.equal(layer.codes, c) for layer, c in zip(layers, codes, strict=True))
    for save, given in ((save_quantized, [small_tokenizer()]), (export_gptq, [])):
        with pytest.raises(ValueError, match="codes of .*q_proj are being moved; call merge_on"):
            save(model, *given, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_has_no_grid_is_refused_and_left_alone():
    adapted = base_of("grid4")
    inject_lora(adapted, ALL_LINEAR, rank=2)
    cases = {
        "q_proj: codes are moved on a grid, and the layer is Linear": (base_of("dense"), 4),
        "the layer is QuantizedLinear; quantize the model as a QuantSpec": (base_of("nf4"), 4),
        "the layer is LoRALinear": (adapted, 4),
        "rank=1000 exceeds": (base_of("grid4"), 1000),
        "rank=0": (base_of("grid4"), 0),
    }
    for message, (model, rank) in cases.items():
        before = logits(model)
        with pytest.raises(ValueError, match=message):
            inject_on_grid(model, ALL_LINEAR, rank=rank)
        assert torch.equal(logits(model), before)
        assert not any(isinstance(m, OnGridLinear) for m in model.modules())
    with pytest.raises(ValueError, match="no layer's codes are being moved; call inject_on_grid"):
        merge_on_grid(base_of("grid4"))
