"""Small models with adapters, for the tests of LoRA, merging and checkpoints."""

import json

import torch

from qlora_lib.base.folders import HASHES
from qlora_lib.lora.inject import inject_lora, use_adapter
from qlora_lib.lora.layer import lora_layers
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.models.quantize import quantize_model
from qlora_lib.quant.fp4 import FP4Spec
from qlora_lib.quant.fp8 import FP8Spec
from qlora_lib.quant.gptq import GPTQOptions
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.nf4 import NF4Spec
from tests.support.small_models import built_once, small_model
from tests.support.tensors import normal

IDS = torch.randint(3, 260, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def trained(model, adapter: str = "default", seed: int = 0, std: float = 0.05):
    """Give an adapter a B, as training would."""
    layers = [m for m in lora_layers(model).values() if adapter in m.configs]
    for i, layer in enumerate(layers):
        b = layer.lora_B[adapter]
        b.data = normal(*b.shape, seed=seed + i, std=std)
    return model


@built_once
def base_of(kind: str, seed: int = 0):
    """A small model: "dense", "grid2" to "grid8", "symmetric", "g_idx", "nf4", "nf4 single",
    "mxfp4", "nvfp4", "e4m3", "e5m2"."""
    model = small_model(seed)
    if kind.startswith("grid"):
        quantize_model(model, None, QuantSpec(int(kind[4:]), 16), "rtn")
    elif kind == "symmetric":
        quantize_model(model, None, QuantSpec(4, None, symmetric=True), "rtn")
    elif kind == "g_idx":
        data = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
        options = GPTQOptions(static_groups=False)
        quantize_model(model, data, QuantSpec(4, 16), options=options)
    elif kind in ("mxfp4", "nvfp4"):
        quantize_model(model, None, FP4Spec(kind), "rtn")
    elif kind in ("e4m3", "e5m2"):
        quantize_model(model, None, FP8Spec(kind), "rtn")
    elif kind.startswith("nf4"):
        quantize_model(model, None, NF4Spec(32, kind == "nf4"), "nf4")
    return model


def adapted(model, rank: int = 4, targets=ALL_LINEAR, seed: int = 0, **given):
    """The model with an adapter that does something."""
    inject_lora(model, targets, rank=rank, **given)
    return trained(model, given.get("adapter", "default"), seed, std=0.1)


def files(folder) -> dict[str, bytes]:
    """All files of a folder, to see whether it changed."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def rewrite(folder, name, change) -> None:
    """Change a JSON file in place, as its owner: without hashes."""
    (folder / HASHES).unlink(missing_ok=True)
    described = json.loads((folder / name).read_text())
    change(described)
    (folder / name).write_text(json.dumps(described))


def family(kind="dense", ranks=(4, 4, 4, 4), alpha=16, **given):
    """A model with adapters a, b, c, d that all do something else."""
    model = base_of(kind)
    for i, rank in enumerate(ranks):
        name = "abcd"[i]
        inject_lora(model, ALL_LINEAR, rank=rank, alpha=alpha, adapter=name, **given)
        trained(model, name, seed=100 * i, std=0.05)
    return model


def under(model, name):
    with use_adapter(model, name):
        return logits(model)
