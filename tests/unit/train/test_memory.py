"""The ledger against published numbers, real bytes, and what autograd really keeps."""

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from experiments.measured_step import AllocationMeter
from qlora_lib import (
    Decoding,
    FP4Spec,
    FP8Spec,
    NF4Spec,
    QuantSpec,
    fitting_batch,
    generator,
    inject_lora,
    memory_ledger,
    quantize_model,
    quantized_layers,
    trainable_parameters,
)
from qlora_lib.base.devices import DTYPES
from qlora_lib.generation.kv_cache import CacheSpec
from qlora_lib.lora.targets import ALL_LINEAR, ATTENTION
from qlora_lib.quant.recipe import Recipe
from qlora_lib.train.memory import PARTS, moments_bytes, packed_bytes
from tests.support.memory_models import BATCH, RANK, SEQ, SMALL, SPEC, model_of
from tests.support.small_models import small_model, small_tokenizer

LLAMA2_7B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "tie_word_embeddings")  # fmt: skip


def gb(ledger, *parts):
    return sum(ledger.parts[p] for p in parts) / 1e9


def test_llama2_7b():
    full = memory_ledger(LLAMA2_7B, "full")
    assert full.parameters == full.trained == 6_738_415_616
    assert gb(full, "weights") == pytest.approx(26.95, abs=0.005)  # fp32, for small steps
    assert gb(full, "weights", "gradients", "optimizer") == pytest.approx(107.8, abs=0.05)
    lora = memory_ledger(LLAMA2_7B, "lora", targets=ATTENTION)
    assert lora.trained == 16_777_216
    static = ("weights", "adapters", "gradients", "optimizer")
    assert gb(lora, *static) == pytest.approx(13.75, abs=0.01)
    assert gb(memory_ledger(LLAMA2_7B, compute_dtype="fp32"), "weights") == pytest.approx(
        26.95, abs=0.005
    )


def test_llama2_7b_in_nf4():
    double = memory_ledger(LLAMA2_7B, "qlora")
    single = memory_ledger(LLAMA2_7B, "qlora", spec=NF4Spec(double_quant=False))
    assert double.parts["packed weights"] == 6_476_005_376 // 2
    assert gb(single, "scales") == pytest.approx(0.40, abs=0.005)
    assert gb(double, "scales") == pytest.approx(0.10, abs=0.005)
    base = ("weights", "packed weights", "scales")
    assert gb(single, *base) == pytest.approx(4.17, abs=0.005)
    assert gb(double, *base) == pytest.approx(3.87, abs=0.005)
    assert double.trained == 39_976_960
    assert gb(double, "adapters", "gradients", "optimizer") == pytest.approx(0.64, abs=0.005)
    assert double.bits_per_parameter == pytest.approx(8 * 3.866 / 6.738, abs=0.01)


@pytest.mark.parametrize("batch, with_checkpointing, without", [(1, 0.4, 2.9), (8, 3.1, 22.9)])
def test_llama2_7b_activations(batch, with_checkpointing, without):
    """Measured once at S = 512, logits included; the ledger's logits are an upper bound."""
    for checkpointing, measured in ((True, with_checkpointing), (False, without)):
        ledger = memory_ledger(LLAMA2_7B, "qlora", batch, 512, checkpointing=checkpointing)
        got = gb(ledger, "activations", "logits") - 0.08  # the adapters' bf16 copies
        assert got == pytest.approx(measured, rel=0.06)


def test_text_and_total():
    ledger = memory_ledger(SMALL, "qlora", spec=SPEC, compute_dtype="fp32")
    assert tuple(ledger.parts) == PARTS and ledger.total == sum(ledger.parts.values())
    lines = str(ledger).splitlines()
    assert "QuantSpec(bits=4" in lines[0] and "total" in lines[-3] and "trained" in lines[-1]
    assert "at the peak" in lines[-2]
    assert all(any(line.split("  ")[1] == part for line in lines[1:-3]) for part in PARTS)
    assert "packed" not in str(memory_ledger(SMALL, "lora"))


@pytest.mark.parametrize(
    "spec",
    [NF4Spec(), NF4Spec(double_quant=False), NF4Spec(block_size=32), QuantSpec(4, 32),
     QuantSpec(3, 32), QuantSpec(2, None), QuantSpec(8, 16, symmetric=True), FP4Spec("mxfp4"),
     FP4Spec("nvfp4"), FP8Spec("e4m3")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(64, 160), (300, 64), (7, 96)])
def test_packed_bytes_are_those_of_the_quantized_weight(spec, shape):
    weight = torch.randn(shape)
    quantized = Recipe(spec).quantize(weight)
    assert sum(packed_bytes(shape, spec)) == quantized.nbytes
    assert packed_bytes(shape, spec)[0] == quantized.codes.nbytes


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_stored_parts_are_those_of_a_real_model(method, compute_dtype):
    model = model_of(method, torch.float32 if method == "full" else DTYPES[compute_dtype])
    parts = memory_ledger(
        SMALL, method, rank=RANK, spec=SPEC, compute_dtype=compute_dtype
    ).parts
    adapters = 0
    if method != "full":
        adapters = sum(p.nbytes for p in trainable_parameters(model).values())
    packed = sum(layer.nbytes for layer in quantized_layers(model).values())
    assert parts["weights"] == sum(p.nbytes for p in model.parameters()) - adapters
    assert parts["packed weights"] + parts["scales"] == packed
    assert parts["adapters"] == adapters


def kept_by_forward(model, dtype):
    """Bytes that autograd keeps of the decoder's forward pass, parameters left out."""
    kept = {}
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    ids = torch.randint(3, 300, (BATCH, SEQ))

    def pack(tensor):
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    mixed = dtype != torch.float32
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype, enabled=mixed):
            model.model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("targets", [ALL_LINEAR, ATTENTION, ("v_proj",), ("q_proj", "up_proj")])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_activations_in_fp32_to_the_byte(method, targets):
    parts = memory_ledger(
        SMALL, method, BATCH, SEQ, RANK, targets, SPEC, compute_dtype="fp32"
    ).parts
    assert parts["activations"] == kept_by_forward(
        model_of(method, torch.float32, targets), torch.float32
    )


def test_activations_where_the_first_attention_needs_no_gradient():
    """Without adapters in it, and behind frozen embeddings, it keeps less than is counted."""
    targets = ("up_proj", "down_proj")
    parts = memory_ledger(
        SMALL, "lora", BATCH, SEQ, RANK, targets, SPEC, compute_dtype="fp32"
    ).parts
    kept = kept_by_forward(model_of("lora", torch.float32, targets), torch.float32)
    assert 0.75 * parts["activations"] < kept < parts["activations"]


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_activations_of_full_fine_tuning_to_the_byte(compute_dtype):
    dtype = DTYPES[compute_dtype]
    parts = memory_ledger(SMALL, "full", BATCH, SEQ, compute_dtype=compute_dtype).parts
    # What the head keeps: its input and, under autocast, a copy of its weight.
    head = BATCH * SEQ * SMALL.hidden_size + (dtype.itemsize < 4) * 300 * SMALL.hidden_size
    model = model_of("full", torch.float32)
    assert parts["activations"] == kept_by_forward(model, dtype) + head * dtype.itemsize


def test_activations_in_bf16():
    """Autocast keeps 16-bit copies of A and B; of the first block not all are needed."""
    parts = memory_ledger(SMALL, "qlora", BATCH, SEQ, RANK, spec=SPEC).parts
    kept = kept_by_forward(model_of("qlora", torch.bfloat16), torch.bfloat16)
    assert kept == pytest.approx(parts["activations"], rel=0.01)


@pytest.mark.parametrize("method, optimizer", [("full", "adamw"), ("qlora", "adam8bit")])
def test_moments_are_counted_a_tensor(method, optimizer):
    """bitsandbytes' rule: 2 bytes and an absmax a block of 256; fp32 below 4096 elements."""
    ledger = memory_ledger(
        SMALL, method, rank=RANK, compute_dtype="fp32", optimizer=optimizer
    )
    want = 0
    for p in trainable_parameters(model_of(method, torch.float32)).values():
        packed = optimizer == "adam8bit" and p.numel() >= 4096
        want += 2 * (p.numel() + 4 * -(-p.numel() // 256)) if packed else 8 * p.numel()
    assert ledger.parts["optimizer"] == want
    assert moments_bytes([4095, 4096, 4097], "adam8bit") == 8 * 4095 + 2 * (4096 + 64) + 2 * (
        4097 + 68
    )


def test_llama2_7b_with_8_bit_adam():
    ledger = memory_ledger(LLAMA2_7B, "qlora", optimizer="adam8bit")
    assert ledger.parts["optimizer"] == pytest.approx(2 * 39_976_960 * (1 + 4 / 256), rel=1e-6)
    assert "8-bit Adam" in str(ledger)


@pytest.mark.parametrize("spec", [NF4Spec(), QuantSpec(4, 64)], ids=str)
def test_llama2_7b_trains_below_6_gb(spec):
    """One sequence of 512 tokens, with checkpointing; without it, 2 GB more."""
    given = dict(method="qlora", batch=1, seq=512, rank=16, spec=spec)
    assert memory_ledger(LLAMA2_7B, checkpointing=True, **given).peak < 6e9
    assert memory_ledger(LLAMA2_7B, **given).peak > 6.9e9


def test_logits_of_a_chunk_of_tokens():
    all_at_once = memory_ledger(LLAMA2_7B, batch=4).parts["logits"]
    assert all_at_once == 2048 * 32_000 * (2 + 4 + 4)
    assert memory_ledger(LLAMA2_7B, batch=4, logit_tokens=256).parts["logits"] == all_at_once / 8
    assert memory_ledger(LLAMA2_7B, batch=4, logit_tokens=9999).parts["logits"] == all_at_once


def test_the_logits_and_what_backward_decodes_are_not_alive_together():
    for checkpointing in (False, True):
        ledger = memory_ledger(LLAMA2_7B, "qlora", checkpointing=checkpointing)
        parts = ledger.parts
        in_backward = parts["dequantized layer"] + ledger.recomputed
        assert ledger.peak == ledger.total - min(parts["logits"], in_backward)
        assert (ledger.recomputed > 0) == checkpointing


# --- other architectures --------------------------------------------------------------------


def test_qwen2_to_the_byte():
    """Llama's blocks with biases on q, k, v: more weights, the same activations."""
    config = Qwen2Config(**{k: getattr(SMALL, k) for k in SIZES}, num_key_value_heads=2)
    ledger = memory_ledger(config, "lora", BATCH, SEQ, RANK, compute_dtype="fp32")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    assert ledger.parameters == sum(p.numel() for p in model.parameters())
    inject_lora(model.train(), ALL_LINEAR, rank=RANK)
    assert ledger.parts["activations"] == kept_by_forward(model, torch.float32)
    assert "estimated" not in str(ledger)


def test_gemma3_is_an_estimate_and_says_so():
    config = Gemma3TextConfig(
        **{k: getattr(SMALL, k) for k in SIZES}, num_key_value_heads=2, head_dim=32
    )
    ledger = memory_ledger(config, "qlora", BATCH, SEQ, RANK, compute_dtype="fp32", spec=SPEC)
    assert "activations of gemma3_text estimated" in str(ledger)
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config)
    quantize_model(model, None, SPEC, "rtn")
    inject_lora(model.train(), ALL_LINEAR, rank=RANK)
    assert ledger.parts["packed weights"] == sum(
        layer.codes.nbytes for layer in quantized_layers(model).values()
    )
    kept = kept_by_forward(model, torch.float32)  # two norms a block more, and norms of q and k
    assert 0.55 * kept < ledger.parts["activations"] < kept


def test_a_decoder_with_other_linears_is_refused():
    with pytest.raises(ValueError, match="named as Llama's, and not gpt2: target_modules"):
        memory_ledger(GPT2Config(n_embd=64, n_layer=2, n_head=4), "lora")


def test_bad_input():
    with pytest.raises(ValueError, match="'qlora'|qlora"):
        memory_ledger(SMALL, "adapter")
    with pytest.raises(ValueError, match="compute_dtype='int8'"):
        memory_ledger(SMALL, compute_dtype="int8")
    with pytest.raises(ValueError, match="optimizer='sgd' must be one of adamw, adam8bit"):
        memory_ledger(SMALL, optimizer="sgd")
    with pytest.raises(ValueError, match="block_proj"):
        memory_ledger(SMALL, "lora", targets=("q_proj", "block_proj"))
    with pytest.raises(ValueError, match="match no"):
        memory_ledger(SMALL, "lora", targets=())
    with pytest.raises(ValueError, match="does not divide"):
        memory_ledger(SMALL, "qlora", spec=QuantSpec(4, 48))


@pytest.mark.parametrize("gigabytes, most, fits", [
    (75, 100, 100), (19.5, 100, 50), (19.5, 64, 32), (7, 100, 12), (3.5, 100, 6), (0.1, 100, 1),
])  # fmt: skip
def test_the_batch_of_llama2_7b_that_fits(gigabytes, most, fits):
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA2_7B).bfloat16()
    assert fitting_batch(model, 420, most, free=gigabytes * 1e9) == fits
    packed = fitting_batch(model, 420, most, CacheSpec(4), free=gigabytes * 1e9)
    assert packed > fits or fits in (1, most)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_batch_that_fits_stays_below_the_free_memory(bits):
    model, tokenizer = small_model(), small_tokenizer()
    cache = CacheSpec(bits) if bits else None
    steps = range(0, 10**7, 10**4)
    free = next(n for n in steps if fitting_batch(model, 200, 8, cache, n) == 8)
    assert fitting_batch(model, 200, 8, cache, free - 10**4) == 4
    ask = generator(model, tokenizer, Decoding(max_new_tokens=40, batch_size=8, cache_bits=bits))
    with AllocationMeter() as meter:
        ask(["1" * 159] * 8)
    assert free / 3 < meter.peak < free


def test_the_batch_that_fits_asks_the_device(monkeypatch):
    monkeypatch.setattr("qlora_lib.train.memory.available_memory", lambda device: 10**6)
    assert fitting_batch(small_model(), 100, 64) < 64
    monkeypatch.setattr("qlora_lib.train.memory.available_memory", lambda device: float("inf"))
    assert fitting_batch(small_model(), 100, 64) == 64


def test_a_decoder_without_a_ledger_gets_the_usual_batch():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))
    assert fitting_batch(model, 100, 64, free=0) == 64
