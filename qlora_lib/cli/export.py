"""`python -m qlora_lib export`: a run as a GPTQ checkpoint, and the command that serves it."""

import dataclasses
import shlex
from pathlib import Path

from ..base.paths import given_path
from .common import Opened, add_command, open_options
from .finetune import training_data

NEEDS = {"data": ("with --merge gptq, which calibrates on it", lambda args: args.merge == "gptq")}
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes


def add_commands(commands) -> None:
    text = "write a GPTQ checkpoint, for vLLM, transformers and GPTQModel"
    shared = "profile model data folder device compute-dtype"
    add = add_command(commands, "export", export, text, shared, needs=NEEDS)
    merge = "put the adapter into the weights and quantize them again; without, it stays beside"
    add("--merge", choices=("gptq", "rtn"), help=merge)
    form = "gptq is for readers that know only version 1 (default: gptq_v2)"
    add("--format", choices=("gptq_v2", "gptq"), default="gptq_v2", help=form)
    add("--out", type=given_path, help="(default: gptq or gptq-merged in the run's folder)")


def export(args) -> None:
    from ..base.lock import held

    opened = open_options(args)
    with held(opened.folder):
        write_checkpoint(opened, args)


def write_checkpoint(opened: Opened, args) -> None:
    from ..base.paths import short_path
    from ..formats.gptq_checkpoint import export_gptq
    from ..lora.files import find_adapter
    from ..models.checkpoint import load_quantized
    from ..runs.run_folder import check_base

    folder, base = opened.folder, opened.base("quantize")
    adapter = trained_adapter(folder)
    if args.merge and adapter is None:
        remedy = f"leave out --merge, or {opened.command('finetune')}"
        raise FileNotFoundError(f"{short_path(folder)} holds no adapter that was trained on a "
                                f"quantized base; {remedy}")  # fmt: skip
    if adapter:
        check_base(folder)
    model, tokenizer = load_quantized(base, opened.device, opened.compute_dtype)
    if adapter:
        find_adapter(model, adapter)  # it raises unless it was trained on this base
    if args.merge:
        merge_adapter(model, tokenizer, adapter, args, opened)
        adapter = None  # nothing is left to serve beside it
    out = args.out or folder / ("gptq-merged" if args.merge else "gptq")
    export_gptq(model, out, args.format, tokenizer)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{args.format} checkpoint of {size:,} bytes in {short_path(out)}")
    if adapter:
        print(f"the adapter in {short_path(adapter)} stays beside it")
    print(f"serve with vLLM:\n  {serve_command(out, adapter)}")


def trained_adapter(folder: Path) -> Path | None:
    """The run's adapter, if it was trained on the quantized base."""
    from ..runs.run_folder import read_run

    try:
        about = read_run(folder)
    except FileNotFoundError:
        return None
    return folder / about["path"] if about["trained"] == "qlora" else None


def merge_adapter(model, tokenizer, adapter: Path, args, opened: Opened) -> None:
    """Merge in place, by rounding or by GPTQ with the options that made the base."""
    from ..lora.files import load_adapter
    from ..lora.merge import merge_lora
    from ..models.merge_hessians import merge_hessians
    from ..quant.gptq import GPTQOptions
    from ..quant.recipe import Recipe
    from ..runs.base import read_recipe

    load_adapter(model, adapter)
    hessians, options = None, GPTQOptions()
    if args.merge == "gptq":
        said = read_recipe(opened.folder) or {}
        if said.get("method") == "gptq":  # the model with its adapter is what is to be met
            options = dataclasses.replace(Recipe.from_json(said).options, match_dense=False)
        changed = ", ".join(f"{k}={v}" for k, v in options.changed().items())
        print(f"merging by GPTQ as the base was made: {changed or 'default options'}")
        batches = calibration(opened, args, tokenizer, said)
        hessians = merge_hessians(model, batches, options.needs_halves)
    rows = merge_lora(model, args.merge, hessians, options, unload=True)
    lost = [row.lost for row in rows]
    print(f"merged into {len(rows)} layers by {args.merge}; rounding error over the adapter's "
          f"update: {sum(lost) / len(lost):.2f} on average, {max(lost):.2f} at most")  # fmt: skip


def calibration(opened: Opened, args, tokenizer, recipe: dict) -> list:
    """Batches of what the base was calibrated on, or of what --data names."""
    from ..data.calibration import calibration_hash
    from ..data.sources import TRAINING_SETS

    if not args.data:
        opened = dataclasses.replace(opened, source=recipe.get("calibrated_on"))
    source = opened.source
    if source and source not in TRAINING_SETS and not Path(source).exists():
        raise FileNotFoundError(f"the base was calibrated on {source}, which is not here: name it, "
                                "or what is to take its place, with --data")
    examples = training_data(opened, args)(tokenizer).train if source else None
    batches = opened.profile.calibration(tokenizer, examples)
    if recipe.get("calibration") not in (None, calibration_hash(batches)):
        print("calibrated on other examples than the base; if it should not be, name its --data")
    return batches


def serve_command(folder: Path, adapter: Path | None = None) -> str:
    """The vLLM command line for an exported folder and an adapter beside it."""
    from ..base.files import read_json

    # vLLM's kernel for grids with zero-points has no bf16.
    words = ["vllm", "serve", str(folder), "--dtype", "float16"]
    if adapter:
        rank = read_json(adapter / "adapter_config.json")["r"]
        room = next((r for r in LORA_RANKS if r >= rank), rank)
        words += ["--enable-lora", "--lora-modules", f"adapter={adapter}"]
        words += ["--max-lora-rank", str(room)]
    return shlex.join(words)
