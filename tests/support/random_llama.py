"""A small LLaMA with random weights in the folder layout of the real one, with a tokenizer of its
kind (SentencePiece, no pad): a rehearsal of the 7B path. `python -m tests.support.random_llama
FOLDER`; config.json says that the weights are random."""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.sentencepiece_like import sentencepiece


def make(folder: Path) -> None:
    """config.json, three safetensors shards with an index, tokenizer, generation settings."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=192,
                         num_hidden_layers=2, num_attention_heads=4, pad_token_id=None,
                         max_position_embeddings=1024, random_weights=True)  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    # What LLaMA-2's own generation_config.json says: sample.
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    model.save_pretrained(folder, max_shard_size="150KB")
    sentencepiece("llama2").save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
