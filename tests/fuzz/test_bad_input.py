"""Bad input at every door: the command line answers with one line and exit code 2, Python with a
ValueError, TypeError or OSError, soon. Nothing is accepted in silence.

Each input is a test of its own. Without --tries a few are drawn with --seed.
"""
# ruff: noqa: F401 (what is imported here is what CALLS are written with)

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

import qlora_lib as q
from course.kit import OUTPUTS_VARIABLE
from course.tools.__main__ import main as course
from qlora_lib.__main__ import main
from qlora_lib.base.statistics import mcnemar, newcombe, wilson
from qlora_lib.data.calibration import calibration_batches
from qlora_lib.data.examples import hold_out, read_examples
from qlora_lib.data.gsm8k import parse_gold
from qlora_lib.data.rows import read_jsonl
from qlora_lib.data.sources import load_gsm8k, load_minigsm
from qlora_lib.evaluation.comparison import compare_verdicts
from qlora_lib.evaluation.evaluate import few_shot
from qlora_lib.evaluation.tasks import Task
from qlora_lib.evaluation.votes import best_score
from qlora_lib.models.load import load_model
from qlora_lib.quant.recipe import Recipe
from qlora_lib.search.rank_search import Search, Trial
from tests.support.fuzzing import deadline
from tests.support.small_models import PAIRS, small_model, small_tokenizer

SECONDS = 20  # that an answer may take

# --- files ---------------------------------------------------------------------------------

ROW = '{"question": "1 + 1?", "answer": "1+1=2\\n#### 2"}\n'
DEEP = b'{"a":' * 100_000
ROWS = {  # of files that should have a problem a line
    "empty": b"", "blank": b"\n \n", "number": b"5\n", "null": b"null\n", "list": b"[]\n",
    "numbers": b"[1, 2]\n", "deep": DEEP, "deep_list": b"[" * 100_000, "half": ROW[:20].encode(),
    "latin1": ROW.replace("1?", "caf\xe9?").encode("latin-1"), "utf16": ROW.encode("utf-16"),
    "zeros": bytes(1000), "no_answer": b'{"question": "1 + 1?"}\n', "other_keys": b'{"a": 1}\n',
    "null_answer": b'{"question": "1 + 1?", "answer": null}\n',
    "number_answer": b'{"question": "1 + 1?", "answer": 2}\n',
    "empty_question": b'{"question": "", "answer": "#### 2"}\n',
    "list_question": b'{"question": ["1 + 1?"], "answer": "#### 2"}\n',
    "surrogate": b'{"question": "\\ud800 1 + 1?", "answer": "#### 2"}\n',
    "key_twice": b'{"question": "1?", "question": "2?", "answer": "#### 2"}\n',
    "second_half": (ROW + ROW[:-3]).encode(),
    "long_line": json.dumps({"question": "1 " * 2_500_000, "answer": "#### 2"}).encode(),
}  # fmt: skip
GOLDS = {  # good to train on, but not to be asked
    "no_gold": b'{"question": "1 + 1?", "answer": "two"}\n',
    "gold_text": b'{"question": "1 + 1?", "answer": "#### two"}\n',
    "gold_nan": b'{"question": "1 + 1?", "answer": "#### nan"}\n',
}
TRAINED_ON = {  # rows of other formats to train on
    "no_turns": b'{"messages": []}\n', "turns_text": b'{"messages": "hello"}\n',
    "turns_numbers": b'{"messages": [1, 2]}\n', "no_template": json.dumps({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}).encode(),
    "strange_role": b'{"messages": [{"role": "robot", "content": "a"}]}\n',
    "text_number": b'{"text": 5}\n', "text_blank": b'{"text": "  "}\n',
    "null_completion": b'{"prompt": "a", "completion": null}\n',
    "list_prompt": b'{"prompt": ["a"], "completion": "b"}\n',
}  # fmt: skip
OBJECTS = {  # of files that should hold an object of JSON
    "list": b"[]", "five": b"5", "null": b"null", "nothing": b"", "half": b'{"a": ', "deep": DEEP,
    "latin1": b'{"a": "\xff\xfe"}', "zeros": b"\0\0\0", "object": b"{}",
    "twice": b'{"a": 1, "a": 2}',
}  # fmt: skip
CONFIGS = {  # changes of a model's config.json
    "negative_width": {"hidden_size": -64}, "no_width": {"hidden_size": 0},
    "text_width": {"hidden_size": "many"}, "list_width": {"hidden_size": [64]},
    "half_width": {"hidden_size": 64.5}, "huge_width": {"hidden_size": 10**9},
    "billion_blocks": {"num_hidden_layers": 10**9}, "text_blocks": {"num_hidden_layers": "2"},
    "negative_blocks": {"num_hidden_layers": -1}, "no_heads": {"num_attention_heads": 0},
    "negative_words": {"vocab_size": -1}, "unknown_type": {"model_type": "nothing"},
    "no_type": {"model_type": None}, "list_type": {"model_type": ["llama"]},
}  # fmt: skip
RUNS = {
    "path_up": b'{"method": "rtn", "path": "../../x", "trained": "qlora"}',
    "path_five": b'{"method": "rtn", "path": 5, "trained": "qlora"}',
    "path_absolute": b'{"method": "rtn", "path": "/etc", "trained": "qlora"}',
    "trained_so": b'{"method": "rtn", "path": "adapter", "trained": "nothing"}', **OBJECTS,
}  # fmt: skip


def make_place(folder: Path) -> None:
    """Write the files that the inputs name."""
    model = folder / "model"
    small_model(layers=1).save_pretrained(model)
    small_tokenizer().save_pretrained(model)
    (folder / "data").mkdir()
    for split in ("train", "dev", "test"):
        (folder / "data" / f"{split}.jsonl").write_text(ROW * 3)
    for name, content in (ROWS | GOLDS | TRAINED_ON).items():
        (folder / f"{name}.jsonl").write_bytes(content)
        shutil.copytree(folder / "data", folder / f"ask_{name}")
        (folder / f"ask_{name}" / "test.jsonl").write_bytes(content)
    config = json.loads((model / "config.json").read_text())
    configs = {name: json.dumps(config | changes).encode() for name, changes in CONFIGS.items()}
    for name, content in (configs | OBJECTS).items():
        shutil.copytree(model, folder / f"config_{name}")
        (folder / f"config_{name}" / "config.json").write_bytes(content)
    for name, content in OBJECTS.items():
        for file in ("tokenizer", "tokenizer_config"):
            shutil.copytree(model, folder / f"{file}_{name}")
            (folder / f"{file}_{name}" / f"{file}.json").write_bytes(content)
        for file in ("recipe", "quantization"):
            shutil.copytree(model, folder / f"{file}_{name}" / "base")
            (folder / f"{file}_{name}" / "base" / f"{file}.json").write_bytes(content)
        (folder / f"report_{name}").mkdir()
        (folder / f"report_{name}" / "report.json").write_bytes(content)
        (folder / f"report_{name}" / "predictions.jsonl").touch()
        (folder / f"adapter_{name}").mkdir()
        (folder / f"adapter_{name}" / "adapter_config.json").write_bytes(content)
    for name, content in RUNS.items():
        shutil.copytree(model, folder / f"run_{name}" / "base")
        (folder / f"run_{name}" / "run.json").write_bytes(content)
    shutil.copytree(model, folder / "no_weights")
    (folder / "no_weights" / "model.safetensors").unlink()
    shutil.copytree(model, folder / "cut_weights")
    os.truncate(folder / "cut_weights" / "model.safetensors", 1000)
    (folder / "empty_folder").mkdir()
    (folder / "folder.jsonl").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "mine.txt").write_text("mine")
    (folder / "file").write_text("a file")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")


# --- command lines -------------------------------------------------------------------------

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
        "--method rtn --weigh-columns", "--best --damping 0.5", "--method rtn --spill x",
        "--method none",
    ):  # fmt: skip
        yield ["quantize", *M, *D, *argv.split()]
    for argv in (
        "--method none --bits 4", "--method none --stream", "--method none --best",
        "--method none --init loftq", "--method gptq --init loftq", "--method gptq --init pissa",
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
                 ["quantize", "--what"], [*EXPORT, "--format", "gguf"], [*EXPORT, "--merge", "x"],
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


# --- Python --------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
NO_COUNT = (0, -1, 1.5, "2", NAN)
FIELDS = [  # class, what else it needs, and bad values of its fields
    (q.QuantSpec, {}, {"bits": (0, 1, 5, -4, 4.0, "4", None, NAN),
                       "group_size": (0, -8, 1.5, "64", NAN)}),
    (q.NF4Spec, {}, {"block_size": (0, -1, 1.5, "64", None, NAN)}),
    (q.GPTQOptions, {}, {"damp_percent": (NAN, INF, -1, "0.1"), "block_size": NO_COUNT}),
    (q.CacheSpec, {}, {"bits": (0, 3, 16, "8", NAN), "group_size": (0, -8, "8", NAN)}),
    (q.Decoding, {"temperature": 1.0}, {
        "temperature": (NAN, INF, -1, "1", None), "top_p": (NAN, 0, 1.5, -1, "1", None),
        "samples": NO_COUNT, "max_new_tokens": NO_COUNT, "batch_size": NO_COUNT,
        "seed": (1.5, "a", None, 2**70), "stop": (("",), ("a", ""), (1,), 5, None),
        "cache_bits": (3, 16, "8", 0)}),
    (q.TrainConfig, {}, {
        "epochs": NO_COUNT, "max_steps": NO_COUNT, "batch_size": NO_COUNT, "max_length": NO_COUNT,
        "accumulation": NO_COUNT, "eval_every": NO_COUNT, "save_every": NO_COUNT,
        "lr": (NAN, INF, 0, -1, "1", None), "lora_plus_ratio": (NAN, INF, 0, "1"),
        "warmup_ratio": (NAN, 1, -0.1, "0"), "weight_decay": (NAN, INF, -1, "0"),
        "max_grad_norm": (NAN, 0, -1, "1"), "seed": (1.5, "a", None, 2**70),
        "compute_dtype": ("fp8", None, 5), "optimizer": ("sgd", None), "resume": (True,)}),
    (Trial, {}, {"rank": NO_COUNT, "lr": (NAN, INF, 0, -1, "1"), "steps": NO_COUNT,
                 "method": ("dora", None), "alpha": (NAN, INF, 0, "1")}),
]  # fmt: skip


def echo(prompts):
    return list(prompts)


PROBLEMS = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(3)]
TASK = Task("toy", str.__eq__, 2)
W = torch.linspace(-1, 1, 128).reshape(2, 64)


def hessian():
    found = q.Hessian(64)
    found.update(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)))
    return found


def bad(value, at=(0, 0), size=None):
    """A weight with one value that is none."""
    weight = torch.zeros(2, 64) if size is None else torch.zeros(*size)
    weight[at] = value
    return weight


def inject(**given):
    return q.inject_lora(small_model(layers=1), **given)


def quantize(calibration=None, spec=q.QuantSpec(4, 32), method="rtn", **given):
    return q.quantize_model(small_model(layers=1), calibration, spec, method, **given)


def broken(name, value):
    """A model with a value that is none in one of its weights."""
    model = small_model(layers=1)
    model.get_parameter(name).data.view(-1)[3] = value
    return model


def asked(*prompts, **given):
    return q.generator(small_model(layers=1), small_tokenizer(), q.Decoding(max_new_tokens=2))(
        *prompts, **given)  # fmt: skip


def trained(examples, **given):
    model = small_model(layers=1)
    q.inject_lora(model, ("q_proj",), rank=2)
    config = q.TrainConfig(**{"max_steps": 1, "compute_dtype": "fp32", "progress": False} | given)
    return q.finetune(model, small_tokenizer(), examples, config)


def search(train=PAIRS[:4], dev=PAIRS[4:6], **given):
    return q.find_optimal_rank(small_model(layers=1), small_tokenizer(), TASK, train, dev,
                               config=q.TrainConfig(max_steps=1, progress=False), **given)


NORM = "model.layers.0.input_layernorm.weight"
LINEAR = "model.layers.0.mlp.down_proj.weight"
# A call a line, evaluated in the names of this module
CALLS = r"""
# weights
q.quantize_rtn(bad(NAN), q.QuantSpec(4, 32))
q.quantize_rtn(bad(INF), q.QuantSpec(4, 32))
q.quantize_nf4(bad(NAN))
q.quantize_nf4(bad(-INF))
q.quantize_rtn(W * 3e38, q.QuantSpec(4, 32))
q.quantize_rtn(W[0], q.QuantSpec(4, 32))
q.quantize_rtn(W, q.QuantSpec(4, 48))
q.quantize_rtn(W.int(), q.QuantSpec(4, 32))
q.quantize_nf4(W, block_size=0)
q.gptq_quantize(bad(NAN), hessian(), q.QuantSpec(4, 32))
q.gptq_quantize(W, q.Hessian(64), q.QuantSpec(4, 32))
q.gptq_quantize(W[:, :32], hessian(), q.QuantSpec(4, 32))
q.Hessian(0)
q.Hessian(-1)
q.Hessian('64')
q.Hessian(64).update(bad(NAN))
q.Hessian(64).update(bad(INF))
q.Hessian(64).update(W[:, :3])
q.pack(torch.full((2, 8), 16), 4)
q.pack(torch.full((2, 8), -1), 4)
q.pack(W, 4)
q.pack(torch.zeros(2, 8).long(), 5)
q.unpack(torch.zeros(3).byte(), 4, (2, 64))
q.quant_matmul(W[:, :3], q.quantize_rtn(W, q.QuantSpec(4, 32)))
q.quantize_rtn(None, q.QuantSpec(4, 32))
q.quantize_rtn(W, None)
# models
quantize(method='nothing')
quantize(None, method='gptq')
quantize([], method='gptq')
quantize(torch.ones(2, 3).long(), method='gptq')
quantize({'input_ids': [[5]]}, method='gptq')
quantize([{'input_ids': torch.tensor([[-1]])}], method='gptq')
quantize([{'input_ids': torch.tensor([[10**6]])}], method='gptq')
quantize(iter([{'input_ids': torch.tensor([[5]])}]), method='gptq')
quantize([5], method='gptq')
quantize(target_modules=('nothing',))
quantize(target_modules=())
quantize(target_modules=5)
quantize(spec=None)
quantize(spec=q.QuantSpec(4, 48))
q.quantize_model(broken(LINEAR, NAN), None, q.QuantSpec(4, 32), 'rtn')
q.quantize_model(broken(LINEAR, INF), None, q.NF4Spec(), 'nf4')
q.quantize_model(broken(NORM, NAN), None, q.QuantSpec(4, 32), 'rtn')
q.save_quantized(small_model(layers=1), small_tokenizer(), 'saved')
q.load_quantized('nowhere')
q.load_quantized('model')
q.load_quantized('file')
q.load_quantized('quantization_list/base')
q.load_quantized('quantization_object/base')
q.load_quantized(None)
q.load_quantized(5)
q.import_gptq('model')
q.import_gptq('nowhere')
q.load_bnb_4bit('model')
q.load_bnb_4bit('nowhere')
q.export_gptq(small_model(layers=1), 'exported')
load_model('nowhere')
load_model('file')
load_model('model', compute_dtype='fp8')
load_model('model', device='nothing')
q.quantize_checkpoint('nowhere', 'out', q.QuantSpec(4, 32), method='rtn')
q.quantize_checkpoint('model', 'out', q.QuantSpec(4, 48), method='rtn')
q.quantize_checkpoint('model', 'out', q.QuantSpec(4, 32))
q.quantize_checkpoint('model', 'out', q.QuantSpec(4, 32), method='rtn', blocks=0)
q.quantize_checkpoint('model', 'out', q.QuantSpec(4, 32), method='rtn', blocks=9)
q.quantize_checkpoint('model', 'file', q.QuantSpec(4, 32), method='rtn')
q.dequantize_model(None)
Recipe.of(q.QuantSpec(), 'nothing')
# adapters
inject(rank=0)
inject(rank=-1)
inject(rank=1.5)
inject(rank='2')
inject(rank=None)
inject(rank=2, alpha=NAN)
inject(rank=2, alpha=INF)
inject(rank=2, alpha=0)
inject(rank=2, alpha=-1)
inject(rank=2, alpha='1')
inject(rank=2, dropout=NAN)
inject(rank=2, dropout=-0.1)
inject(rank=2, dropout=1)
inject(rank=2, dropout='0')
inject(target_modules=('nothing',))
inject(target_modules=())
inject(target_modules=5)
inject(init='nothing')
inject(init='loftq')
inject(rank={'q_proj': 0})
q.load_adapter(small_model(layers=1), 'nowhere')
q.load_adapter(small_model(layers=1), 'file')
q.load_adapter(small_model(layers=1), 'model')
q.save_adapter(small_model(layers=1), 'saved')
q.set_adapter(small_model(layers=1), 'x')
q.merge_lora(small_model(layers=1))
q.combine_adapters(small_model(layers=1), {}, 'x')
q.find_adapter(small_model(layers=1), 'nowhere')
q.Finetuner('model', method='nothing')
q.Finetuner('nowhere', method='lora')
q.Finetuner(small_model(layers=1), method='lora')
q.Finetuner('model', method='full', rank=2)
q.Finetuner.load('nowhere')
q.Finetuner.load('file')
q.Finetuner.load('run_path_up')
q.Finetuner.load('run_list')
q.Finetuner.load('run_object')
q.Finetuner.load('run_five')
# training
trained([])
trained(None)
trained(5)
trained([1])
trained(['a', ('a', 'b')])
trained([(1, 2)])
trained([('a', '\ud800')])
trained('nowhere')
trained('fifo')
trained([([-1], [-1])])
trained([([10**6], [5])])
trained([([], [])])
trained({'question': ['a'], 'answer': ['b']})
trained(PAIRS, lr=1e30)
q.finetune(small_model(layers=1).requires_grad_(False), small_tokenizer(), PAIRS)
search(ranks=())
search(ranks=(0,))
search(ranks=(1.5,))
search(seeds=())
search(train=[])
search(dev=[])
search(target_modules=())
search(hopeless=NAN)
search(path='file')
hold_out([1, 2], -1)
hold_out([1, 2], 3)
q.memory_ledger(small_model(layers=1).config, 'nothing')
q.memory_ledger(small_model(layers=1).config, 'lora', -1)
q.memory_ledger(small_model(layers=1).config, 'lora', 1, NAN)
calibration_batches(small_tokenizer(), [])
calibration_batches(small_tokenizer(), ['a'], n=0)
calibration_batches(small_tokenizer(), ['a'], n=-1)
calibration_batches(small_tokenizer(), ['a'], max_length=0)
# answers
asked('one prompt')
asked(None)
asked([1])
asked([None])
asked(['\ud800'])
asked(5)
asked({'a': 1})
asked([b'1'])
asked(['1 ' * 1000])
asked(['1 ' * 2_500_000])
asked(['a'], adapters=['nothing'])
asked(['a'], adapters=['x', 'y'])
q.generator(None, small_tokenizer())
q.generator(small_model(layers=1), None)
q.evaluate(echo, PROBLEMS, chunk=-1)
q.evaluate(echo, PROBLEMS, chunk=0)
q.evaluate(echo, PROBLEMS, chunk=1.5)
q.evaluate(echo, PROBLEMS, chunk='2')
q.evaluate(echo, PROBLEMS, chunk=NAN)
q.evaluate(echo, [])
q.evaluate(echo, None)
q.evaluate(echo, 'ab')
q.evaluate(echo, [1])
q.evaluate(echo, PROBLEMS * 2 + [{'question': 'x'}])
q.evaluate(None, PROBLEMS)
q.evaluate(lambda p: [], PROBLEMS)
q.evaluate(lambda p: None, PROBLEMS)
q.evaluate(lambda p: [5] * len(p), PROBLEMS)
q.evaluate(lambda p: [['a', 'b']] * len(p), PROBLEMS)
q.evaluate(echo, PROBLEMS, prompt=lambda entry: entry['question'])
q.evaluate(echo, PROBLEMS, 'file')
q.evaluate(echo, PROBLEMS, 'loop')
q.evaluate(echo, PROBLEMS, 'a\0b')
q.EvalReport.load('nowhere')
q.EvalReport.load(None)
q.compare(None, None)
few_shot(PROBLEMS, -1)
few_shot(PROBLEMS, 9)
few_shot(PROBLEMS, 1.5)
few_shot('ab', 1)
few_shot([{}], 1)
q.majority([])
q.majority(None)
q.majority([1, 2])
best_score([])
best_score(['a'])
q.score(echo, TASK, [])
q.score(echo, TASK, 'ab')
q.score(echo, TASK, [(1, 2)])
q.score(lambda p: [], TASK, [('a', 'b')])
compare_verdicts([], [])
compare_verdicts([True], [True, False])
q.extract_answer(None)
q.extract_answer(5)
q.extract_answer('5', 'loose')
q.is_correct('5', None)
q.is_correct('5', NAN)
q.is_correct('5', 'five')
parse_gold('####')
parse_gold('1e5')
parse_gold(None)
q.format_gsm8k({})
q.format_gsm8k(None)
q.format_gsm8k({'question': 5, 'answer': '#### 5'})
wilson(1, 3, -1)
wilson(1, 3, NAN)
wilson(-1, 3)
wilson(4, 3)
wilson(0, 0)
wilson(NAN, 3)
mcnemar(-1, 2)
mcnemar(NAN, 1)
newcombe(1, 2, 3, 2)
newcombe(NAN, 2, 1, 2)
# files
read_jsonl(Path('empty.jsonl'))
read_jsonl(Path('blank.jsonl'))
read_jsonl(Path('number.jsonl'))
read_jsonl(Path('deep.jsonl'))
read_jsonl(Path('deep_list.jsonl'))
read_jsonl(Path('half.jsonl'))
read_jsonl(Path('latin1.jsonl'))
read_jsonl(Path('utf16.jsonl'))
read_jsonl(Path('zeros.jsonl'))
read_jsonl(Path('numbers.jsonl'))
read_jsonl(Path('key_twice.jsonl'))
read_jsonl(Path('second_half.jsonl'))
read_jsonl(Path('nowhere.jsonl'))
read_jsonl(Path('folder.jsonl'))
read_jsonl(Path('loop'))
q.load_profile('nothing')
q.load_profile(None)
q.load_profile('../x')
q.load_profile('tiny', problems='x')
q.load_profile('tiny', data='nowhere').examples('test')
q.load_profile('tiny').examples('x')
load_gsm8k('train', 'nowhere')
load_gsm8k('nothing', 'data')
load_minigsm('../x')
load_minigsm('nothing')
load_minigsm('test', 'empty_folder')
read_examples('empty.jsonl', small_tokenizer())
read_examples('file', small_tokenizer())
read_examples('fifo', small_tokenizer())
Search(None, None, TASK, [], [])
"""
NOT_NAMED = "None where a tensor, a spec or a model belongs: an AttributeError, not one of ours"
RED = dict.fromkeys([  # calls that are not answered yet as they should be, and why
    "q.quantize_rtn(None, q.QuantSpec(4, 32))", "q.quantize_rtn(W, None)", "quantize(spec=None)",
    "q.dequantize_model(None)",
], NOT_NAMED)  # fmt: skip
CALLS_OF_FILES = [
    "q.EvalReport.load('report_{}')", "q.load_adapter(small_model(layers=1), 'adapter_{}')",
]  # fmt: skip


def calls():
    """Yield (what is called, in words, and the call)."""
    for made, usual, fields in FIELDS:
        for field, values in fields.items():
            for value in values:
                yield (f"{made.__name__}({field}={value!r})",
                       lambda m=made, given=usual | {field: value}: m(**given))
    texts = [line for line in CALLS.splitlines() if line and not line.startswith("#")]
    texts += [text.format(name) for text in CALLS_OF_FILES for name in OBJECTS]
    for text in texts:
        yield text, lambda text=text: eval(text, globals())


# --- the tests -----------------------------------------------------------------------------

COMMANDS = [(main, argv) for argv in command_lines()]
COMMANDS += [(course, argv) for argv in course_lines()]
PYTHON = list(calls())
FEW = 15  # of each, where --tries is not given


def pytest_generate_tests(metafunc):
    for name, inputs in (("command", COMMANDS), ("call", PYTHON)):
        if name in metafunc.fixturenames:
            numbers = range(len(inputs))
            if metafunc.config.getoption("tries") is None:
                draw = random.Random(metafunc.config.getoption("seed"))
                numbers = sorted(draw.sample(numbers, FEW))
            marks = {n: [pytest.mark.xfail(strict=True, reason=RED[inputs[n][0]])]
                     for n in numbers if inputs[n][0] in RED}  # fmt: skip
            cases = [pytest.param(inputs[n], id=str(n), marks=marks.get(n, [])) for n in numbers]
            metafunc.parametrize(name, cases)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    make_place(folder)
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # asks nobody
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(place / "outputs"))
    for name in ("MODEL", "GSM8K_DIR"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in ("checkpoints", "outputs"):  # of a command that was accepted
        shutil.rmtree(place / name, ignore_errors=True)


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


def test_a_bad_call_is_an_error_that_says_so(call, capsys):
    what, made = call
    with deadline(SECONDS, what):
        try:
            found = made()
        except (ValueError, TypeError, OSError) as error:
            assert str(error).strip(), f"{what}: {error!r}"
        except Exception as error:
            pytest.fail(f"{what}: {type(error).__name__}: {error}")
        else:
            pytest.fail(f"{what} was accepted: {found!r:.200}")
