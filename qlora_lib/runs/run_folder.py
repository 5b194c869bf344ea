"""A run's folder: what it holds, and how its base and adapter are opened again.

    base/      the quantized model, with recipe.json (none for a dense base)
    adapter/   what was trained, in PEFT's layout; model/ after full fine-tuning
    training/  metrics.jsonl, and the checkpoints to resume from
    run.json   how the adapter was made, on which base, and its hash
    verifier/  where one was trained
    .lock      the process that writes here, while it does (base/lock.py)
"""

from pathlib import Path

from ..base.files import read_json, read_proved_json
from ..base.folders import HASHES, check_folder
from ..base.hashes import changes, file_hash
from ..base.paths import short_path
from ..lora.files import load_adapter
from ..lora.inject import set_adapter
from ..lora.layer import adapter_names
from ..lora.targets import find_linears
from ..models.checkpoint import load_quantized
from ..models.load import load_model
from ..models.quantize import apply_recipe, quantized_layers
from ..quant.recipe import Recipe
from ..train.memory import METHODS
from .base import ABOUT, BASE, read_recipe

ADAPTER, MODEL, TRAINING = "adapter", "model", "training"
OLD = Path("result") / "finetuner.json"  # where Finetuner kept its result before


def read_run(folder: Path) -> dict:
    """What run.json says, the same for older runs: trained ("full", "lora" or "qlora"), method (of
    the base's quantization, or "none"), model (a name; None for a module), adapter (its name),
    path (of what was trained), and what else was kept. FileNotFoundError for no finished run,
    ValueError for a damaged one, and where run.json and what was trained are of two runs."""
    if (folder / ABOUT).is_file():
        said = read_proved_json(folder / ABOUT)
        trained = said.get("trained") or ("lora" if said.get("method") == "none" else "qlora")
        said = {"model": None, "adapter": "default", "path": ADAPTER, "trained": trained} | said
        fits = said["path"] in (ADAPTER, MODEL) and trained in METHODS
        if not (fits and isinstance(said["adapter"], str) and "method" in said):
            raise ValueError(f"{short_path(folder / ABOUT)} names no adapter or model of this "
                             "folder; it was changed or is damaged")  # fmt: skip
        result = folder / said["path"]
        if check_folder(result) and result_hash(result) != said.get("result", result_hash(result)):
            raise ValueError(f"{short_path(result)} and {ABOUT} are of two runs: a save died "
                             "between them. Give its command again; --resume trains nothing anew")
        return said
    if (folder / OLD).is_file():
        said = read_json(folder / OLD)
        ((kind, spec),) = (said["spec"] or {None: None}).items()
        method = {None: "none", "NF4Spec": "nf4", "QuantSpec": "rtn"}[kind]
        said |= {"trained": said["method"], "method": method}
        said["path"] = f"result/{MODEL if said['trained'] == 'full' else ADAPTER}"
        return said | ({"recipe": {"method": method, "spec": spec}} if spec else {})
    raise FileNotFoundError(f"{short_path(folder)} holds no finished run")


def result_hash(result: Path) -> str:
    """The hash of what was trained, as run.json names it: of the hashes of its files."""
    return file_hash(result / HASHES)


def check_base(folder: Path) -> None:
    """Raises ValueError where run.json says that the adapter was trained on another base."""
    then, now = read_run(folder).get("base"), read_recipe(folder)
    if then and now and (changed := changes(then, now)):
        check_folder(folder / BASE)  # a damaged recipe is another thing
        raise ValueError(f"the adapter in {short_path(folder)} was trained on another base "
                         f"({changed}); quantize as it was then, or finetune on this one")


def load_base(folder: Path, device=None, compute_dtype: str = "auto"):
    """(model, tokenizer) of `folder`/base; ValueError unless all of its linears are quantized."""
    model, tokenizer = load_quantized(folder / BASE, device, compute_dtype)
    dense = sorted(set(find_linears(model, "all")) - set(quantized_layers(model)))
    if dense:
        raise ValueError(f"{short_path(folder / BASE)}: {len(dense)} layers are not quantized, "
                         f"such as {dense[0]}")  # fmt: skip
    return model, tokenizer


def load_run(folder: Path | str, model=None, tokenizer=None, device=None, compute_dtype="auto"):
    """(model, tokenizer) of a finished run, in eval mode, its adapter the default.
    model, tokenizer: the base, where it was handed over as a module; a dense one is quantized as
    the run did. Raises FileNotFoundError, and ValueError for an unknown or another base."""
    folder = Path(folder)
    about, here = read_run(folder), short_path(folder)
    trained, where = about["trained"], (device, compute_dtype)
    if trained == "full":
        return load_model(folder / about["path"], *where)
    if model is None and trained == "qlora" and (folder / BASE).is_dir():
        check_base(folder)
        model, tokenizer = load_base(folder, *where)
    elif model is None and about["model"] is None:
        raise ValueError(f"{here}: its base was handed over as a module; give model=, tokenizer=")
    elif model is None:
        model, tokenizer = load_model(about["model"], *where)
    if "recipe" in about and not quantized_layers(model):
        apply_recipe(model, Recipe.from_json(about["recipe"]))
    if bool(quantized_layers(model)) != (trained == "qlora"):
        kind = "a quantized" if trained == "qlora" else "a dense"
        raise ValueError(f"{here}: the adapter was trained on {kind} base; give that one")
    name = about["adapter"]
    if name in adapter_names(model):
        raise ValueError(f"the model has an adapter {name!r} already; give its bare base")
    load_adapter(model, folder / about["path"], name)
    set_adapter(model, name)
    return model.eval(), tokenizer
