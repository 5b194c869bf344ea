"""The quantized base in data/ is the one that quantizing gives: never made anew, and no other."""

import torch

from experiments.accuracy import BASE, STORED
from qlora_lib.models.quantize import quantized_layers
from qlora_lib.quant.gptq import gptq_quantize
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.packing import unpack
from qlora_lib.runs import base as bases
from qlora_lib.runs.profiles import load_profile


def test_it_is_read_and_its_first_layer_is_what_gptq_gives(monkeypatch, capsys):
    profile = load_profile("tiny")
    monkeypatch.setattr(bases, "_quantize", None)  # would be called to make it
    stored, tokenizer = profile.quantized_base(STORED, BASE)
    assert "is there, with these settings" in capsys.readouterr().out
    layers = quantized_layers(stored)
    assert len(layers) == 28 and {layer.spec for layer in layers.values()} == {BASE}

    model, _ = profile.load()
    block, hessian = model.model.layers[0], Hessian(model.config.hidden_size)
    with torch.no_grad():
        for batch in profile.calibration(tokenizer):
            x = block.input_layernorm(model.model.embed_tokens(batch["input_ids"]))
            hessian.update(x[batch["attention_mask"].bool()])  # (tokens, in)
    weight = block.self_attn.q_proj.weight
    codes = [unpack(q.codes, BASE.bits, weight.shape) for q in (
        gptq_quantize(weight, hessian, BASE), stored.model.layers[0].self_attn.q_proj.quantized)]
    # With another number of threads a sum is rounded otherwise, and a tie the other way.
    assert (codes[0] == codes[1]).float().mean() > 0.999
