"""PiSSA and LoftQ against PEFT's: the same residual base, the same product, one file format."""

import inspect

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import loftq_utils

from qlora_lib.lora.files import save_adapter
from qlora_lib.lora.init import loftq
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.layer import lora_layers
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.quant.nf4 import NF4Spec
from tests.support.small_models import small_model
from tests.support.tensors import normal, relative

IDS = torch.randint(3, 260, (2, 12), generator=torch.Generator().manual_seed(0))
CONFIGS = [dict(alpha=16), dict(alpha=5), dict(alpha=16, use_rslora=True)]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_pissa_is_pefts(config, tmp_path):
    model = small_model()
    inject_lora(model, ALL_LINEAR, rank=4, init="pissa", **config)
    reference = get_peft_model(
        small_model(),
        LoraConfig(
            r=4, lora_alpha=config["alpha"], use_rslora=config.get("use_rslora", False),
            target_modules=list(ALL_LINEAR), init_lora_weights="pissa", task_type="CAUSAL_LM",
        ),
    ).eval()  # fmt: skip
    state = dict(reference.named_parameters())
    for path, layer in lora_layers(model).items():
        a, b, base = (
            state[f"base_model.model.{path}.{part}"]
            for part in ("lora_A.default.weight", "lora_B.default.weight", "base_layer.weight")
        )
        scaling = layer.configs["default"].scaling
        # Singular vectors have a free sign, the product has not.
        assert relative(layer.delta("default"), scaling * (b @ a)) < 1e-5
        assert relative(layer.base.weight, base) < 1e-5
        assert relative(layer.lora_A["default"].abs(), a.abs()) < 1e-3  # each factor is as large
    assert relative(logits(model), logits(reference)) < 1e-5

    # What was learned, as PEFT reads it on the original model.
    for i, layer in enumerate(lora_layers(model).values()):
        b = layer.lora_B["default"]
        b.data += normal(*b.shape, seed=i, std=0.05)
    save_adapter(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(small_model(), tmp_path / "a").eval()
    assert relative(logits(loaded), logits(model)) < 1e-4


@pytest.mark.parametrize("steps", [1, 3])
def test_loftq_is_pefts_on_bitsandbytes_nf4(steps):
    """PEFT's own lines, with the CPU in the place of the GPU that they name."""
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    space = dict(vars(loftq_utils))
    exec(source, space)
    weight = normal(64, 96, seed=3)
    base, a, b = space["loftq_init"](weight, num_bits=4, reduced_rank=8, num_iter=steps)
    mine, my_b, my_a = loftq(weight, 8, NF4Spec(64, double_quant=False), steps)
    # The first rounding is the same to the bit; a later one may take the neighbouring level
    # where a weight lies between two.
    assert relative(mine.dequantize(), base) < (1e-6 if steps == 1 else 0.01)
    assert relative(my_b @ my_a, b @ a) < (1e-5 if steps == 1 else 0.02)
