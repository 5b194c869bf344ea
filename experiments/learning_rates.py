"""Full fine-tuning and LoRA, each over its learning rates: `python -m experiments.learning_rates`.

A row is one short training of the tiny model on mini-GSM, with the settings of notebook 03: 32
steps of 8 train problems. Kept is the loss on dev problems afterwards, so that the picture of
notebook 03 shows what each way to train reaches at its own best rate. A seed draws the order of the
problems and A. Greedy answers are not asked for: 32 steps are too few to solve problems.
"""

import sys
from pathlib import Path

import torch

from experiments.table import Table, asked_rows, command_line
from qlora_lib.base.endings import ending
from qlora_lib.base.paths import DATA, short_path
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.targets import ALL_LINEAR, ATTENTION
from qlora_lib.runs.profiles import load_profile
from qlora_lib.train.config import TrainConfig
from qlora_lib.train.finetune import finetune, validation_loss

RESULT = DATA / "results" / "tiny-learning-rates.json"
FULL = "all weights"
# {way to train: (targets, rank)}. On the tiny model the second trains as many parameters as the
# fourth.
WAYS = {
    FULL: None,
    "all seven, r = 16": (ALL_LINEAR, 16),
    "all seven, r = 2": (ALL_LINEAR, 2),
    "q, k, v, o, r = 40": (ATTENTION, 40),
}
RATES = {way: (4e-3, 8e-3, 1.6e-2, 3.2e-2) for way in WAYS} | {
    FULL: (1e-3, 2e-3, 4e-3, 8e-3), "all seven, r = 16": (2e-3, 4e-3, 8e-3, 1.6e-2)}  # fmt: skip
ALPHA = 8  # over sqrt(r): the scale is 2 at rank 16
SEEDS = (0, 1)  # each is a point of the picture
TRAIN, DEV = 1000, 128  # problems
CONFIG = TrainConfig(max_steps=32, batch_size=8, warmup_ratio=0.1, max_length=256,
                     compute_dtype="fp32", progress=False)  # fmt: skip


def row_name(way: str, lr: float, seed: int) -> str:
    return f"{way}, lr={lr:g}, seed={seed}"


def measure(way: str, lr: float, seed: int) -> dict:
    """Train the tiny model once; what is kept of it."""
    profile = load_profile("tiny")
    model, tokenizer = profile.load(compute_dtype="fp32")
    train, dev = ([format_gsm8k(e) for e in profile.examples(split)[:count]]
                  for split, count in (("train", TRAIN), ("dev", DEV)))  # fmt: skip
    torch.manual_seed(seed)
    if way == FULL:
        model.requires_grad_(True)
    else:
        targets, rank = WAYS[way]
        inject_lora(model, targets, rank=rank, alpha=ALPHA, use_rslora=True)
    config = TrainConfig(**vars(CONFIG) | {"lr": lr, "seed": seed})
    history = finetune(model, tokenizer, train, config)
    loss = validation_loss(model, tokenizer, dev, config)
    return {"way": way, "lr": lr, "seed": seed, "parameters": history.trained_parameters,
            "steps": config.max_steps, "dev_problems": len(dev), "dev_loss": loss}  # fmt: skip


def sweep(path: Path = RESULT) -> dict[str, dict[float, list[float]]]:
    """The recorded dev losses, {way: {rate: [a loss a seed]}}, rates rising."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in Table(path, SEEDS[0]).rows.values():
        found.setdefault(row["way"], {}).setdefault(row["lr"], []).append(row["dev_loss"])
    return {way: dict(sorted(found[way].items())) for way in WAYS if way in found}


def best_rates(found: dict[str, dict[float, list[float]]]) -> dict[str, float]:
    """The rate with the lowest mean dev loss over the seeds, for each way."""
    return {way: min(rates, key=lambda lr: sum(rates[lr]) / len(rates[lr]))
            for way, rates in found.items()}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULT, "--force", "--rows")
    args = parser.parse_args(argv)
    plan = {row_name(way, lr, seed): (way, lr, seed)
            for seed in SEEDS for way in WAYS for lr in RATES[way]}  # fmt: skip
    table = Table(args.out, SEEDS[0], list(plan), args.force)
    for name in asked_rows(parser, args.rows, plan):
        if name not in table.rows:
            row = measure(*plan[name])
            table.keep(name, row)
            print(f"{name}: dev loss {row['dev_loss']:.4f}", flush=True)
    print(f"stored in {short_path(args.out)}")


if __name__ == "__main__":
    sys.exit(ending(main))
