"""The probabilities that a next token is drawn with: temperature and top-p."""

import torch
from torch import Tensor


def token_probabilities(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Probabilities that a token is drawn with: logits (..., vocab) to the same shape.

    The logits are divided by the temperature; then the most likely tokens are kept, as many
    as it takes to reach top_p together (Holtzman et al. 2019, arXiv 1904.09751), and what
    they have is scaled to 1. Temperature 0 is greedy: all on the largest logit, the first
    of equals. Raises ValueError for a negative temperature or top_p outside (0, 1].
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}: expected temperature >= 0 and "
            "0 < top_p <= 1"
        )
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, best, 1.0)
    p = torch.softmax(logits / temperature, -1)
    if top_p == 1:  # sums are rounded: they can reach 1 before the last token
        return p
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    # What the more likely tokens have already: the first is always kept.
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, 0)
    p = torch.zeros_like(p).scatter(-1, order, kept)
    return p / p.sum(-1, keepdim=True)
