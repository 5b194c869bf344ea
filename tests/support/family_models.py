"""A small random model of every causal language model that transformers knows, by its model_type.

Its configuration is the family's default, with each number of layers, heads, features, tokens and
experts made small by its name. OTHERS has what names do not tell.
"""

import re

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.small_models import small_tokenizer

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LIMIT = 4_000_000  # parameters; above it a model is not small

# Sides of linears are multiples of 32, as the GPTQ layout wants them. The first pattern counts.
SMALL = {
    ".*vocab_size(_per_layer_input)?": 320,
    "num_hidden_layers|n_layers?|num_layers|num_blocks|depth": 2,
    "num_(en|de)coder_layers|(en|de)coder_layers|num_global_layers": 2,
    ".*num_(key_value|kv)_heads|kv_n_heads|.*experts_per_tok(en)?|moe_top_?k|moe_k": 2,
    "n_groups?|topk_group|num_expert_group": 1,
    ".*num_(attention_)?heads(_per_layer)?|.*n_heads?|.*attention_heads": 4,
    "(moe_)?num_experts|n_routed_experts|num_local_experts|zero_expert_num": 4,
    ".*sliding_window.*|.*window.*|conf_attention.*": 8,
    "v_head_dim|head_dim|dim_head|d_head|kv_channels|attention_head_(size|dim)|.*_key_head_dim": 16,
    ".*state_size|.*d_state|.*value_head_dim|linear_head_dim|swa_head_dim|rotary_dim": 16,
    ".*_rank|qk_rope_head_dim|qk_nope_head_dim": 32,
    "hidden_size|n_embd|d_model|dim|(emb|embedding)_dim|embedding_size|lru_width": 64,
    "word_embed_proj_dim|(in|out)put_embedding_size|attention_hidden_size": 64,
    "index_head_dim|.*per_layer_input": 64,
    ".*max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions": 64,
    "context_length|model_max_length": 64,
    ".*intermediate_size(_mlp)?|.*ffn_dim|n_inner|.*ffn_hidden_size|dim_ff|dff|d_inner": 128,
    "feed_forward_size|mlp_dim|mamba_d_ssm": 128,
}  # fmt: skip
SMALL = {re.compile(pattern): size for pattern, size in SMALL.items()}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA = {"mamba_n_heads": 32, "mamba_d_head": 4, "mamba_n_groups": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 128, "attention_head_dim": 32,
}  # fmt: skip
OTHERS = {
    "bamba": MAMBA,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 128, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": MAMBA,
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": [128, 128]},
    "granitemoehybrid": MAMBA,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 32, "head_dim": 4},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 32, "mamba_head_dim": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8], "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA | {"mamba_headdim": 4, "n_mamba_heads": 32, "hybrid_layer_ids": [1, 3]},
}  # fmt: skip


def small_config(family: str):
    """The family's configuration in small."""
    kind = CONFIG_MAPPING[family]
    said = _shrunk(kind().to_dict()) | OTHERS.get(family, {})
    return kind(**{k: v for k, v in said.items() if k != "model_type"})


def _shrunk(said: dict) -> dict:
    """What a configuration says, with every number made small whose name is known."""
    layers = next((said[k] for k in said if _small(k) == 2 and "layer" in k and said[k]), None)
    small = {}
    for name, value in said.items():
        if name.endswith("config") and isinstance(value, dict):
            value = _shrunk(value)
        elif isinstance(value, list) and len(value) == layers:  # a kind for each layer: two kinds
            value = [value[0], next((other for other in value if other != value[0]), value[0])]
        elif name in TOKENS:
            value = TOKENS[name]
        elif type(value) is int:
            value = min(value, _small(name) or value)
        small[name] = True if name == "is_decoder" else value
    if "kv_lora_rank" in said:  # latent attention
        small |= {"num_key_value_heads": small["num_attention_heads"], "head_dim": 32}
        small |= {"qk_head_dim": 64} if "qk_head_dim" in said else {}
    small.pop("per_layer_config", None)  # of layers that are no more
    return small


def _small(name: str) -> int | None:
    return next((size for pattern, size in SMALL.items() if pattern.fullmatch(name)), None)


def build(family: str, seed: int = 0):
    """The model in eval mode, fp32, with two blocks; vectors are random, too.

    Raises what its classes raise for a configuration that is not understood, and ValueError for
    a model that came out large.
    """
    config = small_config(family)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > LIMIT:
        raise ValueError(f"{family} has {count:,} parameters; its configuration is not small")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():  # some start at 0 or 1, where an error hides
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    return model


def store(family: str, folder):
    """The model's folder, as transformers writes it; returns the model."""
    model = build(family)
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return model
