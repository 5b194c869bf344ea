"""Which adapter a model gets, and what a stored one looks like."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qlora_lib import QuantSpec, inject_lora, load_adapter, quantize_model, save_adapter
from qlora_lib.base.paths import DATA
from qlora_lib.lora.files import find_adapter
from qlora_lib.lora.targets import ALL_LINEAR
from tests.support.small_models import small_model, small_tokenizer


def adapted(seed=0):
    model = small_model(seed)
    torch.manual_seed(seed)
    inject_lora(model, ("q_proj",), rank=2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    return model


def test_the_first_that_fits_is_taken(tmp_path):
    save_adapter(adapted(), tmp_path / "ours")
    save_adapter(adapted(), tmp_path / "ours too")
    save_adapter(adapted(seed=1), tmp_path / "other base")
    folders = [tmp_path / n for n in ("missing", "other base", "ours", "ours too")]
    assert find_adapter(small_model(), *folders) == tmp_path / "ours"
    dense = small_model()
    quantize_model(dense, None, QuantSpec(4, 32), "rtn")
    assert find_adapter(dense, *folders) == tmp_path / "ours"  # a 4-bit base is the same base


def test_none_fits(tmp_path):
    save_adapter(adapted(seed=1), tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"half a file")
    with pytest.raises(FileNotFoundError, match="no readable adapter.*other: [0-9a-f]{16}.*train"):
        find_adapter(small_model(), tmp_path / "broken", tmp_path / "other")


def test_bf16_halves_the_file_and_comes_back_as_fp32(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "fp32")
    save_adapter(model, tmp_path / "bf16", dtype=torch.bfloat16)
    half, whole = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("bf16", "fp32"))
    assert sum(t.nbytes for t in whole.values()) == 2 * sum(t.nbytes for t in half.values())
    fresh = small_model()
    load_adapter(fresh, tmp_path / "bf16")
    ids = torch.tensor([small_tokenizer().encode("Ava has 12 apples.")])
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)
    lora = {n: p for n, p in fresh.named_parameters() if "lora" in n}
    assert {p.dtype for p in lora.values()} == {torch.float32}
    assert all(torch.equal(p, p.bfloat16().float()) for p in lora.values())


def test_the_bundled_adapter_fits_the_bundled_model():
    from qlora_lib import load_profile

    folder = DATA / "tiny-adapter"
    model, _ = load_profile("tiny").load()
    assert find_adapter(model, DATA / "missing", folder) == folder
    assert len(load_adapter(model, folder)) == 7 * model.config.num_hidden_layers
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "data/tiny-llama"
    assert set(described["target_modules"]) == set(ALL_LINEAR)
