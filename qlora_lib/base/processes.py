"""Several processes that share a run: who is who, and what they tell each other.

Data parallel, by torch.distributed alone: gloo between CPUs, NCCL between GPUs, started by
torchrun or accelerate launch. In one process each function here does nothing, or gives back what
it was given. Not handled: machines without a common file system; a model cut into parts.
"""

import builtins
import json
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .devices import default_device

# The others wait while the first quantizes; a launcher ends them all when one of them fails.
PATIENCE = timedelta(hours=24)
SPOKEN = (ValueError, FileNotFoundError, OSError, ImportError)  # errors that say what to do


def launched() -> int:
    """Return how many processes the launcher started, by its environment; 1 without a launcher.
    Raises ValueError for variables of its that hold no number, or one out of range."""
    count = _number("WORLD_SIZE", 1)
    ranks = {"RANK": count - 1, "LOCAL_RANK": count - 1, "MASTER_PORT": 2**16 - 1}
    wrong = [name for name, most in ranks.items() if count > 1 and _number(name, 0) > most]
    if not count or wrong:
        name = wrong[0] if wrong else "WORLD_SIZE"
        raise ValueError(f"{name}={os.environ[name]} in the environment is out of range, for "
                         f"WORLD_SIZE={count}")  # fmt: skip
    return count


def _number(name: str, usual: int) -> int:
    text = os.environ.get(name) or str(usual)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError(f"{name}={text!r:.40} in the environment: expected a number, as torchrun "
                         f"sets it; without a launcher: unset {name}")  # fmt: skip
    return int(text)


def start(device: str | None = None) -> str | None:
    """Join the other processes, if any; returns the device of this process, its own GPU of several.
    Raises ValueError for fewer GPUs than processes, and one GPU asked for by several."""
    if launched() == 1:
        return device
    backend = "gloo"
    if torch.device(device or default_device()).type == "cuda":
        local, gpus = _number("LOCAL_RANK", 0), torch.cuda.device_count()
        if device not in (None, "cuda") or local >= gpus:
            raise ValueError(f"process {local} has no GPU of its own (device={device}, {gpus} GPUs)"
                             ": start one a GPU, without --device, or --device cpu")  # fmt: skip
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    return device


def stop() -> None:
    """Leave the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Return how many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Return whether this is the process that writes files and prints."""
    return rank() == 0


def share(items: Sequence) -> Sequence:
    """Return this process's items, every `world`-th: neighbours, of like length, are apart."""
    return items[rank() :: world()]


def gather(value) -> list:
    """Return, on all processes, the `value` of each by rank, as JSON holds it (no pickle)."""
    if world() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    longest = max(int(n) for n in sizes)
    rows = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(rows, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(rows, sizes)]


def on_first(work: Callable):
    """Run work() in the first process while the others wait; returns its value, as JSON holds it,
    or raises its error, if one of SPOKEN, on all."""
    value = error = None
    if first():
        try:
            value = work()
        except SPOKEN as caught:
            error = caught
    name = next((kind.__name__ for kind in SPOKEN if isinstance(error, kind)), None)
    value, name, text = gather([value, name, str(error)])[0]
    if name is not None:
        raise error or getattr(builtins, name)(text)
    return value


def agree(what: str, value) -> None:
    """Raise ValueError, on all processes, unless they have the same `value`."""
    values = gather(value)
    odd = next((n for n, other in enumerate(values) if other != values[0]), None)
    if odd is not None:
        raise ValueError(f"processes 0 and {odd} differ in {what}: {values[0]!r:.80}, "
                         f"{values[odd]!r:.80}. Start all with the same command and files")


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors, in place, with those of the first process."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def total(value: float, device) -> float:
    """Return the sum of `value` over the processes, taken in float64."""
    if world() == 1:
        return value
    values = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.item()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over the processes; None counts as 0 where not all are."""
    if world() == 1:
        return
    parameters = list(parameters)
    has = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device).int()
    dist.all_reduce(has)
    some = [p for p, n in zip(parameters, has.tolist()) if n]
    for p in some:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for work in [dist.all_reduce(p.grad, async_op=True) for p in some]:
        work.wait()
