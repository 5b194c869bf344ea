"""Small random models of the families whose norms and their readers the library knows."""

import torch
import transformers as hf

from tests.support.calibrated_models import logits

EXACT = 1e-4  # of logits of size 1 to 10, in fp32

SIZES = dict(
    vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "llama": (hf.LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "mistral": (hf.MistralConfig, dict(head_dim=8)),
    "qwen2": (hf.Qwen2Config, dict(tie_word_embeddings=True)),  # its q, k and v have biases
    "qwen3": (hf.Qwen3Config, dict(head_dim=16)),  # norms on queries and keys
    "gemma": (hf.GemmaConfig, dict(head_dim=16)),  # norms by 1 + w, scaled and tied embeddings
}
FAMILIES = list(CONFIGS)


def known(family: str):
    """A model of two blocks in eval mode, fp32, whose gains and biases are not 1 and 0."""
    torch.manual_seed(0)
    make, changes = CONFIGS[family]
    model = hf.AutoModelForCausalLM.from_config(make(**SIZES | changes)).eval()
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    return model


def change(model, other) -> float:
    """The largest difference of two models' logits."""
    return float((logits(model) - logits(other)).abs().max())
