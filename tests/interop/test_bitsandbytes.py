"""NF4 against bitsandbytes: the same bytes, the same values."""

import json
import shutil

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lib.lora.files import load_adapter
from qlora_lib.lora.targets import ALL_LINEAR, find_linears
from qlora_lib.models.bnb_checkpoint import load_bnb_4bit
from qlora_lib.models.checkpoint import load_quantized, save_quantized
from qlora_lib.models.load import load_model
from qlora_lib.models.quantize import quantize_model, quantized_layers
from qlora_lib.quant.nf4 import NESTED_BLOCK, NF4_LEVELS, NF4Spec, dynamic_map, quantize_nf4
from tests.support.small_models import small_model, small_tokenizer
from tests.support.tensors import normal

# (out, in): square, tall, wide, an odd number of blocks, blocks across rows, odd sizes
SHAPES = [(64, 64), (512, 512), (96, 320), (33, 192), (7, 320), (10, 100), (3, 33), (1, 63)]


def theirs(w, block_size=64, double_quant=False):
    return bnb.quantize_4bit(
        w, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )


def test_levels_and_map_are_the_same_bits():
    _, state = theirs(normal(64, 64), double_quant=True)
    assert torch.equal(state.code, torch.tensor(NF4_LEVELS))
    assert torch.equal(state.state2.code, dynamic_map())


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_bytes_and_absmax_are_equal(shape, block_size):
    w = normal(*shape, seed=sum(shape), std=0.02)
    codes, state = theirs(w, block_size)
    ours = quantize_nf4(w, block_size, double_quant=False)
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_bytes_of_half_precision_weights_are_equal(dtype):
    w = normal(64, 256, std=0.02).to(dtype)
    assert torch.equal(quantize_nf4(w).codes, theirs(w)[0].flatten())


def test_zero_blocks_and_large_weights_have_equal_bytes():
    w = normal(32, 128)
    w[3] = 0
    w[4] *= 1e4
    w[5] *= 1e-6
    codes, state = theirs(w)
    ours = quantize_nf4(w, double_quant=False)
    assert torch.equal(ours.codes, codes.flatten()) and torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_double_quantization_is_equal_up_to_ties(shape, block_size):
    """Bytes, nested absmax and offset to the bit; the 8-bit absmax codes up to ties.

    Ours is the nearest level. bitsandbytes' own search is approximate on a CPU: it may
    take a level that is up to 3e-5 (of a range of 1) farther away."""
    w = normal(*shape, seed=sum(shape), std=0.02)
    codes, state = theirs(w, block_size, double_quant=True)
    ours = quantize_nf4(w, block_size)
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)

    nested = ours.nested_absmax.repeat_interleave(NESTED_BLOCK)[: ours.absmax.numel()]
    # A single block is its own mean: nested absmax 0, and any code decodes to 0.
    other = ((ours.absmax != state.absmax) & (nested > 0)).nonzero().flatten()
    assert other.numel() <= 0.01 * ours.absmax.numel()
    absmax = quantize_nf4(w, block_size, double_quant=False).absmax
    value = ((absmax[other] - ours.offset) / nested[other]).double()
    levels = dynamic_map().double()
    mine = (value - levels[ours.absmax[other].int()]).abs()
    his = (value - levels[state.absmax[other].int()]).abs()
    assert (mine <= his + 1e-7).all() and (his - mine < 3e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (96, 320), (33, 192)], ids=str)
def test_dequantized_values_are_equal(shape, block_size, dtype):
    """Rows made of whole blocks. Where a block crosses rows, the CPU kernel of bitsandbytes
    0.50.2 takes another block's absmax: its own error on 64 x 64 weights in blocks of 128 is
    0.29 where decoding block by block gives 0.095."""
    w = normal(*shape, seed=sum(shape), std=0.02).to(dtype)
    codes, state = theirs(w, block_size)
    ours = quantize_nf4(w, block_size, double_quant=False)
    assert torch.equal(ours.dequantize(dtype), bnb.dequantize_4bit(codes, state))


def test_dequantized_values_are_equal_under_double_quantization():
    w = normal(96, 320, std=0.02)
    codes, state = theirs(w, double_quant=True)
    ours = quantize_nf4(w)
    ours.absmax = state.absmax  # the same ties
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(codes, state))


def test_a_linear4bit_gives_the_same_output():
    import bitsandbytes as package

    from qlora_lib.layers.linear import QuantizedLinear

    w, x = normal(96, 128, std=0.02), normal(5, 128, seed=1)
    theirs_layer = package.nn.Linear4bit(
        128, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4",
        compress_statistics=False,
    )
    theirs_layer.load_state_dict({"weight": w})
    theirs_layer = theirs_layer.to("cpu")  # .to() quantizes
    ours = QuantizedLinear(quantize_nf4(w, double_quant=False))
    assert (ours(x) - theirs_layer(x)).abs().max() < 1e-5


# --- whole checkpoints ---------------------------------------------------------------------------
# Weights that fit the small model: 64 and 128 inputs, so that no block crosses rows.

IDS = torch.randint(3, 260, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def bnb_model(dense, double_quant=True, storage="uint8", kind="nf4"):
    """The dense folder, quantized by transformers and bitsandbytes."""
    config = BitsAndBytesConfig(
        load_in_4bit=kind != "int8", load_in_8bit=kind == "int8",
        bnb_4bit_quant_type="fp4" if kind == "int8" else kind,
        bnb_4bit_use_double_quant=double_quant, bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, device_map="cpu", dtype=torch.float32
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bnb") / "dense"
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(dense):
    folder = dense.with_name("saved")
    bnb_model(dense).save_pretrained(folder)
    return folder


def dequantized(model):
    """The same model with bitsandbytes' own dequantized weights in dense layers."""
    reference = small_model()
    for path, linear in find_linears(reference, ALL_LINEAR).items():
        weight = model.get_submodule(path).weight
        linear.weight.data = bnb.dequantize_4bit(weight.data, weight.quant_state)
    return reference


def small_quantized():
    model = small_model()
    quantize_model(model, None, NF4Spec(), "nf4")
    return model


@pytest.mark.parametrize("shards", ["5GB", "100KB"])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_we_load_what_bitsandbytes_saved(double_quant, storage, shards, dense, tmp_path):
    """Weights to the bit; logits to fp32's rounding, which both sides share but for the order
    of sums. In eval mode on a CPU with AVX512-BF16, bitsandbytes itself computes in bf16: its
    reference is the model of its dequantized weights, and its own layers in train mode."""
    theirs_model = bnb_model(dense, double_quant, storage)
    theirs_model.save_pretrained(tmp_path / "m", max_shard_size=shards)
    assert (tmp_path / "m" / "model.safetensors").exists() == (shards == "5GB")
    model, tokenizer = load_bnb_4bit(tmp_path / "m", "cpu", "fp32")
    assert tokenizer is None and not model.training
    reference = dequantized(theirs_model)
    layers = quantized_layers(model)
    assert len(layers) == 14
    for path, layer in layers.items():
        assert layer.spec == NF4Spec(64, double_quant)
        assert torch.equal(layer.dequantize(), reference.get_submodule(path).weight)
    assert (logits(model) - logits(reference)).abs().max() < 1e-5
    assert (logits(model) - logits(theirs_model.train())).abs().max() < 1e-5
    assert not hasattr(model.config, "quantization_config")


def test_a_loaded_checkpoint_is_one_of_ours(saved, tmp_path):
    """Saved in our own format it comes back to the bit; our NF4 of the same weights is equal."""
    model, _ = load_bnb_4bit(saved, "cpu", "fp32")
    save_quantized(model, small_tokenizer(), tmp_path / "ours")
    again, _ = load_quantized(tmp_path / "ours", "cpu", "fp32")
    assert torch.equal(logits(again), logits(model))
    small_tokenizer().save_pretrained(saved)  # load_model wants one
    assert torch.equal(logits(load_model(saved, "cpu", "fp32")[0]), logits(model))
    for path, layer in quantized_layers(small_quantized()).items():
        theirs_layer = quantized_layers(model)[path]
        assert torch.equal(layer.codes, theirs_layer.codes)
        assert torch.equal(layer.nested_absmax, theirs_layer.nested_absmax)
        assert torch.equal(layer.offset, theirs_layer.offset)


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_packed_weights_are_the_same_in_every_compute_dtype(name, dtype, saved):
    model, _ = load_bnb_4bit(saved, "cpu", name)
    exact, _ = load_bnb_4bit(saved, "cpu", "fp32")
    assert {p.dtype for p in model.parameters()} == {dtype}
    for path, layer in quantized_layers(model).items():
        assert torch.equal(layer.dequantize(), quantized_layers(exact)[path].dequantize())


def test_a_qlora_adapter_of_peft_and_bitsandbytes_runs_here(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(saved, device_map="cpu", dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = get_peft_model(base, config).train()
    for i, (name, p) in enumerate(reference.named_parameters()):
        if "lora_B" in name:
            p.data = normal(*p.shape, seed=i, std=0.1)
    reference.save_pretrained(tmp_path / "a")
    model, _ = load_bnb_4bit(saved, "cpu", "fp32")
    before = logits(model)
    assert len(load_adapter(model, tmp_path / "a")) == 14
    assert (logits(model) - before).abs().max() > 0.1
    assert (logits(model) - logits(reference)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "kind, message",
    [("fp4", "config.json: bnb_4bit_quant_type='fp4' is not supported"),
     ("int8", r"config.json: LLM.int8 \(load_in_8bit\) is not supported")],
)  # fmt: skip
def test_other_formats_of_bitsandbytes_are_refused(kind, message, dense, tmp_path):
    bnb_model(dense, kind=kind).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        load_bnb_4bit(tmp_path / "m", "cpu", "fp32")
    # Its tensors say so as well, whatever the config claims.
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"].update(
        load_in_8bit=False, load_in_4bit=True, bnb_4bit_quant_type="nf4"
    )
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds no tensor .*bitsandbytes__nf4; is it"):
        load_bnb_4bit(tmp_path / "m", "cpu", "fp32")


Q = "model.layers.1.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def damaged(saved, tmp_path, change_state=None, change_config=None):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    state = load_file(folder / "model.safetensors")
    if change_state:
        change_state(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if change_config:
        change_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def set_state(**changes):
    def change(state):
        described = json.loads(bytes(state[STATE].tolist()).decode()) | changes
        described = {k: v for k, v in described.items() if v is not None}
        state[STATE] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)

    return change


def put(name, make):
    return lambda state: state.update({name: make(state[name])})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(STATE), f"size mismatch for {Q}"),
        (lambda s: s.pop(f"{Q}.absmax"), rf"{Q}: \['.absmax'\] missing"),
        (lambda s: s.pop(f"{Q}.nested_absmax"), rf"{Q}: \['.nested_absmax'\] missing"),
        (lambda s: s.pop(Q), rf"{Q}: \['weight'\] missing"),
        (lambda s: s.update({f"{Q}.next": torch.ones(1)}), r"\['.next'\] missing or not expected"),
        (lambda s: s.pop("model.norm.weight"), "missing .*model.norm.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "not expected .*extra"),
        (put(Q, lambda t: t[:-1]), rf"{Q}: codes is torch.uint8 \(2047,\), should be .*\(2048,\)"),
        (put(f"{Q}.absmax", lambda t: t[:-1]), rf"{Q}: absmax is torch.uint8 \(63,\)"),
        (put(f"{Q}.absmax", lambda t: t.float()), "absmax is torch.float32 .*should be torch.u"),
        (put(f"{Q}.quant_map", lambda t: t.flip(0)), f"{Q}: .quant_map holds other levels"),
        (put(f"{Q}.nested_quant_map", lambda t: t * 2), "nested_quant_map holds other levels"),
        (put(STATE, lambda t: t[:-3]), ".quant_state.bitsandbytes__nf4 holds no JSON object"),
        (put(STATE, lambda t: t + 100), ".quant_state.bitsandbytes__nf4 holds no JSON object"),
        (set_state(quant_type="fp4"), f"{Q}: it is 'fp4' of shape"),
        (set_state(shape=[32, 128]), r"is 'nf4' of shape \[32, 128\], the model has \(64, 64\)"),
        (set_state(blocksize=128), rf"{Q}: absmax is torch.uint8 \(64,\), should be .*\(32,\)"),
        (set_state(blocksize=0), "block_size.*0"),
        (set_state(nested_blocksize=128), "nested_blocksize=128 is not 256"),
        (set_state(nested_offset=None), r"\['nested_blocksize', 'nested_dtype'\] missing or not"),
        (set_state(next_years_idea=1), r"\['next_years_idea'\] missing or not known"),
    ],
)
def test_damaged_tensors_are_named(change, message, saved, tmp_path):
    folder = damaged(saved, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_bnb_4bit(folder, "cpu", "fp32")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("quantization_config"), "quant_method=None, not 'bitsandbytes'"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "read it with.*_gptq"),
        (lambda c: c["quantization_config"].update(new=1), r"settings \{'new': 1\} are not known"),
        (lambda c: c["quantization_config"].pop("bnb_4bit_quant_type"), "'fp4' is not supported"),
        (lambda c: c.update(intermediate_size=192), r"the model has \(64, 192\)"),
        (lambda c: c.update(vocab_size=300), "size mismatch for model.embed_tokens"),
        (lambda c: c.update(num_hidden_layers=1), "layers.1.*is quantized, but .* has no model.l"),
    ],
)
def test_configs_that_do_not_fit_are_named(change, message, saved, tmp_path):
    folder = damaged(saved, tmp_path, change_config=change)
    with pytest.raises(ValueError, match=message):
        load_bnb_4bit(folder, "cpu", "fp32")


def test_truncated_and_missing_files_are_named(saved, tmp_path):
    folder = damaged(saved, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors is truncated or corrupt"):
        load_bnb_4bit(folder, "cpu", "fp32")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist"):
        load_bnb_4bit(folder, "cpu", "fp32")
