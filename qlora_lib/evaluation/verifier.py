"""A verifier: the chance that a solution is right, read from the model that wrote it.

Cobbe et al. 2021 (arXiv 2110.14168, section 4.2) train the model with a scalar head to predict
the labels of sampled solutions. Here its weights stay frozen: a LoRA adapter is trained.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base import processes
from ..base.files import read_tensors, write_json_atomic
from ..base.folders import atomic_folder, check_folder
from ..base.hashes import content_hash
from ..base.progress import Progress
from ..data.tokens import batches, collate
from ..lora.files import load_adapter, save_adapter
from ..lora.inject import inject_lora, set_adapter, use_adapter
from ..lora.layer import adapter_names, lora_layers
from ..lora.targets import ALL_LINEAR
from ..train.config import TrainConfig, schedule
from ..train.step import Stepper
from .votes import encode_solutions

ADAPTER = "verifier"
HEAD = "head.safetensors"


class Verifier:
    """The adapter "verifier" on `model`, whose own calls go without it, and a head
    (hidden_size -> 1), fp32."""

    def __init__(self, model, tokenizer, rank=16, target_modules=ALL_LINEAR, folder=None):
        """Make a new one, which says 1/2 until it is trained, or load `folder`; freezes the model.
        Raises ValueError for targets that match nothing, a second verifier, and a folder that is
        damaged or of another base; FileNotFoundError."""
        others = adapter_names(model)
        if ADAPTER in others:
            raise ValueError("the model has a verifier already; load the model anew")
        if folder is None:
            inject_lora(model, target_modules, rank=rank, alpha=2 * rank, adapter=ADAPTER)
        else:
            check_folder(folder)
            head = read_tensors(Path(folder) / HEAD)
            if not all(t.is_floating_point() and t.isfinite().all() for t in head.values()):
                raise ValueError(f"{folder}/{HEAD} holds NaN, Inf or no floating-point numbers")
            load_adapter(model, Path(folder) / "adapter", ADAPTER)
        if not others:  # the first adapter is the default one; generation goes without
            set_adapter(model, None)
        self.model, self.tokenizer = model, tokenizer
        device = model.get_input_embeddings().weight.device
        self.head = nn.Linear(model.config.get_text_config().hidden_size, 1).to(device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        for parameter in self.parameters.values():  # train_verifier alone trains it
            parameter.requires_grad_(False)
        if folder is not None:
            try:
                self.head.load_state_dict(head)
            except RuntimeError as error:
                raise ValueError(f"{folder}/{HEAD} is no head for this model ({error})") from error

    @classmethod
    def load(cls, model, tokenizer, folder: str | Path) -> "Verifier":
        """Return the verifier that `save` wrote, for the model that it was trained on."""
        return cls(model, tokenizer, folder=folder)

    def save(self, folder: str | Path, about: dict | None = None) -> None:
        """Write the adapter in PEFT's layout, head.safetensors and verifier.json, which says what
        `about` does, to a folder of their own, in one step. Raises ValueError for NaN and Inf."""
        head = {n: t.detach().cpu() for n, t in self.head.state_dict().items()}
        if not all(t.isfinite().all() for t in head.values()):
            raise ValueError("the verifier's head holds NaN or Inf; train it at a lower lr")
        with atomic_folder(folder, HEAD) as scratch:
            save_file(head, scratch / HEAD)
            save_adapter(self.model, scratch / "adapter", ADAPTER)
            write_json_atomic(scratch / "verifier.json", about or {})

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: the adapter's A and B, and the head."""
        own = {f"head.{n}": p for n, p in self.head.named_parameters()}
        for path, layer in lora_layers(self.model).items():
            if ADAPTER in layer.configs:
                own[f"{path}.A"], own[f"{path}.B"] = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        return own

    def log_odds(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the log-odds of "right", read after each solution's end token: fp32 (batch,)."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with use_adapter(self.model, ADAPTER):
            output = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden, last = output.last_hidden_state, mask.sum(1) - 1  # padded on the right: end tokens
        hidden = hidden[torch.arange(len(last)), last]  # (batch, seq, hidden) -> (batch, hidden)
        return self.head(hidden.float()).squeeze(-1)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64
    ) -> list[float]:
        """Return the probability that each solution is right, read after its end token."""
        encoded = encode_solutions(self.model, self.tokenizer, prompts, completions)
        results = [0.0] * len(encoded)
        for chosen, batch in batches(encoded, batch_size, self.head.weight.device):
            for i, p in zip(chosen, self.log_odds(batch).sigmoid().tolist()):
                results[i] = p
        return results

    def fingerprint(self) -> str:
        """Return a hash of the head; the adapter counts among the model's parameters."""
        return content_hash([p.tolist() for p in self.head.parameters()])

    def loss(self, batch: dict[str, Tensor], right: Tensor) -> Tensor:
        """Return the mean binary cross-entropy a solution; right (batch,) of 0.0 and 1.0."""
        return nn.functional.binary_cross_entropy_with_logits(self.log_odds(batch), right)


def train_verifier(
    verifier: Verifier, prompts: Sequence[str], completions: Sequence[str], right: Sequence[bool],
    config: TrainConfig = TrainConfig(epochs=1, batch_size=64, lr=1e-3),
    callback: Callable[[dict], None] | None = None,
) -> list[dict]:  # fmt: skip
    """Train on labelled solutions, in place, in fp32; returns step, loss, lr, seconds of each step.

    Of `config` it takes epochs or max_steps, batch_size, lr, warmup_ratio, weight_decay,
    max_grad_norm and seed. Raises ValueError unless some are right and some wrong, and when the
    loss is not finite.
    """
    if not len(prompts) == len(completions) == len(right) or len(set(map(bool, right))) < 2:
        raise ValueError(f"got {len(prompts)} prompts, {len(completions)} completions and "
                         f"{len(right)} labels, {sum(map(bool, right))} of them right; a verifier "
                         "needs as many of each, and right and wrong solutions: sample hotter")
    encoded = encode_solutions(verifier.model, verifier.tokenizer, prompts, completions)
    device = verifier.head.weight.device
    labels = torch.tensor([float(r) for r in right], device=device)
    parameters = verifier.parameters
    for p in parameters.values():
        p.requires_grad_(True)
    total = config.max_steps or config.epochs * ceil(len(encoded) / config.batch_size)
    stepper, steps, began = Stepper(parameters, config, total), [], time.perf_counter()
    lengths = [len(example.input_ids) for example in encoded]
    progress = Progress("training the verifier", total, "steps")

    def part_of_loss(chosen: list[int]) -> Iterator[Tensor]:
        """This process's part of the mean loss of the chosen ones."""
        if own := processes.share(chosen):
            loss = verifier.loss(collate([encoded[i] for i in own], device=device), labels[own])
            yield loss * (len(own) / len(chosen))

    for step, _, chosen in schedule(lengths, config.batch_size, config.seed, total):
        taken = stepper.take(step, part_of_loss(chosen))
        seconds = time.perf_counter() - began
        steps.append({"step": step} | taken | {"seconds": seconds})
        progress(step, f"loss {taken['loss']:.4f}")
        if callback:
            callback(steps[-1])
    for p in parameters.values():
        p.requires_grad_(False)
    return steps
