"""`python -m qlora_lib export`: a run as a checkpoint of others, and the command that serves it."""

import shlex
from pathlib import Path

from ..base.paths import given_path
from .common import Opened, add_command, open_options

NEEDS = {"data": ("with --merge gptq, which calibrates on it", lambda args: args.merge == "gptq")}
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes


def add_commands(commands) -> None:
    text = "write a checkpoint (vLLM, transformers, GPTQModel) or GGUF (llama.cpp, Ollama)"
    shared = "profile model data folder device compute-dtype"
    add = add_command(commands, "export", export, text, shared, needs=NEEDS)
    merge = "put the adapter into the weights and quantize them again; without, it stays beside"
    add("--merge", choices=("gptq", "rtn"), help=merge)
    form = ("gptq is for readers that know only version 1 (default: gptq_v2); compressed-tensors "
            "takes bases in nvfp4, mxfp4 and e4m3, and symmetric grids")  # fmt: skip
    add("--format", choices=("gptq_v2", "gptq", "compressed-tensors", "gguf"), default="gptq_v2",
        help=form)  # fmt: skip
    chat = "the tokenizer's own chat template, instead of that of the course's problems"
    add("--chat", action="store_true", help=chat)
    report = "of an evaluation of this very model, for the card (default: outputs/PROFILE/eval)"
    add("--report", type=given_path, help=report)
    add("--out", type=given_path, help="(default: gptq, gptq-merged, gguf ... in the run's folder)")


def export(args) -> None:
    from ..base.lock import held

    opened = open_options(args)
    with held(opened.folder):
        write_and_say(opened, args)


def write_and_say(opened: Opened, args) -> None:
    from ..base.paths import short_path
    from ..data.gsm8k import PROMPT
    from ..runs.export import calibrated_on, export_run, trained_adapter

    folder = opened.folder
    opened.base("quantize")  # which raises where there is none
    adapter = trained_adapter(folder)
    if args.merge and adapter is None:
        remedy = f"leave out --merge, or {opened.command('finetune')}"
        raise FileNotFoundError(f"{short_path(folder)} holds no adapter that was trained on a "
                                f"quantized base; {remedy}")  # fmt: skip
    adapter = None if args.merge else adapter  # nothing is left to serve beside it
    name = args.format.partition("_")[0] + ("-merged" if args.merge else "")
    out = args.out or folder / name
    own = args.merge == "gptq" and not args.data
    source = calibrated_on(folder) if own else opened.source
    rows = export_run(opened.profile, folder, out, args.format, args.merge, source,
                      None if args.chat else PROMPT, args.report, opened.device,
                      opened.compute_dtype)  # fmt: skip
    pattern = "*.gguf" if args.format == "gguf" else "*.safetensors"
    size = sum(file.stat().st_size for file in out.glob(pattern))
    if args.format == "gguf":
        for kind in sorted({row.kind for row in rows}):
            lost = [row.lost for row in rows if row.kind == kind]
            said = f"lost {max(lost):.1e} of a weight at most" if max(lost) else "nothing is lost"
            print(f"{len(lost)} layers as {kind}: {said}")
        print(f"gguf of {size:,} bytes in {short_path(out)}")
        verify = shlex.join(["python", "-m", "qlora_lib", "verify", str(out)])
        print(f"ask llama.cpp whether it answers as measured:\n  {verify}")
        words = ["ollama", "create", out.name, "-f", str(out / "Modelfile")]
        print(f"serve with Ollama:\n  {shlex.join(words)}")
        return
    print(f"{args.format} checkpoint of {size:,} bytes in {short_path(out)}")
    if adapter:
        print(f"the adapter in {short_path(adapter)} stays beside it")
    dtype = "bfloat16" if args.format == "compressed-tensors" else "float16"
    print(f"serve with vLLM:\n  {serve_command(out, adapter, dtype)}")


def serve_command(folder: Path, adapter: Path | None = None, dtype: str = "float16") -> str:
    """The vLLM command line for an exported folder and an adapter beside it."""
    from ..base.files import read_json

    # vLLM's kernel for grids with zero-points has no bf16; compressed-tensors decodes in bf16.
    words = ["vllm", "serve", str(folder), "--dtype", dtype]
    if adapter:
        rank = read_json(adapter / "adapter_config.json")["r"]
        room = next((r for r in LORA_RANKS if r >= rank), rank)
        words += ["--enable-lora", "--lora-modules", f"adapter={adapter}"]
        words += ["--max-lora-rank", str(room)]
    return shlex.join(words)
