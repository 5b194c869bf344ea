"""`python -m qlora_lib export`: the base, the merged model, and the command that serves them."""

import json
import shlex

import pytest
import torch

from qlora_lib.quant.gptq import GPTQOptions
from tests.support.cli_place import COMMON, FAST, place, run  # noqa: F401


def served(out: str) -> list[str]:
    """The words of the command that export prints last."""
    return shlex.split(out.strip().splitlines()[-1])


@pytest.mark.long
def test_export_of_the_base_and_of_the_merged_model(place, capsys):
    from qlora_lib import import_gptq, load_adapter, load_quantized, merge_lora
    from tests.support.lora_models import logits

    def same_logits(folder, model):
        model_of_folder, _ = import_gptq(folder, "cpu", "fp32")
        return torch.equal(logits(model_of_folder), logits(model))

    argv = [*COMMON, "--group-size", "32"]
    assert run("quantize", *argv) == 0
    assert run("export", "--model", "model") == 0
    run_folder = "checkpoints/tiny"
    words = ["vllm", "serve", f"{run_folder}/gptq", "--dtype", "float16"]
    assert served(capsys.readouterr().out) == words
    base, _ = load_quantized(f"{run_folder}/base", "cpu", "fp32")
    assert same_logits(f"{run_folder}/gptq", base)
    assert run("export", "--model", "model", "--merge", "rtn") == 2
    assert "holds no adapter" in capsys.readouterr().err

    assert run("finetune", *FAST, "--group-size", "32", "--lr", "0.1") == 0
    assert run("export", "--model", "model", "--out", "base") == 0
    out = capsys.readouterr().out
    assert "the adapter in checkpoints/tiny/adapter stays beside it" in out
    lora = ["--enable-lora", "--lora-modules", f"adapter={run_folder}/adapter"]
    assert served(out)[2:] == ["base", "--dtype", "float16", *lora, "--max-lora-rank", "8"]
    assert same_logits("base", base)

    for method in ("rtn", "gptq"):
        assert run("export", "--model", "model", "--merge", method) == 0
        out = capsys.readouterr().out
        assert f"merged into 7 layers by {method}; rounding error" in out
        assert served(out) == ["vllm", "serve", f"{run_folder}/gptq-merged", "--dtype", "float16"]
        assert not same_logits(f"{run_folder}/gptq-merged", base)
        if method == "rtn":
            load_adapter(base, f"{run_folder}/adapter")
            merge_lora(base, "rtn", unload=True)
            assert same_logits(f"{run_folder}/gptq-merged", base)
            base, _ = load_quantized(f"{run_folder}/base", "cpu", "fp32")


@pytest.mark.long
def test_the_merge_is_calibrated_on_what_the_base_was(place, capsys, monkeypatch):
    from qlora_lib.runs import export as module

    seen, real = [], module.merge_hessians

    def remember(model, batches, *halves):
        seen.append(batches)
        return real(model, batches, *halves)

    monkeypatch.setattr(module, "merge_hessians", remember)
    own = place / "own.jsonl"
    own.write_text("\n".join(json.dumps({"text": f"{i} apples"}) for i in range(12)))
    argv = ["--model", "model", "--data", "own.jsonl", "--group-size", "32"]
    assert run("finetune", *argv, "--max-steps", "1", "--batch-size", "4", "--rank", "2") == 0
    capsys.readouterr()
    merge = ["export", "--model", "model", "--merge", "gptq"]
    assert run(*merge) == 0
    out = capsys.readouterr().out
    assert "data: own.jsonl (text)" in out and "calibrated on other" not in out
    assert sum(len(batch["input_ids"]) for batch in seen[-1]) == 11  # of 12, one is held out
    assert run(*merge, "--data", "data") == 0
    assert "calibrated on other examples than the base" in capsys.readouterr().out
    assert sum(len(batch["input_ids"]) for batch in seen[-1]) == 12
    own.rename(place / "moved.jsonl")
    assert run(*merge) == 2
    assert "calibrated on own.jsonl, which is not here" in capsys.readouterr().err
    assert run(*merge, "--data", "moved.jsonl") == 0
    assert "calibrated on other" not in capsys.readouterr().out


def test_export_leaves_out_an_adapter_of_a_dense_base(place, capsys):
    assert run("quantize", *COMMON, "--method", "rtn") == 0
    assert run("finetune", *FAST, "--method", "none") == 0
    assert run("export", "--model", "model") == 0
    assert "--enable-lora" not in capsys.readouterr().out
    assert run("export", "--model", "model", "--merge", "rtn") == 2
    assert "trained on a quantized base" in capsys.readouterr().err


@pytest.mark.long
def test_a_base_of_floats_goes_into_compressed_tensors(place, capsys):
    from qlora_lib import import_compressed, load_quantized
    from tests.support.lora_models import logits

    run_folder = "checkpoints/tiny"
    assert run("quantize", *COMMON, "--format", "nvfp4") == 0
    assert "4.5" in capsys.readouterr().out  # bits a weight
    assert run("export", "--model", "model") == 2
    assert "is NVFP4, and GPTQ checkpoints hold integer grids" in capsys.readouterr().err
    assert run("export", "--model", "model", "--format", "compressed-tensors") == 0
    out = capsys.readouterr().out
    assert served(out) == [
        "vllm", "serve", f"{run_folder}/compressed-tensors", "--dtype", "bfloat16",
    ]  # fmt: skip
    base, _ = load_quantized(f"{run_folder}/base", "cpu", "fp32")
    model, _ = import_compressed(f"{run_folder}/compressed-tensors", "cpu", "fp32")
    assert torch.equal(logits(model), logits(base))
    card = (place / run_folder / "compressed-tensors/README.md").read_text()
    assert '"compressed-tensors", "qlora_lib"' in card and "in compressed-tensors" in card
    how = ["verify", f"{run_folder}/compressed-tensors", "--with", "transformers"]
    assert run(*how) == 0


def test_export_refuses_nf4(place, capsys):
    assert run("quantize", *COMMON, "--method", "nf4") == 0
    assert run("export", "--model", "model") == 2
    assert "is NF4" in capsys.readouterr().err


def test_hessians_for_the_merge_leave_padding_out():
    from qlora_lib.models.merge_hessians import merge_hessians
    from tests.support.lora_models import IDS, adapted, base_of

    model = adapted(base_of("grid4"))
    whole = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    padded = {n: torch.nn.functional.pad(t, (0, 5)) for n, t in whole.items()}
    want, got = merge_hessians(model, [whole]), merge_hessians(model, [padded])
    assert len(got) == 14 and want.keys() == got.keys()
    for path, hessian in got.items():
        assert hessian.tokens == IDS.numel()
        assert torch.allclose(hessian.matrix, want[path].matrix, rtol=1e-4, atol=1e-5)  # fp32 sums


@pytest.mark.parametrize("rank, room", [(1, "8"), (8, "8"), (9, "16"), (48, "64"), (300, "320")])
def test_the_serve_command_leaves_room_for_the_rank(rank, room, tmp_path):
    from qlora_lib.cli.export import serve_command

    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    words = shlex.split(serve_command(tmp_path / "with space", tmp_path))
    assert words[2] == str(tmp_path / "with space") and words[-2:] == ["--max-lora-rank", room]


def test_merging_by_gptq_takes_the_options_that_made_the_base(place, capsys, monkeypatch):
    from qlora_lib.runs import export as module

    seen, real = [], module.merge_lora

    def remember(model, into, hessians, options, **how):
        seen.append(options)
        return real(model, into, hessians, options, **how)

    monkeypatch.setattr(module, "merge_lora", remember)
    assert run("finetune", *FAST, "--group-size", "32", "--best") == 0
    for into in ("gptq", "rtn"):
        assert run("export", "--model", "model", "--merge", into, "--out", into) == 0
    # match_dense is the quantization's own: a merge is to meet the trained model.
    assert seen[0] == GPTQOptions.best() and seen[1] == GPTQOptions()
    assert "weigh_columns=True" in capsys.readouterr().out


@pytest.mark.long
def test_gguf_with_its_contract_and_card(place, capsys):
    pytest.importorskip("gguf")
    assert run("finetune", *FAST, "--group-size", "32", "--lr", "0.1") == 0
    argv = ["export", *COMMON[:2], "--format", "gguf"]
    assert run(*argv) == 0
    out = capsys.readouterr().out
    assert "7 layers as Q4_1: lost " in out and "verify checkpoints/tiny/gguf" in out
    folder = place / "checkpoints" / "tiny" / "gguf"
    names = {"base.gguf", "adapter.gguf", "Modelfile", "contract.json", "README.md", "hashes.json"}
    assert names <= {path.name for path in folder.iterdir()}
    golden = json.loads((folder / "contract.json").read_text())["golden"]
    assert len(golden) >= 10 and golden[0]["prompt"].endswith("?\nAnswer:\n")
    assert set(golden[0]["first"]) == {"as measured", "adapter missing", "adapter merged twice"}
    assert "'rank': 2" in (folder / "README.md").read_text()

    assert run("verify", str(folder), "--with", "transformers") == 0
    assert capsys.readouterr().out.endswith("as measured\n")
    (folder / "Modelfile").write_text("FROM ./other.gguf\n")
    assert run("verify", str(folder), "--with", "transformers") == 2
    assert "error: changed file: " in capsys.readouterr().err
    assert run(*argv, "--merge", "rtn") == 0
    merged = folder.with_name("gguf-merged")
    assert not (merged / "adapter.gguf").exists()
    assert run("verify", str(merged), "--with", "transformers") == 0
    assert "merged into the weights by rtn" in (merged / "README.md").read_text()


@pytest.mark.long
def test_a_gptq_checkpoint_has_them_too(place, capsys):
    assert run("finetune", *FAST, "--group-size", "32", "--lr", "0.1") == 0
    assert run("evaluate", *COMMON, "--max-new-tokens", "2", "--out", "report") == 0
    assert run("export", *COMMON[:2], "--report", "report") == 0
    folder, adapter = "checkpoints/tiny/gptq", "checkpoints/tiny/adapter"
    text = (place / folder / "README.md").read_text()
    assert "of 12 problems (95% interval" in text and "library_name: \"transformers\"" in text
    assert run("verify", folder, "--adapter", adapter, "--with", "transformers") == 0
    capsys.readouterr()
    assert run("verify", folder) == 2
    out, err = capsys.readouterr()
    assert "adapter missing: " in out
    assert err.endswith("is not served as it was measured: adapter missing\n")
    assert run("export", *COMMON[:2], "--merge", "rtn", "--report", "report") == 2
    assert "an evaluation of other weights" in capsys.readouterr().err
