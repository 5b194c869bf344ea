"""What a family of models goes through from its folder to what other tools read."""

import warnings

import pytest
import torch
from torch import nn

from qlora_lib.formats.gptq_checkpoint import export_gptq, import_gptq
from qlora_lib.layers.blocks import decoder_blocks
from qlora_lib.lora.files import load_adapter, save_adapter
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.merge import merge_lora
from qlora_lib.lora.targets import find_linears, linear_layers
from qlora_lib.models.checkpoint import load_quantized, save_quantized
from qlora_lib.models.load import load_model
from qlora_lib.models.quantize import quantize_model
from qlora_lib.models.stream import quantize_checkpoint
from qlora_lib.quant.gptq import output_error
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.hessian import Hessian
from qlora_lib.train.config import TrainConfig
from qlora_lib.train.finetune import finetune
from tests.support.family_models import store
from tests.support.small_models import PAIRS
from tests.support.tensors import relative

SPEC = QuantSpec(4, 8, clip_search=False)
IDS = torch.randint(3, 300, (2, 2, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 1, 13:] = 0
BATCHES = [{"input_ids": i, "attention_mask": m} for i, m in zip(IDS, MASK)]
# Layers whose weight the family's code reads itself, or that are too narrow for a group: they are
# neither quantized nor adapted.
LEFT_OUT = {
    "gemma3n_text": {"correction_coefs", "prediction_coefs"},
    "mamba": {"x_proj", "dt_proj", "out_proj"}, "falcon_mamba": {"x_proj", "dt_proj", "out_proj"},
    "jamba": {"dt_proj"}, "mamba2": {"out_proj"}, "bamba": {"out_proj"}, "zamba2": {"out_proj"},
    "falcon_h1": {"out_proj"}, "granitemoehybrid": {"out_proj"}, "nemotron_h": {"out_proj"},
}  # fmt: skip


@torch.no_grad()
def logits(model, batch=BATCHES[0]):
    """The logits of real tokens, (tokens, vocab)."""
    return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


def rehearse(family: str, folder) -> str:
    """The family's verdict: what it is taken through, and the words of what is refused.

    Whatever is not refused by a ValueError must be right, or an AssertionError says what is not.
    """
    original, said = store(family, folder / "model"), []
    model, tokenizer = load_model(folder / "model", "cpu", "fp32")
    dense = load_model(folder / "model", "cpu", "fp32")[0]
    assert relative(logits(model), logits(original)) < 1e-4, "loading changes it"
    if not _rows_are_apart(model):
        said.append("padding changes it")
    targets = _targets(model, family)
    said.append("all" if targets == "all" else "named")
    found = find_linears(model, targets)

    how, calls = (BATCHES, SPEC, "gptq"), True
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            report = quantize_model(model, *how, target_modules=targets)
        except ValueError as error:
            if "'rtn'" not in str(error):  # what to do instead
                raise
            how, calls = (None, SPEC, "rtn"), False
            said.append("not calibrated")
            model = load_model(folder / "model", "cpu", "fp32")[0]
            report = quantize_model(model, *how, target_modules=targets)
    left = found.keys() - {row.name for row in report}
    warned = [str(w.message) for w in warned if "stay dense" in str(w.message)]
    assert bool(left) == bool(warned) and all(min(left) in text for text in warned)
    said += ["unused layers"] if left else []
    if calls:
        check_errors(model, dense, report)

    quantized = logits(model)
    torch.manual_seed(0)
    paths = [path for path in inject_lora(model, targets, rank=2) if path not in left]
    assert torch.equal(logits(model), quantized), "an untrained adapter changes it"
    config = TrainConfig(max_steps=1, batch_size=2, lr=1e-2, compute_dtype="fp32")
    finetune(model, tokenizer, PAIRS[:2], config)
    trained = [model.get_submodule(path).lora_B["default"].any() for path in paths]
    if not all(trained):  # its output does not depend on them, as on an indexer's choice
        said.append("untrained layers")
    adapted = logits(model)
    assert not torch.equal(adapted, quantized)

    save_quantized(model, tokenizer, folder / "quantized")
    save_adapter(model, folder / "adapter")
    again = load_quantized(folder / "quantized", "cpu", "fp32")[0]
    assert relative(logits(again), quantized) < 1e-6, "another base is loaded"
    load_adapter(again, folder / "adapter")
    assert relative(logits(again), adapted) < 1e-5, "another adapter is loaded"
    merge_lora(model, unload=True)
    moved = [relative(*rows) for rows in zip(logits(model), adapted)]
    # A token at the border between two experts may go to the other one.
    assert sum(error > 1e-3 for error in moved) <= len(moved) // 10, "merging changes it"

    base = load_quantized(folder / "quantized", "cpu", "fp32")[0]
    if _refused(said, "not exported", export_gptq, base, folder / "gptq", tokenizer=tokenizer):
        assert relative(logits(import_gptq(folder / "gptq", "cpu", "fp32")[0]), quantized) < 1e-5
    given = {"target_modules": targets, "compute_dtype": "fp32", "device": "cpu"}
    out = folder / "streamed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        streamed = _refused(
            said, "not streamed", quantize_checkpoint, folder / "model", out, SPEC, how[0], how[2],
            **given,
        )
    if streamed:
        assert relative(logits(load_quantized(out, "cpu", "fp32")[0]), quantized) < 1e-5
    return ", ".join(said)


def _refused(said: list, word: str, call, *args, **given) -> bool:
    """Call, and add the word to `said` where it is refused; returns whether it was not."""
    try:
        call(*args, **given)
    except ValueError:
        said.append(word)
        return False
    return True


@torch.no_grad()
def _rows_are_apart(model) -> bool:
    """Whether a row's logits are the same alone and in a batch with padding."""
    whole = model(**BATCHES[0], use_cache=False).logits[1:, :13]
    alone = model(input_ids=IDS[0, 1:, :13], use_cache=False).logits
    return relative(whole, alone) < 1e-3


def _targets(model, family: str):
    """ "all", or, where that is refused, the names of linears that fit the GPTQ layout."""
    prefix, _ = decoder_blocks(model)
    if family not in LEFT_OUT:
        try:
            find_linears(model, "all")
            return "all"
        except ValueError as error:
            assert "name target_modules" in str(error)
    names, odd = set(), set(LEFT_OUT.get(family, ()))
    for path, layer in linear_layers(model).items():
        if path.startswith(f"{prefix}."):
            names.add(path.rpartition(".")[2])
            if layer.in_features % 32 or layer.out_features % 32:
                odd.add(path.rpartition(".")[2])
    return tuple(sorted(names - odd))


def check_errors(model, dense, report) -> None:
    """Each layer's reported error is the one measured on what it gets in the quantized model."""
    hessians, mask, handles = {row.name: Hessian(row.shape[1]) for row in report}, None, []
    for path, hessian in hessians.items():

        def see(_, args, hessian=hessian):
            hessian.update(args[0].reshape(mask.numel(), -1)[mask.flatten()])

        handles.append(model.get_submodule(path).register_forward_pre_hook(see))
    for batch in BATCHES:
        mask = batch["attention_mask"].bool()
        logits(model, batch)
    for handle in handles:
        handle.remove()
    for row in report:
        weight: nn.Linear = dense.get_submodule(row.name).weight.detach()
        packed = model.get_submodule(row.name).dequantize()
        measured = output_error(weight, packed, hessians[row.name])
        assert row.output_error == pytest.approx(measured, rel=0.01), row.name
