"""The page that answers by itself: the bundled model in 4 bits, its adapter, and web/ask.js, a
forward pass in plain JavaScript.

The codes of GPTQ stand in the page as they are. The adapter is written as the singular triplets of
its update, the largest first, so that the first k of them are the best update of rank k.
"""
import base64
import json

import torch
from torch import Tensor

from qlora_lib.base.files import read_text
from qlora_lib.base.paths import DATA
from qlora_lib.data.gsm8k import PROMPT, parse_gold
from qlora_lib.lora.files import load_adapter
from qlora_lib.lora.init import balanced, product_svd
from qlora_lib.lora.layer import lora_layers
from qlora_lib.models.checkpoint import load_quantized

BASE, ADAPTER, PROBLEMS = DATA / "tiny-gptq" / "base", DATA / "tiny-adapter", "minigsm/test.jsonl"
SHOWN = 12  # problems to choose from


def page_model(base=BASE, adapter=ADAPTER) -> dict:
    """All that web/ask.js computes with, as JSON holds it: sizes, vocabulary, and tensors in
    base64: codes uint8 (out, in / 2), grids and adapter fp16, embedding and norms fp16."""
    model, tokenizer = load_quantized(base, "cpu", "fp32")
    load_adapter(model, adapter)
    config, state = model.config, model.state_dict()
    said = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    return {
        "sizes": {
            "layers": config.num_hidden_layers, "heads": config.num_attention_heads,
            "width": config.hidden_size, "head": config.head_dim,
            "theta": config.rope_parameters["rope_theta"], "eps": config.rms_norm_eps,
            "group": first.base.spec.group_size, "rank": first.configs[first.active].rank,
        },
        "ids": {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id},
        "prompt": PROMPT,
        "vocabulary": [text for text, _ in sorted(said["vocab"].items(), key=lambda p: p[1])],
        "merges": [pair if isinstance(pair, list) else pair.split(" ") for pair in said["merges"]],
        "dense": {name: _fp16(t) for name, t in state.items()
                  if name.endswith(("embed_tokens.weight", "norm.weight"))},
        "packed": {path: _packed(layer) for path, layer in layers.items()},
    }


def adapter_factors(layer) -> tuple[Tensor, Tensor]:
    """B (out, rank), with the scaling, and A (rank, in) of a layer's adapter, fp16: its singular
    triplets, the largest first."""
    name = layer.active
    update = layer.configs[name].scaling * layer.lora_B[name].detach(), layer.lora_A[name].detach()
    b, a = balanced(*product_svd(*update), update[1].shape[0])
    return b.half(), a.half()


def _packed(layer) -> dict:
    held = layer.base.quantized
    b, a = adapter_factors(layer)
    return {"shape": list(held.shape), "codes": _text(held.codes), "scale": _fp16(held.scale),
            "zero": _text(held.zero_point), "a": _fp16(a), "b": _fp16(b)}


def _fp16(t: Tensor) -> str:
    return _text(t.detach().half().contiguous().view(torch.uint8))


def _text(t: Tensor) -> str:
    return base64.b64encode(t.numpy().tobytes()).decode()


def problems(count: int = SHOWN) -> list[dict]:
    """The first test problems, {question, gold}."""
    lines = read_text(DATA / PROBLEMS).splitlines()[:count]
    return [{"question": entry["question"], "gold": str(parse_gold(entry["answer"]))}
            for entry in map(json.loads, lines)]
