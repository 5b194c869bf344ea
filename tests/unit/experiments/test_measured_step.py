"""A training step against the ledger, part by part; the meter."""

import gc

import pytest
import torch

from experiments.measured_step import WORKING, AllocationMeter, measure_step
from qlora_lib import memory_ledger, trainable_parameters
from qlora_lib.base.devices import DTYPES
from qlora_lib.quant.nf4 import NF4Spec
from tests.support.memory_models import BATCH, RANK, SEQ, SMALL, SPEC, model_of


def ledger_of(method, compute_dtype="fp32", checkpointing=False, **given):
    return memory_ledger(
        SMALL, method, BATCH, SEQ, RANK, spec=SPEC, compute_dtype=compute_dtype,
        checkpointing=checkpointing, **given,
    )  # fmt: skip


# Gradients grow while activations go, and only adapters are small enough for that not to show;
# the ledger takes them together, as they are when batches are accumulated.
@pytest.mark.parametrize(
    "method, compute_dtype, checkpointing, tolerance, given",
    [
        ("qlora", "fp32", False, 0.05, {}), ("qlora", "bf16", False, 0.05, {}),
        ("qlora", "fp32", True, 0.05, {}), ("qlora", "bf16", True, 0.08, {}),
        ("lora", "fp32", False, 0.05, dict(optimizer="adam8bit")),
        ("full", "fp32", False, 0.15, {}), ("full", "bf16", False, 0.15, {}),
        ("full", "bf16", True, 0.15, {}), ("qlora", "fp32", False, 0.05, dict(logit_tokens=48)),
    ],
)  # fmt: skip
def test_prediction_and_measurement_agree(method, compute_dtype, checkpointing, tolerance, given):
    ledger = ledger_of(method, compute_dtype, checkpointing, **given)
    model = model_of(method, DTYPES[compute_dtype])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = measure_step(ledger, model.eval())
    assert result.ratio == pytest.approx(1, abs=tolerance)
    assert result.measured["peak"] <= 1.05 * ledger.total
    for part in result.predicted:
        if part not in (WORKING, "peak"):
            assert result.predicted[part] == result.measured[part], part
    # and the model is as it was
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n].to(p.dtype)) for n, p in model.named_parameters())


def test_a_step_of_ones_own():
    """A longer one than predicted shows in the working memory, not in what is stored."""
    ledger, model = ledger_of("qlora"), model_of("qlora", torch.float32)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9)
    ids = torch.randint(3, 300, (2 * BATCH, SEQ))
    calls = []

    def step():
        calls.append(model(ids, labels=ids).loss.backward())
        optimizer.step()
        optimizer.zero_grad()

    result = measure_step(ledger, model, step, optimizer)
    assert len(calls) == 2
    assert result.measured["optimizer"] == result.predicted["optimizer"] / 2  # one moment
    assert result.measured["gradients"] == result.predicted["gradients"]
    assert result.measured[WORKING] > 1.8 * result.predicted[WORKING] and result.ratio < 0.7
    lines = str(result).splitlines()
    assert "predicted" in lines[0] and lines[-1].split()[0] == "peak"
    assert lines[-1].split()[-1] == f"{result.ratio:.3f}"


def test_what_measure_refuses():
    model = model_of("qlora", torch.float32)
    with pytest.raises(ValueError, match="give both, or none"):
        measure_step(ledger_of("qlora"), model, step=lambda: None)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        measure_step(ledger_of("qlora"), model.requires_grad_(False))


def test_the_meter_counts_storages_once_and_sees_them_go():
    given = torch.ones(100)
    with AllocationMeter() as meter:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(100, 10).t()
        b.add_(given)  # (10, 100) + (100,)
        given.mul_(2)
        assert meter.alive == meter.peak == 4000
        c = a * 2
        assert meter.alive == 8000
        del a, b
        gc.collect()
        assert meter.alive == 4000
        del c
    assert meter.alive == 0 and meter.peak == 8000 == max(meter.trace)


@pytest.mark.parametrize("spec", [SPEC, NF4Spec(32)], ids=str)
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_decoding_one_layer_takes_what_the_ledger_says(spec, compute_dtype):
    from qlora_lib.quant.recipe import Recipe

    weight = Recipe(spec).quantize(torch.randn(160, 64))
    with AllocationMeter() as meter:
        weight.dequantize(DTYPES[compute_dtype])
    parts = memory_ledger(SMALL, "qlora", spec=spec, compute_dtype=compute_dtype).parts
    # Scales in fp32, zero-points, tables: a tenth more at 32 weights a scale.
    assert 1 <= meter.peak / parts["dequantized layer"] < 1.2
