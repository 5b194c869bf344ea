"""An adapter with numbers in it, as training would have left one."""

import torch

from qlora_lib.lora.files import save_adapter
from qlora_lib.lora.inject import inject_lora, trainable_parameters
from qlora_lib.lora.targets import ALL_LINEAR
from tests.support.small_models import small_model


def make_adapter(folder, seed):
    model = small_model()
    torch.manual_seed(seed)
    inject_lora(model, ALL_LINEAR, rank=2)
    for name, p in trainable_parameters(model).items():
        torch.nn.init.normal_(p, std=0.05)
    save_adapter(model, folder)
