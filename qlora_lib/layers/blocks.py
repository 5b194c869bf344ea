"""The decoder blocks of a model, and what "all" and "attention" mean among their linears: words
that go by where a layer is, for families name their layers each in their own way."""

import re
from collections.abc import Iterable

from torch import nn

WORDS = ("all", "attention")


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the blocks of a model's text decoder: a vision or audio tower may have as
    many, so only what transformers calls the decoder is searched, without parts that have a config
    of another kind. Raises ValueError for none."""
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} has no config that counts its decoder blocks")
    text = model.config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if isinstance(decoder, nn.Linear):  # ModernBERT calls its head so
        decoder = model
    inside, kinds = set(decoder.modules()), (type(text), type(model.config))
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            if module in inside and isinstance(_config_around(model, path), kinds):
                return path, module
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder blocks")


def _config_around(model: nn.Module, path: str):
    """The config of the nearest module around `path` that has one."""
    path = path.rpartition(".")[0]
    around = model.get_submodule(path)
    return around.config if hasattr(around, "config") else _config_around(model, path)


def linears_in_blocks(model: nn.Module, paths: Iterable[str], word: str) -> list[str]:
    """Those of the linear layers at `paths` that a word means: "all" in decoder blocks, so not the
    head, or of these the ones inside a module that is named for "attention". Raises ValueError for
    none, and for "all" where a block has other matrices too, such as stacked experts."""
    prefix, blocks = decoder_blocks(model)
    inside = [path for path in paths if path.startswith(f"{prefix}.")]
    if word == "all":
        parts = tuple(f"{path}." for path in inside)
        matrices = (f"{prefix}.{n}" for n, p in blocks.named_parameters() if p.dim() > 1)
        others = [n for n in matrices if not n.startswith(parts)]
        if others:
            raise ValueError(f"the blocks of {type(model).__name__} have matrices outside of "
                             f"linear layers, such as {others[0]}, so 'all' can't mean all; name "
                             "target_modules to leave these as they are")  # fmt: skip
    else:
        inside = [p for p in inside if re.search("attn|attention", p.rpartition(".")[0])]
    if not inside:
        raise ValueError(f"{word!r} matches no linear layer of {type(model).__name__}")
    return inside
