"""What a training run keeps: its metrics, and checkpoints of one file each, which proves itself.

`last.safetensors` holds "parameter/NAME" and AdamW's state as "exp_avg/NAME" and so on; its header
step, loss scaler, the run's identity and the metrics so far: several files could not be renamed at
once. `metrics.jsonl` is for readers; nothing here reads it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.files import read_proved_tensors, whole_file, write_proved_tensors
from ..base.hashes import changes, content_hash
from .step import Stepper

Parameters = dict[str, nn.Parameter]
LAST, BEST, METRICS = "last.safetensors", "best.safetensors", "metrics.jsonl"


def save_best(folder: Path, parameters: Parameters, metrics: dict, identity: dict) -> None:
    """Write the parameters at the lowest dev loss so far, which is in `metrics`."""
    tensors = {f"parameter/{n}": p for n, p in parameters.items()}
    write_proved_tensors(folder / BEST, tensors, metrics | {"run": content_hash(identity)})


def load_best(folder: Path, parameters: Parameters, best: tuple[int, float]) -> None:
    """Put back the parameters of the lowest dev loss, History.best. Raises ValueError for those of
    another step, and what load_parameters raises."""
    about = load_parameters(folder / BEST, parameters)
    if (about.get("step"), about.get("dev_loss")) != best:
        raise ValueError(f"{folder / BEST} is of step {about.get('step')}, the lowest dev loss of "
                         f"step {best[0]}: another run wrote it; train anew")  # fmt: skip


def load_parameters(path: str | Path, parameters: Parameters) -> dict:
    """Copy a checkpoint's parameters into `parameters`, in place; returns what else it says. Raises
    FileNotFoundError, and ValueError for a damaged file or for other names or shapes."""
    tensors, about = read_proved_tensors(Path(path))
    _copy_parameters(Path(path), tensors, parameters)
    return about


def start_metrics(folder: Path, steps: Sequence[dict]) -> None:
    """Write metrics.jsonl with the steps that are kept; those after the checkpoint come again."""
    with whole_file(folder / METRICS) as part:
        part.write_text("".join(json.dumps(s) + "\n" for s in steps), encoding="utf-8")


def add_metrics(folder: Path, metrics: dict) -> None:
    with open(folder / METRICS, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(metrics) + "\n")


def save_last(folder: Path, stepper: Stepper, identity: dict, steps: Sequence[dict]) -> None:
    """Write everything that the next step depends on, and the metrics of the steps so far."""
    tensors: dict[str, Tensor] = {f"parameter/{n}": p for n, p in stepper.parameters.items()}
    for name, parameter in stepper.parameters.items():
        for key, value in stepper.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    state = {"scaler": stepper.scaler.state_dict(), "identity": identity, "steps": list(steps)}
    write_proved_tensors(folder / LAST, tensors, state)


def load_last(folder: Path, stepper: Stepper, identity: dict) -> list[dict]:
    """Put parameters, optimizer and scaler back; returns the metrics up to that step, [] for no
    checkpoint. Raises ValueError for a damaged one, for another run's, naming what differs, and
    where best.safetensors is not of this run."""
    path = folder / LAST
    if not path.exists():
        return []
    tensors, state = read_proved_tensors(path)
    old = state["identity"]
    if changed := changes(old, json.loads(json.dumps(identity))):
        raise ValueError(f"{path} belongs to another run: {changed}. Give the same settings to "
                         "resume it, or another folder (or resume=False) to start anew")
    if any("dev_loss" in step for step in state["steps"]):
        if read_proved_tensors(folder / BEST)[1].get("run") != content_hash(old):
            raise ValueError(f"{folder / BEST} belongs to another run than {path.name}, which was "
                             "to be resumed; train anew (without resume)")  # fmt: skip
    _copy_parameters(path, tensors, stepper.parameters)
    for name, value in tensors.items():
        key, _, name = name.partition("/")
        if key != "parameter":
            p = stepper.parameters[name]
            # AdamW's step counter is on the CPU.
            stepper.optimizer.state[p][key] = value if key == "step" else value.to(p.device)
    stepper.scaler.load_state_dict(state["scaler"])
    return state["steps"]


@torch.no_grad()
def _copy_parameters(path: Path, tensors: dict[str, Tensor], parameters: Parameters) -> None:
    saved = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith("parameter/")}
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in parameters.items()}:
        strange = sorted(set(saved) ^ set(parameters))[:3] or "the same names, other shapes"
        raise ValueError(f"{path} holds other parameters than this model trains ({strange}...); "
                         "inject the adapter with the rank and targets of that run")  # fmt: skip
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
