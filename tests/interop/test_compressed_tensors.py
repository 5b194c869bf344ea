"""MXFP4, NVFP4 and grids beside compressed-tensors: the same bytes; and its layout as transformers
reads it: the same logits."""

import copy

import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from qlora_lib.formats.compressed_layout import to_compressed
from qlora_lib.formats.compressed_tensors import export_compressed, import_compressed
from qlora_lib.models.quantize import dequantize_model, quantize_model, quantized_layers
from qlora_lib.quant.fp4 import FP4Spec, quantize_fp4
from qlora_lib.quant.fp8 import FP8Spec
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.minifloat import decode_float, encode_float, float_levels, quantize_fp8
from tests.support.small_models import small_tokenizer
from tests.support.tensors import normal, relative

IDS = torch.randint(3, 260, (4, 64), generator=torch.Generator().manual_seed(0))
COMPRESSORS = {"nvfp4": NVFP4PackedCompressor, "mxfp4": MXFP4PackedCompressor}
both = pytest.mark.parametrize("form", COMPRESSORS)


def theirs(w: torch.Tensor, form: str) -> tuple[dict, QuantizationScheme]:
    """The tensors that compressed-tensors makes of a weight, with scales from its absmax."""
    scheme = preset_name_to_scheme(f"{form.upper()}A16", ["Linear"])
    whole = generate_gparam(w.amin(), w.amax()) if form == "nvfp4" else None
    blocks = w.unflatten(1, (-1, scheme.weights.group_size))
    ends = blocks.amin(-1), blocks.amax(-1)
    scale, _ = calculate_qparams(*ends, scheme.weights, global_scale=whole)
    state = {"weight": w.clone(), "weight_scale": scale}
    if whole is not None:
        state["weight_global_scale"] = whole
    return COMPRESSORS[form].compress(state, scheme), scheme


def weight(i: int) -> torch.Tensor:
    """24 shapes, rows of very different sizes; among them zeros, -0, ties, tiny and bf16 values."""
    out, n = 1 + 3 * i, 32 * (1 + i % 7)
    w = normal(out, n, seed=i) * 10.0 ** (5 * normal(out, 1, seed=i + 99).sigmoid() - 4)
    changes = {
        0: lambda: w.fill_(0), 1: lambda: w[:, :32].fill_(0), 2: lambda: w.mul_(1e-36),
        3: lambda: w.mul_(1e-38), 4: lambda: w.mul_((normal(out, n, seed=7) > 0).float()),
        5: lambda: w.copy_((8 * normal(out, n, seed=8)).round() / 4),
        6: lambda: w.copy_(w.bfloat16()), 7: lambda: w.mul_(1e30),
    }  # fmt: skip
    changes.get(i, lambda: None)()
    return w


@both
@pytest.mark.parametrize("i", range(24))
def test_bytes_are_equal(form, i):
    w = weight(i)
    quantized = quantize_fp4(w, FP4Spec(form))
    ours, (peer, scheme) = to_compressed("layer", quantized), theirs(w, form)
    assert ours.keys() == peer.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == peer[name].dtype and tensor.shape == peer[name].shape
        assert torch.equal(tensor.view(torch.uint8), peer[name].view(torch.uint8)), name
    decoded = COMPRESSORS[form].decompress(peer, scheme)["weight"]  # in bf16
    assert torch.equal(quantized.dequantize(torch.bfloat16), decoded)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, None])
def test_bytes_of_symmetric_grids_are_equal(bits, size):
    for i in range(4):
        w = normal(8 + i, 64 * (1 + i), seed=i)
        spec = QuantSpec(bits, size, symmetric=True, clip_search=False)
        quantized = quantize_rtn(w, spec)
        strategy = "group" if size else "channel"
        args = QuantizationArgs(num_bits=bits, strategy=strategy, group_size=size)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        # From our dense weights, which lie on the grid: codes come back whatever rounds to them.
        state = {"weight": quantized.dequantize(), "weight_scale": quantized.scale.float()}
        peer = PackedQuantizationCompressor.compress(state, scheme)
        ours = to_compressed("layer", quantized)
        assert ours.keys() == peer.keys()
        assert torch.equal(ours["weight_packed"], peer["weight_packed"])
        assert torch.equal(ours["weight_shape"], peer["weight_shape"])
        decoded = PackedQuantizationCompressor.decompress(peer, scheme)["weight"]
        assert torch.equal(decoded, quantized.dequantize())


def test_bytes_of_eight_bits_are_equal():
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    x = normal(20, 64) * 10.0 ** torch.linspace(-6, 3, 20).unsqueeze(1)
    scale, _ = calculate_qparams(x.amin(1, True), x.amax(1, True), args)
    codes, ours = quantize_fp8(x)
    assert torch.equal(ours, scale)
    assert torch.equal(codes, encode_float(x / scale, "e4m3"))
    assert decode_float(codes, "e4m3").abs().amax(1).eq(float_levels("e4m3").max()).all()
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    peer = FloatQuantizationCompressor.compress({"weight": x, "weight_scale": scale}, scheme)
    tensors = to_compressed("layer", FP8Spec().quantize(x))
    assert tensors.keys() == peer.keys() and torch.equal(tensors["weight_scale"], scale)
    assert torch.equal(tensors["weight"].view(torch.uint8), peer["weight"].view(torch.uint8))


# --- models -----------------------------------------------------------------------------------


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(small_tokenizer()), hidden_size=128, intermediate_size=256,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.1, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


SPECS = {
    "nvfp4": FP4Spec("nvfp4"), "mxfp4": FP4Spec("mxfp4"), "e4m3": FP8Spec(),
    "grid": QuantSpec(4, 32, symmetric=True), "rows": QuantSpec(8, None, symmetric=True),
    "3 bits": QuantSpec(3, 64, symmetric=True),
}  # fmt: skip


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


@pytest.fixture(scope="module", params=SPECS)
def exported(request, tmp_path_factory):
    """A model by GPTQ, and the folder of its export."""
    model, spec = random_llama(), SPECS[request.param]
    quantize_model(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], spec)
    folder = tmp_path_factory.mktemp(request.param) / "m"
    export_compressed(model, folder, small_tokenizer())
    return model, folder


def test_transformers_computes_the_same_logits_in_fp32(exported):
    """It decodes FP4 in bf16, which holds 8 bits of a weight: MXFP4's weights have fewer, those of
    NVFP4, level times scale over the tensor's scale, are rounded. Beside our weights rounded so the
    logits are the same but for the order of sums."""
    model, folder = exported
    rounded, layers = copy.deepcopy(model), quantized_layers(model)
    floats = isinstance(next(iter(layers.values())).spec, FP4Spec)
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if floats else {}
    peer = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", **how
    )
    theirs = logits(peer)
    assert relative(theirs, logits(model)) < 1e-2
    dequantize_model(rounded)
    for path in layers if floats else ():
        weight = rounded.get_submodule(path).weight
        weight.data = weight.data.bfloat16().float()
    assert (theirs - logits(rounded)).abs().max() < 1e-4


@both
def test_packed_as_config_json_says(form, tmp_path):
    """In bf16, packed until the first call, which decodes; compared with our weights in bf16, as a
    packed product of ours may round only its result."""
    model, folder = random_llama(), tmp_path / "m"
    quantize_model(model, None, FP4Spec(form), "rtn")
    export_compressed(model, folder)
    peer = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    q_proj = peer.model.layers[0].self_attn.q_proj
    assert hasattr(q_proj, "weight_packed") and not hasattr(q_proj, "weight")
    ours, _ = import_compressed(folder, "cpu", "bf16")
    dequantize_model(ours)
    assert relative(logits(peer), logits(ours)) < 1e-2


def test_it_comes_back(exported):
    model, folder = exported
    again, tokenizer = import_compressed(folder, "cpu", "fp32")
    assert torch.equal(logits(again), logits(model)) and tokenizer is not None
