"""`python -m qlora_lib export`: a run as a GPTQ checkpoint, and the command that serves it."""

import json
import shlex
from pathlib import Path

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
    from ..checkpoint import load_quantized
    from ..data import short_path
    from ..gptq_format import export_gptq

    base, adapter = args.folder / "base", trained_adapter(args.folder)
    if not base.is_dir():
        command = f"python -m qlora_lib quantize --profile {profile.name}"
        raise FileNotFoundError(f"there is no quantized base {short_path(base)}; `{command}`")
    if args.merge and adapter is None:
        raise FileNotFoundError(
            f"{short_path(args.folder)} holds no adapter that was trained on a quantized base; "
            f"leave out --merge, or `python -m qlora_lib finetune --profile {profile.name}`"
        )
    model, tokenizer = load_quantized(base, args.device, args.compute_dtype)
    if args.merge:
        merge_adapter(model, tokenizer, adapter, args.merge, profile)
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
    from ..checkpoint import read_json

    if not (folder / "run.json").is_file() or read_json(folder / "run.json")["method"] == "none":
        return None
    return folder / "adapter"


def merge_adapter(model, tokenizer, adapter: Path, method: str, profile) -> None:
    """Merge in place; "gptq" calibrates on the problems that the base was calibrated on."""
    from .. import merge_lora
    from ..adapters import load_adapter
    from ..data import calibration_batches, format_gsm8k
    from ..merge_loss import merge_hessians

    load_adapter(model, adapter)
    hessians = None
    if method == "gptq":
        pairs = [format_gsm8k(entry) for entry in profile.examples("train")]
        batches = calibration_batches(tokenizer, pairs, max_length=profile.train.max_length)
        hessians = merge_hessians(model, batches)
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
    words = ["vllm", "serve", str(folder), "--dtype", "float16"]
    if adapter:
        rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
        room = next((r for r in LORA_RANKS if r >= rank), rank)
        words += ["--enable-lora", "--lora-modules", f"adapter={adapter}"]
        words += ["--max-lora-rank", str(room)]
    return shlex.join(words)
