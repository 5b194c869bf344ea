"""Random models of every architecture that is written as GGUF, small, with the small tokenizer."""

import torch
import transformers

from tests.support.small_models import small_tokenizer

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
# The kind of config, and its settings; all but the untied ones tie head and embeddings
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "llama, untied, with biases": ("Llama", {"tie_word_embeddings": False, "attention_bias": True,
                                             "mlp_bias": True}),
    "llama, rope of llama 3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope": ("Llama", {"rope_parameters": LINEAR}),
    "llama, wide heads": ("Llama", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", GEMMA | {"num_hidden_layers": 4}),
    "gemma3": ("Gemma3Text", GEMMA | {"num_hidden_layers": 7}),
}  # fmt: skip


def random_model(name: str, **given):
    """A model of ARCHITECTURES, fp32, whose norms and biases are no constants."""
    kind, settings = ARCHITECTURES[name]
    config = getattr(transformers, f"{kind}Config")(**{
        "vocab_size": len(small_tokenizer()), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.1, "tie_word_embeddings": True,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings, **given,
    })  # fmt: skip
    torch.manual_seed(0)
    how = {"trust_remote_code": False}
    model = transformers.AutoModelForCausalLM.from_config(config, **how).eval()
    for path, weight in model.named_parameters():
        if path.endswith("norm.weight"):
            weight.data.add_(0.1 * torch.randn_like(weight))
        elif path.endswith("bias"):
            weight.data.normal_(0, 0.1)
    return model
