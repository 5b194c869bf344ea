"""Scales that are trained while the codes stay: PEQA."""

import copy

import pytest
import torch
from torch import nn

from course.nb07.peqa import freeze_scales, scale_grad, train_scales
from qlora_lib import finetune
from qlora_lib.formats.gptq_checkpoint import export_gptq
from qlora_lib.layers.linear import QuantizedLinear, decoding_layout
from qlora_lib.lora.inject import trainable_parameters
from qlora_lib.models.checkpoint import load_quantized, save_quantized
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from qlora_lib.train.config import TrainConfig
from tests.support.lora_models import base_of, logits
from tests.support.small_models import PAIRS, small_model, small_tokenizer
from tests.support.tensors import default_dtype, normal, relative


def packed(kind: str) -> QuantizedLinear:
    weight = normal(96, 64, std=0.1)
    if kind == "g_idx":
        hessian = Hessian(64)
        hessian.update(normal(200, 64, seed=5) * torch.linspace(0.1, 2, 64))
        options = GPTQOptions(static_groups=False)
        return QuantizedLinear(gptq_quantize(weight, hessian, QuantSpec(4, 16), options))
    spec = QuantSpec(4, None, symmetric=True) if kind == "row" else QuantSpec(int(kind), 16)
    return QuantizedLinear(quantize_rtn(weight, spec), bias=normal(96, seed=9))


@pytest.mark.parametrize("kind", ["2", "3", "4", "8", "row", "g_idx"])
def test_the_gradient_of_the_scales_is_that_of_float64_autograd(kind):
    layer = packed(kind)
    q = layer.quantized
    layer = nn.Sequential(layer)
    before = layer(normal(3, 5, 64))
    assert train_scales(layer) == ["0"]
    assert torch.equal(layer(normal(3, 5, 64)), before)  # fp32 holds what fp16 held
    learning = trainable_parameters(layer)
    assert {n: p.dtype for n, p in learning.items()} == {"0.scale": torch.float32}
    x, g = normal(3, 5, 64), normal(3, 5, 96, seed=1)
    layer(x).backward(g)  # of an input that needs no gradient itself

    scale = q.scale.double().requires_grad_()
    groups = torch.arange(64) // (64 // scale.shape[1]) if q.g_idx is None else q.g_idx.long()
    codes = q.unpacked(slice(None)).double() - q.zero_point.double()[:, groups]
    (x.double() @ (scale[:, groups] * codes).t()).backward(g.double())
    assert relative(layer[0].scale.grad.double(), scale.grad) < 1e-5
    assert layer[0].bias is None or not layer[0].bias.requires_grad

    x.requires_grad_()
    layer(x).backward(g)
    assert relative(x.grad, g @ q.dequantize()) < 1e-5


def test_the_gradient_of_scales_is_fp32_whatever_the_default_dtype():
    for q in (packed("4").quantized, packed("g_idx").quantized):
        x, grad = normal(5, 64), normal(5, 96, seed=1)
        want = scale_grad(x, grad, q)
        with default_dtype(torch.bfloat16):
            got = scale_grad(x, grad, q)
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_scales_learn_while_codes_stay_and_go_back_to_fp16(tmp_path):
    model = base_of("grid2")
    codes = {n: b.clone() for n, b in model.named_buffers() if n.endswith(".codes")}
    assert len(train_scales(model)) == 14
    assert all(n.endswith(".scale") for n in trainable_parameters(model))
    cast = copy.deepcopy(model).half()  # casts of the model leave the scales in fp32
    assert all(p.dtype == torch.float32 for p in trainable_parameters(cast).values())
    config = TrainConfig(max_steps=6, batch_size=8, lr=2e-3, warmup_ratio=0, compute_dtype="fp32")
    history = finetune(model, small_tokenizer(), PAIRS, config)
    assert history.losses[-1] < history.losses[0] - 0.1
    for save in (
        lambda: save_quantized(model, small_tokenizer(), tmp_path / "m"),
        lambda: export_gptq(model, tmp_path / "m"),
    ):
        with pytest.raises(ValueError, match="scales of .*are being trained; call freeze_scales"):
            save()
    assert not list(tmp_path.iterdir())
    with torch.no_grad(), decoding_layout(model):
        trained_logits = logits(model)
    assert len(freeze_scales(model)) == 14 and not trainable_parameters(model)
    assert all(torch.equal(b, codes[n]) for n, b in model.named_buffers() if n in codes)
    assert relative(logits(model), trained_logits) < 5e-3  # fp16: 2**-11 a scale
    assert set(model.state_dict()) == set(base_of("grid2").state_dict())
    save_quantized(model, small_tokenizer(), tmp_path / "m")
    again, _ = load_quantized(tmp_path / "m")
    assert torch.equal(logits(again), logits(model))


def test_scales_that_can_not_be_trained_or_stored_are_named():
    with pytest.raises(ValueError, match="no layer is quantized"):
        train_scales(small_model())
    with pytest.raises(ValueError, match="q_proj is NF4; scales are trained on grids"):
        train_scales(base_of("nf4"))
    model = base_of("grid4")
    with pytest.raises(ValueError, match="no layer's scales are being trained"):
        freeze_scales(model)
    train_scales(model)
    next(iter(trainable_parameters(model).values())).data[0, 0] = 1e6
    with pytest.raises(ValueError, match="q_proj: a trained scale is beyond fp16"):
        freeze_scales(model)
    assert len(trainable_parameters(model)) == 14
    next(iter(trainable_parameters(model).values())).data[0, 0] = 1e-9  # 0 in fp16
    with pytest.raises(ValueError, match="q_proj: a trained scale is beyond fp16"):
        freeze_scales(model)
    next(iter(trainable_parameters(model).values())).data[0, 0] = 0  # as it was trained
    assert len(freeze_scales(model)) == 14
