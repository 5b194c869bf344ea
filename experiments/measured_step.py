"""Memory, measured: bytes alive in a block, and a training step by parts, beside its ledger."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qlora_lib.base.devices import DTYPES
from qlora_lib.lora.inject import trainable_parameters
from qlora_lib.models.quantize import quantized_layers
from qlora_lib.train.loss import loss_sum
from qlora_lib.train.step import make_optimizer, training_mode

WORKING = "activations, logits, one layer"  # what lives only within a step


class AllocationMeter(TorchDispatchMode):
    """Bytes of the tensors made within its block: `alive` now, at the `peak`, and in the `trace`
    after each operation; on any device. What an operation allocates and frees inside is not seen.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.trace: list[int] = []
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata in given or storage in self._known:
                continue  # a view, or written in place
            self._known.add(storage)
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        self.trace.append(self.alive)
        return out

    def _free(self, nbytes: int) -> None:
        self.alive -= nbytes


def _storages(nested) -> list:
    return [x.untyped_storage() for x in tree_iter(nested) if isinstance(x, Tensor)]


@dataclass(frozen=True)
class Measurement:
    """Bytes by part, predicted and measured; "peak" is what was alive at once."""

    predicted: dict[str, int]
    measured: dict[str, int]  # of the same parts

    @property
    def ratio(self) -> float:
        """Predicted peak over measured peak."""
        return self.predicted["peak"] / self.measured["peak"]

    def __str__(self) -> str:
        rows = [f"  {'':<32}{'predicted':>12}{'measured':>12}    ratio"]
        for part, n in self.predicted.items():
            m = self.measured[part]
            if n or m:
                ratio = f"{n / m:9.3f}" if m else "        -"
                rows.append(f"  {part:<32}{n / 1e6:>9.2f} MB{m / 1e6:>9.2f} MB{ratio}")
        return "\n".join(rows)


def measure_step(ledger, model, step: Callable | None = None, optimizer=None) -> Measurement:
    """Run two training steps of `model`, of which only the second has all at once, and compare
    with what the ledger predicts.

    step: one of yours (forward, backward, optimizer.step(), gradients set to None), with its
    `optimizer`. Without it: random tokens of the ledger's batch and length, and its optimizer
    with lr=0, which leaves the parameters as they are. Measured by AllocationMeter on a CPU, else
    by CUDA's allocator. Raises ValueError when no parameter is trained, and for a step without
    its optimizer.
    """
    parameters = list(trainable_parameters(model).values())
    if not parameters:
        raise ValueError("no parameter requires a gradient; call inject_lora(model, ...) first")
    if (step is None) != (optimizer is None):
        raise ValueError("step and optimizer go together: give both, or none")
    gradients = {}
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: gradients.update({id(p): p.grad.nbytes}))
        for p in parameters
    ]
    with training_mode(model, ledger.checkpointing):
        if step is None:
            optimizer = make_optimizer(ledger.optimizer, parameters, lr=0.0, weight_decay=0.0)
            step = random_step(ledger, model, optimizer)
        measured, before = _stored(model), _state_bytes(optimizer)
        device, stored = parameters[0].device, sum(measured.values())
        if device.type == "cuda":
            others = torch.cuda.memory_allocated(device) - stored - before
            torch.cuda.reset_peak_memory_stats(device)
            step(), step()
            peak = torch.cuda.max_memory_allocated(device) - others
        else:
            with AllocationMeter() as meter:
                step(), step()
            peak = stored + before + meter.peak
    for hook in hooks:
        hook.remove()
    measured |= {"gradients": sum(gradients.values()), "optimizer": _state_bytes(optimizer)}
    measured[WORKING] = max(0, peak - sum(measured.values()))
    predicted = {part: ledger.parts[part] for part in measured if part != WORKING}
    predicted[WORKING] = ledger.peak - sum(predicted.values())
    return Measurement(predicted | {"peak": ledger.peak}, measured | {"peak": peak})


def _stored(model) -> dict[str, int]:
    """Bytes of a model's tensors, by the ledger's parts."""
    layers = quantized_layers(model).values()
    packed = sum(layer.codes.nbytes for layer in layers)
    scales = sum(layer.quantized.nbytes for layer in layers) - packed
    lora = sum(p.nbytes for n, p in model.named_parameters() if ".lora_" in n)
    biases = sum(layer.bias.nbytes for layer in layers if layer.bias is not None)
    weights = sum(p.nbytes for p in model.parameters()) - lora + biases
    return {"weights": weights, "packed weights": packed, "scales": scales, "adapters": lora}


def _state_bytes(optimizer) -> int:
    """Bytes of the optimizer's moments; its step counters, 4 bytes a tensor, lie on the CPU."""
    return sum(t.nbytes for s in optimizer.state.values() for k, t in s.items() if k != "step")


def random_step(ledger, model, optimizer) -> Callable[[], None]:
    """A training step on random tokens, all supervised, as the ledger describes it."""
    draw = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab, (ledger.batch, ledger.seq), generator=draw).to(model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step() -> None:
        loss = loss_sum(model, batch, DTYPES[ledger.compute_dtype], ledger.logit_tokens)
        (loss / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
