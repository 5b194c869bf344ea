"""Outliers planted in the tiny model, and what undoes them: `python -m experiments.outliers`.

The fine-tuned tiny model (the bundled adapter, merged) gets channels that are `size` times as
large as they were, in every place where a block can have them, by a change that leaves its function
alone. A row is a size, a repair, a format and a way to round the weights, in groups of 64:

repair  none; fold (the gains of norms into the layers that read them); smooth (SmoothQuant, alpha
        0.5); awq; rotate (fold, then QuaRot's R1 and R2, in the weights); rotate online (and R4)
format  w4a16: weights in 4 bits; w8a8, w4a4: the inputs of each layer in as many bits as its
        weights, an asymmetric grid a token; fp8: w8 with inputs in E4M3, a scale a token;
        nvfp4: weights and inputs in NVFP4, in blocks of 16
method  rtn: round to nearest; gptq

Kept are the loss on solutions of dev problems and greedy exact match on some of them; "exact" is
the model as it is. The repairs see the train problems that GPTQ is calibrated on, nothing else.
"""

import copy
import sys
from contextlib import nullcontext
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

from experiments.accuracy import ADAPTER, merged
from experiments.table import Table, asked_rows, command_line
from qlora_lib.base.endings import ending
from qlora_lib.base.paths import DATA, short_path
from qlora_lib.base.statistics import wilson
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.evaluation.extraction import is_correct
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.layers.rounded_inputs import rounded_inputs
from qlora_lib.lora.targets import find_linears
from qlora_lib.models.input_sizes import input_absmax
from qlora_lib.models.merge_hessians import input_hessians
from qlora_lib.models.quantize import dequantize_model, quantize_model
from qlora_lib.models.rescale import awq_scales, plant_outliers, rescale_channels, smooth
from qlora_lib.models.rotate import fold_norms, rotate_model
from qlora_lib.quant.fp4 import FP4Spec
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.profiles import load_profile
from qlora_lib.train.config import TrainConfig
from qlora_lib.train.finetune import validation_loss

RESULT = DATA / "results" / "tiny-outliers.json"
SEED, CHANNELS = 0, 2  # channels of each place
REPAIRS = ("none", "rotate online", "smooth", "awq", "rotate", "fold")
W8, W4 = QuantSpec(8, 64), QuantSpec(4, 64)
# How weights and, by rounded_inputs, inputs are rounded
FORMATS = {"w4a16": (W4, None), "w8a8": (W8, {"bits": 8}), "w4a4": (W4, {"bits": 4}),
           "fp8": (W8, {"how": "e4m3"}), "nvfp4": (FP4Spec("nvfp4"), {"how": "nvfp4"})}  # fmt: skip
WAYS = [("w4a4", "rtn"), ("w4a16", "rtn"), ("w8a8", "rtn"), ("fp8", "rtn"), ("nvfp4", "rtn"),
        ("w4a4", "gptq"), ("w4a16", "gptq")]  # fmt: skip
SIZE = 64  # at which all repairs are measured; at the others only some
OTHERS = {1: ("none", "rotate online", "smooth", "awq"), 8: ("none",), 1024: ("none",)}
CALIBRATION, DEV, ASKED = 64, 128, 100  # problems
LOSS = TrainConfig(batch_size=32, max_length=256, compute_dtype="fp32", progress=False)


def row_name(size: int, repair: str, form: str, method: str) -> str:
    return f"size {size}, {repair}, {form}, {method}"


def plan() -> dict[str, tuple | None]:
    """Every row: its name, and what `measure` takes."""
    settings = [(SIZE, repair) for repair in REPAIRS]
    settings += [(size, repair) for size, repairs in OTHERS.items() for repair in repairs]
    rows = [(size, repair, *way) for (size, repair), way in product(settings, WAYS)]
    return {"exact": None} | {row_name(*row): row for row in rows}


@cache
def profile():
    return load_profile("tiny")


@cache
def calibration() -> list[dict]:
    return profile().calibration(merged(profile(), ADAPTER)[1],
                                 profile().examples("train")[:CALIBRATION])  # fmt: skip


def planted(size: int):
    """A copy of the fine-tuned model with outliers of this size; 1: as it is."""
    model = copy.deepcopy(merged(profile(), ADAPTER)[0])
    if size > 1:
        plant_outliers(model, size, CHANNELS, SEED)
    return model


def repair(model, how: str, spec: QuantSpec) -> None:
    """Repair a model in place; spec: what AWQ's search rounds to."""
    if how == "fold":
        fold_norms(model)
    elif how == "smooth":
        smooth(model, input_absmax(model, calibration()))
    elif how == "awq":
        hessians = input_hessians(model, find_linears(model, "all"), calibration())
        rescale_channels(model, awq_scales(model, hessians, spec)[0])
    elif how != "none":
        rotate_model(model, SEED, online=how == "rotate online")


def scores(model, inputs: dict | None) -> dict:
    """Loss and exact match on dev problems, with inputs rounded as rounded_inputs takes it."""
    tokenizer, problems = merged(profile(), ADAPTER)[1], profile().examples("dev")
    decoding = Decoding(max_new_tokens=profile().max_new_tokens, batch_size=ASKED)
    with rounded_inputs(model, **inputs) if inputs else nullcontext():
        loss = validation_loss(model, tokenizer, [format_gsm8k(e) for e in problems[:DEV]], LOSS)
        asked = [format_gsm8k(e)[0] for e in problems[:ASKED]]
        said = generator(model, tokenizer, decoding)(asked)
    right = [is_correct(c, e["answer"]) for c, e in zip(said, problems)]
    return {"loss": loss, "dev_problems": DEV, "n": ASKED, "correct": sum(right),
            "accuracy": sum(right) / ASKED, "interval": wilson(sum(right), ASKED),
            "right": "".join("01"[bool(x)] for x in right)}  # fmt: skip


@lru_cache(maxsize=1)
def quantized(size: int, how: str, spec: QuantSpec | FP4Spec, method: str):
    """(the planted, repaired and rounded model, its weights kept dense, bits a weight)."""
    model = planted(size)
    repair(model, how, spec if isinstance(spec, QuantSpec) else W4)  # AWQ searches on grids
    report = quantize_model(model, calibration() if method == "gptq" else None, spec, method)
    dequantize_model(model)
    return model, report[0].bits_per_weight


def measure(setting: tuple | None) -> dict:
    """What is kept of a row."""
    if setting is None:
        return scores(merged(profile(), ADAPTER)[0], None)
    size, how, form, method = setting
    spec, inputs = FORMATS[form]
    model, stored = quantized(size, how, spec, method)
    return {"size": size, "repair": how, "format": form, "method": method, "channels": CHANNELS,
            "bits_per_weight": stored} | scores(model, inputs)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULT, "--force", "--rows")
    args, rows = parser.parse_args(argv), plan()
    table = Table(args.out, SEED, list(rows), args.force)
    for name in asked_rows(parser, args.rows, rows):
        if name not in table.rows:
            table.keep(name, made := measure(rows[name]))
            print(f"{name}: loss {made['loss']:.4f}, {made['correct']} of {ASKED}", flush=True)
    print(f"stored in {short_path(Path(args.out))}")


if __name__ == "__main__":
    sys.exit(ending(main))
