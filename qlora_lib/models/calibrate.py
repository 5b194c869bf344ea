"""A model block by block: what each decoder block and each of its layers is called with.

A call is (args, kwargs) of a block's forward, hidden states first. Nothing runs twice for a
whole model: the outputs of one block are the calls of the next.
"""

from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from ..quant.hessian import Hessian


def token_mask(batch: dict[str, Tensor]) -> Tensor:
    """bool (batch, seq), False for padding; a batch without attention_mask has none.

    Raises ValueError for a batch without input_ids, or with a mask of another shape.
    """
    if "input_ids" not in batch:
        raise ValueError(f"a batch holds {sorted(batch)}, but needs input_ids (batch, seq)")
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {tuple(mask.shape)} for input_ids {tuple(ids.shape)}")
    return mask.bool()


class _Stop(Exception):
    """Ends a forward pass at the layer that was waited for."""


def first_block_inputs(model: nn.Module, block: nn.Module, batches) -> list[tuple[tuple, dict]]:
    """What a block, mostly the first, is called with, for each batch: (args, kwargs)."""
    calls = []

    def catch(module, args, kwargs):
        calls.append((args, kwargs))
        raise _Stop

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    device = next(model.parameters()).device
    try:
        for batch in batches:
            with suppress(_Stop):
                model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False)
    finally:
        handle.remove()
    return calls


@contextmanager
def watch_inputs(layers: dict[str, nn.Module], see):
    """Call see(path, input) whenever one of the layers runs."""
    handles = [
        layer.register_forward_pre_hook(lambda module, args, path=path: see(path, args[0]))
        for path, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shared_inputs(block: nn.Module, layers: dict[str, nn.Module], call) -> list[list[str]]:
    """The layers of a block in the order of their calls, those with one input together."""
    stages: list[list[str]] = []
    last = None

    def see(path, x):
        nonlocal last
        if x is last:
            stages[-1].append(path)
        else:
            stages.append([path])
        last = x

    with watch_inputs(layers, see):
        block(*call[0], **call[1])
    return stages


def input_of(layer: nn.Module, block: nn.Module, call: tuple[tuple, dict]) -> Tensor:
    """What a layer of the block gets (batch, seq, in) when the block is called so."""
    caught = []

    def see(_, x):
        caught.append(x)
        raise _Stop  # what comes after this layer is not needed

    with watch_inputs({"": layer}, see), suppress(_Stop):
        block(*call[0], **call[1])
    return caught[0]


def quantize_block(
    block: nn.Module, layers: dict[str, nn.Module], calls, masks, swap, dense=None, halves=False
) -> list:
    """What swap(path, hessian) returns for each layer of a block, in the order of their calls.

    calls: (args, kwargs) of the block for each batch; masks: bool (batch, seq), real tokens.
    dense: the block as it was and its calls in the dense model, where Hessians shall know them.
    halves: as for a Hessian.
    """
    report, names = [], {module: name for name, module in block.named_modules()}
    names = {path: names[layer] for path, layer in layers.items()}
    for stage in _shared_inputs(block, layers, calls[0]) if layers else []:
        first = layers[stage[0]]
        # one for the whole stage
        hessian = Hessian(first.in_features, first.weight.device, halves=halves)
        for n, (call, mask) in enumerate(zip(calls, masks)):
            before = None
            if dense is not None:
                twin = dense[0].get_submodule(names[stage[0]])
                before = input_of(twin, dense[0], dense[1][n])[mask]
            hessian.update(input_of(first, block, call)[mask], before)
        report += [swap(path, hessian) for path in stage]
    return report


def next_call(block: nn.Module, call: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """What the next block is called with, once this one has run."""
    args, kwargs = call
    out = block(*args, **kwargs)
    return (out[0] if isinstance(out, tuple) else out, *args[1:]), kwargs


def block_settings(model: nn.Module, blocks, batches, calls) -> list[list[dict]]:
    """The keyword arguments of each block, for each batch; `calls` are those of the first.

    All blocks get the same ones, but in models with several kinds of layers (Gemma 3: a
    sliding window or all of the context), whose masks and rotary angles differ.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(blocks)
    settings = {kinds[0]: [kwargs for _, kwargs in calls]}
    for block, kind in zip(blocks, kinds):
        if kind not in settings:
            settings[kind] = [kw for _, kw in first_block_inputs(model, block, batches)]
    return [settings[kind] for kind in kinds]
