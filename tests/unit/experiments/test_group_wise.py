"""QA-LoRA: an update that is constant within a group goes into the zero-points."""

import copy

import pytest
import torch

from experiments.group_wise import GroupWiseLinear, inject_group_wise, merge_group_wise
from qlora_lib import finetune
from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.quant.grid import QuantizedTensor
from qlora_lib.train.config import TrainConfig
from tests.support.lora_models import base_of, logits
from tests.support.small_models import PAIRS, small_tokenizer
from tests.support.tensors import normal, relative

KINDS = ["grid2", "grid4", "grid8", "symmetric", "g_idx"]


def group_wise(kind: str):
    model = base_of(kind)
    inject_group_wise(model, ALL_LINEAR, 4, 8)
    for seed, layer in enumerate(m for m in model.modules() if isinstance(m, GroupWiseLinear)):
        layer.lora_B.data = normal(*layer.lora_B.shape, seed=seed, std=0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_of_a_group_is_moved_alike(kind):
    layer = next(m for m in group_wise(kind).modules() if isinstance(m, GroupWiseLinear))
    q, x = layer.quantized, normal(3, 5, layer.in_features)
    groups = q.scale.shape[1]
    in_order = torch.arange(layer.in_features) // (layer.in_features // groups)
    g_idx = in_order if q.g_idx is None else q.g_idx.long()
    weight = q.dequantize() + 2 * (layer.lora_B @ layer.lora_A)[:, g_idx]  # alpha / rank = 2
    assert relative(layer(x).detach(), x @ weight.detach().t()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_loses_what_the_dtype_of_the_zero_points_loses(kind):
    model = group_wise(kind)
    trained = logits(model)
    for zeros, most in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        other = copy.deepcopy(model)
        lost = merge_group_wise(other, zeros)
        assert lost < most and relative(logits(other), trained) < most
    whole = copy.deepcopy(model)
    assert merge_group_wise(whole, torch.uint8) > 0.01
    assert relative(logits(whole), trained) > 0.01
    for layer in (m for m in whole.modules() if isinstance(m, QuantizedLinear)):
        assert type(layer) is QuantizedLinear and type(layer.quantized) is QuantizedTensor


def test_training_lowers_the_loss():
    model = base_of("grid4")
    before = logits(model)
    inject_group_wise(model, ALL_LINEAR, 4, 8)
    assert torch.equal(logits(model), before)  # B = 0
    config = TrainConfig(max_steps=30, batch_size=8, lr=2e-2, progress=False, compute_dtype="fp32")
    history = finetune(model, small_tokenizer(), PAIRS, config)
    assert history.losses[-1] < 0.9 * history.losses[0]
