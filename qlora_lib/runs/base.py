"""The quantized base of a run: made once by its plan, and taken from the run's folder afterwards.

`FOLDER/base` holds the packed model and recipe.json, which says what made it: weights, recipe,
dtype, calibration examples. Where one of them is another one, the base is made anew.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..base import processes
from ..base.files import read_json, read_proved_json
from ..base.folders import check_folder, check_place
from ..base.hashes import weights_id
from ..base.lock import held
from ..base.paths import short_path
from ..data.calibration import calibration_hash
from ..data.sources import TRAINING_SETS
from ..models.checkpoint import QUANTIZATION, load_quantized, save_quantized
from ..models.load import is_whole, load_model, local_folder
from ..models.quantize import LayerReport, apply_recipe, quantized_layers
from ..models.settings import read_tokenizer
from ..models.stream import REPORT, quantize_checkpoint
from ..quant.recipe import Recipe

BASE, RECIPE = "base", "recipe.json"  # in the run's folder; in the base's
ABOUT = "run.json"  # in the run's folder: how what was trained was made, and on which base
Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class BasePlan:
    """Whose weights are quantized, by which recipe, and on what GPTQ is calibrated."""

    model: str  # a hub id, a folder or a GGUF file
    recipe: Recipe
    calibrate: Callable[[object], Batches] | None = None  # the tokenizer to batches, for GPTQ
    calibrated_on: str | None = None  # what these come from; None: the profile's train problems
    compute_dtype: str = "auto"
    device: str | None = None
    stream: bool = False  # one decoder block in memory at a time
    spill: Path | None = None  # with stream: a folder to keep activations in
    load: Callable | None = None  # gives (model, tokenizer); None: load_model
    any_base: bool = False  # weights that are NF4 already will do, whatever the recipe
    _batches: list[Batches] = field(default_factory=list, init=False, repr=False, compare=False)

    def record(self) -> dict:
        """What recipe.json says of this plan's base, but for the calibration's hash."""
        said = {"weights": weights_id(self.model), "compute_dtype": self.compute_dtype}
        if self.recipe.method == "gptq" and self.calibrated_on:
            said["calibrated_on"] = self.calibrated_on
        return self.recipe.as_json() | said

    def whole_record(self, tokenizer) -> dict:
        """What recipe.json says of this plan's base."""
        seen = self.calibration_hash(tokenizer)
        return self.record() | ({"calibration": seen} if seen else {})

    def dense(self):
        """(model, tokenizer) as its weights come, before anything is quantized here."""
        if self.load:
            return self.load()
        return load_model(self.model, self.device, self.compute_dtype)

    def batches(self, tokenizer) -> Batches | None:
        """What GPTQ is calibrated on, tokenized once; None for other methods."""
        return self.shown(tokenizer) if self.recipe.method == "gptq" else None

    def shown(self, tokenizer) -> Batches:
        """The calibration batches, tokenized once, whatever the method."""
        if not self._batches:
            self._batches.append(self.calibrate(tokenizer))
        return self._batches[0]

    def dense_weights(self):
        """The weights before quantization: with `stream` their folder, of which a layer at a time
        can be read, else the model. Raises ValueError for weights that are packed already."""
        if self.stream and not is_whole(self.model):
            return local_folder(self.model)
        model, _ = self.dense()
        if quantized_layers(model):
            raise ValueError(f"{short_path(Path(self.model))} holds packed weights, and what "
                             "rounding lost shows only beside dense ones; take init='kaiming'")
        return model

    def calibration_hash(self, tokenizer) -> str | None:
        """The hash of what GPTQ sees; None for other methods and published sets."""
        if self.recipe.method != "gptq" or self.calibrated_on in TRAINING_SETS:
            return None
        return calibration_hash(self.batches(tokenizer))


def quantized_base(plan: BasePlan, folder: Path | None):
    """(model, tokenizer) of the base in `folder`, made first if need be; None: not kept on disk."""
    if folder is None:
        return _quantize(plan)
    made = make_base(plan, folder)
    return made or load_quantized(Path(folder) / BASE, plan.device, plan.compute_dtype)


def make_base(plan: BasePlan, folder: Path):
    """Keep `folder`/base if it is what the plan makes, else make it, in the first process; returns
    (model, tokenizer) where they are in memory anyway, else None."""
    base, made = Path(folder) / BASE, []

    def make() -> None:
        if _is_made_so(base, plan):
            print(f"base: {short_path(base)} is there, with these settings")
            return
        with held(folder):  # only now: what is there already may be read by many at once
            check_place(base, QUANTIZATION)
            tell_of_orphan(Path(folder))
            stream = plan.stream and not is_whole(plan.model)
            print(f"base: {'streaming' if stream else 'quantizing'} {short_path(Path(plan.model))} "
                  f"with {plan.recipe.method}")  # fmt: skip
            if plan.stream and not stream:
                print("  read whole: neither a GGUF file nor packed weights can be streamed")
            if stream:
                _stream(plan, base)
            else:
                made.append(_quantize(plan, base))

    processes.on_first(make)
    return made[0] if made else None


def read_recipe(folder: Path) -> dict | None:
    """What recipe.json says of `folder`/base; None where there is none."""
    path = Path(folder) / BASE / RECIPE
    if not path.parent.is_dir():
        check_folder(path.parent)  # which finishes a save that died
    return read_json(path) if path.is_file() else None


def tell_of_orphan(folder: Path) -> None:
    """Print which adapter another base in `folder` leaves without its own, if there is one."""
    recipe = read_recipe(folder)
    about = read_proved_json(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    if recipe and about.get("base") == recipe:
        print(f"note: what was trained in {short_path(folder)} needs the base that is replaced now;"
              " quantize as before, or train again, to use it")  # fmt: skip


def _is_made_so(base: Path, plan: BasePlan) -> bool:
    made = read_recipe(base.parent)
    if made is None:
        return False
    check_folder(base)
    before = made.pop("calibration", None)  # older ones do not say
    if made != json.loads(json.dumps(plan.record())):  # as JSON holds it, which has no tuples
        return False
    if before is None:
        return True
    try:
        return plan.calibration_hash(read_tokenizer(base)) in (before, None)
    except FileNotFoundError:  # problems that can't be read now, such as the hub's
        return True


def _quantize(plan: BasePlan, base: Path | None = None):
    """(model, tokenizer), quantized in memory, and saved to `base` if given."""
    model, tokenizer = plan.dense()
    layers, report = quantized_layers(model), []
    if layers and (plan.any_base or plan.recipe.method == "nf4"):
        specs = ", ".join(sorted({str(layer.spec) for layer in layers.values()}))
        print(f"  its weights are quantized already, {specs}: taken as they are")
    elif layers:
        name = short_path(Path(plan.model))
        raise ValueError(f"{name} holds NF4 weights, which {plan.recipe.method} can't quantize "
                         "again; give --method nf4 to take them as they are, or dense weights")
    else:
        report = apply_recipe(model, plan.recipe, plan.batches(tokenizer))
    if base is not None:
        for row in report:
            _show(row)
        save_quantized(model, tokenizer, base, {RECIPE: plan.whole_record(tokenizer)})
        after = sum(layer.quantized.nbytes for layer in quantized_layers(model).values())
        was = f"{sum(row.bytes_before for row in report):,} -> " if report else ""
        print(f"  {was}{after:,} bytes, saved to {short_path(base)}")
    return model, tokenizer


def _stream(plan: BasePlan, base: Path) -> None:
    """Quantize block by block into `base`."""
    source, recipe = local_folder(plan.model), plan.recipe
    tokenizer = read_tokenizer(source)
    quantize_checkpoint(source, base, recipe.spec, plan.batches(tokenizer), recipe.method,
                        recipe.options, recipe.targets, compute_dtype=plan.compute_dtype,
                        device=plan.device, spill=plan.spill, progress=_show,
                        beside={RECIPE: plan.whole_record(tokenizer)})  # fmt: skip
    made = read_json(base / REPORT)
    print(f"  {made['weight_bytes']:,} bytes for {made['parameters']:,} parameters, "
          f"{made['bits_per_parameter']:.2f} bits each, saved to {short_path(base)}")  # fmt: skip


def _show(row: LayerReport) -> None:
    error = "" if row.output_error is None else f"   output error {row.output_error:.4f}"
    print(f"  {row.name:<34} {row.bits_per_weight:.2f} bits a weight{error}")
