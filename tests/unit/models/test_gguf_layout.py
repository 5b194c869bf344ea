"""Names and order of llama.cpp's tensors; tests/interop/test_llama_cpp.py asks llama.cpp itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lib.models.gguf_layout import layout, rope_factors
from tests.support.gguf_models import ARCHITECTURES, random_model

pytest.importorskip("gguf")


def layout_of(name: str):
    model = random_model(name)
    return layout(model.config, type(model).__name__), model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_has_one_name_of_its_own(name):
    lay, model = layout_of(name)
    tied = model.all_tied_weights_keys  # Gemma's head, which llama.cpp has no name for
    names = [lay.name(path) for path in model.state_dict() if path not in tied]
    assert None not in names and len(set(names)) == len(names)
    assert lay.offset("model.norm.weight") == int("gemma" in name)
    assert lay.offset("model.embed_tokens.weight") == 0


def test_rope_s_pairs_become_neighbours():
    """Row i of a head, and row i + d / 2, which transformers turns together."""
    lay, _ = layout_of("llama")  # 4 heads of 16 rows, 2 of keys
    rows = torch.arange(32)
    moved = lay.rows("model.layers.0.self_attn.k_proj", rows)
    assert moved[:6].tolist() == [0, 8, 1, 9, 2, 10] and moved[16:18].tolist() == [16, 24]
    assert lay.rows("model.layers.0.self_attn.v_proj", rows) is rows
    assert layout_of("qwen2")[0].rows("model.layers.0.self_attn.k_proj", rows) is rows


@given(half=st.integers(1, 8), columns=st.integers(0, 3), path=st.sampled_from(["q_proj", "k_proj"]))
@settings(max_examples=40, deadline=None)
def test_the_order_of_rows_goes_there_and_back(half, columns, path):
    lay, _ = layout_of("llama")
    size = (lay.heads[path] * 2 * half, *[5] * columns)
    tensor = torch.arange(torch.Size(size).numel()).view(size)
    assert torch.equal(lay.rows(path, lay.rows(path, tensor), back=True), tensor)


def test_factors_of_rope():
    assert rope_factors(random_model("llama").config) is None
    linear = rope_factors(random_model("llama, linear rope").config)
    assert torch.allclose(linear, torch.full((8,), 2.0))
    scaled = rope_factors(random_model("llama, rope of llama 3").config)
    assert scaled[0] == 1 and scaled[-1] == pytest.approx(8) and (scaled.diff() > -1e-5).all()
