"""The loss of next-token prediction, without all logits at once.

They can outweigh all other activations, so head and cross-entropy follow for CHUNK supervised
positions at a time, and backward computes each chunk's logits anew (checkpointing; Chen et al.
2016, arXiv 1604.06174).
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ..data.tokens import IGNORE

CHUNK = 256  # supervised positions whose logits are alive together


def loss_sum(model, batch: dict[str, Tensor], dtype: torch.dtype, chunk: int | None = CHUNK):
    """Cross-entropy summed over the supervised tokens of a batch, fp32 scalar, computed in `dtype`.
    batch: input_ids, attention_mask, labels, int64 (batch, seq). chunk: as chunk_for says; None
    takes the model's own forward pass, with the logits of all positions."""
    return sum(_losses(model, batch, dtype, chunk, "sum"))


@torch.no_grad()
def token_losses(model, batch: dict[str, Tensor], chunk: int | None) -> list[Tensor]:
    """-log p of each supervised token, given those before it: fp32 (supervised,) for each row;
    batch and chunk as in loss_sum, logits in the model's own dtype."""
    counts = (batch["labels"][:, 1:] != IGNORE).sum(1).tolist()
    return list(torch.cat(_losses(model, batch, torch.float32, chunk, "none")).split(counts))


def _losses(model, batch, dtype: torch.dtype, chunk: int | None, reduction: str) -> list[Tensor]:
    """The cross-entropy of the supervised tokens in chunks, row after row."""
    targets = batch["labels"][:, 1:]  # position t predicts token t + 1
    kept = targets != IGNORE
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.autocast(targets.device.type, dtype, enabled=dtype != torch.float32):
        if chunk is None:
            logits = model(**inputs, use_cache=False).logits  # (batch, seq, vocab)
            return [cross_entropy(logits[:, :-1][kept].float(), targets[kept], reduction=reduction)]
        hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        hidden = hidden[:, :-1][kept]  # (batch, seq, hidden) -> (supervised, hidden)
        parts = list(zip(hidden.split(chunk), targets[kept].split(chunk)))

        def part_loss(hidden: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(_logits(model, hidden).float(), targets, reduction=reduction)

        if len(parts) == 1 or not torch.is_grad_enabled():
            return [part_loss(*part) for part in parts]  # its backward comes next, or none
        return [checkpoint(part_loss, *part, use_reentrant=False) for part in parts]


@torch.no_grad()
def chunk_for(model, dtype: torch.dtype) -> int | None:
    """CHUNK if the output head on the decoder's hidden states reproduces the model's logits on four
    tokens; else None (Granite and Cohere scale their logits)."""
    head, device = model.get_output_embeddings(), next(model.parameters()).device
    if head is None or model.get_decoder() in (model, head):
        return None
    ids = torch.arange(4, device=device).unsqueeze(0)  # (1, 4)
    was_training = model.training
    model.eval()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        expected = model(input_ids=ids, use_cache=False).logits
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = _logits(model, hidden)
    model.train(was_training)
    slack = 1e-2 * expected.nan_to_num().abs().max().item()
    same = torch.allclose(logits, expected, rtol=0, atol=slack, equal_nan=True)
    return CHUNK if same else None


def _logits(model, hidden: Tensor) -> Tensor:
    """hidden (..., hidden) -> (..., vocab)."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)  # Gemma 2 and later
