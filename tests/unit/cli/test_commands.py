"""The command line, from quantizing to a score, on a small random model."""

import json

import pytest
import torch

from qlora_lib.__main__ import parser
from qlora_lib.evaluation.result_row import read_row
from qlora_lib.models.checkpoint import load_quantized
from tests.support.bnb_folder import save_bnb
from tests.support.cli_place import COMMON, FAST, SHORT, place, run  # noqa: F401
from tests.support.small_models import small_model


@pytest.mark.long
def test_finetune_evaluate_generate(place, capsys):
    assert run("finetune", *FAST) == 0
    out = capsys.readouterr().out
    assert "quantizing model with gptq" in out and "bits a weight" in out
    assert "on 7 layers" in out and "fp32" in out and "12 examples, 4 x 1 a step" in out
    folder = place / "checkpoints" / "tiny"
    parts = {"base", "adapter", "training", "run.json", ".lock"}
    assert {p.name for p in folder.iterdir()} == parts
    assert len((folder / "training" / "metrics.jsonl").read_text().splitlines()) == 2

    assert run("evaluate", *COMMON, "--max-new-tokens", "8") == 0
    out = capsys.readouterr().out
    assert "all 7 linear layers are quantized" in out and "adapter on 7 layers" in out
    assert out.count("   gold ") == 12 and "12 questions" in out and "95% interval" in out
    report = json.loads((place / "outputs/tiny/eval/report.json").read_text())
    assert report["n"] == 12 and report["info"]["compute_dtype"] == "fp32"
    assert report["info"]["device"] and report["info"]["adapter"] == "checkpoints/tiny/adapter"
    predictions = (place / "outputs/tiny/eval/predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 12

    asked = "outputs/tiny/eval"
    assert run("report", asked) == 0
    assert "add --run checkpoints/tiny" in capsys.readouterr().out
    assert run("report", asked, "--run", "checkpoints/tiny", "--out", "mine.json") == 0
    row = read_row("mine.json")
    assert row["n"] == 12 and row["run"]["lora"]["rank"] == 2 and row["stamp"]["device"]
    assert row["protocol_hash"] == read_row(f"{asked}/row.json")["protocol_hash"]
    assert run("report", "outputs") == 2
    assert "no outputs/report.json" in capsys.readouterr().err

    argv = ["--no-adapter", "--few-shot", "2", "--limit", "3", "--max-new-tokens", "8"]
    assert run("evaluate", *COMMON, *argv) == 0
    assert "3 questions" in capsys.readouterr().out
    assert (place / "outputs/tiny/eval-base-2shot-first3/report.json").is_file()
    base = "outputs/tiny/eval-base-2shot-first3"
    assert run("report", base, "--run", "checkpoints/tiny") == 2
    assert "asked the base alone" in capsys.readouterr().err
    short = ["--max-new-tokens", "4"]
    assert run("generate", *COMMON[:2], *short, "1 + 1?") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    prompt = "Question: 1 + 1?\nAnswer:\n"
    assert run("generate", *COMMON[:2], *short, "--form", "prompt", prompt) == 0
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert run("generate", *COMMON[:2], *short, "--form", "chat", "1 + 1?") == 2
    assert "no chat template" in capsys.readouterr().err


def test_only_the_answer_to_a_question_ends_before_the_next(place, monkeypatch):
    from qlora_lib.generation import generate as generation

    stops, real = [], generation.generator
    monkeypatch.setattr(
        generation, "generator", lambda *a: stops.append(a[2].stop) or real(*a)
    )
    argv = ["generate", *COMMON[:2], "--dense", "--no-adapter", "--max-new-tokens", "2"]
    for form in ("question", "prompt"):
        assert run(*argv, "--form", form, "1 + 1?") == 0
    assert stops == [("Question:",), ()]


@pytest.mark.parametrize("free, given, batch", [
    (10**12, [], 64), (2 * 10**6, [], 16), (10**5, ["--batch-size", "5"], 5),
    (10**12, ["--samples", "3"], 21), (2 * 10**6, ["--samples", "2", "--cache-bits", "4"], 8),
])  # fmt: skip
def test_evaluate_asks_as_many_at_once_as_fit(place, monkeypatch, free, given, batch):
    monkeypatch.setattr("qlora_lib.train.memory.available_memory", lambda device: free)
    argv = [*COMMON, "--dense", "--no-adapter", "--limit", "6", "--max-new-tokens", "8"]
    assert run("evaluate", *argv, "--out", "out", *given) == 0
    info = json.loads((place / "out/report.json").read_text())["info"]
    assert info["decoding"]["batch_size"] == batch
    assert info["chunk"] == batch * info["decoding"]["samples"]


def test_evaluate_goes_on_compares_and_refuses_other_settings(place, capsys):
    argv = [*COMMON, "--max-new-tokens", "4", "--dense", "--no-adapter"]
    assert run("evaluate", *argv) == 0
    own = place / "outputs/tiny/eval-dense-base"
    first = (own / "predictions.jsonl").read_text()
    capsys.readouterr()
    assert run("evaluate", *argv) == 0  # answers are kept: nothing is asked
    assert "   gold " not in capsys.readouterr().out
    assert (own / "predictions.jsonl").read_text() == first
    small_model(seed=1, layers=1).save_pretrained("model")
    assert run("evaluate", *argv) == 2
    assert "weights was" in capsys.readouterr().err
    assert run("evaluate", *argv, "--out", "b", "--compare", str(own)) == 0
    out = capsys.readouterr().out
    assert "exact McNemar p = 1: they are right on the same" in out and out.count("   gold ") == 12
    assert run("evaluate", *argv, "--restart") == 0
    assert capsys.readouterr().out.count("   gold ") == 12

    (place / "data" / "test_changed.jsonl").write_text((place / "data" / "dev.jsonl").read_text())
    assert run("evaluate", *argv, "--split", "test_changed", "--compare", str(own)) == 0
    assert "paired by index" in capsys.readouterr().out
    assert (place / "outputs/tiny/eval-test_changed-dense-base").is_dir()
    assert run("evaluate", *argv, "--compare", "nowhere") == 2
    assert "nowhere/report.json" in capsys.readouterr().err
    assert run("evaluate", *argv, "--split", "gsm_hard") == 2
    assert "mini-GSM has the splits" in capsys.readouterr().err


def test_base_is_reused_only_if_made_the_same_way(place, capsys):
    def quantizes(*argv):
        assert run("quantize", *COMMON, *argv) == 0
        return "quantizing" in capsys.readouterr().out

    assert quantizes("--method", "rtn")
    assert not quantizes("--method", "rtn")
    assert quantizes("--method", "rtn", "--bits", "3")
    assert quantizes("--method", "rtn", "--format", "nvfp4")
    assert not quantizes("--method", "rtn", "--format", "nvfp4")
    assert quantizes("--method", "rtn", "--format", "mxfp4")
    assert quantizes("--method", "nf4")
    assert not quantizes("--method", "nf4")
    small_model(seed=1, layers=1).save_pretrained("model")
    assert quantizes("--method", "nf4")


def forget(path, key):
    """As older versions wrote it: without the key, and without hashes."""
    kept = json.loads(path.read_text())
    for name in (key, "format", "sha256"):
        kept.pop(name, None)
    path.write_text(json.dumps(kept))
    (path.parent / "hashes.json").unlink(missing_ok=True)


@pytest.mark.long
def test_an_adapter_is_asked_on_its_own_base_only(place, capsys):
    assert run("finetune", *FAST, "--method", "rtn") == 0
    assert run("quantize", *COMMON, "--method", "rtn", "--bits", "2") == 0
    assert "note: what was trained in checkpoints/tiny needs the base" in capsys.readouterr().out
    for argv in (["evaluate", *COMMON, *SHORT], ["export", *COMMON[:2], "--merge", "rtn"]):
        assert run(*argv) == 2
        err = capsys.readouterr().err
        assert "checkpoints/tiny was trained on another base (spec was {'bits': 4" in err
    assert run("evaluate", *COMMON, *SHORT, "--no-adapter") == 0
    assert run("quantize", *COMMON, "--method", "rtn") == 0  # as it was then
    assert run("evaluate", *COMMON, *SHORT) == 0
    forget(place / "checkpoints/tiny/run.json", "base")
    assert run("quantize", *COMMON, "--method", "rtn", "--bits", "2") == 0
    capsys.readouterr()
    assert run("evaluate", *COMMON, *SHORT, "--out", "as-before") == 2  # the adapter says so itself
    assert "was trained beside other linear layers" in capsys.readouterr().err


@pytest.mark.long
def test_other_calibration_examples_make_another_base(place, capsys):
    def quantizes(*argv):
        assert run("quantize", "--model", "model", "--group-size", "32", *argv) == 0
        return "quantizing" in capsys.readouterr().out

    def write(n, path=place / "own.jsonl"):
        path.write_text("\n".join(json.dumps({"text": f"{n} and {i}"}) for i in range(5)))

    write(1)
    own = ["--data", "own.jsonl"]
    assert quantizes(*own) and not quantizes(*own)
    write(2)
    assert quantizes(*own)
    forget(place / "checkpoints/tiny/base/recipe.json", "calibration")
    write(3)
    assert not quantizes(*own)  # a base from before this was kept says nothing of it
    problems = ["--data", "data"]
    assert quantizes(*problems) and not quantizes(*problems)
    (place / "data" / "train.jsonl").write_text((place / "data" / "dev.jsonl").read_text())
    assert quantizes(*problems)


def test_killed_run_resumes(place, capsys):
    argv = ["finetune", *FAST, "--method", "rtn", "--optimizer", "adam8bit"]
    assert run(*argv) == 0
    assert run(*argv, "--resume") == 0
    assert "is there, with these settings" in capsys.readouterr().out
    assert run(*argv, "--resume", "--lr", "1") == 2
    assert "lr was" in capsys.readouterr().err
    assert run(*argv[:-2], "--resume") == 2
    assert "optimizer was 'adam8bit', is 'adamw'" in capsys.readouterr().err


def test_training_on_a_file_of_ones_own(place, capsys):
    rows = [{"prompt": f"Count to {i}: ", "completion": f"{i}"} for i in range(20)]
    rows[4]["completion"] = "Ava asks 2 + 2? and the answer is 4, which is what 2 + 2 makes"
    (place / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--model", "model", "--data", "mine.jsonl", "--group-size", "32"]
    fast = ["--max-steps", "1", "--batch-size", "4", "--rank", "2"]
    assert run("finetune", *argv, *fast, "--keep-notes") == 0
    out = capsys.readouterr().out
    assert "data: mine.jsonl (prompt and completion); calculator notes kept; 2 held out" in out
    assert "training on 18 examples" in out and "0 of them padding" in out
    said = json.loads((place / "checkpoints/tiny/run.json").read_text())["data"]
    assert said["calculator_notes"] == "kept" and said["tokens"]["examples"] == 18
    recipe = json.loads((place / "checkpoints/tiny/base/recipe.json").read_text())
    assert recipe["calibrated_on"] == "mine.jsonl"
    assert run("quantize", *argv) == 0
    assert "is there, with these settings" in capsys.readouterr().out
    assert run("evaluate", *argv[:4]) == 2
    assert "evaluate asks problems: name a folder" in capsys.readouterr().err


def test_a_dense_run_is_not_taken_for_a_quantized_one(place, capsys):
    assert run("finetune", *FAST, "--method", "none", "--targets", "q_proj,v_proj") == 0
    assert "on 2 layers" in capsys.readouterr().out
    assert run("evaluate", *COMMON) == 2
    assert "its layers are not quantized" in capsys.readouterr().err
    assert run("evaluate", *COMMON, "--dense", "--limit", "2", "--max-new-tokens", "2") == 0
    assert run("finetune", *FAST, "--method", "rtn") == 0
    capsys.readouterr()
    assert run("evaluate", *COMMON, "--dense") == 2
    assert "leave out --dense" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method, init, targets", [("nf4", "loftq", "attention"), ("none", "pissa", "all")]
)
def test_an_adapter_that_starts_from_its_base(place, capsys, method, init, targets):
    """Trained, saved, and asked again: on its own base, and on no other."""
    argv = [*FAST, "--method", method, "--init", init, "--targets", targets, "--rslora"]
    assert run("finetune", *argv, "--lr", "0.01") == 0
    out = capsys.readouterr().out
    assert f"'init': '{init}', 'use_rslora': True" in out
    dense = ["--dense"] if method == "none" else []
    assert run("evaluate", *COMMON, *dense, "--limit", "2", "--max-new-tokens", "2") == 0
    out = capsys.readouterr().out
    assert f"adapter on {7 if targets == 'all' else 4} layers" in out
    assert dense or "all 7 linear layers are quantized" in out  # those without adapters too
    if not dense:  # another base in its place: refused
        assert run("quantize", *COMMON, "--method", method) == 0
        assert run("evaluate", *COMMON, "--limit", "2") == 2
        assert "another base (residual was {'init': 'loftq', 'rank': 2" in capsys.readouterr().err
        forget(place / "checkpoints/tiny/run.json", "base")  # a run from before this was kept
        assert run("evaluate", *COMMON, "--limit", "2") == 2
        assert "init='loftq' made this adapter together" in capsys.readouterr().err


def test_one_folder_for_the_command_line_and_for_python(place, capsys):
    """What either has made, the other opens."""
    from qlora_lib import Finetuner, TrainConfig
    from qlora_lib.lora.layer import adapter_names

    assert run("finetune", *FAST, "--method", "rtn") == 0
    model, _ = Finetuner.load("checkpoints/tiny", compute_dtype="fp32")
    assert adapter_names(model) == ["default"]
    mine = Finetuner("model", folder="mine", rank=2, compute_dtype="fp32")
    mine.fit([("1 + 1?", "2")] * 4, [], TrainConfig(max_steps=1, compute_dtype="fp32"))
    mine.save()
    capsys.readouterr()
    assert run("evaluate", *COMMON, *SHORT, "--folder", "mine") == 0
    out = capsys.readouterr().out
    assert "all 7 linear layers are quantized, NF4Spec" in out and "adapter on 7 layers" in out


def test_weights_that_are_nf4_already_are_the_base(place, capsys):
    (place / "bnb").mkdir()
    model, _ = save_bnb(place / "bnb")
    argv = ["--model", "bnb", *FAST[2:]]
    assert run("finetune", *argv) == 2  # gptq, the default, can't
    assert "give --method nf4 to take them as they are" in capsys.readouterr().err
    for stream in ([], ["--stream", "--folder", "streamed"]):
        assert run("finetune", *argv, "--method", "nf4", *stream) == 0
        assert "quantized already, NF4Spec" in capsys.readouterr().out
    base, _ = load_quantized("checkpoints/tiny/base", "cpu", "fp32")
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(base(ids).logits, model(ids).logits)
    assert run("evaluate", *argv[:4], *SHORT) == 0
    assert "adapter on 14 layers" in capsys.readouterr().out
    assert run("quantize", *argv[:4], "--method", "nf4") == 0
    assert "is there, with these settings" in capsys.readouterr().out


def test_smaller_batches_keep_the_size_of_a_step(place, capsys):
    argv = [*COMMON, "--max-steps", "1", "--method", "none", "--batch-size", "2"]
    assert run("finetune", *argv) == 0
    assert "2 x 16 a step" in capsys.readouterr().out


def test_model_is_read_from_the_environment(place, monkeypatch, capsys):
    monkeypatch.setenv("MODEL", "model")
    assert run("quantize", "--method", "rtn") == 0
    assert "quantizing model with rtn" in capsys.readouterr().out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as done:
        parser().parse_args(["--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    for command in ("quantize", "finetune", "evaluate", "generate", "export"):
        assert command in out
        with pytest.raises(SystemExit):
            parser().parse_args([command, "--help"])
        assert "--profile" in capsys.readouterr().out


def test_experiments_store_rows_and_do_not_measure_them_again(place, capsys, short_answers):
    from experiments.accuracy import TRAINED, main

    argv = [*COMMON, "--out", "table.json", "--limit", "2", "--max-steps", "1"]
    main([*argv, "--rows", "base_statement", "qlora_attention_r16"])
    table = json.loads((place / "table.json").read_text())
    assert list(table) == ["base_statement", "qlora_attention_r16"]
    row = table["qlora_attention_r16"]
    assert row["n"] == 2 and row["training"]["bits"] == 4 and row["stamp"]["device"]
    main([*argv, "--rows", "base_statement", "base_bare_question"])
    assert "base_statement: is there" in capsys.readouterr().out
    table = json.loads((place / "table.json").read_text())
    assert list(table) == ["base_bare_question", "base_statement", "qlora_attention_r16"]
    small_model(seed=1, layers=1).save_pretrained("model")  # other weights: old rows are not theirs
    main([*argv, "--rows", "base_statement"])
    assert "is there" not in capsys.readouterr().out
    assert len(TRAINED) == 5


def test_votes_and_a_verifier(place, capsys):
    assert run("finetune", *FAST) == 0
    sampling = ["--max-new-tokens", "4", "--limit", "4", "--samples", "3"]
    assert run("evaluate", *COMMON, *sampling, "--vote", "verifier") == 2
    assert "there is no verifier checkpoints/tiny/verifier; `python" in capsys.readouterr().err
    hot = ["--limit", "6", "--samples", "4", "--temperature", "2", "--max-new-tokens", "4"]
    assert run("verifier", *COMMON, *hot) == 2  # a random model solves nothing
    assert "0 of them right; a verifier needs" in capsys.readouterr().err
    for vote in ("majority", "likelihood"):
        assert run("evaluate", *COMMON, *sampling, "--vote", vote) == 0
        folder = place / f"outputs/tiny/eval-first4-{vote}3"
        report = json.loads((folder / "report.json").read_text())
        assert report["n"] == 4 and report["info"]["decoding"]["samples"] == 3
        assert report["info"]["decoding"]["temperature"] == 0.7
        first = json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])
        assert len(first["samples"]) == 3 and first["completion"] in first["samples"]
        assert ("scores" in first) == (vote == "likelihood")
    assert run("evaluate", *COMMON, "--vote", "majority") == 2
    assert "--samples 2 or more" in capsys.readouterr().err


def test_a_verifier_is_trained_saved_and_votes(place, capsys, monkeypatch):
    """Labels by the length of the text stand for verdicts, of which a random model has one kind."""
    monkeypatch.setattr("qlora_lib.evaluation.extraction.is_correct", lambda said, gold: len(said) % 2 == 0)
    assert run("finetune", *FAST) == 0
    hot = ["--limit", "6", "--samples", "4", "--temperature", "2", "--max-new-tokens", "4"]
    assert run("verifier", *COMMON, *hot, "--rank", "2") == 0
    out = capsys.readouterr().out
    assert "24 solutions of 6 train problems" in out and "checkpoints/tiny/verifier" in out
    folder = place / "checkpoints/tiny/verifier"
    parts = {"adapter", "head.safetensors", "verifier.json", "hashes.json"}
    assert {p.name for p in folder.iterdir()} == parts
    assert json.loads((folder / "verifier.json").read_text())["solutions"] == 24
    monkeypatch.undo()
    monkeypatch.chdir(place)
    for vote in ("verifier", "weighted"):
        argv = ["--samples", "3", "--vote", vote, "--limit", "4", "--max-new-tokens", "4"]
        assert run("evaluate", *COMMON, *argv) == 0
        lines = (place / f"outputs/tiny/eval-first4-{vote}3/predictions.jsonl").read_text()
        scores = json.loads(lines.splitlines()[0])["scores"]
        assert len(scores) == 3 and all(0 < s < 1 for s in scores)
