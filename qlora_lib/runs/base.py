"""What a run of a real model keeps between its steps: the quantized base, and its results.

Notebooks and command line go through the same stages. Each is made once and taken from the
run's folder afterwards, as long as weights and settings are those it was made with; training
and evaluation keep their own state there (train.py, evaluation.py)."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..base import processes
from ..base.devices import default_device, dtype_name, resolve_dtype
from ..base.files import check_place, read_json, write_json_atomic
from ..base.hashes import weights_id
from ..base.paths import DATA, short_path
from ..base.stamp import stamp
from ..data.calibration import calibration_hash
from ..data.sources import TRAINING_SETS
from ..lora.targets import ALL_LINEAR, ATTENTION
from ..models.checkpoint import QUANTIZATION, load_quantized, save_quantized
from ..models.load import REASONS
from ..models.quantize import LayerReport
from ..models.stream import REPORT, quantize_checkpoint
from ..quant.gptq import GPTQOptions
from ..quant.grid import QuantSpec
from ..quant.nf4 import NF4Spec
from ..train.config import TrainConfig
from ..train.loss import CHUNK
from ..train.measure import check_fits
from ..train.memory import memory_ledger


def check_memory(
    profile,
    config: TrainConfig,
    rank: int,
    target_modules,
    spec: QuantSpec | NF4Spec | None = None,
    device=None,
    compute_dtype: str | None = None,
) -> None:
    """Refuse, before anything is loaded, a training that would not fit into memory.

    spec: of the quantized base; None: a dense one. Predicted for the longest sequences that
    are allowed. Where there is no config yet, or no ledger for such a model, it says so and
    lets the run go on. Raises NotEnoughMemory, with the ledger.
    """
    from transformers import AutoConfig

    device = device or default_device()
    words = {"all": ALL_LINEAR, "attention": ATTENTION}
    targets = target_modules if isinstance(target_modules, tuple) else words[target_modules]
    dtype = dtype_name(resolve_dtype(compute_dtype or profile.compute_dtype, device))
    try:
        ledger = memory_ledger(
            AutoConfig.from_pretrained(profile.model), "qlora" if spec else "lora",
            config.batch_size, config.max_length, rank, targets, spec or NF4Spec(),
            config.gradient_checkpointing, dtype, config.optimizer, CHUNK,
        )  # fmt: skip
    except (OSError, ValueError) as error:  # what is wrong with it, loading says better
        print(f"memory: not predicted ({str(error).splitlines()[0]})")
        return
    check_fits(ledger, device)
    print(f"memory: {ledger.peak / 1e9:.2f} GB predicted at the peak of training")


def quantized_base(profile, folder: Path, *args, device=None, compute_dtype=None, **how):
    """(model, tokenizer) of the base that `make_base` makes, with the same arguments, or finds."""
    made = make_base(profile, folder, *args, device=device, compute_dtype=compute_dtype, **how)
    return made or load_quantized(folder / "base", device, compute_dtype or profile.compute_dtype)


def make_base(
    profile,
    folder: Path,
    spec: QuantSpec | NF4Spec = QuantSpec(bits=4, group_size=64),
    method: str | None = None,
    device=None,
    compute_dtype: str | None = None,
    target_modules="all",
    calibrated_on: str | None = None,
    examples: Callable | None = None,
    stream: bool = False,
    spill: Path | None = None,
    options: GPTQOptions = GPTQOptions(),
):
    """See that `folder`/base holds the profile's model, quantized so; keep it if it does.

    Returns (model, tokenizer) where they are in memory anyway, else None. The first process
    works, while the others wait. method: as in Profile.load. calibrated_on, examples: a name,
    and a function from the tokenizer to the pairs that GPTQ sees, where those are not the
    profile's train problems. stream, spill: one decoder block in memory at a time
    (quantize_checkpoint); a hub model is downloaded first, and a killed run goes on.
    options: of GPTQ.
    The base is made anew, too, when the calibration examples are others than they were, but for
    published sets. Raises FileNotFoundError where the profile has no weights, and what check_place
    and quantizing raise.
    """
    from transformers import AutoTokenizer

    method = method or ("nf4" if isinstance(spec, NF4Spec) else "gptq")
    dtype = compute_dtype or profile.compute_dtype
    recipe = {
        "method": method,
        "spec": dataclasses.asdict(spec),
        "weights": weights_id(profile.model),
        "compute_dtype": dtype,
    }
    if target_modules != "all":
        recipe["targets"] = target_modules
    if calibrated_on and method == "gptq":
        recipe["calibrated_on"] = calibrated_on
    if method == "gptq":
        recipe |= options.changed()
    base, made = folder / "base", []
    pairs = examples if "calibrated_on" in recipe else None
    seen = None  # by GPTQ: a hash, as a function of the tokenizer
    if method == "gptq" and calibrated_on not in TRAINING_SETS:

        def seen(tokenizer) -> str:
            return calibration_hash(profile.calibration(tokenizer, pairs and pairs(tokenizer)))

    def make() -> None:
        if _is_made_so(base, recipe, seen):
            print(f"base: {short_path(base)} is there, with these settings")
            return
        check_place(base, QUANTIZATION)
        print(f"base: {'streaming' * stream or 'quantizing'} {short_path(Path(profile.model))} "
              f"with {method}")  # fmt: skip
        if stream:
            source = dataclasses.replace(profile, model=str(_local(profile.model)))
            _stream(source, base, spec, method, options, target_modules, pairs, device, dtype, spill)
        else:
            model, tokenizer = profile.load(device=device, compute_dtype=dtype)
            report = profile.quantize(
                model, tokenizer, spec, method, target_modules, pairs and pairs(tokenizer),
                options,
            )
            for row in report:
                _show(row)
            save_quantized(model, tokenizer, base)
            made.append((model, tokenizer))
            before, after = sum(r.bytes_before for r in report), sum(r.bytes_after for r in report)
            print(f"  {before:,} -> {after:,} bytes, saved to {short_path(base)}")
        if seen:
            recipe["calibration"] = seen(AutoTokenizer.from_pretrained(base))
        write_json_atomic(base / "recipe.json", recipe)

    processes.on_first(make)
    return made[0] if made else None


def _is_made_so(base: Path, recipe: dict, seen: Callable | None) -> bool:
    from transformers import AutoTokenizer

    if not (base / "recipe.json").is_file():
        return False
    made = read_json(base / "recipe.json")
    before = made.pop("calibration", None)  # older ones do not say
    # Compared as JSON holds it, which has no tuples.
    if made != json.loads(json.dumps(recipe)):
        return False
    try:
        return not (seen and before) or seen(AutoTokenizer.from_pretrained(base)) == before
    except FileNotFoundError:  # problems that can't be read now, such as the hub's
        return True


def _show(row: LayerReport) -> None:
    error = "" if row.output_error is None else f"   output error {row.output_error:.4f}"
    # print would break a progress bar
    tqdm.write(f"  {row.name:<34} {row.bits_per_weight:.2f} bits a weight{error}")


def _stream(
    profile, base, spec, method, options, target_modules, pairs, device, dtype, spill
) -> None:
    from transformers import AutoTokenizer

    batches = None
    if method == "gptq":
        tokenizer = AutoTokenizer.from_pretrained(profile.model)
        batches = profile.calibration(tokenizer, pairs and pairs(tokenizer))
    quantize_checkpoint(
        profile.model, base, spec, batches, method, options, target_modules=target_modules,
        compute_dtype=dtype, device=device, spill=spill, progress=_show,
    )  # fmt: skip
    made = read_json(base / REPORT)
    print(
        f"  {made['weight_bytes']:,} bytes for {made['parameters']:,} parameters, "
        f"{made['bits_per_parameter']:.2f} bits each, saved to {short_path(base)}"
    )


def _local(model: str) -> Path:
    """The folder of a model's safetensors; a hub id is downloaded into the hub's cache."""
    if (Path(model) / "config.json").is_file():
        return Path(model)
    if Path(model).exists():
        raise FileNotFoundError(f"streaming reads a folder with config.json, {model} is none")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds, all with one remedy
        reason = next((why for sign, why in REASONS.items() if sign in str(error).lower()), error)
        raise FileNotFoundError(
            f"{model} could not be downloaded: {reason}. A local folder does instead: MODEL=, "
            "--model (LLaMA-2-7B also as NousResearch/Llama-2-7b-hf, ungated)"
        ) from error


def random_weights(model) -> bool:
    """Whether the checkpoint says of itself that its weights are random: it then shows memory
    and time, and no accuracy."""
    return bool(getattr(model.config, "random_weights", False))


def keep_result(profile: str, part: str, model, facts: dict, seed: int) -> Path:
    """Write `facts` and a stamp to data/results/<profile>-<part>.json; for random weights to
    outputs/<profile>, where nothing is mistaken for a result. Returns the path."""
    is_random = random_weights(model)
    folder = DATA.parent / "outputs" / profile if is_random else DATA / "results"
    path = folder / f"{profile}-{part}.json"
    made = {"random_weights": is_random, "model": short_path(Path(model.config._name_or_path))}
    write_json_atomic(path, made | facts | {"stamp": stamp(seed)})
    return path
