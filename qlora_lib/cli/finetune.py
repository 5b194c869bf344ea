"""`python -m qlora_lib quantize | finetune`: calibrate, quantize, train, save."""

import argparse
import dataclasses
import math
from functools import partial

from .common import Opened, add_command, grid, open_options, positive

METHODS = ("gptq", "rtn", "nf4", "none")
INITS = ("kaiming", "gaussian", "loftq", "pissa")
OF_GRID = ("bits", "group_size")  # options that not every method has
OF_GPTQ = ("match_dense", "weigh_columns", "refit_scales", "damping", "best")


def damping(text: str) -> float | str:
    """A share of the Hessian's diagonal, or "auto", for argparse."""
    return text if text == "auto" else float(text)


def above_zero(text: str) -> float:
    """A number above 0, for argparse: alpha 0 would train nothing."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def add_commands(commands, shared) -> None:
    base = argparse.ArgumentParser(add_help=False)
    add = base.add_argument
    add("--method", choices=METHODS, default="gptq", help="of quantization; none: a dense base")
    add("--bits", type=int, help="with gptq and rtn: 2, 3, 4 or 8 (default 4)")
    add("--group-size", type=int, help="weights that share a scale (default 64); 0: a whole row")
    flag = partial(add, action="store_true")
    flag("--match-dense", help="with gptq: layers aim at the dense model's outputs (for 2 bits)")
    flag("--weigh-columns", help="with gptq: grids are fitted to what each column's error costs")
    flag("--refit-scales", help="with gptq: scales are fitted again once the codes are known")
    add("--damping", type=damping, metavar="SHARE", help="with gptq: of the Hessian's mean "
        "diagonal (default 0.01), or auto: chosen for each layer from the calibration tokens")
    flag("--best", help="with gptq: --match-dense --weigh-columns --refit-scales --damping auto")
    flag("--stream", help="quantize with one block in memory at a time")

    add = add_command(commands, "quantize", quantize, "calibrate, quantize, save", shared, base)
    text = "linears to quantize: all (default), or q, k, v, o alone"
    add("--targets", choices=("all", "attention"), default="all", help=text)
    add("--spill", help="with --stream: a folder to keep activations in")

    text = "quantize, inject LoRA, train, save"
    add = add_command(commands, "finetune", finetune, text, shared, base)
    add("--epochs", type=positive, help="passes over the training examples")
    add("--max-steps", type=positive, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=positive, help="examples at a time; the rest of a step is accumulated")
    add("--accumulation", type=positive, help="batches in a step (default: as many examples as "
        "in the profile's, about)")  # fmt: skip
    add("--optimizer", choices=("adamw", "adam8bit"), help="(default: adamw)")
    add("--lr", type=float, help="peak learning rate")
    add("--max-length", type=positive, help="tokens of prompt and target")
    add("--eval-every", type=positive, help="steps between dev losses (default: each epoch's end)")
    add("--gradient-checkpointing", action="store_true", default=None)
    add("--rank", type=positive, help="of the adapter")
    add("--alpha", type=above_zero, help="LoRA's scale is alpha / rank (default: 2 * rank)")
    add("--dropout", type=float, default=0.0)
    add("--init", choices=INITS, default="kaiming", help="of A and B; loftq: with nf4 or rtn")
    add("--targets", default="all", help="all (default), attention, or names: q_proj,v_proj")
    flag = partial(add, action="store_true")
    flag("--rslora", help="scale by alpha / sqrt(rank), not alpha / rank")
    flag("--keep-notes", help="learn GSM8K's calculator notes too; solutions then need "
         "--max-new-tokens 512")  # fmt: skip
    flag("--keep-overlap", help="train also on examples that hold test questions")
    add("--resume", action="store_true", default=None, help="go on from the last checkpoint")


def recipe_of(args):
    """The recipe, None for --method none; ValueError for options that the method does not have."""
    from ..quant.gptq import GPTQOptions
    from ..quant.nf4 import NF4Spec
    from ..quant.recipe import Recipe

    lacking = {"gptq": (), "rtn": OF_GPTQ, "nf4": OF_GRID + OF_GPTQ,
               "none": (*OF_GRID, *OF_GPTQ, "stream")}[args.method]  # fmt: skip
    if given := [name for name in lacking if getattr(args, name) not in (None, False)]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"--method {args.method} has no {names}; leave them out, or take a method "
                         "that has them")  # fmt: skip
    if args.method == "none":
        return None
    spec = NF4Spec() if args.method == "nf4" else grid(args.bits, args.group_size)
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

    if args.method == "none":
        raise ValueError("quantize needs a method: gptq, rtn or nf4")
    if args.spill and not args.stream:
        raise ValueError("--spill keeps the activations of --stream on disk; give both")
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
    from ..base import processes
    from ..base.paths import short_path
    from ..layers.blocks import WORDS
    from ..lora.inject import trainable_parameters
    from ..quant.recipe import Recipe
    from ..runs.finetuner import Finetuner

    recipe = recipe_of(args)
    opened = open_options(args)
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
