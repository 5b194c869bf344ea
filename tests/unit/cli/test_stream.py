"""Streamed quantization from the command line, and the experiment at LLaMA-2-7B's width."""

import json
import re
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from experiments import streaming as streaming_experiments
from qlora_lib.__main__ import main
from qlora_lib.models.checkpoint import load_quantized
from qlora_lib.models.load import load_model
from qlora_lib.models.quantize import quantized_layers
from qlora_lib.quant.gptq import GPTQOptions
from tests.support.gguf_file import write_gguf
from tests.support.streamed_models import folder, stored  # noqa: F401


@pytest.mark.long
def test_the_streamed_base_is_the_one_that_finetune_looks_for(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(4)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    common = ["quantize", "--model", "model", "--data", "data", "--group-size", "0"]
    assert main([*common, "--stream", "--spill", "spill"]) == 0
    out = capsys.readouterr().out
    assert "streaming model with gptq" in out and len(re.findall("output error", out)) == 14
    assert re.search(r"bytes for [\d,]+ parameters, \d+\.\d\d bits each", out)
    assert main(common) == 0 and "is there, with these settings" in capsys.readouterr().out
    assert main([*common, "--targets", "attention"]) == 0  # another base
    whole, _ = load_quantized("checkpoints/tiny/base", "cpu", "fp32")
    assert len(quantized_layers(whole)) == 8
    assert main([*common, "--targets", "attention", "--stream"]) == 0
    assert "is there, with these settings" in capsys.readouterr().out
    options = {  # another base each, and remembered
        "--match-dense": {"match_dense": True},
        "--weigh-columns": {"weigh_columns": True},
        "--refit-scales": {"refit_scales": True},
        "--damping=0.05": {"damp_percent": 0.05},
        "--damping=auto": {"damp_percent": None},
        "--best": GPTQOptions.best(match_dense=True).changed(),
    }
    for option, changed in options.items():
        named = [*common, "--targets", "attention", option]
        assert main(named) == 0 and "quantizing model with gptq" in capsys.readouterr().out
        recipe = json.loads((tmp_path / "checkpoints/tiny/base/recipe.json").read_text())
        assert {k: v for k, v in recipe.items() if k in asdict(GPTQOptions())} == changed
        assert main([*named, "--stream"]) == 0
        assert "is there, with these settings" in capsys.readouterr().out
    assert main([*common, "--spill", "spill"]) == 2
    assert "--spill goes only with --stream" in capsys.readouterr().err
    assert main(["quantize", "--model", "data", "--stream"]) == 2
    assert "data holds no model; name a folder with config.json" in capsys.readouterr().err


def test_a_gguf_file_is_the_base_and_is_read_whole(tmp_path, monkeypatch, capsys):
    """Of its architecture transformers makes a model at once, so it can't be streamed."""
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    write_gguf("small.gguf")
    argv = ["quantize", "--model", "small.gguf", "--method", "rtn", "--compute-dtype", "fp32"]
    for stream in ([], ["--stream", "--folder", "streamed"]):
        assert main([*argv, *stream]) == 0
        out = capsys.readouterr().out
        assert "quantizing small.gguf with rtn" in out
        assert ("read whole: neither a GGUF file nor packed weights" in out) == bool(stream)
    one, other = (load_quantized(base, "cpu", "fp32")[0].state_dict()
                  for base in ("checkpoints/tiny/base", "streamed/base"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_experiment_measures_and_predicts(tmp_path, monkeypatch, capsys):
    small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    monkeypatch.setattr(streaming_experiments, "LLAMA2_7B", streaming_experiments.LLAMA2_7B | small)
    monkeypatch.setattr(streaming_experiments, "LENGTH", 16)
    monkeypatch.setattr(streaming_experiments, "SHARD", 150_000)
    out = tmp_path / "result.json"
    argv = [str(tmp_path), "--blocks", "2", "--sequences", "4", "--out", str(out)]
    streaming_experiments.main([*argv, "--part"])
    few = load_file(tmp_path / "model" / "model-00001-of-00002.safetensors")
    result = json.loads(out.read_text())
    assert result["packed_bytes_a_block"] == result["predicted_packed_bytes_a_block"]
    assert result["peak_anonymous_bytes"] >= result["anonymous_bytes_before"] > 0
    assert result["calibration_tokens"] == 64 and len(result["output_errors"]["layers"]) == 14
    assert "no meaning" in result["output_errors"]["meaning"] and result["stamp"]["date"]
    assert "peak anonymous memory" in capsys.readouterr().out

    streaming_experiments.make_folder(tmp_path / "model", streaming_experiments.LLAMA2_7B)
    whole, _ = load_model(tmp_path / "model", "cpu", "bf16")  # transformers reads it
    assert len(whole.model.layers) == 3
    state = whole.state_dict()
    for name, tensor in few.items():
        assert torch.equal(tensor, state[name])  # a part holds the same weights
    assert state["lm_head.weight"].float().std() == pytest.approx(0.02, rel=0.05)
    assert (state["model.norm.weight"] == 1).all()
