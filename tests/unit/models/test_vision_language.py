"""LoRA in a vision-language model: its linears are linears, wherever they stand."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from qlora_lib.layers.blocks import decoder_blocks
from qlora_lib.lora.files import load_adapter, save_adapter
from qlora_lib.lora.inject import inject_lora, trainable_parameters, use_adapter
from qlora_lib.lora.targets import find_linears
from qlora_lib.models.quantize import quantize_model
from qlora_lib.quant.grid import QuantSpec
from tests.support.family_models import build

IMAGE = 60
IDS = torch.tensor([[1] + 4 * [IMAGE] + [5, 6, 7]])  # a place for each of the four patches
PICTURE = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)


def small_llava(seed: int = 0):
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                              num_attention_heads=2, image_size=8, patch_size=4)
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE,
                         vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS, pixel_values=PICTURE).logits


def same(a, b):
    """But for the order of sums, which where a tensor lies in memory may change."""
    return torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("targets, parts", [
    (("q_proj", "v_proj"), {"vision_tower", "language_model"}),
    (("linear_1", "linear_2"), {"multi_modal_projector"}),
    (("q_proj", "fc1", "linear_2", "down_proj"),
     {"vision_tower", "multi_modal_projector", "language_model"}),
])
def test_adapters_sit_in_tower_projector_and_language_model_and_learn(targets, parts):
    model = small_llava()
    before = logits(model)
    paths = inject_lora(model, targets, rank=2)
    assert {part for part in parts for path in paths if part in path} == parts
    assert all(any(part in path for part in parts) for path in paths)
    assert same(logits(model), before)  # B = 0
    assert all("lora_" in name for name in trainable_parameters(model))
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.5)
    for _ in range(2):  # the first step gives A no gradient
        optimizer.zero_grad()
        model(input_ids=IDS, pixel_values=PICTURE, labels=IDS).loss.backward()
        optimizer.step()
    grads = [p.grad for p in trainable_parameters(model).values()]
    assert all(grad.isfinite().all() and grad.any() for grad in grads)
    after = logits(model)
    assert not same(after, before)
    with use_adapter(model, None):
        assert same(logits(model), before)


@pytest.mark.parametrize("word", ["all", "attention"])
def test_the_words_mean_the_language_model_though_the_tower_has_as_many_blocks(word):
    model = small_llava()
    before, vision = logits(model), model.model.vision_tower.state_dict()
    path, blocks = decoder_blocks(model)
    assert blocks is model.get_decoder().layers and model.get_submodule(path) is blocks
    paths = find_linears(model, word)
    assert len(paths) == 2 * (7 if word == "all" else 4)
    assert all("language_model" in p for p in paths)
    batch = {"input_ids": torch.randint(1, 50, (2, 9)), "attention_mask": torch.ones(2, 9).long()}
    rows = quantize_model(model, [batch], QuantSpec(3, 8), target_modules=word)
    assert {row.name for row in rows} == set(paths)
    assert not same(logits(model), before)
    assert all(torch.equal(t, vision[n]) for n, t in model.model.vision_tower.state_dict().items())


def test_a_tower_inside_the_decoder_is_no_decoder():
    """GIT's get_decoder holds both; they have as many blocks."""
    model = build("git")
    assert decoder_blocks(model)[0] == "git.encoder.layer"


def test_its_adapter_is_saved_and_loaded(tmp_path):
    model = small_llava()
    inject_lora(model, ("v_proj", "linear_1"), rank=2)
    for name, p in trainable_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    fresh = small_llava()
    load_adapter(fresh, tmp_path / "adapter")
    assert same(logits(fresh), logits(model))


def test_a_wrong_target_lists_what_there_is():
    with pytest.raises(ValueError, match="linear_1.*q_proj"):
        find_linears(small_llava(), ("mm_projector",))
