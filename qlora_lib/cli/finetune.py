"""`python -m qlora_lib quantize | finetune`: calibrate, quantize, train, save."""

import argparse
import dataclasses
import json
from pathlib import Path

from .common import open_profile

METHODS = ("gptq", "rtn", "nf4", "none")


def add_quantize_and_finetune(commands, shared) -> None:
    """The two commands and their options."""
    base = argparse.ArgumentParser(add_help=False)
    add = base.add_argument
    add("--method", choices=METHODS, default="gptq", help="of quantization; none: a dense base")
    add("--bits", type=int, default=4, help="2, 3, 4 or 8 (default 4); not for nf4")
    add("--group-size", type=int, default=64, help="weights that share a scale; 0: a whole row")

    commands.add_parser("quantize", parents=[shared, base], help="calibrate, quantize, save")

    train = commands.add_parser(
        "finetune", parents=[shared, base], help="quantize, inject LoRA, train, save"
    )
    add = train.add_argument
    add("--epochs", type=int, help="passes over the training examples")
    add("--max-steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, help="examples at a time; the rest of a step is accumulated")
    add("--accumulation", type=int, help="batches in a step (default: keeps the profile's step)")
    add("--lr", type=float, help="peak learning rate")
    add("--max-length", type=int, help="tokens of prompt and target")
    add("--eval-every", type=int, help="steps between dev losses (default: each epoch's end)")
    add("--gradient-checkpointing", action="store_true", default=None)
    add("--rank", type=int, help="of the adapter")
    add("--alpha", type=float, help="LoRA's scale is alpha / rank (default: 2 * rank)")
    add("--dropout", type=float, default=0.0)
    add("--targets", default="all", help="all (default), attention, or names: q_proj,v_proj")
    add("--keep-notes", action="store_true",
        help="learn GSM8K's calculator notes too; solutions then need --max-new-tokens 512")
    add("--keep-overlap", action="store_true",
        help="train also on examples that hold test questions (default: they are left out)")
    add("--resume", action="store_true", default=None, help="go on from the last checkpoint")


def training_data(profile, args, tokenizer):
    """What to train on, read once a run and said on the way."""
    from ..training_data import prepare

    if not hasattr(args, "prepared"):
        length = getattr(args, "max_length", None) or profile.train.max_length
        keep = {k: getattr(args, f"keep_{k}", False) for k in ("notes", "overlap")}
        args.prepared = prepare(
            profile, tokenizer, args.source, length, keep["notes"], keep["overlap"]
        )
        print(args.prepared)
    return args.prepared


def quantized_base(profile, args):
    """(model, tokenizer) from args.folder/base if made of the same weights in the same way,
    else quantized now and saved there."""
    from ..checkpoint import load_quantized, save_quantized
    from ..data import short_path, weights_id
    from ..grid import QuantSpec
    from ..nf4 import NF4Spec
    from ..results import write_json_atomic

    nf4 = args.method == "nf4"
    spec = NF4Spec() if nf4 else QuantSpec(bits=args.bits, group_size=args.group_size or None)
    recipe = {
        "method": args.method,
        "spec": dataclasses.asdict(spec),
        "weights": weights_id(profile.model),
        "compute_dtype": args.compute_dtype,
    }
    if args.source and args.method == "gptq":
        recipe["calibrated_on"] = args.source
    folder = args.folder / "base"
    if (folder / "recipe.json").is_file():
        if json.loads((folder / "recipe.json").read_text()) == recipe:
            print(f"base: {short_path(folder)} is there, with these settings")
            return load_quantized(folder, args.device, args.compute_dtype)
    print(f"base: quantizing {short_path(Path(profile.model))} with {args.method}")
    model, tokenizer = profile.load(device=args.device, compute_dtype=args.compute_dtype)
    examples = None
    if "calibrated_on" in recipe:
        examples = training_data(profile, args, tokenizer).train
    report = profile.quantize(model, tokenizer, spec, args.method, examples)
    for row in report:
        error = "" if row.output_error is None else f"   output error {row.output_error:.4f}"
        print(f"  {row.name:<34} {row.bits_per_weight:.2f} bits a weight{error}")
    save_quantized(model, tokenizer, folder)
    write_json_atomic(folder / "recipe.json", recipe)
    before, after = sum(r.bytes_before for r in report), sum(r.bytes_after for r in report)
    print(f"  {before:,} -> {after:,} bytes, saved to {short_path(folder)}")
    return model, tokenizer


def quantize(args) -> None:
    if args.method == "none":
        raise ValueError("quantize needs a method: gptq, rtn or nf4")
    quantized_base(open_profile(args), args)


def train_config(profile, args):
    """The profile's settings, changed by the options that were given."""
    names = ("epochs", "max_steps", "batch_size", "accumulation", "lr", "max_length", "seed",
             "compute_dtype", "eval_every", "gradient_checkpointing", "resume")  # fmt: skip
    changes = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if args.batch_size and not args.accumulation:  # less memory, the same optimizer step
        step = profile.train.batch_size * profile.train.accumulation
        changes["accumulation"] = max(1, step // args.batch_size)
    return dataclasses.replace(profile.train, folder=args.folder / "training", **changes)


def finetune(args) -> None:
    import torch
    from tqdm import tqdm

    from ..adapters import save_adapter
    from ..data import short_path
    from ..lora import WORDS, inject_lora, trainable_parameters
    from ..results import stamp, write_json_atomic
    from ..train import finetune as train

    profile = open_profile(args)
    config = train_config(profile, args)
    if args.method == "none":
        model, tokenizer = profile.load(device=args.device, compute_dtype=args.compute_dtype)
    else:
        model, tokenizer = quantized_base(profile, args)
    targets = args.targets if args.targets in WORDS else tuple(args.targets.split(","))
    rank = args.rank or profile.rank
    lora = {"rank": rank, "alpha": args.alpha or 2 * rank, "dropout": args.dropout}
    torch.manual_seed(args.seed)
    layers = inject_lora(model, targets, **lora)
    count = sum(p.numel() for p in trainable_parameters(model).values())
    print(f"LoRA: {lora} on {len(layers)} layers, {count:,} parameters to train")
    data = training_data(profile, args, tokenizer)
    print(f"training on {len(data.train)} examples, {config.batch_size} x {config.accumulation} a step")

    def show(metrics):
        if metrics["step"] % 25 == 0 or "dev_loss" in metrics:
            dev_loss = f"   dev {metrics['dev_loss']:.4f}" if "dev_loss" in metrics else ""
            tqdm.write(  # print would break the progress bar
                f"  step {metrics['step']:>5}   loss {metrics['loss']:.4f}{dev_loss}   "
                f"{metrics['tokens_per_second']:.0f} tokens/s   {metrics['seconds']:.0f} s"
            )

    history = train(model, tokenizer, data.train, config, data.dev or None, show)
    print(history)
    save_adapter(model, args.folder / "adapter")
    how = {"method": args.method, "targets": targets, "lora": lora, "training": str(history)}
    how["data"] = data.report()
    write_json_atomic(args.folder / "run.json", how | {"stamp": stamp(args.seed)})
    print(f"adapter saved to {short_path(args.folder / 'adapter')}")
