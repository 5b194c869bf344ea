"""What happened in a training run: its metrics, step by step, and their file."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class History:
    """What happened, a dict a step: step, epoch, loss, lr, grad_norm, tokens,
    tokens_per_second, peak_memory (bytes), seconds (since the start), and dev_loss where
    it was measured."""

    compute_dtype: str
    trained_parameters: int
    steps: list[dict] = field(default_factory=list)
    resumed_from: int = 0  # the step of the checkpoint that the run went on from

    @property
    def losses(self) -> list[float]:
        return [s["loss"] for s in self.steps]

    @property
    def dev(self) -> list[tuple[int, float]]:
        """(step, dev loss) wherever it was measured."""
        return [(s["step"], s["dev_loss"]) for s in self.steps if "dev_loss" in s]

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, dev loss) of the lowest dev loss."""
        return min(self.dev, key=lambda pair: pair[1], default=None)

    def __str__(self) -> str:
        first, last = self.steps[0], self.steps[-1]
        dev = f", dev loss {self.dev[-1][1]:.4f}" if self.dev else ""
        if self.dev:
            dev += f" (best {self.best[1]:.4f} at step {self.best[0]})"
        return (
            f"{last['step']} steps in {last['seconds']:.0f} s, loss {first['loss']:.4f} -> "
            f"{last['loss']:.4f}{dev}; {self.trained_parameters:,} trained parameters, "
            f"compute dtype {self.compute_dtype}, peak memory {last['peak_memory'] / 1e9:.2f} GB"
        )


def start_metrics(folder: Path, steps: Sequence[dict]) -> None:
    """metrics.jsonl with the steps that are kept; those after the checkpoint come again."""
    folder.mkdir(parents=True, exist_ok=True)
    if not steps:  # a new run: an older one's checkpoints would be mistaken for its own
        for name in ("last.safetensors", "best.safetensors"):
            (folder / name).unlink(missing_ok=True)
    beside = folder / "metrics.jsonl.part"
    beside.write_text("".join(json.dumps(s) + "\n" for s in steps), encoding="utf-8")
    beside.replace(folder / "metrics.jsonl")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kB
