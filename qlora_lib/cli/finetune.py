"""`python -m qlora_lib quantize | finetune`: calibrate, quantize, train, save."""

import argparse
import dataclasses
import math
from pathlib import Path

from ..runs.residual_base import residual_base
from .common import open_profile, positive

METHODS = ("gptq", "rtn", "nf4", "none")
INITS = ("kaiming", "gaussian", "loftq", "pissa")


def damping(text: str) -> float | None:
    """What GPTQOptions calls damp_percent, None for "auto"."""
    return None if text == "auto" else float(text)


def above_zero(text: str) -> float:
    """A number above 0, for argparse: alpha 0 would train nothing."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def add_quantize_and_finetune(commands, shared) -> None:
    """The two commands and their options."""
    base = argparse.ArgumentParser(add_help=False)
    add = base.add_argument
    add("--method", choices=METHODS, default="gptq", help="of quantization; none: a dense base")
    add("--bits", type=int, default=4, help="2, 3, 4 or 8 (default 4); not for nf4")
    add("--group-size", type=int, default=64, help="weights that share a scale; 0: a whole row")
    add("--match-dense", action="store_true",
        help="with gptq: each layer aims at its outputs in the dense model (for 2 bits)")
    add("--weigh-columns", action="store_true",
        help="with gptq: grids are fitted to what an error in each column costs")
    add("--refit-scales", action="store_true",
        help="with gptq: scales are fitted again once the codes are known")
    add("--damping", type=damping, default=0.01, metavar="SHARE",
        help="with gptq: of the mean of the Hessian's diagonal (default 0.01), or auto: chosen "
        "for each layer from the calibration tokens")
    add("--best", action="store_true",
        help="with gptq: --match-dense --weigh-columns --refit-scales --damping auto")
    add("--stream", action="store_true", help="quantize with one block in memory at a time")

    alone = commands.add_parser(
        "quantize", parents=[shared, base], help="calibrate, quantize, save"
    )
    add = alone.add_argument
    add("--targets", choices=("all", "attention"), default="all",
        help="linears to quantize: all (default), or q, k, v, o alone")  # fmt: skip
    add("--spill", type=Path, help="with --stream: a folder to keep activations in")

    train = commands.add_parser(
        "finetune", parents=[shared, base], help="quantize, inject LoRA, train, save"
    )
    add = train.add_argument
    add("--epochs", type=positive, help="passes over the training examples")
    add("--max-steps", type=positive, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=positive, help="examples at a time; the rest of a step is accumulated")
    add("--accumulation", type=positive,
        help="batches in a step (default: what comes to about as many examples as the profile's)")
    add("--optimizer", choices=("adamw", "adam8bit"), help="(default: adamw)")
    add("--lr", type=float, help="peak learning rate")
    add("--max-length", type=positive, help="tokens of prompt and target")
    add("--eval-every", type=positive, help="steps between dev losses (default: each epoch's end)")
    add("--gradient-checkpointing", action="store_true", default=None)
    add("--rank", type=positive, help="of the adapter")
    add("--alpha", type=above_zero, help="LoRA's scale is alpha / rank (default: 2 * rank)")
    add("--dropout", type=float, default=0.0)
    add("--init", choices=INITS, default="kaiming", help="of A and B; loftq: with nf4 or rtn")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(rank), not alpha / rank")
    add("--targets", default="all", help="all (default), attention, or names: q_proj,v_proj")
    add("--keep-notes", action="store_true",
        help="learn GSM8K's calculator notes too; solutions then need --max-new-tokens 512")
    add("--keep-overlap", action="store_true",
        help="train also on examples that hold test questions (default: they are left out)")
    add("--resume", action="store_true", default=None, help="go on from the last checkpoint")


def training_data(profile, args, tokenizer):
    """What to train on, read once a run and said on the way."""
    from ..runs.training_data import prepare

    if not hasattr(args, "prepared"):
        length = getattr(args, "max_length", None) or profile.train.max_length
        keep = {k: getattr(args, f"keep_{k}", False) for k in ("notes", "overlap")}
        args.prepared = prepare(
            profile, tokenizer, args.source, length, keep["notes"], keep["overlap"]
        )
        print(args.prepared)
    return args.prepared


def base_settings(profile, args) -> dict:
    """What make_base and quantized_base are called with."""
    from ..quant.gptq import GPTQOptions
    from ..quant.grid import QuantSpec
    from ..quant.nf4 import NF4Spec

    nf4 = args.method == "nf4"
    return {
        "spec": NF4Spec() if nf4 else QuantSpec(bits=args.bits, group_size=args.group_size or None),
        "method": args.method,
        "options": GPTQOptions.best(match_dense=True) if args.best else GPTQOptions(
            match_dense=args.match_dense,
            weigh_columns=args.weigh_columns,
            refit_scales=args.refit_scales,
            damp_percent=args.damping,
        ),
        "device": args.device,
        "compute_dtype": args.compute_dtype,
        "calibrated_on": args.source,
        "examples": lambda tokenizer: training_data(profile, args, tokenizer).train,
    }


def quantize(args) -> None:
    from ..runs.base import make_base

    if args.method == "none":
        raise ValueError("quantize needs a method: gptq, rtn or nf4")
    if args.spill and not args.stream:
        raise ValueError("--spill keeps the activations of --stream on disk; give both")
    profile = open_profile(args)
    how = base_settings(profile, args) | {"target_modules": args.targets}
    make_base(profile, args.folder, stream=args.stream, spill=args.spill, **how)


def train_config(profile, args):
    """The profile's settings, changed by the options that were given."""
    names = ("epochs", "max_steps", "batch_size", "accumulation", "optimizer", "lr", "max_length",
             "seed", "compute_dtype", "eval_every", "gradient_checkpointing", "resume")  # fmt: skip
    changes = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if args.batch_size and not args.accumulation:  # less memory, the same optimizer step
        step = profile.train.batch_size * profile.train.accumulation
        changes["accumulation"] = max(1, step // args.batch_size)
    return dataclasses.replace(profile.train, folder=args.folder / "training", **changes)


def finetune(args) -> None:
    import torch
    from tqdm import tqdm

    from ..base import processes
    from ..base.files import check_place, read_json, write_json_atomic
    from ..base.paths import short_path
    from ..base.stamp import stamp
    from ..layers.blocks import WORDS
    from ..lora.files import ADAPTER_CONFIG, save_adapter
    from ..lora.init import RESIDUAL_INITS
    from ..lora.inject import inject_lora, trainable_parameters
    from ..runs.base import check_memory, quantized_base
    from ..train.finetune import finetune as train

    profile = open_profile(args)
    config = train_config(profile, args)
    check_place(args.folder / "adapter", ADAPTER_CONFIG)  # before hours of work, not after
    targets = args.targets if args.targets in WORDS else tuple(args.targets.split(","))
    rank = args.rank or profile.rank
    alpha = 2 * rank if args.alpha is None else args.alpha
    lora = {"rank": rank, "alpha": alpha, "dropout": args.dropout}
    lora |= {"init": args.init, "use_rslora": args.rslora}
    spec = None if args.method == "none" else base_settings(profile, args)["spec"]
    check_memory(profile, config, rank, targets, spec, args.device, args.compute_dtype)
    if args.init in RESIDUAL_INITS:
        model, tokenizer, layers = residual_base(profile, args, targets, lora)
    else:
        if args.method == "none":
            model, tokenizer = profile.load(device=args.device, compute_dtype=args.compute_dtype)
        else:
            settings = base_settings(profile, args) | {"stream": args.stream}
            model, tokenizer = quantized_base(profile, args.folder, **settings)
        torch.manual_seed(args.seed)
        layers = inject_lora(model, targets, **lora)
    count = sum(p.numel() for p in trainable_parameters(model).values())
    print(f"LoRA: {lora} on {len(layers)} layers, {count:,} parameters to train")
    data = training_data(profile, args, tokenizer)
    shared = f", shared by {processes.world()} processes" if processes.world() > 1 else ""
    print(
        f"training on {len(data.train)} examples, {config.batch_size} x {config.accumulation} "
        f"a step{shared}"
    )

    def show(metrics):
        if metrics["step"] % 25 == 0 or "dev_loss" in metrics:
            dev_loss = f"   dev {metrics['dev_loss']:.4f}" if "dev_loss" in metrics else ""
            tqdm.write(  # print would break the progress bar
                f"  step {metrics['step']:>5}   loss {metrics['loss']:.4f}{dev_loss}   "
                f"{metrics['tokens_per_second']:.0f} tokens/s   {metrics['seconds']:.0f} s"
            )

    history = train(model, tokenizer, data.train, config, data.dev or None, show)
    print(history)
    if not processes.first():
        return
    save_adapter(model, args.folder / "adapter")
    how = {"method": args.method, "targets": targets, "lora": lora, "training": str(history)}
    how["data"] = data.report()
    recipe = args.folder / "base" / "recipe.json"
    if args.method != "none" and recipe.is_file():
        how["base"] = read_json(recipe)
    write_json_atomic(args.folder / "run.json", how | {"stamp": stamp(args.seed)})
    print(f"adapter saved to {short_path(args.folder / 'adapter')}")
