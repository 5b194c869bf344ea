"""Fine-tuning: a plain loop over examples, and the history that it leaves.

The loss is the mean over the supervised tokens of one optimizer step, however they are cut into
batches or shared among processes. A killed run goes on from its last checkpoint and gives, on one
machine and with as many processes, the bits of the uninterrupted one.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..base import processes
from ..base.devices import dtype_name, resolve_dtype
from ..base.hashes import content_hash
from ..base.lock import held
from ..base.progress import Progress
from ..data.examples import read_examples
from ..data.tokens import IGNORE, Example, Pair, batches
from ..lora.inject import trainable_parameters
from ..lora.layer import lora_layers
from ..models.batches import check_tokens
from ..models.fingerprint import frozen_hash
from .config import TrainConfig, schedule
from .loss import chunk_for, loss_sum
from .snapshots import add_metrics, load_last, save_best, save_last, start_metrics
from .step import Stepper, check_widths, training_mode


@dataclass
class History:
    """What happened, a dict a step: step, epoch, loss, lr, grad_norm, tokens, tokens_per_second,
    peak_memory (bytes), seconds (since the start), and dev_loss where it was measured."""

    compute_dtype: str
    trained_parameters: int
    steps: list[dict] = field(default_factory=list)
    resumed_from: int = 0  # the step of the checkpoint that the run went on from

    @property
    def losses(self) -> list[float]:
        return [s["loss"] for s in self.steps]

    @property
    def dev(self) -> list[tuple[int, float]]:
        """(step, dev loss) where it was measured."""
        return [(s["step"], s["dev_loss"]) for s in self.steps if "dev_loss" in s]

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, dev loss) of the lowest dev loss."""
        return min(self.dev, key=lambda pair: pair[1], default=None)

    def __str__(self) -> str:
        first, last = self.steps[0], self.steps[-1]
        dev = ""
        if self.dev:
            step, lowest = self.best
            dev = f", dev loss {self.dev[-1][1]:.4f} (best {lowest:.4f} at step {step})"
        return (f"{last['step']} steps in {last['seconds']:.0f} s, loss {first['loss']:.4f} -> "
                f"{last['loss']:.4f}{dev}; {self.trained_parameters:,} trained parameters, compute "
                f"dtype {self.compute_dtype}, peak memory {last['peak_memory'] / 1e9:.2f} GB")


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


def finetune(model, tokenizer, examples: Iterable[Example | Pair],
             config: TrainConfig = TrainConfig(), dev: Iterable[Example | Pair] | None = None,
             callback: Callable[[dict], None] | None = None) -> History:  # fmt: skip
    """Train the parameters of `model` that require a gradient, in place and in fp32.

    examples, dev: whatever read_examples takes, such as (prompt, target) pairs, of which only
    target and eos are supervised. `callback` gets each step's metrics. With config.folder:
    `metrics.jsonl`, a line a step; `last.safetensors`, to resume from; `best.safetensors`, the
    parameters at the lowest dev loss. Those of an earlier run stay until there are new ones.
    Reseeds torch's global generator at each step. Parameters of 16 bits stay fp32 unless others
    are frozen in 16 bits.

    Several processes, called with the same arguments and frozen weights, share the examples of a
    step: the steps are those of one but for rounding and dropout's masks. The first writes the
    files; parameters start as its own.

    Raises ValueError for nothing to train or to train on, examples that don't fit the model or
    max_length, another run's checkpoint, a folder that another process is training in, processes
    that differ, and a loss, gradient or parameter that is not finite, before that is saved.
    """
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError("no parameter requires a gradient; call inject_lora(model, ...) first")
    examples = _ready(examples, tokenizer, config)
    dev = [] if dev is None else _ready(dev, tokenizer, config)
    loss = _Loss(model, config)
    check_widths(model, loss.dtype)
    check_tokens(model, set().union(*(example.input_ids for example in examples + dev)))

    lengths = [len(example.input_ids) for example in examples]
    window = config.batch_size * config.accumulation  # examples in an optimizer step
    per_epoch = math.ceil(len(examples) / window)
    total = config.max_steps or config.epochs * per_epoch
    history = History(dtype_name(loss.dtype), sum(p.numel() for p in parameters.values()))
    alone = nullcontext() if config.folder is None else held(config.folder)
    with alone, training_mode(model, config.gradient_checkpointing):
        stepper = Stepper(parameters, config, total, loss.dtype)
        identity = _identity(model, parameters, examples, config, history.compute_dtype)
        folder = _start(stepper, identity, config, history)
        done = len(history.steps)
        began = time.perf_counter() - (history.steps[-1]["seconds"] if done else 0.0)
        progress = Progress("training", total, "steps", done)
        for step, epoch, chosen in schedule(lengths, window, config.seed, total, done):
            started = time.perf_counter()
            # Dropout, another one in each process
            torch.manual_seed((processes.rank() << 40) + config.seed * 1_000_003 + step)
            metrics = {"step": step, "epoch": epoch}
            asked = [examples[i] for i in chosen]
            count = supervised(asked)
            metrics |= stepper.take(step, (part / count for part in loss.parts(asked)))
            metrics["tokens"] = sum(lengths[i] for i in chosen)
            metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - started)
            if dev and (step == total or step % (config.eval_every or per_epoch) == 0):
                metrics["dev_loss"] = loss.mean(dev)
            metrics["peak_memory"] = peak_memory(stepper.device)
            metrics["seconds"] = time.perf_counter() - began
            history.steps.append(metrics)
            if folder:
                add_metrics(folder, metrics)
                if "dev_loss" in metrics and history.best[0] == step:
                    save_best(folder, parameters, metrics, identity)
                if step % config.save_every == 0 or step == total:
                    save_last(folder, stepper, identity, history.steps)
            if config.progress:
                progress(step, f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} "
                         f"tokens/s, {metrics['peak_memory'] / 1e9:.1f} GB at the peak")
            if callback:
                callback(metrics)
    return history


def validation_loss(model, tokenizer, examples: Iterable, config: TrainConfig) -> float:
    """Mean loss a supervised token over all examples, as read_examples takes them, in config's
    compute dtype and lengths. All of several processes must call it."""
    return _Loss(model, config).mean(_ready(examples, tokenizer, config))


def _ready(examples: Iterable[Example | Pair], tokenizer, config: TrainConfig) -> list[Example]:
    return [example.cut(config.max_length) for example in read_examples(examples, tokenizer)]


class _Loss:
    def __init__(self, model, config: TrainConfig):
        self.model, self.size = model, config.batch_size
        self.device = next(model.parameters()).device
        self.dtype = resolve_dtype(config.compute_dtype, self.device)
        self.chunk = chunk_for(model, self.dtype)

    def parts(self, examples: Sequence[Example]) -> Iterator[Tensor]:
        """The summed loss of each of this process's batches."""
        for _, batch in batches(processes.share(examples), self.size, self.device):
            yield loss_sum(self.model, batch, self.dtype, self.chunk)

    @torch.no_grad()
    def mean(self, examples: Sequence[Example]) -> float:
        was_training = self.model.training
        self.model.eval()
        loss = processes.total(sum(part.item() for part in self.parts(examples)), self.device)
        self.model.train(was_training)
        if not math.isfinite(loss):
            raise ValueError(f"the loss on {len(examples)} examples is not finite; try a lower lr, "
                             "and look for NaN in the model's weights")  # fmt: skip
        return loss / supervised(examples)


def supervised(examples: Sequence[Example]) -> int:
    """How many tokens the loss sums over: nothing predicts the first."""
    return sum(label != IGNORE for example in examples for label in example.labels[1:])


def _start(stepper: Stepper, identity: dict, config: TrainConfig, history: History) -> Path | None:
    """Put back the last checkpoint, if the run goes on; returns where this process writes."""
    folder = None if config.folder is None else Path(config.folder)
    if config.resume:
        history.steps = load_last(folder, stepper, identity)
        history.resumed_from = len(history.steps)
    for name, value in (identity | {"the checkpoint's step": history.resumed_from}).items():
        processes.agree(name, value)
    processes.copy_from_first(stepper.parameters.values())
    if folder is None or not processes.first():
        return None
    start_metrics(folder, history.steps)
    return folder


def _identity(model, parameters, examples, config: TrainConfig, compute_dtype: str) -> dict:
    """What must be equal for a run to be the continuation of another."""
    free = ("folder", "resume", "progress", "save_every", "eval_every", "gradient_checkpointing")
    identity = {k: v for k, v in asdict(config).items() if k not in free}
    identity["compute_dtype"] = compute_dtype
    identity["examples"] = content_hash([[e.input_ids, e.labels] for e in examples])
    settings: dict[str, dict] = {}  # of each adapter, by layer
    for path, layer in lora_layers(model).items():
        for name, lora in layer.configs.items():
            for key, value in asdict(lora).items():
                settings.setdefault(f"{key} of adapter {name!r}", {})[path] = value
    for key, of in settings.items():  # the value, or all of them where layers differ
        identity[key] = of if len(set(of.values())) > 1 else next(iter(of.values()))
    if config.folder is not None:  # reads the whole model: worth it only for a checkpoint
        identity["base"] = frozen_hash(model, parameters)
    return identity
