"""A small model in a folder as bitsandbytes writes it."""

import json

import torch
from safetensors.torch import save_file
from torch import nn

from qlora_lib.models.quantize import quantize_model, quantized_layers
from qlora_lib.quant.nf4 import NF4_LEVELS, NF4Spec, NF4Tensor, dynamic_map
from tests.support.small_models import small_model, small_tokenizer
from tests.support.tensors import normal


def as_bytes(described: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


def layout(q: NF4Tensor) -> dict[str, torch.Tensor]:
    """The tensors of one weight, by what follows ".weight"."""
    described = {"quant_type": "nf4", "blocksize": q.spec.block_size, "dtype": "bfloat16",
                 "shape": list(q.shape)}  # fmt: skip
    tensors = {"": q.codes.view(-1, 1), ".absmax": q.absmax, ".quant_map": torch.tensor(NF4_LEVELS)}
    if q.spec.double_quant:
        described |= {"nested_blocksize": 256, "nested_dtype": "float32",
                      "nested_offset": q.offset.item()}  # fmt: skip
        tensors |= {".nested_absmax": q.nested_absmax, ".nested_quant_map": dynamic_map()}
    return tensors | {".quant_state.bitsandbytes__nf4": as_bytes(described)}


def save_bnb(folder, double_quant: bool = True, context: int = 256):
    """Write the folder; returns the model, whose linears have biases, and the state that is stored."""
    model = small_model(context=context)
    model.config.attention_bias = model.config.mlp_bias = True
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
        if layer is not model.lm_head:
            layer.bias = nn.Parameter(normal(layer.out_features, seed=i))
    quantize_model(model, None, NF4Spec(double_quant=double_quant), "nf4")
    layers = quantized_layers(model)
    packed = tuple(f"{path}." for path in layers)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith(packed)}
    state.pop("lm_head.weight")  # tied
    for path, layer in layers.items():
        state |= {f"{path}.weight{n}": t.clone() for n, t in layout(layer.quantized).items()}
        state[f"{path}.bias"] = layer.bias
    model.config.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True,
                                     "bnb_4bit_quant_type": "nf4"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model, state
