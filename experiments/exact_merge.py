"""Adapters merged back into the bits of their base: `python -m experiments.exact_merge`.

A row is one short training of the tiny model on mini-GSM, quantized by GPTQ in groups of 64, with
an adapter of rank 16 on all linears: 32 steps of 8 train problems. Three kinds: LoRA, which knows
nothing of the grid; codes that move on it (lora/on_grid.py); QA-LoRA (group_wise.py). Kept are
the loss on dev problems with the adapter, and for each way to merge it the loss afterwards, the
error of the logits, and the part of the update that was lost. The learning rate is LoRA's best in
tiny-learning-rates.json; a tenth of it, at 4 bits, leaves a small update. A seed draws the order
of the problems and A; the second is at 4 bits alone. 32 steps are too few to ask for answers.
"""

import copy
import sys
from functools import cache

import torch

from experiments.group_wise import inject_group_wise, merge_group_wise
from experiments.merge_report import compare_logits, merged, real_logits
from experiments.table import Table, asked_rows, command_line
from qlora_lib.base.endings import ending
from qlora_lib.base.paths import DATA, short_path
from qlora_lib.data.calibration import calibration_batches
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.layer import TINY, lora_layers
from qlora_lib.lora.on_grid import inject_on_grid, merge_on_grid, move_codes
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.models.merge_hessians import merge_hessians
from qlora_lib.quant.gptq import GPTQOptions
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.profiles import load_profile
from qlora_lib.train.config import TrainConfig
from qlora_lib.train.finetune import finetune, validation_loss

RESULT = DATA / "results" / "tiny-exact-merges.json"
KINDS = {"lora": inject_lora, "on_grid": inject_on_grid, "group_wise": inject_group_wise}
BITS, SEEDS, RATE, SMALL = (4, 2), (0, 1), 8e-3, 8e-4
RANK, ALPHA, TRAIN, DEV, COMPARED = 16, 32, 1000, 64, 32  # the last three: problems
CONFIG = TrainConfig(max_steps=32, batch_size=8, warmup_ratio=0.1, max_length=256,
                     compute_dtype="fp32", progress=False)  # fmt: skip


def row_name(kind: str, bits: int, lr: float, seed: int) -> str:
    return f"{kind}, {bits} bits, lr={lr:g}, seed={seed}"


@torch.no_grad()
def merge_onto_grid(model) -> float:
    """Merge LoRA by moving the codes of its base; the part of the update that was lost."""
    lost = []
    for layer in lora_layers(model).values():
        update, base = layer.delta(layer.active), layer.base.quantized
        moved, _ = move_codes(base, update)
        layer.merged = QuantizedLinear(moved, layer.base.bias)
        missing = base.dequantize() + update - moved.dequantize()
        lost.append(float(missing.norm() / update.norm().clamp(min=TINY)))
    return sum(lost) / len(lost)


def plan() -> dict[str, tuple[str, int, float, int]]:
    """The rows by name: what `measure` takes."""
    settings = [(bits, RATE, SEEDS[0]) for bits in BITS] + [(BITS[0], SMALL, SEEDS[0])]
    settings += [(BITS[0], RATE, seed) for seed in SEEDS[1:]]
    rows = [(kind, *setting) for setting in settings for kind in KINDS]
    return {row_name(*row): row for row in rows}


@cache
def base(bits: int):
    """(profile, quantized model, tokenizer); the model is not to be changed."""
    profile = load_profile("tiny")
    return profile, *profile.load(quantize=QuantSpec(bits, 64), compute_dtype="fp32")


def measure(kind: str, bits: int, lr: float, seed: int) -> dict:
    """Train once and merge in each way; what is kept of it."""
    profile, model, tokenizer = base(bits)
    model = copy.deepcopy(model)
    train, dev = ([format_gsm8k(e) for e in profile.examples(split)[:count]]
                  for split, count in (("train", TRAIN), ("dev", DEV)))  # fmt: skip
    config = TrainConfig(**vars(CONFIG) | {"lr": lr, "seed": seed})

    def loss(net) -> float:
        return validation_loss(net, tokenizer, dev, config)

    before = loss(model)
    torch.manual_seed(seed)
    KINDS[kind](model, ALL_LINEAR, rank=RANK, alpha=ALPHA)
    history = finetune(model, tokenizer, train, config)
    model.eval()
    batches = calibration_batches(tokenizer, dev[:COMPARED])
    trained = [real_logits(model, batch) for batch in batches]  # each (tokens, vocab)
    row = {"kind": kind, "bits": bits, "lr": lr, "seed": seed, "base_loss": before,
           "dev_loss": loss(model), "parameters": history.trained_parameters,
           "steps": config.max_steps, "dev_problems": len(dev), "merged": {}}  # fmt: skip

    def keep(way: str, net, lost: float) -> None:
        error, _, same = compare_logits(net, batches, trained)
        row["merged"][way] = {"dev_loss": loss(net), "logit_error": error, "same_token": same,
                              "update_lost": lost}  # fmt: skip

    if kind == "lora":
        hessians = merge_hessians(model, calibration_batches(tokenizer, train))
        for way in ("dense", "rtn", "gptq"):
            with merged(model, way, hessians, GPTQOptions()) as lost:
                keep(way, model, lost)
        keep("own grid", model, merge_onto_grid(model))
    elif kind == "on_grid":
        row["codes_moved"] = merge_on_grid(model)
        keep("exact", model, 0.0)  # the update that was trained is a move of codes
    else:
        for way, zeros in (("real zero-points", torch.float16), ("whole zero-points", torch.uint8)):
            other = copy.deepcopy(model)
            keep(way, other, merge_group_wise(other, zeros))
    return row


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULT, "--force", "--rows")
    args = parser.parse_args(argv)
    rows = plan()
    table = Table(args.out, SEEDS[0], list(rows), args.force)
    for name in asked_rows(parser, args.rows, rows):
        if name not in table.rows:
            row = measure(*rows[name])
            table.keep(name, row)
            ways = {way: f"{kept['dev_loss']:.4f}" for way, kept in row["merged"].items()}
            print(f"{name}: dev loss {row['dev_loss']:.4f}, merged {ways}", flush=True)
    print(f"stored in {short_path(args.out)}")


if __name__ == "__main__":
    sys.exit(ending(main))
