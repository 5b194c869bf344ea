"""`python -m qlora_lib quantize | finetune`: calibrate, quantize, train, save."""

import argparse
import dataclasses
import json
from pathlib import Path

from .common import check_memory, open_profile
from .residual import residual_base

METHODS = ("gptq", "rtn", "nf4", "none")
INITS = ("kaiming", "gaussian", "loftq", "pissa")


def add_quantize_and_finetune(commands, shared) -> None:
    """The two commands and their options."""
    base = argparse.ArgumentParser(add_help=False)
    add = base.add_argument
    add("--method", choices=METHODS, default="gptq", help="of quantization; none: a dense base")
    add("--bits", type=int, default=4, help="2, 3, 4 or 8 (default 4); not for nf4")
    add("--group-size", type=int, default=64, help="weights that share a scale; 0: a whole row")

    alone = commands.add_parser(
        "quantize", parents=[shared, base], help="calibrate, quantize, save"
    )
    add = alone.add_argument
    add("--targets", dest="quantized", choices=("all", "attention"), default="all",
        help="linears to quantize: all (default), or q, k, v, o alone")  # fmt: skip
    add("--stream", action="store_true", help="one block in memory at a time; --model is a folder")
    add("--spill", type=Path, help="with --stream: a folder to keep activations in")

    train = commands.add_parser(
        "finetune", parents=[shared, base], help="quantize, inject LoRA, train, save"
    )
    train.set_defaults(quantized="all")  # its --targets are those of the adapter
    add = train.add_argument
    add("--epochs", type=int, help="passes over the train problems")
    add("--max-steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, help="problems at a time; the rest of a step is accumulated")
    add("--accumulation", type=int, help="batches in a step (default: keeps the profile's step)")
    add("--optimizer", choices=("adamw", "adam8bit"), help="(default: adamw)")
    add("--lr", type=float, help="peak learning rate")
    add("--max-length", type=int, help="tokens of prompt and target")
    add("--eval-every", type=int, help="steps between dev losses (default: each epoch's end)")
    add("--gradient-checkpointing", action="store_true", default=None)
    add("--rank", type=int, help="of the adapter")
    add("--alpha", type=float, help="LoRA's scale is alpha / rank (default: 2 * rank)")
    add("--dropout", type=float, default=0.0)
    add("--init", choices=INITS, default="kaiming", help="of A and B; loftq: with nf4 or rtn")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(rank), not alpha / rank")
    add("--targets", default="all", help="all (default), attention, or names: q_proj,v_proj")
    add("--resume", action="store_true", default=None, help="go on from the last checkpoint")


def base_recipe(profile, args):
    """(spec, targets, what the base is made of and how)."""
    from ..data import weights_id
    from ..grid import QuantSpec
    from ..lora import ALL_LINEAR, ATTENTION
    from ..nf4 import NF4Spec

    nf4 = args.method == "nf4"
    spec = NF4Spec() if nf4 else QuantSpec(bits=args.bits, group_size=args.group_size or None)
    recipe = {
        "method": args.method,
        "spec": dataclasses.asdict(spec),
        "weights": weights_id(profile.model),
        "compute_dtype": args.compute_dtype,
    }
    if args.quantized == "attention":
        recipe["targets"] = ATTENTION
    return spec, ATTENTION if args.quantized == "attention" else ALL_LINEAR, recipe


def base_is_there(folder: Path, recipe: dict) -> bool:
    """Whether the folder holds a base that was made so."""
    from ..data import short_path

    file = folder / "recipe.json"
    # Compared as JSON holds it, which has no tuples.
    same = file.is_file() and json.loads(file.read_text()) == json.loads(json.dumps(recipe))
    if same:
        print(f"base: {short_path(folder)} is there, with these settings")
    return same


def show_row(row) -> None:
    from tqdm import tqdm

    error = "" if row.output_error is None else f"   output error {row.output_error:.4f}"
    # print would break a progress bar
    tqdm.write(f"  {row.name:<34} {row.bits_per_weight:.2f} bits a weight{error}")


def quantized_base(profile, args):
    """(model, tokenizer) from args.folder/base if made of the same weights in the same way,
    else quantized now and saved there."""
    from ..checkpoint import load_quantized, save_quantized
    from ..data import short_path
    from ..results import write_json_atomic

    (spec, targets, recipe), folder = base_recipe(profile, args), args.folder / "base"
    if base_is_there(folder, recipe):
        return load_quantized(folder, args.device, args.compute_dtype)
    print(f"base: quantizing {short_path(Path(profile.model))} with {args.method}")
    model, tokenizer = profile.load(device=args.device, compute_dtype=args.compute_dtype)
    report = profile.quantize(model, tokenizer, spec, args.method, targets)
    for row in report:
        show_row(row)
    save_quantized(model, tokenizer, folder)
    write_json_atomic(folder / "recipe.json", recipe)
    before, after = sum(r.bytes_before for r in report), sum(r.bytes_after for r in report)
    print(f"  {before:,} -> {after:,} bytes, saved to {short_path(folder)}")
    return model, tokenizer


def stream_base(profile, args) -> None:
    """The same base, with one decoder block in memory at a time; a killed run goes on."""
    from transformers import AutoTokenizer

    from ..data import short_path
    from ..results import write_json_atomic
    from ..streaming import REPORT, quantize_checkpoint

    if not (Path(profile.model) / "config.json").is_file():
        raise FileNotFoundError(
            f"--stream reads a folder on disk, and {profile.model} is none; download it "
            "(`hf download NAME --local-dir FOLDER`) and give --model FOLDER"
        )
    (spec, targets, recipe), folder = base_recipe(profile, args), args.folder / "base"
    if base_is_there(folder, recipe):
        return
    print(f"base: streaming {short_path(Path(profile.model))} through {args.method}")
    batches = None
    if args.method == "gptq":
        batches = profile.calibration(AutoTokenizer.from_pretrained(profile.model))
    quantize_checkpoint(
        profile.model, folder, spec, batches, args.method, target_modules=targets,
        compute_dtype=args.compute_dtype, device=args.device, spill=args.spill, progress=show_row,
    )  # fmt: skip
    write_json_atomic(folder / "recipe.json", recipe)
    made = json.loads((folder / REPORT).read_text())
    print(
        f"  {made['weight_bytes']:,} bytes for {made['parameters']:,} parameters, "
        f"{made['bits_per_parameter']:.2f} bits each, saved to {short_path(folder)}"
    )


def quantize(args) -> None:
    if args.method == "none":
        raise ValueError("quantize needs a method: gptq, rtn or nf4")
    if args.spill and not args.stream:
        raise ValueError("--spill keeps the activations of --stream on disk; give both")
    (stream_base if args.stream else quantized_base)(open_profile(args), args)


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

    from .. import processes
    from ..adapters import save_adapter
    from ..data import format_gsm8k, short_path
    from ..lora import ALL_LINEAR, ATTENTION, inject_lora, trainable_parameters
    from ..lora_init import RESIDUAL_INITS
    from ..results import stamp, write_json_atomic
    from ..train import finetune as train

    profile = open_profile(args)
    config = train_config(profile, args)
    groups = {"all": ALL_LINEAR, "attention": ATTENTION}
    targets = groups.get(args.targets) or tuple(args.targets.split(","))
    rank = args.rank or profile.rank
    lora = {"rank": rank, "alpha": args.alpha or 2 * rank, "dropout": args.dropout}
    lora |= {"init": args.init, "use_rslora": args.rslora}
    check_memory(profile, args, config, targets, rank)
    if args.init in RESIDUAL_INITS:
        model, tokenizer, layers = residual_base(profile, args, targets, lora)
    else:
        if args.method == "none":
            model, tokenizer = profile.load(device=args.device, compute_dtype=args.compute_dtype)
        else:
            model, tokenizer = quantized_base(profile, args)
        torch.manual_seed(args.seed)
        layers = inject_lora(model, targets, **lora)
    count = sum(p.numel() for p in trainable_parameters(model).values())
    print(f"LoRA: {lora} on {len(layers)} layers, {count:,} parameters to train")
    pairs, dev = ([format_gsm8k(e) for e in profile.examples(s)] for s in ("train", "dev"))
    shared = f", shared by {processes.world()} processes" if processes.world() > 1 else ""
    print(
        f"training on {len(pairs)} problems, {config.batch_size} x {config.accumulation} a step"
        f"{shared}"
    )

    def show(metrics):
        if metrics["step"] % 25 == 0 or "dev_loss" in metrics:
            dev_loss = f"   dev {metrics['dev_loss']:.4f}" if "dev_loss" in metrics else ""
            tqdm.write(  # print would break the progress bar
                f"  step {metrics['step']:>5}   loss {metrics['loss']:.4f}{dev_loss}   "
                f"{metrics['tokens_per_second']:.0f} tokens/s   {metrics['seconds']:.0f} s"
            )

    history = train(model, tokenizer, pairs, config, dev, show)
    print(history)
    if not processes.first():
        return
    save_adapter(model, args.folder / "adapter")
    how = {"method": args.method, "targets": targets, "lora": lora, "training": str(history)}
    write_json_atomic(args.folder / "run.json", how | {"stamp": stamp(args.seed)})
    print(f"adapter saved to {short_path(args.folder / 'adapter')}")
