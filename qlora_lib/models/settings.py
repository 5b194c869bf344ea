"""Config and tokenizer of a model, from a folder or the hub, read without any code of its own.

What a config says is checked before anything is built by it: a size can't be negative or text, and
a model of a billion layers would never be finished.
"""

import math
import re
from contextlib import contextmanager
from pathlib import Path

import torch

from ..base.files import read_json

LAYERS = re.compile(r"(num_|n_)?((hidden|decoder|encoder)_)?layers?|depth")
MOST_LAYERS = 1000  # the deepest of today's have 126
SIZES = re.compile(
    r"(hidden|intermediate|vocab|ffn_hidden|embedding)_size|head_dim|d_model|d_ff|(n_)?embd"
    r"|(num|n)_(attention_|key_value_)?heads?|max_position_embeddings|n_positions|n_ctx"
)
LARGEST_SIZE = 2**24  # the longest context of today's is 10 million
POSITIVE = re.compile(r".*_(eps|epsilon|theta)")

# What transformers writes into its errors, and what it means
REASONS = {
    "trust_remote_code": "it needs code of its own, which is never run here; take a model whose "
                         "architecture transformers has",
    "ignore_mismatched_sizes": "it holds tensors of other shapes than its config.json says; get "
                               "both again",
    "SafetensorError": "its weights are truncated or corrupt ({}); get them again",
}  # fmt: skip
OTHER = "{}; it is damaged, or of a newer version"


@contextmanager
def plain_errors(what: str):
    """Raise ValueError, in one line, for whatever transformers raises within the block when a file
    is not what it expects; errors of the system, the hub and the memory stay what they are."""
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind, by the place where a wrong value is first used
        text, kind = " ".join(str(error).split()), type(error).__name__
        why = next((why for sign, why in REASONS.items() if sign in f"{kind} {text}"), OTHER)
        why = why.format(f"{kind}: {text:.300}")
        raise ValueError(f"{what} can't be read: {why}") from error


def read_config(name: Path | str, **changes):
    """Return the config of a model, in a folder or on the hub, as transformers reads it, with
    `changes`. Raises OSError where there is none, ValueError for values that no model has."""
    from transformers import AutoConfig
    from transformers.configuration_utils import PreTrainedConfig

    file, what = Path(name) / "config.json", f"the config of {name}"
    said = read_json(file) if file.is_file() else PreTrainedConfig.get_config_dict(str(name))[0]
    check_config(said, what)
    with plain_errors(what):
        return AutoConfig.from_pretrained(str(name), trust_remote_code=False, **changes)


def read_tokenizer(name: Path | str):
    """Return the tokenizer of a model, in a folder or on the hub. Raises OSError where there is
    none, ValueError for one that is damaged or needs code of its own."""
    from transformers import AutoTokenizer

    with plain_errors(f"the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)


def head_dim(config) -> int:
    """Return how many features an attention head of a decoder with this config works on."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_config(said: dict, what: str) -> None:
    """Raise ValueError for a size, a number of layers or a constant, at any depth of what a config
    says, that no model has, and for kernels that would be fetched from the hub."""
    found = list(said.items())
    while found:
        name, value = found.pop()
        if isinstance(value, dict):
            found += value.items()
        elif isinstance(value, list):
            found += ((name, part) for part in value)
        elif value is not None and (wrong := _wrong(str(name), value)):
            raise ValueError(f"{what}: {name} is {value!r:.80}{wrong}")


def _wrong(name: str, value) -> str | None:
    """Return why no model has this value."""
    most = MOST_LAYERS if LAYERS.fullmatch(name) else LARGEST_SIZE
    if most == MOST_LAYERS or SIZES.fullmatch(name):
        number = type(value) in (int, float) and 0 <= value <= most
        if not number or value != int(value):
            return f", not a number from 0 to {most:,}"
    if name in ("hidden_size", "d_model") and value < 1:  # by which others are divided
        return ", not a positive number"
    if POSITIVE.fullmatch(name) and (isinstance(value, (bool, str)) or not 0 <= value < math.inf):
        return ", not a positive number"
    if name.endswith("_implementation") and "/" in str(value):
        return ", code from the hub, which is never run here; delete that entry"
    return None
