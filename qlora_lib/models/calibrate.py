"""A model block by block: what each decoder block and each of its layers is called with.

Nothing runs twice for a whole model: what one block gives for the hidden states is what the next
one gets. All else that a block is called with (mask, rotary angles, in Gemma 3n and 4 an input of
its own) follows from the tokens alone, and is written down before any block runs.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..quant.hessian import Hessian
from .batches import Batch, real_tokens, token_mask


class _Stop(Exception):
    """Ends a forward pass as soon as what was waited for has been seen."""


class BlockCalls:
    """What the decoder blocks are called with, for each calibration batch.

    hidden    what the next block gets, (batch, seq, hidden) for each batch: at first the embedded
              tokens; `advance` replaces them by what a block gives. A list, or what acts like one
    settings  settings[batch][block]: the other arguments, (args, kwargs)
    masks     bool (batch, seq) for each batch, False for padding

    Raises ValueError for a model whose blocks are not a chain: called in another order, on changed
    hidden states, or with more that depends on earlier blocks.
    """

    def __init__(self, model: nn.Module, blocks, batches: Iterable[Batch], hidden=None):
        device = model.get_input_embeddings().weight.device
        self.hidden = [] if hidden is None else hidden
        self.settings, self.masks = [], []
        for batch in batches:
            self.masks.append(token_mask(batch).to(device))
            batch = {k: v.to(device) for k, v in batch.items()}
            first, settings = _record(model, blocks, batch)
            if not self.settings:
                _check_settings(model, settings, _record(model, blocks, batch, torch.zeros_like)[1])
            self.hidden.append(first)
            self.settings.append(settings)

    def output(self, i: int, block: nn.Module, n: int) -> Tensor:
        """Return the hidden states that `block`, in the place of block i, gives for batch n."""
        args, kwargs = self.settings[n][i]
        out = block(self.hidden[n], *args, **kwargs)
        return out[0] if isinstance(out, (tuple, list)) else out

    def advance(self, i: int, block: nn.Module) -> None:
        """Go on to block i + 1: its hidden states are what `block` gives."""
        for n in range(len(self.hidden)):
            self.hidden[n] = self.output(i, block, n)


class _Other:
    """Stands for what a block gives beside its hidden states, which nothing may use."""


# How a block hands its hidden states on: bare, or first in a tuple of this length.
_RETURNS = (lambda out: out, *(lambda out, n=n: (out, *[_Other()] * n) for n in range(3)))


def _record(model, blocks, batch: Batch, answer: Callable = lambda hidden: hidden):
    """Return what the first block gets, and for each block the (args, kwargs) beside it, in a
    forward pass in which no block runs: answer(hidden) stands for its output."""
    error = None
    for wrap in _RETURNS:
        calls, given = [], None

        def stand_in(i: int, *args, **kwargs):
            nonlocal given
            hidden, *args = args or (kwargs.pop("hidden_states"),)
            used = any(isinstance(x, _Other) for x in tree_leaves((args, kwargs)))
            in_order = i == len(calls) and (i == 0 or hidden is given) and not used
            if in_order:
                calls.append((hidden, (tuple(args), kwargs)))
            if not in_order or len(calls) == len(blocks):
                raise _Stop
            given = answer(hidden)
            return wrap(given)

        with _forwards(blocks, stand_in), suppress(_Stop):
            try:
                model(**batch, use_cache=False)
            except (TypeError, ValueError, AttributeError, IndexError) as other:
                if not calls:
                    raise
                error = other  # the blocks return something else
        if len(calls) == len(blocks):
            return calls[0][0], [settings for _, settings in calls]
    raise ValueError(f"{type(model).__name__} does more between its {len(blocks)} blocks than to "
                     "hand on their hidden states; quantize by 'rtn' or 'nf4'") from error


@contextmanager
def _forwards(blocks, stand_in):
    """Within it, stand_in(i, ...) runs instead of the forward of block i."""
    before = [vars(block).get("forward") for block in blocks]
    for i, block in enumerate(blocks):
        block.forward = lambda *args, i=i, **kwargs: stand_in(i, *args, **kwargs)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _check_settings(model, settings, others) -> None:
    """Raise ValueError if what blocks get beside the hidden states depends on these."""
    for i, (own, other) in enumerate(zip(settings, others)):
        pairs = zip(tree_leaves(own), tree_leaves(other), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)):
            raise ValueError(f"block {i} of {type(model).__name__} is called with more that "
                             "depends on the blocks before it; quantize by 'rtn' or 'nf4'")


@contextmanager
def watch_inputs(layers: dict[str, nn.Module], see):
    """Within it, see(path, input) is called whenever one of the layers runs."""
    with ExitStack() as hooks:
        for path, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _, args, path=path: see(path, args[0]))
            hooks.enter_context(hook)
        yield


class SharedInputs:
    """Tells layers that are called in a row with the same numbers, as q, k and v are: at the same
    place in memory, not written to since. The last input is held, so that its place stays taken."""

    def __init__(self):
        self.last = self.key = self.path = None

    def first(self, path: str, x: Tensor) -> str:
        """Return the path of the first layer in a row that was called with x; maybe `path`."""
        key = x.data_ptr(), x.dtype, x.shape, x.stride(), x._version
        self.path = self.path if key == self.key else path
        self.last, self.key = x, key
        return self.path


def _stages(i: int, block: nn.Module, layers: dict[str, nn.Module], calls) -> list[list[str]]:
    """Return the layers that a block calls, in order, those with one input together. Raises
    ValueError for one that is called twice."""
    stages: dict[str, list[str]] = {}
    shared, seen = SharedInputs(), set()

    def see(path: str, x: Tensor) -> None:
        if path in seen:
            raise ValueError(f"{path} is called more than once in its block; leave it out of "
                             "target_modules, or use 'rtn' or 'nf4'")  # fmt: skip
        seen.add(path)
        stages.setdefault(shared.first(path, x), []).append(path)

    with watch_inputs(layers, see):
        calls.output(i, block, 0)
    return list(stages.values())


def _input_of(layer: nn.Module, i: int, block: nn.Module, calls: BlockCalls, n: int) -> Tensor:
    """Return what a layer of the block gets (..., in) for batch n."""
    caught = []

    def see(_, x):
        caught.append(x)
        raise _Stop  # what comes after this layer is not needed

    with watch_inputs({"": layer}, see), suppress(_Stop):
        calls.output(i, block, n)
    return caught[0]


def quantize_block(
    i: int, block: nn.Module, layers: dict[str, nn.Module], calls: BlockCalls, swap,
    dense: tuple[nn.Module, BlockCalls] | None = None, halves: bool = False,
) -> list:  # fmt: skip
    """Build the Hessian of each layer of block i, and replace the layer by swap(path, hessian).

    layers: by path. dense: the block as it was and its calls in the dense model, where Hessians
    shall know them. halves: as for a Hessian. Returns what swap returned, in the order of calls;
    layers that are not called stay. Raises ValueError, naming the layer, for inputs that do not
    hold a row for each token, and for two calls.
    """
    report, names = [], {module: name for name, module in block.named_modules()}
    names = {path: names[layer] for path, layer in layers.items()}
    twin, dense_calls = dense or (None, None)
    for path, *others in _stages(i, block, layers, calls) if layers else []:
        layer, before = layers[path], None
        own = twin and twin.get_submodule(names[path])
        hessian = Hessian(layer.in_features, layer.weight.device, halves=halves)  # of all of them
        for n, mask in enumerate(calls.masks):
            if twin:
                before = real_tokens(_input_of(own, i, twin, dense_calls, n), mask, path)
            hessian.update(real_tokens(_input_of(layer, i, block, calls, n), mask, path), before)
        report += [swap(path, hessian) for path in (path, *others)]
    return report
