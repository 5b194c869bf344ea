"""Other families than Llama, small and random: quantized, adapted, trained, asked, saved."""

from functools import cache

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from qlora_lib import (
    Decoding,
    NF4Spec,
    QuantSpec,
    TrainConfig,
    dequantize_model,
    finetune,
    generator,
    inject_lora,
    load_quantized,
    merge_lora,
    quantize_model,
    save_quantized,
)
from qlora_lib.data.calibration import calibration_batches
from qlora_lib.layers.blocks import decoder_blocks
from qlora_lib.lora.fingerprint import base_fingerprint
from qlora_lib.lora.targets import ALL_LINEAR, ATTENTION, find_linears
from qlora_lib.models.conv1d import linear_from_conv1d
from qlora_lib.models.load import load_model
from qlora_lib.models.quantize import quantized_layers
from qlora_lib.quant.gptq import gptq_quantize
from qlora_lib.quant.hessian import Hessian
from tests.support.family_models import build, store
from tests.support.family_rehearsal import rehearse
from tests.support.small_models import PAIRS, small_model, small_tokenizer
from tests.support.tensors import relative

SIZES = dict(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMAS_NAMES = set(ALL_LINEAR), set(ATTENTION)
FAMILIES = {
    # Gemma's two layers differ in mask and rotary angles; the window is shorter than the text.
    "gemma3": (
        Gemma3ForCausalLM,
        lambda: Gemma3TextConfig(
            **SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        *LLAMAS_NAMES,
    ),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**SIZES), *LLAMAS_NAMES),
    "gpt2": (
        GPT2LMHeadModel,
        lambda: GPT2Config(
            vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128,
            initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        ),
        {"c_attn", "c_proj", "c_fc"},
        {"c_attn", "c_proj"},
    ),
}  # fmt: skip
IDS = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))


@cache
def original(family: str):
    """As transformers makes it; not to be changed."""
    torch.manual_seed(0)
    kind, config, *_ = FAMILIES[family]
    model = kind(config()).eval()
    for name, p in model.named_parameters():  # some start at 0 or 1, where an error hides
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each family, as save_pretrained writes it."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        original(family).save_pretrained(root / family)
        small_tokenizer().save_pretrained(root / family)
    return root


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def load(folders, family):
    return load_model(folders / family, "cpu", "fp32")[0]


def test_loading_changes_no_logit(folders, family):
    """GPT-2's products are taken the other way round: rounding in fp32."""
    model = load(folders, family)
    assert not any(isinstance(m, Conv1D) for m in model.modules())
    torch.testing.assert_close(logits(model), logits(original(family)), rtol=1e-4, atol=1e-4)


def test_the_words_find_the_linears_by_place(folders, family):
    model, (_, _, every, attention) = load(folders, family), FAMILIES[family]
    prefix, blocks = decoder_blocks(model)
    assert len(blocks) == 2
    for word, names in (("all", every), ("attention", attention)):
        found = find_linears(model, word)
        assert {path.rpartition(".")[2] for path in found} == names
        assert all(path.startswith(f"{prefix}.") for path in found)
    found = find_linears(model, "attention")
    assert all("attn" in path.split(".")[-2] for path in found)  # GPT-2's MLP has a c_proj too
    assert len(found) == 2 * len(attention)


def test_for_llama_the_words_are_its_names():
    model = small_model()
    for word, names in (("all", ALL_LINEAR), ("attention", ATTENTION)):
        assert list(find_linears(model, word)) == list(find_linears(model, names))


@pytest.mark.long
def test_each_layer_is_calibrated_on_its_own_inputs(folders, family):
    """The last layer's codes are GPTQ's on the inputs that it has in the quantized model."""
    batches, spec = calibration_batches(small_tokenizer(), PAIRS, 6, batch_size=3), QuantSpec(3, 16)
    model, dense = load(folders, family), load(folders, family)
    quantize_model(model, batches, spec)
    path = list(find_linears(model, "all"))[-1]
    hessian, mask = Hessian(model.get_submodule(path).in_features), None
    seen = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: hessian.update(args[0][mask])
    )
    for batch in batches:
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch)
    seen.remove()
    want = gptq_quantize(dense.get_submodule(path).weight.detach(), hessian, spec)
    codes = model.get_submodule(path).codes
    assert (codes == want.codes).float().mean() > 0.99  # sums in another order: a tie may flip


@pytest.mark.long
@pytest.mark.parametrize("method", ["rtn", "gptq", "nf4"])
def test_quantize_adapt_train_generate_save(folders, family, method, tmp_path):
    model, tokenizer = load_model(folders / family, "cpu", "fp32")
    batches = calibration_batches(tokenizer, PAIRS, 4) if method == "gptq" else None
    spec = NF4Spec(32) if method == "nf4" else QuantSpec(4, 16)
    report = quantize_model(model, batches, spec, method)
    assert len(report) == len(quantized_layers(model)) == len(find_linears(model, "all"))
    quantized = logits(model)
    assert relative(quantized, logits(original(family))) < 0.5
    torch.manual_seed(0)
    assert sorted(inject_lora(model, "all", rank=2)) == sorted(row.name for row in report)
    assert torch.equal(logits(model), quantized)
    config = TrainConfig(max_steps=1, batch_size=4, lr=1e-2, compute_dtype="fp32")
    assert finetune(model, tokenizer, PAIRS[:4], config).losses[0] > 0
    assert not torch.equal(logits(model), quantized)
    texts = generator(model, tokenizer, Decoding(max_new_tokens=3))([PAIRS[0][0], PAIRS[3][0]])
    assert len(texts) == 2 and all(0 < text.tokens <= 3 for text in texts)
    save_quantized(model, tokenizer, tmp_path / "base")
    assert torch.equal(logits(load_quantized(tmp_path / "base", "cpu", "fp32")[0]), quantized)


def test_gpt2_is_written_as_it_was_read(folders, tmp_path):
    """save_pretrained of the dense, the merged and the dequantized model gives Conv1D again."""
    model = load(folders, "gpt2")
    inject_lora(model, "all", rank=2)
    for layer in find_linears(model, "attention").values():
        layer.lora_B["default"].data.normal_()
    adapted = logits(model)
    merge_lora(model, unload=True)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-3)
    merged = logits(model)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert sum(isinstance(m, Conv1D) for m in again.modules()) == 8
    torch.testing.assert_close(logits(again), merged, rtol=1e-4, atol=1e-4)
    quantize_model(model, None, QuantSpec(8, 16), "rtn", target_modules="attention")
    mixed = logits(model)  # the MLP is dense
    save_quantized(model, small_tokenizer(), tmp_path / "mixed")
    assert torch.equal(logits(load_quantized(tmp_path / "mixed", "cpu", "fp32")[0]), mixed)
    dequantize_model(model)
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(again), mixed, rtol=1e-4, atol=1e-4)


def test_bases_of_a_family_are_told_apart(family):
    """Where no parameter is called norm or embed, too."""
    model = original(family)
    before = base_fingerprint(model)
    embedding = model.get_input_embeddings().weight
    embedding.data[0, 0] += 1
    assert base_fingerprint(model) != before
    embedding.data[0, 0] -= 1


def test_words_refuse_what_they_cannot_mean():
    model = original("gpt2")  # with its Conv1D, which is no linear layer
    with pytest.raises(ValueError, match="'attention' matches no linear layer of GPT2LMHeadModel"):
        find_linears(model, "attention")
    with pytest.raises(ValueError, match="matrices outside of linear layers.*c_attn.weight"):
        find_linears(model, "all")
    with pytest.raises(ValueError, match="Sequential has no config"):
        inject_lora(torch.nn.Sequential(torch.nn.Linear(4, 4)), "all")
    assert linear_from_conv1d(small_model()) == []


@pytest.mark.parametrize("family, verdict", [
    ("phi3", "all"), ("camembert", "all"), ("bart", "all, unused layers"),
    ("mixtral", "named, not streamed"), ("modernbert-decoder", "all"),
])  # fmt: skip
def test_a_sample_of_the_families_goes_from_folder_to_export(family, verdict, tmp_path):
    """What tests/families does with every family that transformers knows."""
    assert rehearse(family, tmp_path) == verdict


def test_buffers_that_a_parent_fills_have_their_values(tmp_path):
    """Falcon H1's model, not the layer that holds it, knows a vector of multipliers."""
    model, name = store("falcon_h1", tmp_path / "model"), "model.layers.1.mamba.mup_vector"
    model.model.layers[0].mamba.A_log.data.add_(1)  # nor does anything else come out as it began
    quantize_model(model, None, QuantSpec(4, 16), "rtn", target_modules=("q_proj",))
    save_quantized(model, small_tokenizer(), tmp_path / "base")
    again, _ = load_quantized(tmp_path / "base", "cpu", "fp32")
    assert torch.equal(again.get_buffer(name), model.get_buffer(name))
    state, want = again.state_dict(), model.state_dict()
    assert all(torch.equal(state[n], want[n]) for n in want)


def test_a_router_is_no_linear_layer_though_its_class_is():
    """It returns scores and choices; Falcon's layers, of a class of their own too, are linear."""
    paths = find_linears(build("phimoe"), ("q_proj",))
    assert len(paths) == 2
    with pytest.raises(ValueError, match="'router'.* match no linear layer"):
        find_linears(build("phimoe"), ("router",))
    assert len(find_linears(build("falcon"), "all")) == 8


def test_who_reads_a_weight_that_is_packed_is_told():
    model = build("jamba")
    quantize_model(model, None, QuantSpec(4, 8), "rtn", target_modules=("dt_proj",))
    with pytest.raises(ValueError, match="keeps no dense weight.*out of target_modules"):
        model(IDS, use_cache=False)
    assert not hasattr(find_linears(model, ("dt_proj",)).popitem()[1], "weight")
