"""What happened in a training run: its metrics, step by step, and their file.

Fine-tuning: a plain loop over (prompt, target) pairs.

AdamW on the trainable parameters (adapters, or a whole model), linear warm-up, then
cosine to zero. The loss is the mean over the supervised tokens of one optimizer step,
however they are cut into batches or shared among processes. A run that was killed goes on
from its last checkpoint and gives, on one machine and with as many processes, the bits of
the uninterrupted one: the order of the data follows from (seed, epoch), dropout from (seed,
step, process)."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ..base import processes
from ..base.devices import dtype_name, resolve_dtype
from ..data.tokens import IGNORE, Encoded, Pair, collate, encode, pad_id
from ..lora.choice import keep_choice
from ..lora.inject import trainable_parameters
from ..lora.layer import lora_layers
from ..lora.variants import lora_plus_groups
from ..models.fingerprint import _base_hash
from ..models.vocabulary import check_tokens
from .adam8bit import Adam8bit
from .config import TrainConfig, learning_rate, schedule
from .loss import chunk_for, loss_sum
from .snapshots import load_last, save_last, save_parameters


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


def finetune(
    model,
    tokenizer,
    examples: Sequence[Pair | Encoded],
    config: TrainConfig = TrainConfig(),
    dev: Sequence[Pair | Encoded] | None = None,
    callback: Callable[[dict], None] | None = None,
) -> History:
    """Train the parameters of `model` that require a gradient, in place.

    examples, dev: (prompt, target) pairs, of which only target and eos are supervised, or
    (input_ids, labels) made before. `callback` gets each step's metrics. With config.folder:
    `metrics.jsonl`, a line a step; `last.safetensors` (parameters and optimizer, to resume
    from); `best.safetensors` (parameters at the lowest dev loss). Reseeds torch's global
    generator at each step.

    In several processes, all call it with the same arguments and the same frozen weights:
    each takes its share of every step's examples and gradients are summed, so that the steps
    are those of one process but for rounding (and for dropout's masks). The first process
    writes the files; parameters start as its own; each returns the same history.

    Raises ValueError for no examples, nothing to train (with a LoRA+ ratio: no B), a prompt that
    fills max_length, a token that the model does not have, a checkpoint of another run, processes
    that differ in their settings or examples, and a loss or gradient that is not finite.
    """
    if not examples or (dev is not None and not dev):
        raise ValueError("there are no examples to train on (or an empty dev set was given)")
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError("no parameter requires a gradient; call inject_lora(model, ...) first")
    device = next(iter(parameters.values())).device
    dtype = resolve_dtype(config.compute_dtype, device)
    if dtype == torch.float16 and any(p.dtype != torch.float32 for p in parameters.values()):
        raise ValueError("fp16 needs its trained parameters in fp32; load with compute_dtype=fp32")
    encoded = _encode(tokenizer, examples, config)
    encoded_dev = _encode(tokenizer, dev, config) if dev else []
    padding = {pad_id(tokenizer)} if config.batch_size > 1 else set()
    check_tokens(model, padding.union(*(ids for ids, _ in encoded + encoded_dev)))

    lengths = [len(ids) for ids, _ in encoded]
    window = config.batch_size * config.accumulation  # examples in an optimizer step
    per_epoch = math.ceil(len(encoded) / window)
    total = config.max_steps or config.epochs * per_epoch
    kind = {"adamw": torch.optim.AdamW, "adam8bit": Adam8bit}[config.optimizer]
    groups = parameters.values()
    if config.lora_plus_ratio != 1:
        groups = lora_plus_groups(parameters, config.lr, config.lora_plus_ratio)
    optimizer = kind(groups, lr=config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    history = History(dtype_name(dtype), sum(p.numel() for p in parameters.values()))
    identity = _identity(config, history.compute_dtype, encoded) | _settings(model)
    folder = None if config.folder is None else Path(config.folder)
    if folder:  # hashing a model reads all of it: worth it only where a checkpoint is kept
        identity["base"] = _base_hash(model, parameters)
    if folder and config.resume:
        history.steps = load_last(folder, parameters, optimizer, scaler, identity)
        history.resumed_from = len(history.steps)
    done = len(history.steps)
    for name, value in (identity | {"the checkpoint's step": done}).items():
        processes.agree(name, value)
    processes.copy_from_first(parameters.values())
    folder = folder if processes.first() else None  # where to write
    if folder:
        start_metrics(folder, history.steps)

    loss_of = partial(loss_sum, model, dtype=dtype, chunk=chunk_for(model, dtype))
    before = history.steps[-1]["seconds"] if done else 0.0
    began = time.perf_counter()
    bar = tqdm(
        total=total,
        initial=done,
        file=sys.stderr,
        disable=not processes.first() or (None if config.progress is None else not config.progress),
    )
    with training_mode(model, config.gradient_checkpointing), bar:
        for step, epoch, chosen in schedule(lengths, window, config.seed, total, done):
            started = time.perf_counter()
            # Dropout; another one in each process, whose examples are others.
            torch.manual_seed((processes.rank() << 40) + config.seed * 1_000_003 + step)
            lr = learning_rate(step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_ratio", 1.0)
            asked = [encoded[i] for i in chosen]
            own = _batches(processes.share(asked), config.batch_size, tokenizer, device)
            count = _supervised(asked)
            loss, norm = _step(loss_of, parameters, optimizer, scaler, own, count, config, step)
            tokens = sum(lengths[i] for i in chosen)
            metrics = {
                "step": step,
                "epoch": epoch,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "tokens": tokens,
                "tokens_per_second": tokens / (time.perf_counter() - started),
            }
            end_of_epoch = step % per_epoch == 0
            if encoded_dev and (
                step == total
                or (step % config.eval_every == 0 if config.eval_every else end_of_epoch)
            ):
                metrics["dev_loss"] = _mean_loss(model, loss_of, tokenizer, encoded_dev, config)
            metrics["peak_memory"] = peak_memory(device)
            metrics["seconds"] = before + time.perf_counter() - began
            history.steps.append(metrics)
            if folder:
                with open(folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
                    stream.write(json.dumps(metrics) + "\n")
                if "dev_loss" in metrics and history.best[0] == step:
                    save_parameters(folder / "best.safetensors", parameters, metrics)
                if step % config.save_every == 0 or step == total:
                    save_last(folder, parameters, optimizer, scaler, identity, step)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if callback:
                callback(metrics)
    return history


def validation_loss(model, tokenizer, pairs: Sequence[Pair], config: TrainConfig) -> float:
    """Mean loss a supervised token over all pairs, in config's compute dtype and lengths.

    Of several processes each takes its share; all must call it.
    """
    dtype = resolve_dtype(config.compute_dtype, next(model.parameters()).device)
    loss_of = partial(loss_sum, model, dtype=dtype, chunk=chunk_for(model, dtype))
    return _mean_loss(model, loss_of, tokenizer, _encode(tokenizer, pairs, config), config)


def _encode(tokenizer, examples, config: TrainConfig) -> list[Encoded]:
    return [encode(tokenizer, example, config.max_length) for example in examples]


def _identity(config: TrainConfig, compute_dtype: str, encoded: Sequence[Encoded]) -> dict:
    """What must be equal for a run to be the continuation of another."""
    free = ("folder", "resume", "progress", "save_every", "eval_every", "gradient_checkpointing")
    identity = {k: v for k, v in asdict(config).items() if k not in free}
    digest = hashlib.sha256(json.dumps(encoded).encode()).hexdigest()
    return identity | {"compute_dtype": compute_dtype, "examples": digest}


def _settings(model) -> dict:
    """Each setting of each adapter: the value, or where layers differ {path: value}."""
    found: dict[str, dict] = {}
    for path, layer in lora_layers(model).items():
        for name, config in layer.configs.items():
            for key, value in asdict(config).items():
                found.setdefault(f"{key} of adapter {name!r}", {})[path] = value
    return {
        key: values if len(set(values.values())) > 1 else next(iter(values.values()))
        for key, values in found.items()
    }


@contextmanager
def training_mode(model, checkpointing: bool):
    """Training mode, with activations recomputed if `checkpointing`; as before afterwards."""
    was_training = model.training
    model.train()
    if checkpointing:
        # Not gradient_checkpointing_enable: it also makes the frozen embeddings' output need
        # a gradient, for good. Only reentrant checkpointing would want that: it gives no
        # gradient to a block whose input needs none.
        recompute = keep_choice(partial(checkpoint, use_reentrant=False))
        model._set_gradient_checkpointing(True, recompute)
    try:
        yield
    finally:
        model.train(was_training)
        if checkpointing:
            model._set_gradient_checkpointing(False)


def _batches(examples: Sequence[Encoded], size: int, tokenizer, device) -> list[dict[str, Tensor]]:
    starts = range(0, len(examples), size)
    batches = [collate(examples[i : i + size], pad_id(tokenizer)) for i in starts]
    return [{k: v.to(device) for k, v in batch.items()} for batch in batches]


def _supervised(examples: Sequence[Encoded]) -> int:
    """The tokens that the loss of these examples sums over: none predicts the first."""
    return sum(label != IGNORE for _, labels in examples for label in labels[1:])


def _step(
    loss_of, parameters, optimizer, scaler, batches, supervised: int, config: TrainConfig, step: int
) -> tuple[float, float | None]:
    """One optimizer step; (loss, gradient norm before clipping, None if fp16 overflowed).

    supervised: tokens of the whole step, not of each batch or process: a token weighs the
    same in a short one.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = 0.0
    for batch in batches:
        part = loss_of(batch) / supervised
        loss += part.item()
        scaler.scale(part).backward()
    # Summed before any check, so that all processes find the same.
    loss = processes.total(loss, next(iter(parameters.values())).device)
    processes.sum_gradients(parameters.values())
    if not math.isfinite(loss):
        raise ValueError(_diverged("loss", step, config))
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm).item()
    if not math.isfinite(norm) and not scaler.is_enabled():
        raise ValueError(_diverged("gradient", step, config))
    scaler.step(optimizer)  # leaves the parameters alone where fp16 overflowed
    scaler.update()
    return loss, norm if math.isfinite(norm) else None


def _diverged(what: str, step: int, config: TrainConfig) -> str:
    return (
        f"the {what} is not finite at step {step} (lr={config.lr}, compute_dtype="
        f"{config.compute_dtype}); try a lower lr, a longer warm-up (warmup_ratio), or fp32, "
        "and look for NaN in the model's weights"
    )


@torch.no_grad()
def _mean_loss(model, loss_of, tokenizer, encoded, config: TrainConfig) -> float:
    device = next(model.parameters()).device
    by_length = sorted(encoded, key=lambda example: len(example[0]))
    batches = _batches(processes.share(by_length), config.batch_size, tokenizer, device)
    was_training = model.training
    model.eval()
    loss = processes.total(sum(loss_of(batch).item() for batch in batches), device)
    model.train(was_training)
    return loss / _supervised(encoded)
