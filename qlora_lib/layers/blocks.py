"""The decoder blocks of a model, and what "all" and "attention" mean among their linears: words
that go by where a layer is, for families name their layers each in their own way."""

import re
from collections.abc import Iterable

from torch import nn

WORDS = ("all", "attention")


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of the blocks of a model's text decoder (a vision or audio tower may
    have as many). Raises ValueError when there is no list of the config's length."""
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} has no config that counts its decoder blocks")
    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = set(decoder.modules())
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside:
            return path, module
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder blocks")


def linears_in_blocks(model: nn.Module, paths: Iterable[str], word: str) -> list[str]:
    """Those of the linear layers at `paths` that a word means.

    "all": every one in a decoder block, so not the head. "attention": of these, the ones inside
    a module that is named for it (self_attn, attn, self_attention ...). Raises ValueError when
    that is none, and for "all" where a block has other matrices too, such as stacked experts.
    """
    prefix, blocks = decoder_blocks(model)
    inside = [path for path in paths if path.startswith(f"{prefix}.")]
    if word == "all":
        parts = tuple(f"{path}." for path in inside)
        matrices = (f"{prefix}.{n}" for n, p in blocks.named_parameters() if p.dim() > 1)
        others = [n for n in matrices if not n.startswith(parts)]
        if others:
            raise ValueError(
                f"the blocks of {type(model).__name__} have matrices outside of linear layers, "
                f"such as {others[0]}, so 'all' can't mean all; name target_modules to leave "
                "these as they are"
            )
    else:
        parents = {path: path.rpartition(".")[0] for path in inside}
        inside = [path for path in inside if re.search("attn|attention", parents[path])]
    if not inside:
        raise ValueError(f"{word!r} matches no linear layer of {type(model).__name__}")
    return inside
