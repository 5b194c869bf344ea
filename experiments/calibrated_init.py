"""Where an adapter beside a quantized base starts: `python -m experiments.calibrated_init`.

Six starts on the tiny model. On identical bases (GPTQ at 4, 3 and 2 bits, NF4; groups of 64): zero
(B = 0), and three that start from what rounding lost, svd, qera and cloq. pissa and loftq make
bases of their own, residuals, rounded to nearest at the same bits (or NF4). "again" is cloq with
GPTQ and the closed form in turn for as long as it helps, so it too makes its own base.

before   each start before any training, ranks 8 and 32: the loss on questions and on solutions of
         dev problems, and how far the next token's distribution has moved from the dense model's
         (the mean of KL(dense || this), nats a token of the questions)
rate     short trainings of one seed on GPTQ's 2 bits, over learning rates: dev loss
trained  as short, five seeds, each start at its best rate: loss and exact match on test problems

A seed draws the order of the problems, and A where B = 0. Bases are dequantized for the training:
the same weights, computed faster on a CPU.
"""

import copy
import math
import sys
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import torch

from experiments.table import Table, asked_rows, command_line
from qlora_lib.base.endings import ending
from qlora_lib.base.paths import DATA, short_path
from qlora_lib.base.statistics import wilson
from qlora_lib.data.examples import read_examples
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.data.tokens import IGNORE, batches
from qlora_lib.evaluation.extraction import is_correct
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.lora.init import LOST_INITS, RESIDUAL_INITS
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.merge import merge_lora
from qlora_lib.lora.targets import find_linears
from qlora_lib.models.calibrated_init import inject_calibrated
from qlora_lib.models.merge_hessians import input_hessians
from qlora_lib.models.quantize import dequantize_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.nf4 import NF4Spec
from qlora_lib.quant.recipe import Recipe
from qlora_lib.runs.profiles import load_profile
from qlora_lib.train.config import TrainConfig
from qlora_lib.train.finetune import finetune, validation_loss

RESULT = DATA / "results" / "calibrated-init.json"
BASES = {f"gptq {bits} bits": QuantSpec(bits, 64) for bits in (4, 3, 2)} | {"nf4": NF4Spec()}
STARTS = ("zero", *RESIDUAL_INITS, *LOST_INITS)
RANKS, SEEDS = (8, 32), (0, 1, 2, 3, 4)
RATES = (4e-3, 1e-2)
DEV, TEST = 128, 100  # problems
STEPS = TrainConfig(max_steps=40, batch_size=8, max_length=256, compute_dtype="fp32",
                    progress=False)  # fmt: skip
DAMPING = None  # chosen for each layer from the calibration texts
# (base, rank) of what is trained
TRAINED = [("gptq 2 bits", 8)]
BASELINE = "zero"  # with which every other start is compared


def row_name(kind: str, base: str, rank: int, start: str, **more) -> str:
    return ", ".join([kind, base, f"r={rank}", start, *(f"{k}={v:g}" for k, v in more.items())])


def plan() -> dict[str, tuple]:
    """Every row: its name, and what `measure` takes."""
    rows = {"before, dense": ("dense",)}
    again = ("again",)
    for base, rank in product(BASES, RANKS):
        starts = STARTS + (again if base != "nf4" else ())
        rows |= {row_name("before", base, rank, s): ("before", base, rank, s) for s in starts}
    for (base, rank), start, lr in product(TRAINED, STARTS, RATES):
        rows[row_name("rate", base, rank, start, lr=lr)] = ("rate", base, rank, start, lr)
    for (base, rank), seed, start in product(TRAINED, SEEDS, STARTS):
        name = row_name("trained", base, rank, start, seed=seed)
        rows[name] = ("trained", base, rank, start, seed)
    return rows


@cache
def profile():
    return load_profile("tiny")


@cache
def dense():
    """(model, tokenizer) as pretrained; not to be changed."""
    return profile().load()


@cache
def quantized(base: str):
    """(packed model, Hessians of its layers' inputs by path); not to be changed."""
    (model, tokenizer), spec = profile().load(), BASES[base]
    profile().quantize(model, tokenizer, spec)
    seen = profile().calibration(tokenizer)
    return model, input_hessians(model, find_linears(model, "all"), seen, halves=True)


@cache
def examples(split: str, count: int) -> list:
    return profile().examples(split)[:count]


def started(base: str, rank: int, start: str, seed: int = 0):
    """(model with an adapter of this start, its base dequantized; rows of what it mends)."""
    torch.manual_seed(seed)
    how, spec, rows = dict(rank=rank, alpha=2 * rank), BASES[base], []
    if start in RESIDUAL_INITS:
        model, _ = profile().load()
        inject_lora(model, "all", init=start, spec=spec, **how)
    else:
        packed, hessians = quantized(base)
        model = copy.deepcopy(packed)
        if start == "zero":
            inject_lora(model, "all", **how)
        else:
            again = Recipe.of(spec) if start == "again" else None
            init = "cloq" if again else start
            rows = inject_calibrated(model, dense()[0], hessians, init, DAMPING, again=again, **how)
    dequantize_model(model)
    return model.eval(), rows


@torch.no_grad()
def moved(model) -> float:
    """The mean of KL(dense || model) over the tokens of dev questions, in nats."""
    own, tokenizer = dense()
    questions = [("", e["question"] + "\n") for e in examples("dev", DEV)]
    total, count = 0.0, 0
    for _, batch in batches(read_examples(questions, tokenizer), 32):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        keep = batch["labels"][:, 1:] != IGNORE
        p, q = (m(**inputs).logits[:, :-1][keep].log_softmax(-1) for m in (own, model))
        total += float((p.exp() * (p - q)).sum())
        count += int(keep.sum())
    return total / count


def losses(model, split: str = "dev", count: int = DEV) -> dict:
    """Losses a token on questions, and on solutions after their questions."""
    tokenizer, asked = dense()[1], examples(split, count)
    questions = [("", e["question"] + "\n") for e in asked]
    return {"question_loss": validation_loss(model, tokenizer, questions, STEPS),
            "loss": validation_loss(model, tokenizer, [format_gsm8k(e) for e in asked], STEPS),
            f"{split}_problems": count}  # fmt: skip


def trained(base: str, rank: int, start: str, lr: float, seed: int):
    """A model after a short training at this rate."""
    model, _ = started(base, rank, start, seed)
    pairs = [format_gsm8k(e) for e in examples("train", 4000)]
    config = TrainConfig(**vars(STEPS) | {"lr": lr, "seed": seed})
    finetune(model, dense()[1], pairs, config)
    return model.eval()


def exact_match(model) -> dict:
    """How many test problems it answers rightly, greedily; a verdict a problem."""
    merge_lora(model, unload=True)  # exact, and faster
    problems = examples("test", TEST)
    decoding = Decoding(max_new_tokens=profile().max_new_tokens, batch_size=TEST)
    said = generator(model, dense()[1], decoding)([format_gsm8k(e)[0] for e in problems])
    right = [is_correct(c, e["answer"]) for c, e in zip(said, problems)]
    return {"n": TEST, "correct": sum(right), "accuracy": sum(right) / TEST,
            "interval": wilson(sum(right), TEST),
            "right": "".join("01"[bool(x)] for x in right)}  # fmt: skip


def best_rate(rows: dict[str, dict], base: str, rank: int, start: str) -> float:
    """The rate of the least dev loss."""
    found = {lr: rows[row_name("rate", base, rank, start, lr=lr)]["loss"] for lr in RATES}
    return min(found, key=found.get)


def measure(rows: dict[str, dict], kind: str, *setting) -> dict:
    """What is kept of a row; `rows` are those measured before."""
    if kind == "dense":
        return losses(dense()[0])
    base, rank, start, *rest = setting
    own = start in (*RESIDUAL_INITS, "again")
    how = "rounded to nearest" if start in RESIDUAL_INITS else "GPTQ"
    said = {"base": base, "rank": rank, "start": start,
            "its_own_base": f"{'NF4' if base == 'nf4' else how}, residual" if own else None}
    if kind == "before":
        model, layers = started(base, rank, start)
        found = losses(model) | {"kl": moved(model)}
        if layers:
            found["layers_off"] = [fmean(getattr(row, w) for row in layers)
                                   for w in ("before", "after")]  # fmt: skip
        return said | found
    if kind == "rate":
        (lr,) = rest
        model = trained(base, rank, start, lr, SEEDS[0])
        return said | {"lr": lr, "seed": SEEDS[0], "steps": STEPS.max_steps} | losses(model)
    (seed,), lr = rest, best_rate(rows, base, rank, start)
    model = trained(base, rank, start, lr, seed)
    more = losses(model, "test", TEST) | exact_match(model)
    return said | {"lr": lr, "seed": seed, "steps": STEPS.max_steps} | more


# --- what the rows say ----------------------------------------------------------------------


def paired_t(differences: Sequence[float]) -> float:
    """The two-sided p of Student's paired t of five differences. Of 4 degrees of freedom the
    distribution is, with u = t / sqrt(t^2 + 4), F(t) = 1/2 + (3 u - u^3) / 4 (Abramowitz and
    Stegun, 26.7.4). Raises ValueError for another count."""
    if len(differences) != 5:
        raise ValueError(f"got {len(differences)} differences, and 5 seeds are compared")
    spread = stdev(differences)
    if spread == 0:
        return float(fmean(differences) == 0)
    t = abs(fmean(differences)) / spread * math.sqrt(5)
    u = t / math.sqrt(t * t + 4)
    return 1 - (3 * u - u**3) / 2


def holm(values: dict) -> dict:
    """The p of a family by Holm's step-down (1979): each times the number of those not smaller."""
    adjusted, least = {}, 0.0
    for k, name in enumerate(sorted(values, key=values.get)):
        least = max(least, min(1.0, (len(values) - k) * values[name]))
        adjusted[name] = least
    return adjusted


def comparisons(rows: dict[str, dict], key: str = "loss") -> dict[tuple, dict]:
    """Every start against B = 0 in each trained setting of which all seeds are measured: the mean
    difference of `key` ("loss" or "accuracy"), its p, and Holm's over the whole family."""
    found = {}
    for (base, rank), start in product(TRAINED, STARTS):
        names = [[row_name("trained", base, rank, s, seed=seed) for seed in SEEDS]
                 for s in (start, BASELINE)]  # fmt: skip
        if start != BASELINE and all(name in rows for each in names for name in each):
            gaps = [rows[a][key] - rows[b][key] for a, b in zip(*names)]
            found[base, rank, start] = {"difference": fmean(gaps), "p": paired_t(gaps)}
    for name, p in holm({name: row["p"] for name, row in found.items()}).items():
        found[name]["holm"] = p
    return found


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULT, "--force", "--rows")
    args, rows = parser.parse_args(argv), plan()
    table = Table(args.out, SEEDS[0], list(rows), args.force)
    for name in asked_rows(parser, args.rows, rows):
        if name not in table.rows:
            table.keep(name, made := measure(table.rows, *rows[name]))
            print(f"{name}: loss {made['loss']:.4f}, {made.get('correct', '')}", flush=True)
    print(f"stored in {short_path(Path(args.out))}")


if __name__ == "__main__":
    sys.exit(ending(main))
