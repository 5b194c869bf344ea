"""What a notebook keeps of a run with a real model, and whether its weights are real."""
from pathlib import Path

from qlora_lib.base.files import write_json_atomic
from qlora_lib.base.paths import DATA, plain_name, short_path
from qlora_lib.base.stamp import stamp

from .record import outputs_folder


def random_weights(model) -> bool:
    """Whether the checkpoint says of itself that its weights are random: it then shows memory
    and time, and no accuracy."""
    return bool(getattr(model.config, "random_weights", False))


def keep_result(profile: str, part: str, model, facts: dict, seed: int) -> Path:
    """Write `facts` and a stamp to data/results/<profile>-<part>.json; for random weights to
    outputs/<profile>, where nothing is mistaken for a result. Returns the path."""
    is_random = random_weights(model)
    folder = outputs_folder(profile) if is_random else DATA / "results"
    path = folder / f"{plain_name(f'{profile}-{part}', 'the part')}.json"
    made = {"random_weights": is_random, "model": short_path(Path(model.config._name_or_path))}
    write_json_atomic(path, made | facts | {"stamp": stamp(seed)})
    return path
