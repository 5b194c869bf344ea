"""`python -m qlora_lib export`: a run as a GPTQ checkpoint, and the command that serves it."""

import dataclasses
import shlex
from pathlib import Path

from ..base.paths import given_path
from .common import Opened, add_command, open_options
from .finetune import training_data

NEEDS = {"data": ("with --merge gptq, which calibrates on it", lambda args: args.merge == "gptq")}
LONGEST = 128  # new tokens of a golden completion
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes


def add_commands(commands) -> None:
    text = "write a GPTQ checkpoint (vLLM, transformers, GPTQModel) or GGUF (llama.cpp, Ollama)"
    shared = "profile model data folder device compute-dtype"
    add = add_command(commands, "export", export, text, shared, needs=NEEDS)
    merge = "put the adapter into the weights and quantize them again; without, it stays beside"
    add("--merge", choices=("gptq", "rtn"), help=merge)
    form = "gptq is for readers that know only version 1 (default: gptq_v2)"
    add("--format", choices=("gptq_v2", "gptq", "gguf"), default="gptq_v2", help=form)
    chat = "the tokenizer's own chat template, instead of that of the course's problems"
    add("--chat", action="store_true", help=chat)
    report = "of an evaluation of this very model, for the card (default: outputs/PROFILE/eval)"
    add("--report", type=given_path, help=report)
    add("--out", type=given_path, help="(default: gptq, gptq-merged, gguf ... in the run's folder)")


def export(args) -> None:
    from ..base.lock import held

    opened = open_options(args)
    with held(opened.folder):
        write_checkpoint(opened, args)


def write_checkpoint(opened: Opened, args) -> None:
    from ..base.paths import short_path
    from ..data.gsm8k import PROMPT
    from ..data.tokens import encode_prompt
    from ..formats.gguf_checkpoint import export_gguf
    from ..formats.gptq_checkpoint import export_gptq
    from ..generation.generate import Decoding
    from ..lora.files import find_adapter, load_adapter
    from ..models.checkpoint import load_quantized
    from ..runs.run_folder import check_base
    from ..serving.card import write_card, write_modelfile
    from ..serving.contract import (
        GOLDEN,
        adapter_faults,
        ask_of,
        make_contract,
        serving_tokenizer,
        write_contract,
    )

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
    out = args.out or folder / (args.format[:4] + ("-merged" if args.merge else ""))
    template = None if args.chat else PROMPT
    tokenizer = serving_tokenizer(tokenizer, template)
    context = model.config.max_position_embeddings
    new, faults = min(opened.profile.max_new_tokens, LONGEST, context // 4), None
    asked = {q: encode_prompt(tokenizer, ask_of(tokenizer, q)) for q in golden_questions(opened)}
    asked = {q: ids for q, ids in asked.items() if len(ids) + new <= context}
    if not asked:
        raise ValueError(f"no golden question fits the context of {context} tokens")
    if args.merge or adapter and args.format == "gguf":
        load_adapter(model, adapter)
    if args.merge:
        faults = adapter_faults(model, list(asked.values()))
        merge_adapter(model, tokenizer, args, opened)
        adapter = None  # nothing is left to serve beside it
    about = described(opened, model, args)

    def beside(scratch: Path) -> None:
        """Write what was measured, once it is clear that the weights can be written."""
        if adapter and args.format != "gguf":  # which is served beside the checkpoint
            load_adapter(model, adapter)
        report = report_of(model, args.report, Path("outputs") / opened.profile.name / "eval")
        decoding = Decoding(max_new_tokens=new, batch_size=GOLDEN)
        contract = make_contract(model, tokenizer, list(asked), decoding, faults)
        if args.format == "gguf":
            write_modelfile(scratch, contract, template, context)
        write_contract(contract, scratch)
        write_card(scratch, about, contract, report)

    if args.format == "gguf":
        rows = export_gguf(model, out, tokenizer, beside=beside)
        for kind in sorted({row.kind for row in rows}):
            lost = [row.lost for row in rows if row.kind == kind]
            said = f"lost {max(lost):.1e} of a weight at most" if max(lost) else "nothing is lost"
            print(f"{len(lost)} layers as {kind}: {said}")
        size = sum(file.stat().st_size for file in out.glob("*.gguf"))
        print(f"gguf of {size:,} bytes in {short_path(out)}")
        verify = shlex.join(["python", "-m", "qlora_lib", "verify", str(out)])
        print(f"ask llama.cpp whether it answers as measured:\n  {verify}")
        words = ["ollama", "create", out.name, "-f", str(out / "Modelfile")]
        print(f"serve with Ollama:\n  {shlex.join(words)}")
        return
    export_gptq(model, out, args.format, tokenizer, beside=beside)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{args.format} checkpoint of {size:,} bytes in {short_path(out)}")
    if adapter:
        print(f"the adapter in {short_path(adapter)} stays beside it")
    print(f"serve with vLLM:\n  {serve_command(out, adapter)}")


def golden_questions(opened: Opened) -> list[str]:
    """The first of the profile's test problems; sums, where these can't be had."""
    from ..serving.contract import GOLDEN

    try:
        return [entry["question"] for entry in opened.profile.examples("test")[:GOLDEN]]
    except (OSError, ImportError) as error:
        print(f"the contract asks sums, not the profile's problems ({str(error).splitlines()[0]})")
        asked = "Ava has {} apples and buys {} more. How many apples does she have?"
        return [asked.format(3 * i + 2, 7 * i + 5) for i in range(GOLDEN)]


def report_of(model, given: Path | None, usual: Path) -> Path | None:
    """The folder of an evaluation of these very weights: the one that is given, else the usual one
    where it is one. Raises ValueError for a given one of other weights."""
    from ..evaluation.evaluate import EvalReport
    from ..models.fingerprint import fingerprint

    try:
        found = EvalReport.load(given or usual)
    except FileNotFoundError:
        if given:
            raise
        return None
    if found.info.get("weights") == fingerprint(model):
        return given or usual
    if given:
        raise ValueError(f"{given} is an evaluation of other weights than are exported; leave out "
                         "--report, or evaluate these")  # fmt: skip
    return None


def described(opened: Opened, model, args) -> dict[str, str]:
    """What the card says of where the model comes from."""
    from ..base.paths import short_path
    from ..models.quantize import quantized_layers
    from ..runs.base import read_recipe
    from ..runs.run_folder import read_run
    from ..serving.card import licence_of

    name, recipe = opened.profile.model, read_recipe(opened.folder) or {}
    layers = quantized_layers(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    about = {
        "base model": short_path(Path(name)) if Path(name).exists() else name,
        "licence": licence_of(name) or "",
        "method": ", ".join(sorted({f"{recipe.get('method', '?')}, {m.spec}" for m in layers})),
        "bits a weight": f"{8 * sum(m.held.nbytes for m in layers) / weights:.2f}",
    }
    try:
        run = read_run(opened.folder)
    except FileNotFoundError:
        return about
    data = run.get("data") or {}
    merged = f", merged into the weights by {args.merge}" if args.merge else ""
    about["adapter"] = f"{run.get('lora')}{merged}"
    return about | {"trained on": str(data.get("source", "unknown"))}


def trained_adapter(folder: Path) -> Path | None:
    """The run's adapter, if it was trained on the quantized base."""
    from ..runs.run_folder import read_run

    try:
        about = read_run(folder)
    except FileNotFoundError:
        return None
    return folder / about["path"] if about["trained"] == "qlora" else None


def merge_adapter(model, tokenizer, args, opened: Opened) -> None:
    """Merge the active adapter, by rounding or by GPTQ with the options that made the base."""
    from ..lora.merge import merge_lora
    from ..models.merge_hessians import merge_hessians
    from ..quant.gptq import GPTQOptions
    from ..quant.recipe import Recipe
    from ..runs.base import read_recipe

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
