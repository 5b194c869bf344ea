"""A small model for each method, with the sizes that its ledger is made for."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from qlora_lib import (
    QuantSpec,
    inject_lora,
    quantize_model,
)
from qlora_lib.lora.targets import ALL_LINEAR

SMALL = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    tie_word_embeddings=True,
)
BATCH, SEQ, RANK = 4, 48, 8
SPEC = QuantSpec(4, 32, clip_search=False)


def model_of(method, dtype, targets=ALL_LINEAR):
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMALL).to(dtype)
    if method == "qlora":
        quantize_model(model, None, SPEC, "rtn")
    if method != "full":
        inject_lora(model, targets, rank=RANK)
    return model.train()
