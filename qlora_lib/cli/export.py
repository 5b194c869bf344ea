"""`python -m qlora_lib export`: a run as a GPTQ checkpoint, and the command that serves it."""

import shlex
from pathlib import Path

from .common import check_base
from .finetune import training_data

# torch and transformers take seconds to import, so --help does without them.

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes


def add_export(commands, shared) -> None:
    """The command and its options."""
    text = "write a GPTQ checkpoint, for vLLM, transformers and GPTQModel"
    add = commands.add_parser("export", parents=[shared], help=text).add_argument
    merge = "put the adapter into the weights and quantize them again; without, it stays beside"
    add("--merge", choices=("gptq", "rtn"), help=merge)
    form = "gptq is for readers that know only version 1 (default: gptq_v2)"
    add("--format", choices=("gptq_v2", "gptq"), default="gptq_v2", help=form)
    add("--out", type=Path, help="(default: gptq or gptq-merged in the run's folder)")


def export(profile, args) -> None:
    """Export args.folder/base, with the adapter merged into it if args.merge says how."""
    from ..base.paths import short_path
    from ..formats.gptq_checkpoint import export_gptq
    from ..models.checkpoint import load_quantized

    base, adapter = args.folder / "base", trained_adapter(args.folder)
    if not base.is_dir():
        command = f"python -m qlora_lib quantize --profile {profile.name}"
        raise FileNotFoundError(f"there is no quantized base {short_path(base)}; `{command}`")
    if args.merge and adapter is None:
        raise FileNotFoundError(
            f"{short_path(args.folder)} holds no adapter that was trained on a quantized base; "
            f"leave out --merge, or `python -m qlora_lib finetune --profile {profile.name}`"
        )
    if adapter:
        check_base(args.folder)
    model, tokenizer = load_quantized(base, args.device, args.compute_dtype)
    if args.merge:
        batches = None
        if args.merge == "gptq":
            batches = calibration(profile, args, tokenizer)
        merge_adapter(model, adapter, args.merge, batches)
        adapter = None
    out = args.out or args.folder / ("gptq-merged" if args.merge else "gptq")
    export_gptq(model, out, args.format, tokenizer)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{args.format} checkpoint of {size:,} bytes in {short_path(out)}")
    if adapter:
        print(f"the adapter in {short_path(adapter)} stays beside it")
    print(f"serve with vLLM:\n  {serve_command(out, adapter)}")


def trained_adapter(folder: Path) -> Path | None:
    """The run's adapter, if it was trained on the quantized base."""
    from ..base.files import read_json

    if not (folder / "run.json").is_file() or read_json(folder / "run.json")["method"] == "none":
        return None
    return folder / "adapter"


def calibration(profile, args, tokenizer) -> list:
    """Batches of what the base was calibrated on, or of what --data names."""
    from ..base.files import read_json
    from ..data.calibration import calibration_hash
    from ..data.sources import TRAINING_SETS

    recipe = args.folder / "base" / "recipe.json"
    recipe = read_json(recipe) if recipe.is_file() else {}
    if not args.data:
        args.source = recipe.get("calibrated_on")
    source = args.source
    if source and source not in TRAINING_SETS and not Path(source).exists():
        raise FileNotFoundError(
            f"the base was calibrated on {source}, which is not here: name it, or what is to take "
            "its place, with --data"
        )
    examples = training_data(profile, args, tokenizer).train if source else None
    batches = profile.calibration(tokenizer, examples)
    if recipe.get("calibration") not in (None, calibration_hash(batches)):
        print("calibrated on other examples than the base; if it should not be, name its --data")
    return batches


def merge_adapter(model, adapter: Path, method: str, batches: list | None) -> None:
    """Merge in place; "gptq" calibrates on the batches."""
    from .. import merge_lora
    from ..lora.files import load_adapter
    from ..models.merge_hessians import merge_hessians

    load_adapter(model, adapter)
    hessians = merge_hessians(model, batches) if method == "gptq" else None
    rows = merge_lora(model, method, hessians, unload=True)
    lost = [row.lost for row in rows]
    print(
        f"merged into {len(rows)} layers by {method}; rounding error over the adapter's update: "
        f"{sum(lost) / len(lost):.2f} on average, {max(lost):.2f} at most"
    )


def serve_command(folder: Path, adapter: Path | None = None) -> str:
    """The vLLM command line for an exported folder, with an adapter beside it or without.

    float16: vLLM's kernel for grids with zero-points has no bf16.
    """
    from ..base.files import read_json

    words = ["vllm", "serve", str(folder), "--dtype", "float16"]
    if adapter:
        rank = read_json(adapter / "adapter_config.json")["r"]
        room = next((r for r in LORA_RANKS if r >= rank), rank)
        words += ["--enable-lora", "--lora-modules", f"adapter={adapter}"]
        words += ["--max-lora-rank", str(room)]
    return shlex.join(words)
