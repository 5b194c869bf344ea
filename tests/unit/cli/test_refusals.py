"""What the commands refuse: in one line with exit code 2, and before the work."""


import pytest

from qlora_lib.__main__ import parser
from tests.support.cli_place import COMMON, FAST, SHORT, place, run  # noqa: F401
from tests.support.small_models import small_model, small_tokenizer


def test_what_data_may_be(place, monkeypatch):
    from qlora_lib.cli.common import read_data_option

    def read(data, command="finetune", profile="tiny"):
        argv = [command, "--profile", profile, *(["--data", data] if data else [])]
        return read_data_option(parser().parse_args(argv))

    monkeypatch.setenv("GSM8K_DIR", "gsm")
    assert read(None) == (None, None, None) and read(None, profile="smollm2") == (None, "gsm", None)
    assert read("gsm8k") == ("gsm8k", "gsm", None)
    assert read("metamathqa", "evaluate") == ("gsm8k", "gsm", "metamathqa")
    assert read("data", "evaluate") == (None, "data", None)  # problems
    (place / "own").mkdir()
    with pytest.raises(FileNotFoundError, match="no train.jsonl"):
        read("own")
    (place / "own" / "mine.jsonl").touch()
    assert read("own") == (None, None, "own") and read("own", profile="smollm2")[1] == "gsm"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--init", "loftq"], "GPTQ's codes are made by calibration"),
        (["--init", "loftq", "--method", "none"], "a dense base has nothing quantized"),
    ],
)
def test_inits_that_do_not_go_with_a_method(place, capsys, argv, message):
    assert run("finetune", *FAST, *argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, named",
    [
        (["quantize", "--method", "nf4", "--bits", "3", "--best"], "--bits"),
        (["quantize", "--method", "nf4", "--bits", "4"], "--bits"),
        (["finetune", "--method", "nf4", "--group-size", "64"], "--group-size"),
        (["quantize", "--method", "rtn", "--match-dense"], "--match-dense"),
        (["quantize", "--method", "rtn", "--damping", "auto"], "--damping"),
        (["quantize", "--method", "rtn", "--weigh-columns"], "--weigh-columns"),
        (["quantize", "--method", "nf4", "--refit-scales"], "--refit-scales"),
        (["quantize", "--method", "nf4", "--format", "nvfp4"], "--format"),
        (["finetune", "--method", "none", "--format", "mxfp4"], "--format"),
        (["quantize", "--format", "nvfp4", "--bits", "4"], "--bits"),
        (["quantize", "--format", "mxfp4", "--group-size", "32"], "--group-size"),
        (["quantize", "--format", "nvfp4", "--weigh-columns"], "--weigh-columns"),
        (["finetune", "--format", "nvfp4", "--best"], "--best"),
        (["quantize", "--best", "--damping", "0.5"], "--damping"),
        (["quantize", "--method", "rtn", "--spill", "x"], "--spill"),
        (["finetune", "--method", "none", "--bits", "4"], "--bits"),
        (["finetune", "--method", "none", "--stream"], "--stream"),
        (["finetune", "--method", "nf4", "--init", "pissa", "--stream"], "--stream"),
        (["finetune", "--epochs", "2"], "--epochs"),
        (["evaluate", "--top-p", "0.5"], "--top-p"),
        (["evaluate", "--temperature", "0", "--top-p", "0.5"], "--top-p"),
        (["evaluate", "--seed", "3"], "--seed"),
        (["evaluate", "--vote", "majority"], "--vote"),
        (["evaluate", "--samples", "2", "--verifier", "x"], "--verifier"),
        (["export", "--merge", "rtn"], "--data"),
        (["memory", "--method", "lora", "--bits", "4"], "--bits"),
        (["memory", "--method", "full", "--rank", "4"], "--rank"),
        (["memory", "--method", "full", "--targets", "attention"], "--targets"),
        (["memory", "--group-size", "32"], "--group-size"),
    ],
)
def test_an_option_that_does_not_apply_is_refused_by_name(place, capsys, argv, named):
    common = COMMON[:2] if argv[0] == "memory" else COMMON
    steps = FAST[4:] if argv[0] == "finetune" else []
    assert run(argv[0], *common, *steps, *argv[1:]) == 2
    out, err = capsys.readouterr()
    assert f"error: {named} goes only with" in err and "quantizing" not in out
    assert not (place / "checkpoints").exists()


@pytest.mark.parametrize("argv", [
    ["generate", "--data", "x", "1?"], ["generate", "--seed", "1", "1?"], ["memory", "--folder", "x"],
    ["quantize", "--seed", "1"], ["export", "--seed", "1"], ["quantize", "--method", "none"],
])  # fmt: skip
def test_an_option_that_a_command_does_not_have(capsys, argv):
    with pytest.raises(SystemExit) as done:
        parser().parse_args(argv)
    assert done.value.code == 2 and "error: " in capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_loading(place, capsys, monkeypatch):
    monkeypatch.setattr("qlora_lib.train.measure.available_memory", lambda device: 1e6)
    assert run("finetune", *FAST, "--method", "nf4") == 2
    captured = capsys.readouterr()
    assert "cpu has 0.00 GB free; take fewer or shorter sequences" in captured.err
    assert "packed weights" in captured.err and "quantizing" not in captured.out


def test_partly_quantized_base_fails_the_check(place, capsys):
    from qlora_lib.models.checkpoint import save_quantized
    from qlora_lib.models.quantize import quantize_model
    from qlora_lib.quant.grid import QuantSpec

    model = small_model()
    quantize_model(model, None, QuantSpec(group_size=32), "rtn", target_modules=("q_proj",))
    save_quantized(model, small_tokenizer(), "checkpoints/tiny/base")
    assert run("evaluate", *COMMON, "--no-adapter") == 2
    assert "12 layers are not quantized" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["evaluate", "--samples", "0"], "--samples: expected a whole number of at least 1"),
        (["evaluate", "--batch-size", "0"], "--batch-size: expected a whole number"),
        (["evaluate", "--limit", "-2"], "--limit: expected a whole number of at least 1"),
        (["evaluate", "--max-new-tokens", "0"], "--max-new-tokens: expected"),
        (["verifier", "--samples", "0"], "--samples: expected"),
        (["finetune", "--rank", "0"], "--rank: expected"),
        (["finetune", "--alpha", "0"], "--alpha: expected a number above 0"),
        (["finetune", "--max-length", "-1"], "--max-length: expected"),
        (["memory", "--tokens", "-5"], "--tokens: expected"),
        (["memory", "--batch-size", "one"], "--batch-size: expected"),
    ],
)
def test_numbers_out_of_range_are_refused_by_the_parser(capsys, argv, message):
    with pytest.raises(SystemExit) as done:
        parser().parse_args(argv)
    assert done.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_what_would_fail_at_the_end_fails_before_the_work(place, capsys):
    (place / "foreign" / "adapter").mkdir(parents=True)
    (place / "foreign" / "adapter" / "mine.txt").touch()
    assert run("finetune", *FAST, "--method", "rtn", "--folder", "foreign") == 2
    out, err = capsys.readouterr()
    assert "foreign/adapter holds other files" in err and "quantizing" not in out
    for init in ([], ["--init", "loftq"]):
        (place / "taken" / "base").mkdir(parents=True, exist_ok=True)
        (place / "taken" / "base" / "mine.txt").touch()
        argv = [*FAST, "--method", "nf4", *init, "--folder", "taken"]
        assert run("finetune", *argv) == 2
        out, err = capsys.readouterr()
        assert "taken/base holds other files" in err and "bits a weight" not in out
    (place / "file").touch()
    assert run("quantize", *COMMON, "--method", "rtn", "--folder", "file/run") == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "Not a directory" in err and "bits a weight" not in out
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["evaluate", "--device", "gpu"], "--device gpu: expected cpu, cuda"),
        (["evaluate", "--device", "meta"], "--device meta: expected cpu, cuda"),
        (["evaluate", "--device", "cuda:99"], "CUDA devices"),
        (["evaluate", "--dense", "--no-adapter", "--out", "model/config.json"], "config.json"),
        (["evaluate", "--dense", "--no-adapter", "--out", "model/config.json/x"], "config.json"),
        (["evaluate"], "no finished run"),
        (["evaluate", "--no-adapter"], "no quantized base"),
        (["finetune", "--bits", "5"], "bits"),
        (["finetune", "--targets", "k"], "match no linear"),
        (["finetune", "--profile", "small"], "no profile"),
        (["quantize", "--model", "./nowhere"], "holds no model"),
        (["finetune", "--data", "nowhere"], "no folder or file nowhere"),
        (["export"], "no quantized base"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place, capsys, argv, message):
    common = COMMON[:2] if argv[0] == "export" else COMMON
    assert run(argv[0], *common, *argv[1:]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and message in err[-1]
