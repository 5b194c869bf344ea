"""A run as a folder that others serve: its weights as a GPTQ checkpoint, as compressed-tensors or
GGUF, and the contract and card that stand beside them (serving/)."""

import dataclasses
from pathlib import Path

from ..base.paths import short_path
from ..data.calibration import calibration_hash
from ..data.gsm8k import PROMPT
from ..data.sources import TRAINING_SETS
from ..data.tokens import encode_prompt
from ..evaluation.evaluate import REPORT, EvalReport
from ..formats.compressed_tensors import METHOD, export_compressed
from ..formats.gguf_checkpoint import BlockRow, export_gguf
from ..formats.gptq_checkpoint import export_gptq
from ..generation.generate import Decoding
from ..lora.files import find_adapter, load_adapter
from ..lora.merge import merge_lora
from ..models.checkpoint import load_quantized
from ..models.fingerprint import fingerprint
from ..models.merge_hessians import merge_hessians
from ..models.quantize import quantized_layers
from ..quant.gptq import GPTQOptions
from ..quant.recipe import Recipe
from ..serving.card import licence_of, write_card, write_modelfile
from ..serving.contract import (
    GOLDEN,
    adapter_faults,
    ask_of,
    make_contract,
    serving_tokenizer,
    write_contract,
)
from .base import BASE, read_recipe
from .profiles import Profile
from .run_folder import check_base, read_run
from .training_data import prepare

LONGEST = 128  # new tokens of a golden completion


def trained_adapter(folder: Path) -> Path | None:
    """The run's adapter, if it was trained on the quantized base."""
    try:
        about = read_run(folder)
    except FileNotFoundError:
        return None
    return folder / about["path"] if about["trained"] == "qlora" else None


def export_run(profile: Profile, folder: Path, out: Path, form: str = "gptq_v2",
               merge: str | None = None, source: str | None = None, template: str | None = PROMPT,
               report: Path | None = None, device=None,
               compute_dtype: str = "auto") -> list[BlockRow]:  # fmt: skip
    """Write the quantized base in `folder`, with what was trained on it, to `out`; returns a row a
    layer for GGUF, [] for a checkpoint, which an adapter that is not merged stays beside.

    form: "gguf", "compressed-tensors", or a checkpoint_format of export_gptq. merge: "rtn" or "gptq", the latter
    calibrated on `source`, as prepare takes it (calibrated_on says what the base was). template: a
    text with one {question}; None: the tokenizer's own chat template. report: the folder of an
    evaluation of what is exported, for the card; None: outputs/PROFILE/eval, if it is one. Raises
    FileNotFoundError, and ValueError for a base, an adapter and a report that do not belong
    together."""
    adapter, gguf, faults = trained_adapter(folder), form == "gguf", None
    if adapter:
        check_base(folder)
    model, tokenizer = load_quantized(folder / BASE, device, compute_dtype)
    if adapter:
        find_adapter(model, adapter)  # it raises unless it was trained on this base
    tokenizer = serving_tokenizer(tokenizer, template)
    context = model.config.max_position_embeddings
    new = min(profile.max_new_tokens, LONGEST, context // 4)
    asked = {q: encode_prompt(tokenizer, ask_of(tokenizer, q)) for q in golden_questions(profile)}
    asked = {q: ids for q, ids in asked.items() if len(ids) + new <= context}
    if not asked:
        raise ValueError(f"no golden question fits the context of {context} tokens")
    if merge or adapter and gguf:
        load_adapter(model, adapter)
    if merge:
        faults = adapter_faults(model, list(asked.values()))
        _merge(model, tokenizer, merge, profile, folder, source)

    def beside(scratch: Path) -> None:
        """Write what was measured, once it is clear that the weights can be written."""
        if adapter and not merge and not gguf:  # which is served beside the checkpoint
            load_adapter(model, adapter)
        found = _report_of(model, report, Path("outputs") / profile.name / "eval")
        decoding = Decoding(max_new_tokens=new, batch_size=GOLDEN)
        contract = make_contract(model, tokenizer, list(asked), decoding, faults)
        if gguf:
            write_modelfile(scratch, contract, template, context)
        write_contract(contract, scratch)
        write_card(scratch, _described(model, profile.model, folder, merge), contract, found)

    if gguf:
        return export_gguf(model, out, tokenizer, beside=beside)
    if form == METHOD:
        export_compressed(model, out, tokenizer, beside=beside)
    else:
        export_gptq(model, out, form, tokenizer, beside=beside)
    return []


def golden_questions(profile: Profile) -> list[str]:
    """The first of the profile's test problems; sums, where these can't be had."""
    try:
        return [entry["question"] for entry in profile.examples("test")[:GOLDEN]]
    except (OSError, ImportError) as error:
        print(f"the contract asks sums, not the profile's problems ({str(error).splitlines()[0]})")
        asked = "Ava has {} apples and buys {} more. How many apples does she have?"
        return [asked.format(3 * i + 2, 7 * i + 5) for i in range(GOLDEN)]


def _report_of(model, given: Path | None, usual: Path) -> Path | None:
    """The folder of an evaluation of these very weights: the one that is given, else the usual one
    where it is one. Raises ValueError for a given one of other weights."""
    if given is None and not (usual / REPORT).is_file():
        return None
    same = EvalReport.load(given or usual).info.get("weights") == fingerprint(model)
    if given and not same:
        raise ValueError(f"{given} is an evaluation of other weights than are exported; leave out "
                         "--report, or evaluate these")  # fmt: skip
    return given or usual if same else None


def _described(model, name: str, folder: Path, merge: str | None) -> dict[str, str]:
    """What the card says of where the model comes from."""
    recipe, layers = read_recipe(folder) or {}, quantized_layers(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    about = {
        "base model": short_path(Path(name)) if Path(name).exists() else name,
        "licence": licence_of(name) or "",
        "method": ", ".join(sorted({f"{recipe.get('method', '?')}, {m.spec}" for m in layers})),
        "bits a weight": f"{8 * sum(m.held.nbytes for m in layers) / weights:.2f}",
    }
    try:
        run = read_run(folder)
    except FileNotFoundError:
        return about
    merged = f", merged into the weights by {merge}" if merge else ""
    source = (run.get("data") or {}).get("source", "unknown")
    return about | {"adapter": f"{run.get('lora')}{merged}", "trained on": str(source)}


def _merge(model, tokenizer, into: str, profile: Profile, folder: Path, source) -> None:
    """Merge the active adapter, by rounding or by GPTQ with the options that made the base."""
    hessians, options = None, GPTQOptions()
    if into == "gptq":
        said = read_recipe(folder) or {}
        if said.get("method") == "gptq":  # the model with its adapter is what is to be met
            options = dataclasses.replace(Recipe.from_json(said).options, match_dense=False)
        changed = ", ".join(f"{k}={v}" for k, v in options.changed().items())
        print(f"merging by GPTQ as the base was made: {changed or 'default options'}")
        batches = _calibration(profile, tokenizer, source, said)
        hessians = merge_hessians(model, batches, options.needs_halves)
    rows = merge_lora(model, into, hessians, options, unload=True)
    lost = [row.lost for row in rows]
    print(f"merged into {len(rows)} layers by {into}; rounding error over the adapter's "
          f"update: {sum(lost) / len(lost):.2f} on average, {max(lost):.2f} at most")  # fmt: skip


def calibrated_on(folder: Path) -> str | None:
    """What the base was calibrated on, None: train problems. Raises FileNotFoundError where it is
    not here any more."""
    source = (read_recipe(folder) or {}).get("calibrated_on")
    if source and source not in TRAINING_SETS and not Path(source).exists():
        raise FileNotFoundError(f"the base was calibrated on {source}, which is not here: name it, "
                                "or what is to take its place, with --data")
    return source


def _calibration(profile: Profile, tokenizer, source: str | None, recipe: dict) -> list:
    """Batches of the examples of `source`."""
    examples = None
    if source:
        data = prepare(profile, tokenizer, source, profile.train.max_length)
        print(data)
        examples = data.train
    batches = profile.calibration(tokenizer, examples)
    if recipe.get("calibration") not in (None, calibration_hash(batches)):
        print("calibrated on other examples than the base; if it should not be, name its --data")
    return batches
