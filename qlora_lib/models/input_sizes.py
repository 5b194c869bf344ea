"""How large the inputs of a model's linear layers are, channel by channel."""

import torch
from torch import Tensor, nn

from ..lora.targets import find_linears
from .batches import Batch, batch_logits, real_tokens, token_mask
from .calibrate import watch_inputs


@torch.no_grad()
def input_absmax(
    model: nn.Module, batches: list[Batch], layers: dict[str, nn.Module] | None = None
) -> dict[str, Tensor]:
    """The largest |x| of each input channel (in,), fp32, of each linear layer, by path, over the
    real tokens of the batches. layers: by path; None: all in the decoder blocks. Raises ValueError
    for no batches, and for inputs that do not hold a row for each token."""
    if not batches:
        raise ValueError("no calibration batches; pass at least one")
    layers, found, mask = layers or find_linears(model, "all"), {}, None

    def see(path: str, x: Tensor) -> None:
        seen = real_tokens(x, mask, path).float().abs().amax(0)  # (tokens, in) -> (in,)
        found[path] = torch.maximum(found[path], seen) if path in found else seen

    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = token_mask(batch)
            with watch_inputs(layers, see):
                batch_logits(model, batch)
    finally:
        model.train(was_training)
    return found
