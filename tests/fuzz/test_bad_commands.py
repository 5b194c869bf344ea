"""Bad input on the command line: one line, exit code 2, soon. Nothing is accepted in silence.

Each input is a test of its own. Without --tries a few are drawn with --seed.
"""

import pytest

from course.tools.__main__ import main as course
from qlora_lib.__main__ import main
from tests.support.bad_files import CONFIGS, GOLDS, OBJECTS, ROWS, RUNS, TRAINED_ON
from tests.support.fuzzing import SECONDS, deadline, draw

pytestmark = pytest.mark.usefixtures("bad_files")
M, D = ["--model", "model"], ["--data", "data"]
BARE = ["--dense", "--no-adapter", "--max-new-tokens", "2"]  # a model as it comes
QUANTIZE = ["quantize", *M, *D, "--method", "rtn"]
TRAIN = ["finetune", *M, *D, "--method", "rtn", "--max-steps", "1"]
ASK = ["evaluate", *M, *D, *BARE, "--limit", "1"]
SAY = ["generate", *M, *BARE]
JUDGE = ["verifier", *M, *D, *BARE, "--limit", "1"]
MEMORY = ["memory", *M]
EXPORT = ["export", *M]
NOT_WHOLE = ("0", "-1", "1.5", "nan", "four", "", "1e3", "0x10")
NOT_REAL = ("nan", "inf", "-inf", "-1", "two", "", "1e400", "1,5")
NO_PLACE = ("nowhere", "empty_folder", "file", "fifo", "loop", "dangling", "x" * 300, "a\0b",
            "model/config.json/x", "/dev/null", "")  # fmt: skip
UNWRITABLE = ("file", "fifo", "loop", "x" * 300, "a\0b", "/dev/null", "/dev/null/x", "/proc/x",
              "model/config.json")  # fmt: skip


def command_lines():
    """Yield the arguments of each bad command."""
    for command, options in (
        (TRAIN, "--epochs --max-steps --batch-size --accumulation --max-length --rank"),
        (ASK, "--limit --batch-size --samples --max-new-tokens"),
        (JUDGE, "--limit --samples --epochs --batch-size --rank"),
        (TRAIN, "--eval-every"), (MEMORY, "--batch-size --tokens --rank"),
    ):  # fmt: skip
        for option in options.split():
            yield from ([*command, option, value] for value in NOT_WHOLE)
    for value in NOT_REAL:
        yield from ([*TRAIN, option, value] for option in ("--lr", "--alpha", "--dropout"))
        yield from ([*JUDGE, option, value] for option in ("--lr", "--temperature"))
        yield [*ASK, "--temperature", value]
        yield [*ASK, "--temperature", "1", "--top-p", value]
        yield ["quantize", *M, *D, "--damping", value]
    for value in ("0", "1", "5", "16", "-4", "four", "nan", "1.5"):
        yield [*QUANTIZE, "--bits", value]
        yield [*MEMORY, "--bits", value]
    for value in ("7", "-1", "1.5", "nan", "1000000", ""):
        yield [*QUANTIZE, "--group-size", value]
    for value in ("-1", "4", "nan", "1.5"):
        yield [*ASK, "--few-shot", value]
    for value in ("1.5", "nan", "", "9" * 30):
        yield [*TRAIN, "--seed", value]
        yield [*ASK, "--seed", value]
    for value in ("3", "16", "0", "x"):
        yield [*ASK, "--cache-bits", value]
    # What does not apply, or contradicts something else
    for argv in (
        "--method nf4 --bits 2", "--method nf4 --group-size 32", "--method nf4 --refit-scales",
        "--method rtn --match-dense", "--method rtn --best", "--method rtn --damping 0.1",
        "--method rtn --weigh-columns", "--method nf4 --format nvfp4", "--format fp4",
        "--format nvfp4 --bits 4", "--format mxfp4 --group-size 32", "--format nvfp4 --best",
        "--best --damping 0.5", "--method rtn --spill x",
        "--method none",
    ):  # fmt: skip
        yield ["quantize", *M, *D, *argv.split()]
    for argv in (
        "--method none --bits 4", "--method none --stream", "--method none --best",
        "--method none --init loftq", "--method gptq --init loftq", "--method gptq --init pissa",
        "--method none --init cloq", "--init cloq --stream --match-dense",
        "--method rtn --init pissa --stream --max-steps 1", "--optimizer sgd", "--init x",
        "--targets q", "--targets q_proj,", "--targets ,", "--targets (.*)*x", "--targets lm_head",
        "--max-length 1", "--rank 1000000", "--method int3",
    ):  # fmt: skip
        yield ["finetune", *M, *D, "--max-steps", "1", *argv.split()]
    for argv in ("--top-p 0.5", "--temperature 0 --top-p 0.5", "--vote majority", "--vote x",
                 "--split x", "--split gsm_hard", "--max-new-tokens 1000", "--verifier x",
                 "--samples 2 --vote verifier"):  # fmt: skip
        yield [*ASK, *argv.split()]
    for argv in ("--group-size 32", "--method full --bits 2", "--method lora --bits 4",
                 "--method x", "--targets x", "--optimizer sgd"):  # fmt: skip
        yield [*MEMORY, *argv.split()]
    for argv in ([], ["nothing"], ["--seed", "1"], ["generate"], ["generate", "a", "b"],
                 ["quantize", "--what"], [*EXPORT, "--format", "awq"], [*EXPORT, "--merge", "x"],
                 EXPORT, [*SAY[:3], "1?"], ["verifier", *M, *D]):  # fmt: skip
        yield argv
    # Names and places
    for value in ("", " ", "nothing", "../tiny", "tiny/", "TINY", "tiny\n", "a\0b", "x" * 300):
        yield [*MEMORY, "--profile", value]
        yield [*ASK, "--profile", value]
    for value in ("gpu", "cuda:99", "cuda:-1", "meta", "cpu cuda", "cpu:x"):
        yield [*SAY, "--device", value, "1?"]
    for value in ("", "fp8", "float32", "FP32"):
        yield [*SAY, "--compute-dtype", value, "1?"]
    for value in NO_PLACE[:-1]:
        yield ["finetune", "--model", value, *D, "--method", "rtn", "--max-steps", "1"]
        yield ["generate", "--model", value, *BARE, "1?"]
        yield ["memory", "--model", value]
        yield ["quantize", *M, "--data", value]
        yield ["evaluate", *M, *BARE, "--data", value]
        yield [*ASK, "--compare", value]
        yield ["generate", *M, "--folder", value, "1?"]
    for value in UNWRITABLE:
        yield [*ASK, "--out", value]
        yield [*QUANTIZE, "--folder", value]
        yield [*TRAIN, "--folder", value]
    for form in ("question", "prompt"):
        for text in ("", "  ", "a\udcff", "\ud800", "1 " * 500, "1 " * 2_500_000):
            yield [*SAY, "--form", form, text]
    yield [*SAY, "--form", "chat", "1?"]
    yield [*SAY, "--max-new-tokens", "100000", "1?"]
    # Files
    for name in ROWS | GOLDS:
        yield ["evaluate", *M, *BARE, "--data", f"ask_{name}"]
    for name in ROWS | TRAINED_ON:
        yield ["finetune", *M, "--method", "rtn", "--max-steps", "1", "--data", f"{name}.jsonl"]
    for name in OBJECTS | CONFIGS:
        yield ["generate", "--model", f"config_{name}", *BARE, "1?"]
        yield ["memory", "--model", f"config_{name}"]
    for name in ("billion_blocks", "text_width", "negative_blocks"):
        yield ["finetune", "--model", f"config_{name}", *TRAIN[3:]]
        yield ["quantize", "--model", f"config_{name}", *QUANTIZE[3:], "--stream"]
    for name in OBJECTS:
        if name not in ("object", "twice"):  # a tokenizer may have no settings of its own
            yield ["generate", "--model", f"tokenizer_{name}", *BARE, "1?"]
            yield ["generate", "--model", f"tokenizer_config_{name}", *BARE, "1?"]
        yield [*ASK, "--compare", f"report_{name}"]
        yield ["generate", *M, "--folder", f"quantization_{name}", "--no-adapter", "1?"]
        yield [*QUANTIZE, "--folder", f"recipe_{name}"]
    for name in ("no_weights", "cut_weights"):
        yield ["generate", "--model", name, *BARE, "1?"]
    for value in (*NO_PLACE, "model", "data"):
        yield ["verify", value]
        yield ["report", value]
    for name in OBJECTS:
        yield ["verify", f"contract_{name}"]
        yield ["report", f"report_{name}"]
    for value in ("", "x", "vllm", "http://", "http://example.com", "https://127.0.0.1", "ftp://x",
                  "http://127.0.0.1:1", "http://127.0.0.1:99999", "http://[::1", "//127.0.0.1"):
        yield ["verify", "contract", "--with", value]
    for argv in ("", "--with transformers", "--adapter nowhere", "--with transformers --no-adapter",
                 "--with llama.cpp --adapter x", "--device gpu"):  # fmt: skip
        yield ["verify", "contract", *argv.split()]
    for name in RUNS:
        yield ["generate", *M, "--folder", f"run_{name}", "1?"]
        yield [*EXPORT, "--folder", f"run_{name}", "--merge", "rtn"]


def course_lines():
    """Yield the arguments of each bad command of course.tools."""
    for value in ("", "../../x", "/tmp/x", "nothing", ".", "..", "tiny/..", "a\0b", "TINY"):
        yield ["run", "--profile", value, "01"]
    for value in ("bits", "=3", "1=2", "bits='", "nothing=1", "bits=four", "bits=[",
                  "bits=" + "x" * 300, "bits=" + "(" * 10_000, "bits=1e400"):  # fmt: skip
        yield ["run", "--parameters", value, "01"]
    for command in ("run", "store", "normal", "solved", "student"):
        yield [command, "99"]
        yield [command, "../01"]
    for value in ("0", "-1", "x", "1.5"):
        yield ["run", "--jobs", value, "01"]
        yield ["run", "--timeout", value, "01"]
        yield ["store", "--timeout", value, "01"]
        yield ["grade", "empty_folder", "--seconds", value]
    for value in ("nowhere", "file", "fifo", "loop", "a\0b", "empty_folder"):
        yield ["grade", value]
    yield from ([], ["nothing"], ["grade"], ["run", "--what"])


COMMANDS = [(main, argv) for argv in command_lines()]
COMMANDS += [(course, argv) for argv in course_lines()]


def pytest_generate_tests(metafunc):
    draw(metafunc, "command", COMMANDS)


def accepted(*given):
    pytest.fail("accepted: notebooks would be run")


def test_a_bad_command_is_one_line_and_exit_code_2(command, capsys, monkeypatch):
    run, argv = command
    for runs_notebooks in ("side_by_side", "_run_in_memory"):
        monkeypatch.setattr(f"course.tools.execute.{runs_notebooks}", accepted)
    shown = [word if len(word) < 80 else f"{word[:20]}... ({len(word):,})" for word in argv]
    with deadline(SECONDS, str(shown)):
        try:
            code = run(argv)
        except SystemExit as error:  # of argparse
            code = error.code
        except Exception as error:
            pytest.fail(f"{shown}: {type(error).__name__}: {error}")
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if "error: " in line]
    assert code == 2, f"{shown}: exit code {code}, {out[-200:]} {err[-300:]}"
    assert len(errors) == 1 and err.rstrip().endswith(errors[0].rstrip()), f"{shown}: {err[-600:]}"
