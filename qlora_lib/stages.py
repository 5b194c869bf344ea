"""What a run of a real model keeps between its steps: the quantized base, and its results.

Notebooks and command line go through the same stages. Each is made once and taken from the
run's folder afterwards, as long as weights and settings are those it was made with; training
and evaluation keep their own state there (train.py, evaluation.py).
"""

import dataclasses
import json
from pathlib import Path

from .checkpoint import load_quantized, save_quantized
from .data import DATA, short_path, weights_id
from .grid import QuantSpec
from .nf4 import NF4Spec
from .results import ROOT, stamp, write_json_atomic


def quantized_base(
    profile,
    folder: Path,
    spec: QuantSpec | NF4Spec = QuantSpec(bits=4, group_size=64),
    method: str | None = None,
    device=None,
    compute_dtype: str | None = None,
):
    """(model, tokenizer) of `folder`/base if made of the same weights in the same way, else
    quantized now and saved there.

    method: as in Profile.load. Raises FileNotFoundError where the profile has no weights.
    """
    method = method or ("nf4" if isinstance(spec, NF4Spec) else "gptq")
    dtype = compute_dtype or profile.compute_dtype
    recipe = {
        "method": method,
        "spec": dataclasses.asdict(spec),
        "weights": weights_id(profile.model),
        "compute_dtype": dtype,
    }
    base = folder / "base"
    if (base / "recipe.json").is_file():
        if json.loads((base / "recipe.json").read_text()) == recipe:
            print(f"base: {short_path(base)} is there, with these settings")
            return load_quantized(base, device, dtype)
    print(f"base: quantizing {short_path(Path(profile.model))} with {method}")
    model, tokenizer = profile.load(device=device, compute_dtype=dtype)
    report = profile.quantize(model, tokenizer, spec, method)
    for row in report:
        error = "" if row.output_error is None else f"   output error {row.output_error:.4f}"
        print(f"  {row.name:<34} {row.bits_per_weight:.2f} bits a weight{error}")
    save_quantized(model, tokenizer, base)
    write_json_atomic(base / "recipe.json", recipe)
    before, after = sum(r.bytes_before for r in report), sum(r.bytes_after for r in report)
    print(f"  {before:,} -> {after:,} bytes, saved to {short_path(base)}")
    return model, tokenizer


def random_weights(model) -> bool:
    """Whether the checkpoint says of itself that its weights are random: it then shows memory
    and time, and no accuracy."""
    return bool(getattr(model.config, "random_weights", False))


def keep_result(profile: str, part: str, model, facts: dict, seed: int) -> Path:
    """Write `facts` and a stamp to data/results/<profile>-<part>.json; for random weights to
    outputs/<profile>, where nothing is mistaken for a result. Returns the path."""
    is_random = random_weights(model)
    folder = ROOT / "outputs" / profile if is_random else DATA / "results"
    path = folder / f"{profile}-{part}.json"
    made = {"random_weights": is_random, "model": short_path(Path(model.config._name_or_path))}
    write_json_atomic(path, made | facts | {"stamp": stamp(seed)})
    return path
