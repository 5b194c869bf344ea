"""The GPU benchmark and the recorded step at LLaMA-2-7B's width, at a small size, on a CPU."""

import json
import sys
from functools import partial
from importlib import import_module
from itertools import count

import pytest
import torch
from transformers import LlamaConfig

from experiments.step import BLOCKS, RANK, SEQ, measure_shape, random_packed_model
from qlora_lib.base.paths import DATA, ROOT
from qlora_lib.models.quantize import quantized_layers
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.nf4 import NF4Spec
from qlora_lib.train.memory import PARTS, memory_ledger

CONFIG = LlamaConfig(
    num_hidden_layers=1, hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=99
)
RECORD = DATA / "results" / "llama2-7b-shape-step.json"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield import_module("gpu")
    sys.modules.pop("gpu")


@pytest.mark.long
def test_the_whole_benchmark_at_a_small_size(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "ROWS", benchmark.ROWS[1:])  # two are enough here
    assert benchmark.main(["--small", "--out", str(tmp_path / "gpu.json")]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert set(result["models"]) == {"small, nf4", "small, rtn"}
    for model in result["models"].values():
        ways = {"as it comes", "4 bits", "steps of a graph"}
        assert set(model["decoded_tokens_per_second"]) == ways
        assert all(rate > 0 for rate in model["decoded_tokens_per_second"].values())
        rows = {(row["batch"], row["checkpointing"]): row for row in model["training"]}
        assert set(rows) == set(benchmark.ROWS)
        for row in rows.values():
            assert row["tokens_per_second"] > 0 and 0.8 < row["ratio"] < 1.3
            assert set(row["predicted_bytes"]) == {*PARTS, "peak"}
    assert len(result["linears"]["small"]) == 6
    dense = result["stamp"]["dtype"]  # of the machine: fp32, or bf16 where it is native
    for row in result["linears"]["small"]:
        assert set(row["milliseconds"]) == {dense, "nf4", "rtn"} and row["packed_of_copy"] > 0
        for name, (low, high) in row["quartiles"].items():
            assert 0 < low <= row["milliseconds"][name] <= high
    assert "no CUDA GPU" in result["skipped"][0] and "--smollm2 PATH" in result["skipped"][1]
    stamp = result["stamp"]
    assert stamp["seed"] == 0 and {"date", "device", "torch", "command", "small"} <= set(stamp)
    assert capsys.readouterr().out.count("skipped: ") == 2


def test_when_the_time_is_over_what_is_missing_is_named(benchmark, tmp_path, capsys, monkeypatch):
    """The clock is a fake: it ticks when it is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ticks = count()
    out_of_time = partial(benchmark.Budget, seconds=3, clock=lambda: next(ticks))
    monkeypatch.setattr(benchmark, "Budget", out_of_time)
    assert benchmark.main(["--small", "--out", str(tmp_path / "gpu.json")]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    rows = result["linears"]["small"]
    missing = [reason for reason in result["skipped"] if "seconds are spent" in reason]
    assert len(rows) == 1 and rows[0]["milliseconds"]  # of what was begun there are times
    assert [reason.partition(":")[0] for reason in missing] == [
        "small, one linear of 64 x 64, 16 tokens", "small, one linear of 128 x 64",
        "small, one linear of 64 x 128", "small, nf4", "small, rtn",
    ]  # fmt: skip
    assert result["models"] == {} and capsys.readouterr().out.count("seconds are spent") == 5


def test_calls_are_timed_until_the_time_is_over_and_once_at_least(benchmark):
    cpu, calls, now = torch.device("cpu"), [], [0.0]
    budget = benchmark.Budget(10, lambda: now[0])

    def slow():
        calls.append(now)
        now[0] += 4

    assert len(benchmark.all_seconds(slow, cpu, 20, budget)) == 2  # after 4, 8 and 12 seconds
    assert len(benchmark.all_seconds(slow, cpu, 20, budget)) == 1 and len(calls) == 5
    assert not budget.allows("more") and budget.skipped == ["more: the 10 seconds are spent"]


def test_without_a_gpu_the_large_sizes_are_not_tried(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert "--small runs it all" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", [NF4Spec(), QuantSpec(4, 64, clip_search=False)], ids=str)
def test_a_model_is_packed_as_it_is_drawn(spec):
    model = random_packed_model(CONFIG, spec, torch.bfloat16)
    assert len(quantized_layers(model)) == 7
    weights = [layer.dequantize() for layer in quantized_layers(model).values()]
    assert all(0.018 < w.std() < 0.022 for w in weights)  # N(0, 0.02), rounded
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    again = random_packed_model(CONFIG, spec, torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_small_shape_is_measured():
    """That it runs and what it says; the process's noise is as large as this model."""
    row = measure_shape(CONFIG, NF4Spec(), 16, 4, "fp32")
    assert row["tensors_with_gradient"] == 14
    assert row["measured_tensors"]["adapters"] == row["predicted_bytes"]["adapters"]
    assert row["predicted_bytes"]["peak"] > 0 and row["measured_bytes"]["peak"] > 0


def test_the_recorded_step_is_within_a_tenth_of_todays_ledger():
    row = json.loads(RECORD.read_text(encoding="utf-8"))
    assert (row["blocks"], row["tensors_with_gradient"]) == (BLOCKS, 2 * 7 * BLOCKS)
    assert "nothing about accuracy" in row["what"] and row["stamp"]["command"]
    dtype = next(d for d in ("fp32", "bf16") if d in row["setting"])
    spec = NF4Spec(**row["spec"]) if "block_size" in row["spec"] else QuantSpec(**row["spec"])
    config = LlamaConfig(num_hidden_layers=BLOCKS)
    ledger = memory_ledger(config, "qlora", 1, SEQ, RANK, spec=spec, compute_dtype=dtype)
    assert row["predicted_bytes"] == ledger.parts | {"peak": ledger.peak}
    assert row["ratio"] == ledger.peak / row["measured_bytes"]["peak"]
    assert 0.9 < row["ratio"] < 1.1
