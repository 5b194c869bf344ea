"""What a training run keeps: its metrics, and checkpoints of one safetensors file each.

`last.safetensors` holds "parameter/NAME" and AdamW's state as "exp_avg/NAME" and so on; step, loss
scaler and the run's identity are its metadata, as JSON: two files could not be renamed at once.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.files import whole_file
from ..base.hashes import changes
from .step import Stepper

Parameters = dict[str, nn.Parameter]


def save_parameters(path: Path, parameters: Parameters, metadata: dict) -> None:
    _save(path, {f"parameter/{n}": p for n, p in parameters.items()}, metadata)


def load_parameters(path: str | Path, parameters: Parameters) -> dict:
    """Copy a checkpoint's parameters into `parameters`, in place; returns its metadata. Raises
    FileNotFoundError, and ValueError for a damaged file or for other names or shapes."""
    tensors, metadata = _load(Path(path))
    _copy_parameters(Path(path), tensors, parameters)
    return metadata


def start_metrics(folder: Path, steps: Sequence[dict]) -> None:
    """Write metrics.jsonl with the steps that are kept; those after the checkpoint come again."""
    if not steps:  # a new run: an older one's checkpoints would be mistaken for its own
        for name in ("last.safetensors", "best.safetensors"):
            (folder / name).unlink(missing_ok=True)
    with whole_file(folder / "metrics.jsonl") as part:
        part.write_text("".join(json.dumps(s) + "\n" for s in steps), encoding="utf-8")


def add_metrics(folder: Path, metrics: dict) -> None:
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(metrics) + "\n")


def save_last(folder: Path, stepper: Stepper, identity: dict, step: int) -> None:
    """Write everything that the next step depends on."""
    tensors: dict[str, Tensor] = {f"parameter/{n}": p for n, p in stepper.parameters.items()}
    for name, parameter in stepper.parameters.items():
        for key, value in stepper.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    state = {"step": step, "scaler": stepper.scaler.state_dict(), "identity": identity}
    _save(folder / "last.safetensors", tensors, state)


def load_last(folder: Path, stepper: Stepper, identity: dict) -> list[dict]:
    """Put parameters, optimizer and scaler back; returns the metrics up to that step, [] for no
    checkpoint. Raises ValueError for a damaged one and for another run's, naming what differs."""
    path = folder / "last.safetensors"
    if not path.exists():
        return []
    tensors, state = _load(path)
    old = {k: v for k, v in state["identity"].items() if k in identity}  # older ones say less
    if changed := changes(old, {k: identity[k] for k in old}):
        raise ValueError(f"{path} belongs to another run: {changed}. Give the same settings to "
                         "resume it, or another folder (or resume=False) to start anew")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    if len(lines) < state["step"]:
        raise ValueError(f"{folder}/metrics.jsonl lacks steps before {path}; start the run anew")
    _copy_parameters(path, tensors, stepper.parameters)
    for name, value in tensors.items():
        key, _, name = name.partition("/")
        if key != "parameter":
            p = stepper.parameters[name]
            # AdamW's step counter is on the CPU.
            stepper.optimizer.state[p][key] = value if key == "step" else value.to(p.device)
    stepper.scaler.load_state_dict(state["scaler"])
    return [json.loads(line) for line in lines[: state["step"]]]  # later ones come again


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    whole = {name: t.detach().contiguous() for name, t in tensors.items()}
    with whole_file(path) as part:
        save_file(whole, part, {"json": json.dumps(metadata)})


def _load(path: Path) -> tuple[dict[str, Tensor], dict]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["json"])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of this package ({error}); delete it "
                         "and start the run anew") from error  # fmt: skip


@torch.no_grad()
def _copy_parameters(path: Path, tensors: dict[str, Tensor], parameters: Parameters) -> None:
    saved = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith("parameter/")}
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in parameters.items()}:
        strange = sorted(set(saved) ^ set(parameters))[:3] or "the same names, other shapes"
        raise ValueError(f"{path} holds other parameters than this model trains ({strange}...); "
                         "inject the adapter with the rank and targets of that run")  # fmt: skip
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
