"""Small random models of families whose blocks or layers are called otherwise than Llama's."""

import pytest
import torch

from tests.support.small_models import small_tokenizer

SIZES = dict(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GEMMA = SIZES | dict(
    head_dim=8, sliding_window=8, vocab_size_per_layer_input=320, hidden_size_per_layer_input=16,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
)  # fmt: skip


def build(family: str, seed: int = 0):
    """A model of three blocks in eval mode, fp32."""
    import transformers as hf

    torch.manual_seed(seed)
    if family == "gemma4" and not hasattr(hf, "Gemma4TextConfig"):
        pytest.skip("this version of transformers has no Gemma 4")
    if family == "gemma3":  # two kinds of blocks, with masks and angles of their own
        config = hf.Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=8)
    elif family == "gemma3n":  # an input for each block, and keys shared between blocks
        config = hf.Gemma3nTextConfig(
            **GEMMA, laurel_rank=8, num_kv_shared_layers=1, activation_sparsity_pattern=[0.0] * 3
        )
    elif family == "gemma4":  # likewise
        config = hf.Gemma4TextConfig(**GEMMA, num_kv_shared_layers=0, global_head_dim=8)
    elif family == "opt":  # its feed-forward layers get (batch * seq, hidden)
        config = hf.OPTConfig(
            vocab_size=320, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=128, word_embed_proj_dim=32, init_std=0.2,
        )  # fmt: skip
    elif family == "deepseek":  # a layer of its attention gets (batch, 1, seq, rank)
        config = hf.DeepseekV3Config(
            **SIZES | dict(num_key_value_heads=4), q_lora_rank=16, kv_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=3,
        )  # fmt: skip
    elif family == "falcon":  # its blocks return tuples
        config = hf.FalconConfig(
            vocab_size=320, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
            initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
    else:
        raise ValueError(family)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():  # some start at 0 or 1, where an error hides
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    return model


def store(family: str, folder):
    """The model's folder, as transformers writes it; returns its path."""
    build(family).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder
