"""How llama.cpp names and lays out a model's tensors, by architecture.

Three things differ from transformers: names; for Llama the rows of q and k, since llama.cpp's rope
turns neighbours (2i, 2i + 1) where transformers' turns (i, i + d / 2); and for Gemma the weights
of norms, which are stored plus 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .settings import head_dim

GELU, SILU = "gelu_pytorch_tanh", "silu"
# By transformers' name: llama.cpp's, pairs of rope are neighbours, norms plus 1, activation
KNOWN = {
    "LlamaForCausalLM": ("llama", True, 0, SILU),
    "MistralForCausalLM": ("llama", True, 0, SILU),
    "Qwen2ForCausalLM": ("qwen2", False, 0, SILU),
    "Qwen3ForCausalLM": ("qwen3", False, 0, SILU),
    "GemmaForCausalLM": ("gemma", False, 1, GELU),
    "Gemma2ForCausalLM": ("gemma2", False, 1, GELU),
    "Gemma3ForCausalLM": ("gemma3", False, 1, GELU),
}
ROPE = ("default", "linear", "llama3")  # the last two as factors, in a tensor of their own


@dataclass(frozen=True)
class Layout:
    """Names and order of the tensors of one model."""

    arch: str
    plus: int  # added to the weights of norms
    heads: dict[str, int]  # of the projections whose rows are in pairs, by last path component
    name: Callable[[str], str | None] = field(repr=False)  # a path in transformers to llama.cpp's

    def rows(self, path: str, tensor: Tensor, back: bool = False) -> Tensor:
        """A weight, bias or lora_B of a path with its rows in llama.cpp's order; back: in
        transformers'."""
        heads = self.heads.get(path.rpartition(".")[2])
        if heads is None:
            return tensor
        shape = (heads, -1, 2) if back else (heads, 2, -1)
        return tensor.unflatten(0, shape).transpose(1, 2).flatten(0, 2).contiguous()

    def offset(self, name: str) -> int:
        """What is added to a tensor when it is stored."""
        return self.plus if name.endswith("norm.weight") else 0


def layout(config, model_class: str) -> Layout:
    """The layout of a model; ValueError, by name, for what llama.cpp would compute otherwise."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    if model_class not in KNOWN:
        raise ValueError(f"{model_class} can't be written as GGUF here; expected one of "
                         f"{', '.join(KNOWN)}")  # fmt: skip
    arch, pairs, plus, activation = KNOWN[model_class]
    _check(config, arch, activation)
    names = get_tensor_name_map(MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    kv = config.num_key_value_heads
    heads = {"q_proj": config.num_attention_heads, "k_proj": kv} if pairs else {}
    return Layout(arch, plus, heads, lambda name: names.get_name(name, (".weight", ".bias")))


def _check(config, arch: str, activation: str) -> None:
    used = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if used != activation:
        raise ValueError(f"its activation is {used!r}; as {arch} llama.cpp computes {activation}")
    window = getattr(config, "sliding_window", None)
    if arch in ("llama", "qwen2", "qwen3") and getattr(config, "use_sliding_window", window):
        if window and window < config.max_position_embeddings:
            raise ValueError(f"sliding_window={window}: as {arch} llama.cpp attends to all tokens")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar not in (None, head_dim(config)):
        raise ValueError(f"query_pre_attn_scalar={scalar} is not head_dim={head_dim(config)}, "
                         "by which llama.cpp scales attention")  # fmt: skip
    for kind, rope in ropes(config).items():
        if rope.get("rope_type", "default") not in (ROPE if kind == "" else ("default",)):
            raise ValueError(f"rope of type {rope['rope_type']!r} can't be written as GGUF here; "
                             f"expected {', '.join(ROPE)}")  # fmt: skip


def ropes(config) -> dict[str, dict]:
    """The settings of rope: under "", or by the kind of layer where they differ."""
    said = config.rope_parameters
    return said if all(isinstance(v, dict) for v in said.values()) else {"": said}


def rope_factors(config) -> Tensor | None:
    """What llama.cpp divides rope's frequencies by, fp32 (head_dim / 2,); None for plain rope."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = ropes(config).get("", {})
    kind, half = rope.get("rope_type", "default"), torch.arange(0, head_dim(config), 2).float()
    if kind == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return rope["rope_theta"] ** (-half / head_dim(config)) / scaled
