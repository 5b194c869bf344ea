"""How a model is trained, in fine-tuning and as a verifier: its mode, and one optimizer step."""

import math
from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..base import processes
from ..lora.choice import keep_choice
from ..lora.lora_plus import lora_plus_groups
from .config import TrainConfig, learning_rate

HALF = (torch.bfloat16, torch.float16)


def check_widths(model, compute_dtype: torch.dtype) -> None:
    """Raises ValueError where trained fp32 parameters meet frozen 16 bits without autocast."""
    half = {p.requires_grad: n for n, p in model.named_parameters() if p.dtype in HALF}
    if len(half) == 2 and compute_dtype == torch.float32:
        raise ValueError(f"{half[True]} is trained, in fp32, beside frozen weights of 16 bits such "
                         f"as {half[False]}; give their compute_dtype, or load the model in fp32")


@contextmanager
def training_mode(model, checkpointing: bool):
    """Training mode, with activations recomputed if `checkpointing`, and trained parameters in
    fp32: 16 bits would round small updates away. Afterwards the mode is as before, and parameters
    beside frozen ones of 16 bits return to their dtype, as layers compute in one."""
    was_training = model.training
    model.train()
    narrow = {p: p.dtype for p in model.parameters() if p.requires_grad and p.dtype in HALF}
    for p in narrow:
        p.data = p.data.float()
    if checkpointing:
        # Not gradient_checkpointing_enable: it makes the frozen embeddings' output need a
        # gradient, for good, which only reentrant checkpointing wants.
        recompute = keep_choice(partial(checkpoint, use_reentrant=False))
        model._set_gradient_checkpointing(True, recompute)
    try:
        yield
    finally:
        model.train(was_training)
        if checkpointing:
            model._set_gradient_checkpointing(False)
        if any(not p.requires_grad and p.dtype in HALF for p in model.parameters()):
            for p, dtype in narrow.items():
                p.grad, p.data = None, p.data.to(dtype)


def make_optimizer(name: str, parameters: Iterable, **settings) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    from .adam8bit import Adam8bit  # which most runs do without

    return Adam8bit(parameters, **settings)


class Stepper:
    """The optimizer of a run of `total` steps, and its loss scaler (for fp16 alone). Raises
    ValueError for a LoRA+ ratio without a B."""

    def __init__(self, parameters: dict[str, nn.Parameter], config: TrainConfig, total: int,
                 dtype: torch.dtype = torch.float32):  # fmt: skip
        self.parameters, self.config, self.total = parameters, config, total
        groups = parameters.values()
        if config.lora_plus_ratio != 1:
            groups = lora_plus_groups(parameters, config.lr, config.lora_plus_ratio)
        settings = {"lr": config.lr, "weight_decay": config.weight_decay}
        self.optimizer = make_optimizer(config.optimizer, groups, **settings)
        self.device = next(iter(parameters.values())).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def take(self, step: int, parts: Iterable[Tensor]) -> dict:
        """Take a step of 1..total; returns its loss, lr and grad_norm, before clipping (None if
        fp16 overflowed). parts: the loss is their sum, over all processes; each is differentiated
        before the next is computed. Raises ValueError for a loss or gradient that is not finite,
        parameters untouched, and for parameters that are too large after the step."""
        lr = learning_rate(step, self.total, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for part in parts:
            loss += part.item()
            self.scaler.scale(part).backward()
        # Summed before any check, so that all processes find the same.
        loss = processes.total(loss, self.device)
        parameters = list(self.parameters.values())
        processes.sum_gradients(parameters)
        self._check("loss", loss, step)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm).item()
        if not self.scaler.is_enabled():
            self._check("gradient", norm, step)
        self.scaler.step(self.optimizer)  # leaves the parameters alone where fp16 overflowed
        self.scaler.update()
        # In fp32, so that 1e20 is too much already: the model's products would overflow.
        norms = torch._foreach_norm([p.detach().float() for p in parameters])
        self._check("size of the parameters", torch.stack(norms).sum().item(), step)
        return {"loss": loss, "lr": lr, "grad_norm": norm if math.isfinite(norm) else None}

    def _check(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            settings = f"lr={self.config.lr}, compute_dtype={self.config.compute_dtype}"
            raise ValueError(f"the {what} is not finite at step {step} ({settings}); try a lower "
                             "lr, a longer warmup_ratio or fp32, and look for NaN in the model's "
                             "weights")  # fmt: skip
