"""Small models on disk, as transformers writes them, and their streamed quantization."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from qlora_lib.models.stream import quantize_checkpoint
from qlora_lib.quant.grid import QuantSpec
from tests.support.small_models import small_model, small_tokenizer

SPEC = QuantSpec(4, 32, clip_search=False)  # a search would only take time here
IDS = torch.randint(3, 260, (4, 16), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 11:] = 0
CALIBRATION = [{"input_ids": IDS[i : i + 2], "attention_mask": MASK[i : i + 2]} for i in (0, 2)]


def store(folder, layers=2, dtype=torch.float32, shard_size="5GB", tied=True, bias=False, seed=0):
    """A small model, half as wide as the other tests', grouped-query, as transformers writes it."""
    config = small_model(layers=layers).config
    config.update({"hidden_size": 32, "intermediate_size": 64, "head_dim": 8})
    config.update({"attention_bias": bias, "tie_word_embeddings": tied})
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    small_tokenizer().save_pretrained(folder)
    return folder


def stream(folder, out, spec=SPEC, calibration=CALIBRATION, method="gptq", **given):
    return quantize_checkpoint(
        folder, out, spec, calibration, method, compute_dtype="fp32", device="cpu", **given
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return store(tmp_path_factory.mktemp("two") / "model")


@pytest.fixture
def folder(stored, tmp_path):
    """A model of two blocks that a test may damage."""
    return Path(shutil.copytree(stored, tmp_path / "model"))
