"""What a merge costs, measured where it matters: in the logits and in what they answer."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_lib.lora.inject import use_adapter
from qlora_lib.lora.merge import active_layers, merge_lora, unmerge_lora
from qlora_lib.models.batches import Batch, batch_logits, token_mask
from qlora_lib.models.merge_hessians import check_unmerged, merge_hessians
from qlora_lib.quant.gptq import GPTQOptions

METHODS = ("base", "dense", "rtn", "gptq")


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
    check_unmerged(model)
    active_layers(model)  # raises when there is nothing to merge
    was_training = model.training
    model.eval()
    try:
        trained = [real_logits(model, batch) for batch in batches]  # each (tokens, vocab)
        rows = []
        for method in methods:
            hessians = None
            if method == "gptq":
                hessians = merge_hessians(model, calibration, options.needs_halves)
            with merged(model, method, hessians, options) as lost:
                costs = compare_logits(model, batches, trained)
                rows.append(MergeLoss(method, lost, *costs, measure and measure(model)))
        return rows
    finally:
        model.train(was_training)


@contextmanager
def merged(model, method: str, hessians, options: GPTQOptions):
    """The model merged by one of METHODS, within the block, which gets the part of the update
    that was lost, a mean over the layers."""
    if method == "base":
        with use_adapter(model, None):
            yield 1.0
        return
    try:
        rows = merge_lora(model, method, hessians, options)
        yield sum(row.lost for row in rows) / len(rows)
    finally:
        unmerge_lora(model)


@torch.no_grad()
def real_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of a batch's real tokens, fp32 (tokens, vocab); padding is left out."""
    logits = batch_logits(model, batch)  # (batch, seq, vocab)
    return logits[token_mask(batch).to(logits.device)].float()


def compare_logits(
    model: nn.Module, batches: Sequence[Batch], trained: Sequence[Tensor]
) -> tuple[float, float, float]:
    """Relative error, KL and share of equal choices of the model's logits against those of the
    trained model, a tensor (tokens, vocab) a batch; over all tokens."""
    squares = norms = kl = same = tokens = 0.0
    for batch, old in zip(batches, trained):
        new = real_logits(model, batch)
        squares += float((new - old).square().sum())
        norms += float(old.square().sum())
        p, q = old.log_softmax(-1), new.log_softmax(-1)  # (tokens, vocab)
        kl += float((p.exp() * (p - q)).sum())
        same += float((old.argmax(-1) == new.argmax(-1)).sum())
        tokens += len(old)
    return (squares / norms) ** 0.5, kl / tokens, same / tokens
