"""`python -m qlora_lib quantize | finetune`: calibrate, quantize, train, save."""

import argparse
import dataclasses
from functools import partial

from ..base.paths import given_path
from ..base.ranges import ABOVE_ZERO, COUNT, FROM_ZERO, SHARE_BELOW_ONE, ZERO_ON, Range
from .common import SHARED, Opened, add_command, grid, open_options

RATE = Range(0, 100, above=True)
METHODS = ("gptq", "rtn", "nf4", "none")
FORMATS = ("nvfp4", "mxfp4", "e4m3", "e5m2")
INITS = ("kaiming", "gaussian", "loftq", "pissa", "svd", "qera", "cloq")
OF_LEVELS = ("with --method gptq or rtn", lambda args: args.method in ("gptq", "rtn"))
OF_GRID = (f"{OF_LEVELS[0]}, without --format", lambda a: OF_LEVELS[1](a) and not a.format)
OF_GPTQ = ("with --method gptq", lambda args: args.method == "gptq")
GPTQ_OF_GRID = (f"{OF_GPTQ[0]}, without --format", lambda a: OF_GPTQ[1](a) and not a.format)
NEEDS = {  # of both commands
    **dict.fromkeys(("bits", "group_size"), OF_GRID),
    **dict.fromkeys(("weigh_columns", "refit_scales", "best"), GPTQ_OF_GRID),
    "format": OF_LEVELS,
    "match_dense": OF_GPTQ,
    "damping": ("with --method gptq, without --best", lambda a: a.method == "gptq" and not a.best),
}
OF_QUANTIZE = {"spill": ("with --stream", lambda args: args.stream)}
OF_FINETUNE = {
    "stream": ("with a quantized base, and not with --init loftq or pissa",
               lambda a: a.method != "none" and a.init not in ("loftq", "pissa")),
    "epochs": ("without --max-steps, which replaces it", lambda args: args.max_steps is None),
}  # fmt: skip


def damping(text: str) -> float | str:
    """A share of the Hessian's diagonal, or "auto", for argparse."""
    return text if text == "auto" else ZERO_ON(text)


def add_commands(commands) -> None:
    base = argparse.ArgumentParser(add_help=False)
    add = base.add_argument
    add("--bits", type=COUNT, help="with gptq and rtn: 2, 3, 4 or 8 (default 4)")
    add("--group-size", type=FROM_ZERO, help="weights that share a scale (default 64); 0: a whole row")
    add("--format", choices=FORMATS, help="with gptq and rtn: floats, not an integer "
        "grid: nvfp4 (4 bits, blocks of 16), mxfp4 (of 32), e4m3 or e5m2 (8 bits, a scale a row)")
    flag = partial(add, action="store_true")
    flag("--match-dense", help="with gptq: layers aim at the dense model's outputs (for 2 bits)")
    flag("--weigh-columns", help="with gptq: grids are fitted to what each column's error costs")
    flag("--refit-scales", help="with gptq: scales are fitted again once the codes are known")
    add("--damping", type=damping, metavar="SHARE", help="with gptq: of the Hessian's mean "
        "diagonal (default 0.01), or auto: chosen for each layer from the calibration tokens")
    flag("--best", help="with gptq: --match-dense --weigh-columns --refit-scales --damping auto")
    flag("--stream", help="quantize with one block in memory at a time")

    text, shared = "calibrate, quantize, save", "profile model data folder device compute-dtype"
    needs = NEEDS | OF_QUANTIZE
    add = add_command(commands, "quantize", quantize, text, shared, base, needs=needs)
    add("--method", choices=METHODS[:3], default="gptq", help="of quantization")
    text = "linears to quantize: all (default), or q, k, v, o alone"
    add("--targets", choices=("all", "attention"), default="all", help=text)
    add("--spill", type=given_path, help="with --stream: a folder to keep activations in")

    text = "quantize, inject LoRA, train, save"
    shared, needs = " ".join(SHARED), NEEDS | OF_FINETUNE
    add = add_command(commands, "finetune", finetune, text, shared, base, needs=needs)
    add("--method", choices=METHODS, default="gptq", help="of quantization; none: a dense base")
    add("--epochs", type=COUNT, help="passes over the training examples")
    add("--max-steps", type=COUNT, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=COUNT, help="examples at a time; the rest of a step is accumulated")
    add("--accumulation", type=COUNT, help="batches in a step (default: as many examples as "
        "in the profile's, about)")  # fmt: skip
    add("--optimizer", choices=("adamw", "adam8bit"), help="(default: adamw)")
    add("--lr", type=RATE, help="peak learning rate")
    add("--max-length", type=COUNT, help="tokens of prompt and target")
    add("--eval-every", type=COUNT, help="steps between dev losses (default: each epoch's end)")
    add("--save-every", type=COUNT, help="steps between checkpoints to resume from (default: 100)")
    add("--gradient-checkpointing", action="store_true", default=None)
    add("--rank", type=COUNT, help="of the adapter")
    add("--alpha", type=ABOVE_ZERO, help="LoRA's scale is alpha / rank (default: 2 * rank)")
    add("--dropout", type=SHARE_BELOW_ONE, default=0.0)
    add("--init", choices=INITS, default="kaiming", help="of A and B; loftq: with nf4 or "
        "rtn; svd, qera, cloq: with a quantized base, from what rounding lost: of the weights "
        "alone, weighed by the size of the inputs, or by all that calibration tells of them")
    add("--targets", default="all", help="all (default), attention, or names: q_proj,v_proj")
    flag = partial(add, action="store_true")
    flag("--rslora", help="scale by alpha / sqrt(rank), not alpha / rank")
    flag("--keep-notes", help="learn GSM8K's calculator notes too; solutions then need "
         "--max-new-tokens 512")  # fmt: skip
    flag("--keep-overlap", help="train also on examples that hold test questions")
    add("--resume", action="store_true", default=None, help="go on from the last checkpoint")


def recipe_of(args):
    """The recipe, None for --method none."""
    from ..quant.fp4 import FP4Spec
    from ..quant.fp8 import FP8Spec
    from ..quant.gptq import GPTQOptions
    from ..quant.nf4 import NF4Spec
    from ..quant.recipe import Recipe

    if args.method == "none":
        return None
    spec = NF4Spec() if args.method == "nf4" else grid(args.bits, args.group_size)
    if args.format:
        spec = FP8Spec(args.format) if args.format.startswith("e") else FP4Spec(args.format)
    if args.best:
        return Recipe.of(spec, "gptq", GPTQOptions.best(match_dense=True))
    share = {None: 0.01, "auto": None}.get(args.damping, args.damping)
    flags = {n: getattr(args, n) for n in ("match_dense", "weigh_columns", "refit_scales")}
    return Recipe.of(spec, args.method, GPTQOptions(damp_percent=share, **flags))


def training_data(opened: Opened, args):
    """A function from the tokenizer to what to train on, which is read once and said then."""
    from ..runs.training_data import prepare

    length = getattr(args, "max_length", None) or opened.profile.train.max_length
    keep = [getattr(args, f"keep_{what}", False) for what in ("notes", "overlap")]
    known = []

    def read(tokenizer):
        if not known:
            known.append(prepare(opened.profile, tokenizer, opened.source, length, *keep))
            print(known[0])
        return known[0]

    return read


def plan_of(opened: Opened, recipe, data, **how):
    """The plan of the base, calibrated on what is trained on."""
    where = opened.device, opened.compute_dtype, opened.source
    return opened.profile.plan(recipe, *where, lambda tokenizer: data(tokenizer).train, **how)


def quantize(args) -> None:
    from ..runs.base import make_base

    recipe = dataclasses.replace(recipe_of(args), targets=args.targets)
    opened = open_options(args)
    data = training_data(opened, args)
    make_base(plan_of(opened, recipe, data, stream=args.stream, spill=args.spill), opened.folder)


def train_config(opened: Opened, args):
    """The profile's settings, changed by the given options."""
    usual = opened.profile.train
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(usual)}
    changes = {name: value for name, value in given.items() if value is not None}
    if args.batch_size and not args.accumulation:  # less memory, the same optimizer step
        changes["accumulation"] = max(1, usual.batch_size * usual.accumulation // args.batch_size)
    changes |= {"compute_dtype": opened.compute_dtype, "folder": opened.folder / "training"}
    return dataclasses.replace(usual, **changes)


def finetune(args) -> None:
    from ..base.lock import held

    recipe = recipe_of(args)
    opened = open_options(args)
    with held(opened.folder):
        train_and_save(opened, recipe, args)


def train_and_save(opened: Opened, recipe, args) -> None:
    from ..base import processes
    from ..base.paths import short_path
    from ..layers.blocks import WORDS
    from ..lora.inject import trainable_parameters
    from ..quant.recipe import Recipe
    from ..runs.finetuner import Finetuner

    config, profile = train_config(opened, args), opened.profile
    targets = args.targets if args.targets in WORDS else tuple(args.targets.split(","))
    rank = args.rank or profile.rank
    lora = {"rank": rank, "alpha": 2 * rank if args.alpha is None else args.alpha,
            "dropout": args.dropout, "init": args.init, "use_rslora": args.rslora}  # fmt: skip
    where = opened.device, opened.compute_dtype
    profile.check_memory(rank, recipe and recipe.spec, config, targets, *where)
    data = training_data(opened, args)
    plan = plan_of(opened, recipe or Recipe(), data, stream=args.stream)
    tuner = Finetuner(plan, method="qlora" if recipe else "lora", folder=opened.folder,
                      seed=args.seed, target_modules=targets, **lora)  # fmt: skip
    count = sum(p.numel() for p in trainable_parameters(tuner.model).values())
    print(f"LoRA: {lora} on {len(tuner.layers)} layers, {count:,} parameters to train")
    found, metrics = data(tuner.tokenizer), short_path(config.folder / "metrics.jsonl")
    shared = f", shared by {processes.world()} processes" if processes.world() > 1 else ""
    print(f"training on {len(found.train)} examples, {config.batch_size} x {config.accumulation} "
          f"a step{shared}; each step is a line of {metrics}")

    def show(metrics):
        if "dev_loss" in metrics:
            print(f"  step {metrics['step']:>5}   loss {metrics['loss']:.4f}   dev "
                  f"{metrics['dev_loss']:.4f}   {metrics['seconds']:.0f} s")  # fmt: skip

    print(tuner.fit(found.train, found.dev, config, show, best=False))
    if processes.first():
        tuner.save(data=found.report())
        print(f"adapter saved to {short_path(opened.folder / 'adapter')}")
