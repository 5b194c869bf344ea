"""`python -m qlora_lib quantize | finetune | evaluate | generate | export`, thin over the library.

A run lives in checkpoints/PROFILE: `base` (the quantized model), `adapter`, `training`
(metrics and the checkpoint to resume from) and `run.json` (how the adapter was made).
Only here are environment variables read: MODEL and GSM8K_DIR.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from .export import add_export, export

# torch and transformers take seconds to import, so --help does without them.

METHODS = ("gptq", "rtn", "nf4", "none")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m qlora_lib", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--profile", default="tiny", help="tiny (default), smollm2 or llama2-7b")
    add("--model", default=os.environ.get("MODEL"), help="other weights, folder or hub id; $MODEL")
    add("--data", help="folder with {split}.jsonl; for GSM8K also $GSM8K_DIR")
    add("--folder", type=Path, help="of the run (default: checkpoints/PROFILE)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    add("--compute-dtype", choices=("auto", "bf16", "fp16", "fp32"), help="(default: profile's)")
    add("--seed", type=int, default=0)

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
    add("--epochs", type=int, help="passes over the train problems")
    add("--max-steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, help="problems at a time; the rest of a step is accumulated")
    add("--accumulation", type=int, help="batches in a step (default: keeps the profile's step)")
    add("--lr", type=float, help="peak learning rate")
    add("--max-length", type=int, help="tokens of prompt and target")
    add("--eval-every", type=int, help="steps between dev losses (default: each epoch's end)")
    add("--gradient-checkpointing", action="store_true", default=None)
    add("--rank", type=int, help="of the adapter")
    add("--alpha", type=float, help="LoRA's scale is alpha / rank (default: 2 * rank)")
    add("--dropout", type=float, default=0.0)
    add("--targets", default="all", help="all (default), attention, or names: q_proj,v_proj")
    add("--resume", action="store_true", default=None, help="go on from the last checkpoint")

    for name, text in (
        ("evaluate", "score the fine-tuned model on held-out problems"),
        ("generate", "answer one question"),
    ):
        command = commands.add_parser(name, parents=[shared], help=text)
        add = command.add_argument
        add("--dense", action="store_true", help="for a run made with --method none")
        add("--no-adapter", action="store_true", help="the base model alone")
        add("--max-new-tokens", type=int, help="(default: the profile's)")
        if name == "generate":
            add("question")
        else:
            splits = ("dev", "test", "test_changed", "test_larger", "gsm_hard")
            add("--split", default="test", choices=splits, help="which problems (default: test)")
            add("--limit", type=int, help="only the first so many problems")
            add("--few-shot", type=int, default=0, metavar="K", help="solved problems before each")
            add("--batch-size", type=int, default=64)
            add("--out", type=Path, help="(default: outputs/PROFILE/eval, and what is special)")
            add("--restart", action="store_true", help="replace answers instead of going on")
            add("--compare", type=Path, metavar="REPORT", help="folder of another evaluation")
    add_export(commands, shared)
    return top


def open_profile(args):
    from transformers.utils.logging import disable_progress_bar

    from .profiles import load_profile

    disable_progress_bar()
    data = args.data or (None if args.profile == "tiny" else os.environ.get("GSM8K_DIR"))
    profile = load_profile(args.profile, model=args.model, data=data)
    args.folder = args.folder or Path("checkpoints") / profile.name
    args.compute_dtype = args.compute_dtype or profile.compute_dtype
    return profile


def quantized_base(profile, args):
    """(model, tokenizer) from args.folder/base if made of the same weights in the same way,
    else quantized now and saved there."""
    from .checkpoint import load_quantized, save_quantized
    from .data import short_path, weights_id
    from .grid import QuantSpec
    from .nf4 import NF4Spec
    from .results import write_json_atomic

    nf4 = args.method == "nf4"
    spec = NF4Spec() if nf4 else QuantSpec(bits=args.bits, group_size=args.group_size or None)
    recipe = {
        "method": args.method,
        "spec": dataclasses.asdict(spec),
        "weights": weights_id(profile.model),
        "compute_dtype": args.compute_dtype,
    }
    folder = args.folder / "base"
    if (folder / "recipe.json").is_file():
        if json.loads((folder / "recipe.json").read_text()) == recipe:
            print(f"base: {short_path(folder)} is there, with these settings")
            return load_quantized(folder, args.device, args.compute_dtype)
    print(f"base: quantizing {short_path(Path(profile.model))} with {args.method}")
    model, tokenizer = profile.load(device=args.device, compute_dtype=args.compute_dtype)
    report = profile.quantize(model, tokenizer, spec, args.method)
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

    from .adapters import save_adapter
    from .data import format_gsm8k, short_path
    from .lora import ALL_LINEAR, ATTENTION, inject_lora, trainable_parameters
    from .results import stamp, write_json_atomic
    from .train import finetune as train

    profile = open_profile(args)
    config = train_config(profile, args)
    if args.method == "none":
        model, tokenizer = profile.load(device=args.device, compute_dtype=args.compute_dtype)
    else:
        model, tokenizer = quantized_base(profile, args)
    groups = {"all": ALL_LINEAR, "attention": ATTENTION}
    targets = groups.get(args.targets) or tuple(args.targets.split(","))
    rank = args.rank or profile.rank
    lora = {"rank": rank, "alpha": args.alpha or 2 * rank, "dropout": args.dropout}
    torch.manual_seed(args.seed)
    layers = inject_lora(model, targets, **lora)
    count = sum(p.numel() for p in trainable_parameters(model).values())
    print(f"LoRA: {lora} on {len(layers)} layers, {count:,} parameters to train")
    pairs, dev = ([format_gsm8k(e) for e in profile.examples(s)] for s in ("train", "dev"))
    print(f"training on {len(pairs)} problems, {config.batch_size} x {config.accumulation} a step")

    def show(metrics):
        if metrics["step"] % 25 == 0 or "dev_loss" in metrics:
            dev_loss = f"   dev {metrics['dev_loss']:.4f}" if "dev_loss" in metrics else ""
            tqdm.write(  # print would break the progress bar
                f"  step {metrics['step']:>5}   loss {metrics['loss']:.4f}{dev_loss}   "
                f"{metrics['tokens_per_second']:.0f} tokens/s   {metrics['seconds']:.0f} s"
            )

    history = train(model, tokenizer, pairs, config, dev, show)
    print(history)
    save_adapter(model, args.folder / "adapter")
    how = {"method": args.method, "targets": targets, "lora": lora, "training": str(history)}
    write_json_atomic(args.folder / "run.json", how | {"stamp": stamp(args.seed)})
    print(f"adapter saved to {short_path(args.folder / 'adapter')}")


def open_run(profile, args):
    """Base and adapter of args.folder, the base checked to be quantized unless args.dense."""
    from .adapters import load_adapter
    from .checkpoint import load_quantized
    from .data import short_path
    from .lora import ALL_LINEAR, find_linears
    from .models import quantized_layers

    command = f"python -m qlora_lib finetune --profile {profile.name}"
    how = args.folder / "run.json"
    if not args.no_adapter:
        if not how.is_file():
            raise FileNotFoundError(f"{short_path(args.folder)} holds no finished run; `{command}`")
        if (json.loads(how.read_text())["method"] == "none") != args.dense:
            found = f"the adapter in {short_path(args.folder)} was trained on a "
            if args.dense:
                raise ValueError(found + "quantized base; leave out --dense")
            raise ValueError(
                f"{found}dense base: its layers are not quantized; give --dense, or `{command}`"
            )
    if args.dense:
        model, tokenizer = profile.load(device=args.device, compute_dtype=args.compute_dtype)
    else:
        base = args.folder / "base"
        if not base.is_dir():
            raise FileNotFoundError(f"there is no quantized base {short_path(base)}; `{command}`")
        model, tokenizer = load_quantized(base, args.device, args.compute_dtype)
        linears, quantized = find_linears(model, ALL_LINEAR), quantized_layers(model)
        dense = sorted(set(linears) - set(quantized))
        if dense:
            raise ValueError(
                f"{short_path(base)}: {len(dense)} layers are not quantized, "
                f"such as {dense[0]}; `{command}`"
            )
        specs = ", ".join(sorted({str(layer.spec) for layer in quantized.values()}))
        print(f"checked: all {len(quantized)} linear layers are quantized, {specs}")
    if not args.no_adapter:
        print(f"adapter on {len(load_adapter(model, args.folder / 'adapter'))} layers")
    return model, tokenizer


def make_generator(profile, args, batch_size: int):
    from .generation import Decoding, generator

    length = args.max_new_tokens or profile.max_new_tokens
    model, tokenizer = open_run(profile, args)
    return generator(model, tokenizer, Decoding(max_new_tokens=length, batch_size=batch_size))


def evaluate(args) -> None:
    from .comparison import report_difference
    from .data import format_gsm8k, short_path
    from .evaluation import EvalReport, few_shot
    from .evaluation import evaluate as score
    from .results import stamp

    other = EvalReport.load(args.compare) if args.compare else None  # missing: say so at once
    profile = open_profile(args)
    problems = profile.examples(args.split)[: args.limit]
    prompt = format_gsm8k
    if args.few_shot:
        prompt = few_shot(profile.examples("train"), args.few_shot)
    out = args.out or Path("outputs") / profile.name / evaluation_name(args)
    generate = make_generator(profile, args, args.batch_size)
    adapter = None if args.no_adapter else short_path(args.folder / "adapter")
    generate.info |= {"adapter": adapter, "split": args.split, "few_shot": args.few_shot}
    generate.info |= stamp(args.seed)

    def show(prediction):
        mark = "\u2713" if prediction["strict"] else "\u2717"
        answer = prediction["strict_answer"] or "none"
        print(f"{mark} {answer:>8}   gold {prediction['gold']:>8}   {prediction['question']:.60}")

    report = score(generate, problems, out, prompt, show, args.batch_size, restart=args.restart)
    print(report)
    print(f"report in {short_path(out)}")
    if other:
        names = (short_path(args.compare), short_path(out))
        print(report_difference(other, report, names))


def evaluation_name(args) -> str:
    """A folder for each kind of evaluation: eval, or eval-test_changed-3shot."""
    special = {
        args.split: args.split != "test",
        "dense": args.dense,
        "base": args.no_adapter,
        f"{args.few_shot}shot": args.few_shot,
        f"first{args.limit}": args.limit,
    }
    return "-".join(["eval", *(name for name, on in special.items() if on)])


def generate(args) -> None:
    from .data import PROMPT

    profile = open_profile(args)
    (completion,) = make_generator(profile, args, 1)([PROMPT.format(question=args.question)])
    print(completion)


def main(argv: list[str] | None = None) -> int:
    """Run a command; 2 and one line on stderr for bad input."""
    # Lines appear at once in a pipe too, and a terminal without the check mark gets a "?".
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    args = parser().parse_args(argv)
    commands = {"quantize": quantize, "finetune": finetune}
    commands |= {"evaluate": evaluate, "generate": generate}
    commands["export"] = lambda args: export(open_profile(args), args)
    try:
        commands[args.command](args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
