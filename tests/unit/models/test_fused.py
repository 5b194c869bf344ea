"""Layers that servers compute as one share an NVFP4 tensor scale, in memory and streamed."""

import pytest
import torch

from qlora_lib.models.checkpoint import load_quantized
from qlora_lib.models.fused import shared_largest
from qlora_lib.models.load import load_model
from qlora_lib.models.quantize import quantize_model, quantized_layers
from qlora_lib.quant.fp4 import FP4Spec, quantize_fp4
from qlora_lib.quant.grid import QuantSpec
from tests.support.small_models import small_model
from tests.support.streamed_models import CALIBRATION, store, stream

NV = FP4Spec("nvfp4")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_they_share_the_scale_of_their_largest_weight(method):
    model, dense = small_model(), small_model()
    quantize_model(model, CALIBRATION, NV, method)
    layers = quantized_layers(model)
    weights = {path: dense.get_submodule(path).weight.detach() for path in layers}
    for block in ("model.layers.0", "model.layers.1"):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                      ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)):  # fmt: skip
            most = max(weights[f"{block}.{name}"].abs().max() for name in names)
            for name in names:
                layer = layers[f"{block}.{name}"]
                assert torch.equal(layer.tensor_scale, 448 * 6 / most)
                wanted = quantize_fp4(weights[f"{block}.{name}"], NV, float(most))
                assert method == "gptq" or torch.equal(layer.codes, wanted.codes)
    own = quantize_fp4(weights["model.layers.0.self_attn.q_proj"], NV)
    assert own.tensor_scale != layers["model.layers.0.self_attn.q_proj"].tensor_scale


def test_other_specs_share_nothing():
    linears = {f"a.{name}": torch.nn.Linear(32, 32) for name in ("q_proj", "k_proj", "v_proj")}
    assert shared_largest(linears, NV).keys() == linears.keys()
    assert shared_largest(linears, FP4Spec("mxfp4")) == shared_largest(linears, QuantSpec()) == {}


def test_streamed_they_share_it_too(tmp_path):
    folder = store(tmp_path / "model")
    model, _ = load_model(folder, "cpu", "fp32")
    quantize_model(model, None, NV, "rtn")
    stream(folder, tmp_path / "out", NV, None, "rtn")
    streamed = quantized_layers(load_quantized(tmp_path / "out", "cpu", "fp32")[0])
    for path, layer in quantized_layers(model).items():
        assert torch.equal(streamed[path].tensor_scale, layer.tensor_scale)
