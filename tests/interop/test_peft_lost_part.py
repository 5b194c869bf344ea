"""Adapters that start from what rounding lost, read by PEFT beside the same base."""

import pytest
import torch
from peft import PeftModel

from qlora_lib.formats.gptq_checkpoint import export_gptq, import_gptq
from qlora_lib.lora.files import save_adapter
from qlora_lib.lora.init import LOST_INITS
from qlora_lib.lora.targets import find_linears
from qlora_lib.models.calibrated_init import inject_calibrated
from qlora_lib.models.merge_hessians import input_hessians
from qlora_lib.models.quantize import dequantize_model, quantize_model
from qlora_lib.quant.grid import QuantSpec
from tests.support.small_models import small_model, small_tokenizer
from tests.support.tensors import relative

IDS = torch.randint(3, 260, (4, 24), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("config", [dict(alpha=3), dict(use_rslora=True), dict(use_dora=True)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("init", LOST_INITS)
def test_peft_reads_it_beside_the_exported_base(init, config, tmp_path):
    model = small_model()
    quantize_model(model, BATCHES, QuantSpec(2, 16))
    hessians = input_hessians(model, find_linears(model, "all"), BATCHES)
    export_gptq(model, tmp_path / "base", tokenizer=small_tokenizer())
    inject_calibrated(model, small_model(), hessians, init, rank=4, **config)
    save_adapter(model, tmp_path / "adapter")

    base, _ = import_gptq(tmp_path / "base", "cpu", "fp32")
    alone = relative(logits(base), logits(model))
    dequantize_model(base)  # PEFT adapts dense layers; the weights are the checkpoint's
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert relative(logits(theirs), logits(model)) < 1e-5 < alone
