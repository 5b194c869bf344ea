"""What a merge costs, measured where it matters: in the logits and in what they answer."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .gptq import GPTQOptions
from .hessian import Hessian
from .lora import lora_layers, use_adapter
from .merge import active_layers, merge_lora, unmerge_lora
from .block_inputs import token_mask, watch_inputs

METHODS = ("base", "dense", "rtn", "gptq")
Batch = dict[str, Tensor]


@dataclass
class MergeLoss:
    """One way to merge, compared with the trained model: base and adapter apart.

    Means are over the real tokens of the batches; padding is left out.
    """

    method: str  # "base" is the base alone, without the adapter: what there is to lose
    update_lost: float  # mean over the layers of |update lost| / |update|
    logit_error: float  # |merged - trained| / |trained|, Frobenius norms of the logits
    kl: float  # KL(trained || merged) of the next token, in nats
    same_token: float  # share of tokens whose most probable next token is the same
    measured: object = None  # what `measure` returned, exact match for one


def merge_report(
    model: nn.Module,
    batches: Sequence[Batch],
    methods: Sequence[str] = ("base", "dense", "rtn"),
    calibration: Sequence[Batch] | None = None,
    options: GPTQOptions = GPTQOptions(),
    measure: Callable[[nn.Module], object] | None = None,
) -> list[MergeLoss]:
    """Merge the active adapters by each method, compare the logits, and take the merge back.

    batches: input_ids and attention_mask, each (batch, seq), to compare logits on; the
    trained model's logits (tokens, vocab) are kept meanwhile, so a few thousand tokens will do.
    methods: "base" (the adapter left out) and merge_lora's "dense", "rtn" and "gptq".
    calibration: batches for "gptq", others than `batches`: on its own calibration data a
    method flatters itself. measure: called with the merged model; what it returns is kept
    in the row, as in `measure=lambda m: evaluate(generator(m, ...), problems).strict`.
    Raises ValueError for an unknown method, no batches, "gptq" without calibration, a
    model that is merged already, and whatever merge_lora refuses.
    """
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise ValueError(f"methods={unknown} are not among {METHODS}")
    if not batches:
        raise ValueError("no batches to compare logits on; pass at least one")
    if "gptq" in methods and not calibration:
        raise ValueError("'gptq' needs calibration batches, others than those compared")
    _refuse_merged(model)
    active_layers(model)  # raises when there is nothing to merge
    was_training = model.training
    model.eval()
    try:
        trained = [_logits(model, batch) for batch in batches]  # each (tokens, vocab)
        rows = []
        for method in methods:
            hessians = None
            if method == "gptq":
                hessians = merge_hessians(model, calibration, options.needs_halves)
            with _merged(model, method, hessians, options) as lost:
                row = MergeLoss(method, lost, *_compare(model, batches, trained))
                row.measured = None if measure is None else measure(model)
            rows.append(row)
        return rows
    finally:
        model.train(was_training)


def merge_hessians(
    model: nn.Module, batches: Sequence[Batch], halves: bool = False
) -> dict[str, Hessian]:
    """The Hessian of each adapted layer's inputs, by path, as merge_lora(into="gptq") takes them.

    batches: input_ids and attention_mask, each (batch, seq); halves: as for a Hessian. One pass
    of the trained model, base and adapter apart: all layers are calibrated on its own
    activations, not on those of layers that are merged already, and all Hessians are alive
    together (layers that share an input share one). For a model too large for that, merge into
    "dense" and run quantize_model. Raises ValueError for no batches and for a merged model.
    """
    if not batches:
        raise ValueError("no calibration batches; pass at least one")
    _refuse_merged(model)
    layers, hessians, first = active_layers(model), {}, {}
    last, mask = (None, None), None

    def see(path: str, x: Tensor) -> None:
        nonlocal last
        if path not in hessians:  # q, k and v are called with one tensor
            first[path] = last[0] if x is last[1] else path
            shared = hessians.get(first[path])
            width = layers[path].in_features
            hessians[path] = shared or Hessian(width, x.device, halves=halves)
        if first[path] == path:
            hessians[path].update(x[mask.to(x.device)])  # (batch, seq, in) -> (tokens, in)
            last = (path, x)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), watch_inputs(layers, see):
            for batch in batches:
                mask = token_mask(batch)
                _forward(model, batch)
    finally:
        model.train(was_training)
    return hessians


def _refuse_merged(model: nn.Module) -> None:
    if any(layer.merged is not None for layer in lora_layers(model).values()):
        raise ValueError("the model is merged; call unmerge_lora first")


@contextmanager
def _merged(model, method, hessians, options):
    """The model merged by this method, within the block; gives the part of the update lost."""
    if method == "base":
        with use_adapter(model, None):
            yield 1.0
        return
    try:
        rows = merge_lora(model, method, hessians, options)
        yield sum(row.lost for row in rows) / len(rows)
    finally:
        unmerge_lora(model)


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    return model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).logits


@torch.no_grad()
def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """fp32 (tokens, vocab), padding left out."""
    logits = _forward(model, batch)  # (batch, seq, vocab)
    return logits[token_mask(batch).to(logits.device)].float()


def _compare(model, batches, trained) -> tuple[float, float, float]:
    """Relative logit error, KL and share of equal choices, over all tokens."""
    squares = norms = kl = same = tokens = 0.0
    for batch, old in zip(batches, trained):
        new = _logits(model, batch)
        squares += float((new - old).square().sum())
        norms += float(old.square().sum())
        p, q = old.log_softmax(-1), new.log_softmax(-1)  # (tokens, vocab)
        kl += float((p.exp() * (p - q)).sum())
        same += float((old.argmax(-1) == new.argmax(-1)).sum())
        tokens += len(old)
    return (squares / norms) ** 0.5, kl / tokens, same / tokens
