"""Exercises of notebook 04: bytes of training, a frozen layer's backward, labels, QLoRA by hand."""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from experiments.measured_step import AllocationMeter
from qlora_lib import QuantizedLinear, QuantizedTensor, QuantSpec, quantize_rtn
from qlora_lib.data.tokens import IGNORE

from ..kit.exercise import Exercise, register

# --- 1. What QLoRA keeps -----------------------------------------------------------------

def training_bytes(packed: int, rest: int, adapter: int) -> tuple[float, float, float]:
    return _stored(packed) + 2 * rest + 4 * adapter, 4 * adapter, 8 * adapter


def _stored(packed: int, absmax: float = 1 + 4 / 256, code: float = 1 / 2) -> float:
    """Bytes of so many NF4 weights, with `absmax` bytes for each block of 64."""
    return packed * code + packed / 64 * absmax


def _otherwise(weights: Callable, gradients: int = 4, moments: int = 8) -> Callable:
    """Bytes with other weights, or other bytes of gradients and moments a parameter."""
    return lambda packed, rest, adapter: (
        weights(packed, rest, adapter), gradients * adapter, moments * adapter)


def _right_weights(packed: int, rest: int, adapter: int) -> float:
    return training_bytes(packed, rest, adapter)[0]


register(Exercise(
    name="training_bytes",
    reference=training_bytes,
    cases=[
        (lambda g: (1_048_576, 10_000, 4_000), "a million packed weights"),
        (lambda g: (6_476_005_376, 262_410_240, 39_976_960),
         "LLaMA-2-7B, rank 16 on all linears"),
        (lambda g: (16_384, 0, 0), "one packed layer, no adapter: nothing is trained"),
        (lambda g: (0, 500, 20), "nothing is packed"),
    ],
    mistakes=[
        (_otherwise(lambda p, r, a: p / 2 + 2 * r + 4 * a),
         "the absmax values are missing: one for each block of 64 weights"),
        (_otherwise(lambda p, r, a: _stored(p, 4) + 2 * r + 4 * a),
         "these absmax values are in fp32; double quantization stores them in 8 bits, with one "
         "fp32 scale for 256 of them"),
        (_otherwise(lambda p, r, a: _stored(p, 1) + 2 * r + 4 * a),
         "the second level is missing: one fp32 scale for each 256 absmax values"),
        (_otherwise(lambda p, r, a: _stored(p, 1 + 4) + 2 * r + 4 * a),
         "each absmax has 8 bits and a fp32 scale of its own here; 256 of them share one"),
        (_otherwise(lambda p, r, a: _stored(p, 1 + 4 / 64) + 2 * r + 4 * a),
         "256 absmax values share a scale, not 64"),
        (_otherwise(lambda p, r, a: _stored(p, 1 + 1 / 256) + 2 * r + 4 * a),
         "the second level is fp32, 4 bytes for each 256 absmax values"),
        (_otherwise(lambda p, r, a: _stored(p, code=1) + 2 * r + 4 * a),
         "two codes share a byte: half a byte a packed weight"),
        (_otherwise(lambda p, r, a: _stored(p) + 4 * r + 4 * a),
         "what is not packed is bf16, 2 bytes a parameter"),
        (_otherwise(lambda p, r, a: _stored(p + r) + 4 * a),
         "embeddings, norms and head are not packed: they stay in bf16"),
        (_otherwise(lambda p, r, a: 2 * (p + r) + 4 * a),
         "this is LoRA over a base in bf16; here the linears are packed"),
        (_otherwise(lambda p, r, a: _stored(p) + 2 * r + 2 * a, 2),
         "the adapter is fp32: 4 bytes for a parameter and for its gradient"),
        (_otherwise(lambda p, r, a: _stored(p) + 2 * r),
         "the adapter's own weights are missing from the first number"),
        (_otherwise(lambda p, r, a: _stored(p) + 4 * a),
         "embeddings, norms and head are missing from the first number: 2 bytes each"),
        (_otherwise(_right_weights, moments=4),
         "Adam keeps two moments a parameter, 4 bytes each; you have one"),
        (_otherwise(_right_weights, moments=12),
         "an fp32 copy is for 16-bit parameters; the adapter is fp32 already"),
        (_otherwise(_right_weights, gradients=2), "the adapter's gradient is fp32, as the adapter"),
        (lambda p, r, a: (_right_weights(p, r, a), 2 * (p + r) + 4 * a, 8 * a),
         "the base is frozen: it gets no gradient"),
        (lambda p, r, a: (_right_weights(p, r, a), 4 * a, 8 * (p + r + a)),
         "moments belong to what is trained, the adapter alone"),
        (lambda p, r, a: (_right_weights(p, r, a), 8 * a, 4 * a),
         "the gradients come second, the optimizer's moments last"),
        (_otherwise(_right_weights, gradients=0),
         "the adapter is trained: it gets a gradient, 4 bytes a parameter"),
        (_otherwise(lambda p, r, a: p / 2 + p / 256 * (1 + 4 / 64) + 2 * r + 4 * a),
         "64 weights share an absmax and 256 of these a scale, not the other way round"),
        (lambda p, r, a: tuple(8 * n for n in training_bytes(p, r, a)),
         "those are bits; a byte has 8 of them"),
        (lambda p, r, a: (_right_weights(p, r, a) / 1e9, 4 * a / 1e9, 8 * a / 1e9),
         "those are gigabytes; asked are bytes"),
    ],
    rtol=1e-6))


# --- 2. A frozen layer's forward and backward --------------------------------------------

class LayerRun(NamedTuple):
    """What came out of a layer, and the bytes it kept between forward and backward."""

    y: Tensor
    grad_x: Tensor
    bytes_kept: int


class BackwardFailed(RuntimeError):
    """What autograd said of a backward pass."""


def trial(function: type[torch.autograd.Function]) -> Callable:
    """Turn an autograd Function of (x, weight) into a function that `check` can run.

    The result takes x (tokens, in), a QuantizedTensor (out, in) and the gradient of y.
    """
    def run(x: Tensor, weight: QuantizedTensor, grad: Tensor) -> LayerRun:
        leaf = x.detach().requires_grad_()
        with AllocationMeter() as meter:
            h = leaf + 0  # the layer's input, which only the layer could keep alive
            y = function.apply(h, weight)
            values, behind = y.detach().clone(), (y * grad.to(y.dtype)).sum()
            del h, y  # its output, too
            kept = meter.alive - values.nbytes - behind.nbytes
        try:
            (grad_x,) = torch.autograd.grad(behind, leaf)
        except RuntimeError as error:
            raise BackwardFailed(str(error)) from error
        return LayerRun(values, grad_x, kept)
    return run


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x @ weight.dequantize(x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight.dequantize(grad.dtype), None


class _KeepsDense(_FrozenLinear):
    @staticmethod
    def forward(ctx, x, weight):
        dense = weight.dequantize(x.dtype)
        ctx.save_for_backward(dense)
        return x @ dense.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


class _KeepsInput(_FrozenLinear):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight.dequantize(x.dtype).T


class _KeepsBoth(_KeepsDense):
    @staticmethod
    def forward(ctx, x, weight):
        dense = weight.dequantize(x.dtype)
        ctx.save_for_backward(dense, x)
        return x @ dense.T


class _KeepsOutput(_FrozenLinear):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        y = x @ weight.dequantize(x.dtype).T
        ctx.save_for_backward(y)
        return y


class _SavesPacked(_FrozenLinear):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.dequantize(x.dtype).T


class _TransposedBack(_FrozenLinear):
    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight.dequantize(grad.dtype).T, None


def _multiplied(product: Callable) -> type[_FrozenLinear]:
    """The frozen layer whose forward pass is another `product` of (x, weight)."""
    class Other(_FrozenLinear):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.weight = weight
            return product(x, weight)
    return Other


class _OneGradient(_FrozenLinear):
    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight.dequantize(grad.dtype)


class _AlwaysFp32(_multiplied(lambda x, weight: x @ weight.dequantize().T)):
    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight.dequantize(), None


class _PassesThrough(_FrozenLinear):
    @staticmethod
    def backward(ctx, grad):
        return torch.zeros(grad.shape[0], ctx.weight.shape[1], dtype=grad.dtype), None


def _frozen(out: int, features: int, dtype: torch.dtype = torch.float32):
    def make(g):
        weight = quantize_rtn(torch.randn(out, features, generator=g), QuantSpec(4, 8))
        return (torch.randn(5, features, generator=g).to(dtype), weight,
                torch.randn(5, out, generator=g).to(dtype))
    return make


register(Exercise(
    name="frozen_linear",
    reference=trial(_FrozenLinear),
    cases=[
        (_frozen(6, 16), "a 6 x 16 weight"),
        (_frozen(16, 8), "a 16 x 8 weight"),
        (_frozen(8, 8), "a square weight, where a wrong transpose still runs"),
        (_frozen(6, 16, torch.bfloat16), "x in bf16"),
    ],
    mistakes=[
        (trial(_KeepsDense), "right values, but the dense weight stays alive until backward. "
                             "Keep the packed weight, ctx.weight = weight, and decode it again"),
        (trial(_KeepsInput), "right values, but x is kept. Only the gradient of a weight needs "
                             "x, and this weight is frozen"),
        (trial(_KeepsBoth), "right values, but the dense weight and x are both kept; backward "
                            "needs neither, only the packed weight"),
        (trial(_KeepsOutput), "right values, but the output is kept; backward needs the packed "
                              "weight alone"),
        (trial(_SavesPacked), "save_for_backward and products take tensors, and the packed weight "
                              "is none: ctx.weight = weight keeps it, dequantize decodes it"),
        (trial(_TransposedBack), "backward multiplies by W, not by W^T: grad (tokens, out) @ "
                                 "W (out, in) gives (tokens, in)"),
        (trial(_multiplied(lambda x, weight: x @ weight.dequantize(x.dtype))),
         "forward needs the transpose: x (tokens, in) @ W^T (in, out)"),
        (trial(_OneGradient), "backward returns a tuple, one value for each argument of forward: "
                              "the gradient of x, and None for the frozen weight"),
        (trial(_AlwaysFp32), "decode in the dtype of x and of grad, "
                             "weight.dequantize(x.dtype); bf16 and fp32 don't multiply"),
        (trial(_multiplied(lambda x, weight: x.float() @ weight.dequantize().T)),
         "the output must have the dtype of x: cast it back, or decode the weight in that dtype"),
        (trial(_PassesThrough), "the gradient of x is zero here: the weight is frozen, but the "
                                "adapters in the layers below still need dL/dx = dL/dy W"),
    ],
    rtol=2e-2, atol=2e-2))  # in bf16; who decodes and multiplies in fp32 rounds once, at the end


# --- 3. Labels of a padded batch ---------------------------------------------------------

Pairs = list[tuple[list[int], list[int]]]


def padded_batch(pairs: Pairs, eos: int) -> tuple[Tensor, Tensor]:
    width = max(len(p) + len(t) for p, t in pairs) + 1
    ids = torch.full((len(pairs), width), eos)
    labels = torch.full((len(pairs), width), IGNORE)
    for row, (prompt, target) in enumerate(pairs):
        end = len(prompt) + len(target) + 1
        ids[row, :end] = torch.tensor([*prompt, *target, eos])
        labels[row, len(prompt):end] = torch.tensor([*target, eos])
    return ids, labels


def _relabelled(change):
    """The right ids with labels that `change(ids, labels, pairs, eos)` spoils."""
    def wrong(pairs, eos):
        ids, labels = padded_batch(pairs, eos)
        return ids, change(ids, labels.clone(), pairs, eos)
    return wrong


def _padding_counts(ids, labels, pairs, eos):
    for row, (prompt, _) in enumerate(pairs):
        labels[row, len(prompt):] = ids[row, len(prompt):]
    return labels


def _every_eos_masked(ids, labels, pairs, eos):
    return labels.masked_fill(ids == eos, IGNORE)


def _behind_the_targets_first_eos_masked(ids, labels, pairs, eos):
    for row, (prompt, _) in enumerate(pairs):
        end = ids[row, len(prompt):].tolist().index(eos)
        labels[row, len(prompt) + end + 1:] = IGNORE
    return labels


def _behind_the_first_eos_masked(ids, labels, pairs, eos):
    return labels.masked_fill((ids == eos).cumsum(1) > (ids == eos), IGNORE)


def _prompt_counts(ids, labels, pairs, eos):
    for row, (prompt, target) in enumerate(pairs):
        labels[row, :len(prompt) + len(target) + 1] = ids[row, :len(prompt) + len(target) + 1]
    return labels


def _shifted(ids, labels, pairs, eos):
    return torch.cat([labels[:, 1:], torch.full((len(labels), 1), IGNORE)], dim=1)


def _last_prompt_token_counts(ids, labels, pairs, eos):
    for row, (prompt, _) in enumerate(pairs):
        labels[row, len(prompt) - 1] = prompt[-1]
    return labels


def _first_target_token_masked(ids, labels, pairs, eos):
    for row, (prompt, _) in enumerate(pairs):
        labels[row, len(prompt)] = IGNORE
    return labels


def _padded_with_zero(pairs, eos):
    ids, labels = padded_batch(pairs, eos)
    for row, (prompt, target) in enumerate(pairs):
        ids[row, len(prompt) + len(target) + 1:] = 0
    return ids, labels


def _zero_ignored(ids, labels, pairs, eos):
    return labels.masked_fill(labels == IGNORE, 0)


def _without_eos(pairs, eos):
    ids, labels = padded_batch(pairs, eos)
    return ids[:, :-1], _every_eos_masked(ids, labels, pairs, eos)[:, :-1]


def _left_padded(pairs, eos):
    ids, labels = padded_batch(pairs, eos)
    for row, (prompt, target) in enumerate(pairs):
        shift = ids.shape[1] - len(prompt) - len(target) - 1
        ids[row], labels[row] = ids[row].roll(shift), labels[row].roll(shift)
    return ids, labels


register(Exercise(
    name="padded_batch",
    reference=padded_batch,
    cases=[
        (lambda g: ([([1, 5, 6], [7, 8]), ([1, 5], [9])], 2), "two rows, one shorter by two"),
        (lambda g: ([([1, 4], [5, 6, 7])], 2), "one row: nothing to pad"),
        (lambda g: ([([1, 9, 9, 9], [8]), ([1], [7, 6, 5, 4, 3]), ([1, 3], [3])], 11),
         "three rows, eos = 11"),
        (lambda g: ([([1, 5, 2, 6], [7]), ([1, 5], [9, 8, 7, 6])], 2), "eos inside a prompt"),
        (lambda g: ([([1, 5], [7, 2, 8]), ([1], [9, 8, 7, 6, 5, 4])], 2), "eos inside a target"),
    ],
    mistakes=[
        (_relabelled(_padding_counts), "the padding is supervised: behind its one real eos a row's "
                                       "labels are -100, though the ids there are eos too"),
        (_relabelled(_every_eos_masked), "labels[ids == eos] = -100 masks the real eos with the "
                                         "padding: the model would never learn to stop"),
        (_relabelled(_behind_the_first_eos_masked), "you mask behind the first eos, but a prompt "
                                                    "may hold one too: go by the lengths"),
        (_relabelled(_behind_the_targets_first_eos_masked),
         "you mask behind the first eos after the prompt, but a target may hold one too: go by "
         "the lengths"),
        (_relabelled(_prompt_counts), "the prompt is supervised; its labels are -100: the model "
                                      "must answer questions, not write them"),
        (_relabelled(_shifted), "the labels are shifted by one. Label and id stand at the same "
                                "place here; the loss shifts them, as every Hugging Face model"),
        (_relabelled(_last_prompt_token_counts), "the mask is short by one: the prompt's last "
                                                 "token has label -100 too"),
        (_relabelled(_first_target_token_masked), "the mask is long by one: the target's first "
                                                  "token is learned"),
        (_padded_with_zero, "the ids are padded with 0; Llama-2 has no pad token, and eos fills "
                            "its rows"),
        (_relabelled(_zero_ignored), "what is ignored has label -100; 0 is a token like others"),
        (_without_eos, "no row ends in eos: ids are prompt + target + eos, then the padding"),
        (_left_padded, "padded on the left; that is for generation, training pads on the right"),
        (lambda pairs, eos: padded_batch(pairs, eos)[::-1], "the ids come first, then the labels"),
    ]))


# --- 4. QLoRA by hand: the layer ---------------------------------------------------------

class LayerTrial(NamedTuple):
    """What a layer with an adapter did. `extra_bytes`: kept when it is made, beyond
    the adapter, and alive until backward, beyond its input x, A x and the adapter."""

    base_at_start: bool  # whether it computes what its base does
    random_A: bool
    A_in_range: bool  # reaches to about 1 / sqrt(in) on both sides, not beyond
    y: Tensor
    grad_x: Tensor
    grad_A: Tensor
    grad_B: Tensor
    extra_bytes: int


class NotTrained(ValueError):
    """Other parameters are trained than lora_A and lora_B."""


class WrongShape(ValueError):
    """lora_A or lora_B has another shape."""


def layer_trial(kind: type[nn.Module]) -> Callable:
    """Turn a class of layers, made of (base, rank, alpha), into a function that `check` can run.
    The class is the function's attribute `layer`.

    It takes x (..., in), a QuantizedTensor (out, in), rank, alpha, values for A and B, and the
    gradient of y.
    """
    def run(x: Tensor, weight: QuantizedTensor, rank: int, alpha: float, a: Tensor, b: Tensor,
            grad: Tensor) -> LayerTrial:
        base = QuantizedLinear(weight)
        with AllocationMeter() as made:
            layer = kind(base, rank, alpha)
            held = max(0, made.alive - a.nbytes - b.nbytes)  # such as the decoded weight
        at_start = torch.allclose(layer(x), base(x), rtol=1e-4, atol=1e-5)
        trained = dict(layer.named_parameters())
        if set(trained) != {"lora_A", "lora_B"} or not all(p.requires_grad
                                                           for p in trained.values()):
            raise NotTrained(f"its parameters are {', '.join(trained) or 'none'}; expected lora_A "
                             "and lora_B, each an nn.Parameter that is trained")
        shapes = layer.lora_A.shape, layer.lora_B.shape
        if shapes != (a.shape, b.shape):
            raise WrongShape(f"A {tuple(shapes[0])} and B {tuple(shapes[1])}; expected "
                             f"{tuple(a.shape)} and {tuple(b.shape)}")
        first, bound = layer.lora_A.detach().clone(), base.in_features**-0.5
        is_random = bool(first.min() < first.max())
        layer.lora_A.data.copy_(a)
        layer.lora_B.data.copy_(b)
        leaf = x.detach().requires_grad_()
        with AllocationMeter() as meter:
            h = leaf + 0
            y = layer(h)
            del h
            kept = meter.alive - y.nbytes
        needed = x.nbytes + a.nbytes + b.nbytes + 4 * rank * (x.numel() // x.shape[-1])
        grads = torch.autograd.grad(y, (leaf, layer.lora_A, layer.lora_B), grad.to(y.dtype),
                                    allow_unused=True)
        return LayerTrial(at_start, is_random, not is_random or spans(first, bound),
                          y.detach(), *grads,
                          held + max(0, kept - needed))

    run.layer = kind
    return run


def spans(values: Tensor, bound: float) -> bool:  # public, as layer_trial calls it in gradings
    """Whether the numbers reach beyond a third of +-bound, but not beyond the bound (rounded)."""
    low, high = values.min().item() / bound, values.max().item() / bound
    return -1.001 < low < -1 / 3 and 1 / 3 < high < 1.001


def _qlora_layer(out: Callable | None = None, start: Callable | None = None) -> type[nn.Module]:
    """The layer, with another output `out(layer, x)`, or changed by `start(layer)` when made."""
    class QLoRALinear(nn.Module):
        def __init__(self, base, rank, alpha):
            super().__init__()
            self.base, self.rank, self.alpha, self.scale = base, rank, alpha, alpha / rank
            bound = base.in_features**-0.5
            self.lora_A = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound))
            self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
            if start is not None:
                start(self)

        def forward(self, x):
            if out is not None:
                return out(self, x)
            return self.base(x) + self.scale * (x @ self.lora_A.T) @ self.lora_B.T
    return QLoRALinear


def _update(layer: nn.Module, x: Tensor) -> Tensor:
    return (x @ layer.lora_A.T) @ layer.lora_B.T


def _with(out: Callable) -> Callable:
    return layer_trial(_qlora_layer(out))


def _made(start: Callable) -> Callable:
    return layer_trial(_qlora_layer(start=start))


def _random_b(layer: nn.Module) -> None:
    layer.lora_B.data.normal_()


def _zero_a(layer: nn.Module) -> None:
    layer.lora_A.data.zero_()


def _positive_a(layer: nn.Module) -> None:
    layer.lora_A.data.uniform_()


def _without_graph(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        update = layer.scale * _update(layer, x)
    return layer.base(x) + update


def _not_parameters(layer: nn.Module) -> None:
    a, b = layer.lora_A.data, layer.lora_B.data
    del layer.lora_A, layer.lora_B
    layer.lora_A, layer.lora_B = a.requires_grad_(), b.requires_grad_()


def _turned(layer: nn.Module) -> None:
    layer.lora_A = nn.Parameter(layer.lora_A.data.T.contiguous())
    layer.lora_B = nn.Parameter(layer.lora_B.data.T.contiguous())


def _layer_case(out: int, features: int, rank: int, alpha: float, *shape: int):
    def make(g):
        weight = quantize_rtn(torch.randn(out, features, generator=g), QuantSpec(4, 8))
        return (torch.randn(*shape, features, generator=g), weight, rank, alpha,
                torch.randn(rank, features, generator=g), torch.randn(out, rank, generator=g),
                torch.randn(*shape, out, generator=g))
    return make


register(Exercise(
    name="qlora_linear",
    reference=layer_trial(_qlora_layer()),
    cases=[
        (_layer_case(24, 32, 2, 4, 5), "a 24 x 32 weight, rank 2, alpha 4"),
        (_layer_case(32, 16, 4, 2, 3), "a 32 x 16 weight, rank 4, alpha 2"),
        (_layer_case(16, 16, 1, 3, 6), "a square weight, rank 1, alpha 3"),
        (_layer_case(40, 24, 3, 12, 2, 4), "x (batch, tokens, in)"),
    ],
    mistakes=[
        (_with(lambda m, x: m.base(x) + _update(m, x)), "the scale alpha / rank is missing"),
        (_with(lambda m, x: m.base(x) + m.alpha * _update(m, x)),
         "the scale is alpha / rank; this is alpha alone"),
        (_with(lambda m, x: m.base(x) + m.rank / m.alpha * _update(m, x)),
         "this scale is rank / alpha, upside down"),
        (_with(lambda m, x: m.base(x) + m.alpha / m.rank**0.5 * _update(m, x)),
         "this scale is alpha / sqrt(rank), rsLoRA's; asked is alpha / rank"),
        (_with(lambda m, x: m.base(x) + m.scale**2 * _update(m, x)), "the scale counts twice"),
        (_with(lambda m, x: m.base(x) + m.alpha // m.rank * _update(m, x)),
         "alpha // rank rounds down, to 0 where alpha is smaller: divide with /"),
        (_with(_without_graph), "no gradient reaches A and B: the adapter's part is computed "
                                "outside of autograd"),
        (_with(lambda m, x: m.scale * (m.base(x) + _update(m, x))),
         "the scale belongs to the adapter alone, not to the base's output"),
        (_with(lambda m, x: m.scale * _update(m, x)), "the base's output is missing"),
        (_with(lambda m, x: m.base(x)), "the adapter's part is missing from the output"),
        (_with(lambda m, x: m.base(x) - m.scale * _update(m, x)),
         "the adapter's part is subtracted; add it"),
        (_made(_random_b), "B starts at zero: with B random the layer is damaged before the first "
                           "step"),
        (_made(_zero_a), "A is not random. B's gradient passes through A: A starts random, B at "
                         "zero"),
        (_made(_positive_a), "A comes from another range; asked is U(-1/sqrt(in), 1/sqrt(in)), of "
                             "both signs: torch.empty(...).uniform_(-bound, bound)"),
        (_made(lambda m: setattr(m, "dense", m.base.dequantize())),
         "the layer keeps the decoded weight from the start: it is no smaller than a dense one. "
         "Keep the base, which decodes when it is called"),
        (_with(lambda m, x: m.base(x) + m.scale * x @ (m.lora_B @ m.lora_A).T),
         "right values, but the product B A, as large as the dense weight, stays alive until "
         "backward: (x A^T) B^T, two thin products"),
        (_with(lambda m, x: linear(x, m.base.dequantize()) + m.scale * _update(m, x)),
         "right values, but the decoded weight stays alive until backward: call the base, which "
         "decodes it again"),
        (_with(lambda m, x: linear(x, m.base.dequantize() + m.scale * m.lora_B @ m.lora_A)),
         "right values, but this keeps the sum of weight and update dense until backward"),
        (_with(lambda m, x: m.base(x) + m.scale * _update(m, x.detach())),
         "no gradient passes through the adapter to x: detach() cuts it off"),
        (_with(lambda m, x: m.base(x.detach()) + m.scale * _update(m, x)),
         "no gradient passes through the base to x: it is frozen, but the layers below need it"),
        (_made(_not_parameters), "trained are lora_A and lora_B and nothing else, each as an "
                                 "nn.Parameter: no optimizer finds a plain tensor"),
        (layer_trial(_qlora_layer(
            lambda m, x: m.base(x) + m.scale * (x @ m.lora_A) @ m.lora_B, _turned)),
         "A is (rank, in), B is (out, rank), as nn.Linear stores its weight"),
        (_with(lambda m, x: m.base(x) + m.scale * (x @ m.lora_A) @ m.lora_B),
         "shapes do not fit: x (..., in) @ A^T (in, rank) @ B^T (rank, out)"),
    ],
    rtol=1e-3, atol=1e-4))


# --- QLoRA by hand: the training loop ----------------------------------------------------

class ToyLM(nn.Module):
    """A language model of one layer with an adapter, in which nothing is frozen yet. `computed`
    notes for which of the other parameters a gradient was computed."""

    def __init__(self, vocabulary: int, features: int = 4, rank: int = 2,
                 generator: torch.Generator | None = None):
        super().__init__()
        def random(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator))
        self.embedding = random(vocabulary, features)
        self.base = random(features, features)  # (out, in)
        self.lora_A = random(rank, features)
        self.lora_B = nn.Parameter(torch.zeros(features, rank))
        self.head = random(vocabulary, features)
        self.computed: list[str] = []
        for name in ("embedding", "base", "head"):
            getattr(self, name).register_hook(lambda _, name=name: self.computed.append(name))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, tokens) -> logits (batch, tokens, vocabulary)"""
        x = self.embedding[ids]
        x = x @ self.base.T + (x @ self.lora_A.T) @ self.lora_B.T
        return torch.tanh(x) @ self.head.T


class InsideLM(nn.Module):
    """The toy inside another model, so that its parameters' names are paths: base_model.lora_A."""

    def __init__(self, toy: ToyLM):
        super().__init__()
        self.base_model = toy

    def forward(self, ids: Tensor) -> Tensor:
        return self.base_model(ids)

    @property
    def computed(self) -> list[str]:
        return self.base_model.computed


Batches = list[tuple[Tensor, Tensor]]


def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log p over the labels that are learned; position t predicts token t + 1."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _train(names: tuple[str, ...] = ("lora_",), given: tuple[str, ...] | None = None,
           loss: Callable = supervised_loss, clear: str = "before",
           optimizer: Callable = torch.optim.AdamW, fresh: bool = False,
           later: bool = False, at_start: bool = False) -> Callable:
    """Training in which gradients are computed for the parameters whose names hold one of
    `names`, and those of `given` move; the gradients are cleared `before` backward, `after` it or
    never; with another loss or optimizer, a `fresh` one in each step; the losses taken `later`,
    after the step. A name of the adapter may stand anywhere in a path (the library's end in
    lora_A.default), the toy's others at its end; or, `at_start`, all at its start."""
    given = names if given is None else given

    def holds(path: str, parts: tuple[str, ...]) -> bool:
        if at_start:
            return path.startswith(parts)
        return any(part in (path if part in "lora_A lora_B" else path.rpartition(".")[2])
                   for part in parts)

    def run(model: ToyLM, batches: Batches, lr: float) -> list[float]:
        for name, p in model.named_parameters():
            p.requires_grad_(holds(name, names))
        trained = [p for name, p in model.named_parameters() if holds(name, given)]

        def made():
            return optimizer(trained, lr=lr, **({} if optimizer is torch.optim.SGD
                                                else {"weight_decay": 0.0}))

        moved, losses = made(), []
        for ids, labels in batches:
            moved = made() if fresh else moved
            if clear == "before":
                moved.zero_grad()
            now = loss(model(ids), labels)
            now.backward()
            if clear == "after":
                moved.zero_grad()
            moved.step()
            losses.append((loss(model(ids), labels) if later else now).item())
        return losses
    return run


def _by_attributes(model: ToyLM, batches: Batches, lr: float) -> list[float]:
    model.lora_A, model.lora_B  # where the toy has them, and no other model
    return _train()(model, batches, lr)


def _decayed(params, lr: float, weight_decay: float):
    return torch.optim.AdamW(params, lr=lr)


def _at_another_rate(params, lr: float, weight_decay: float):
    return torch.optim.AdamW(params, weight_decay=0.0)


def _flat(logits: Tensor, labels: Tensor, **how) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), **how)


def _over_all_positions(logits: Tensor, labels: Tensor) -> Tensor:
    total = _flat(logits[:, :-1], labels[:, 1:], reduction="sum")
    return total / labels[:, 1:].numel()


def _rows_first(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([supervised_loss(logits[i:i + 1], labels[i:i + 1])
                        for i in range(len(labels))]).mean()


ALL = ("embedding", "base", "lora_", "head")


def _toy(steps: int, lr: float, vocabulary: int = 7, rows: int = 2, tokens: int = 6,
         inside: bool = False):
    def make(g):
        model, batches = ToyLM(vocabulary, generator=g), []
        model = InsideLM(model) if inside else model
        for _ in range(steps):
            ids = torch.randint(vocabulary, (rows, tokens), generator=g)
            labels = ids.clone()
            for row in range(rows):  # a prompt of two tokens, padding behind
                labels[row, :2] = IGNORE
                labels[row, tokens - row % 3:] = IGNORE
            batches.append((ids, labels))
        return model, batches, lr
    return make


def _state(given: tuple) -> tuple:
    """All parameters, and for which frozen ones a gradient was computed."""
    return [p.detach() for p in given[0].parameters()], sorted(set(given[0].computed))


register(Exercise(
    name="train_adapter",
    reference=_train(),
    cases=[
        (_toy(1, 0.05), "one step"),
        (_toy(5, 0.05), "five steps"),
        (_toy(4, 0.02, vocabulary=20, rows=3, tokens=9), "four steps, 20 tokens, three rows"),
        (_toy(2, 0.05, inside=True), "the toy inside another model: base_model.lora_A"),
    ],
    mistakes=[
        (_train(ALL), "embedding, base and head are trained too: freeze whatever is not the "
                      "adapter"),
        (_train(ALL, ("lora_",)), "right numbers, but embedding, base and head still get "
                                  "gradients: freeze them with requires_grad_(False) before the "
                                  "first backward, so that none is computed"),
        (_train(("embedding", "lora_")), "the embedding is not frozen: it moves"),
        (_train(("lora_", "head")), "the head is not frozen: it moves"),
        (_train(("base", "lora_")), "the base is not frozen: it moves"),
        (_train(("lora_B",)), "B alone is trained; A belongs to the adapter too"),
        (_train(at_start=True), "nothing is found to train: a parameter's name is its whole path, "
                                "such as base_model.lora_A. Look for lora_ anywhere in it"),
        (_by_attributes, "a model need not have these attributes: its adapters stand deep inside. "
                         "named_parameters() finds them all"),
        (_train(clear="never"), "gradients of all steps pile up: clear them in every step"),
        (_train(clear="after"), "nothing moves. Are gradients cleared between backward and step, "
                               "or is B frozen?"),
        (_train(loss=_flat), "position t predicts token t + 1: logits[:, :-1] with labels[:, 1:]"),
        (_train(loss=lambda logits, labels: _flat(logits[:, 1:], labels[:, :-1])),
         "the shift goes the other way: logits[:, :-1] with labels[:, 1:]"),
        (_train(loss=lambda logits, labels: _flat(logits[:, :-1], labels[:, 1:].clamp(min=0))),
         "-100 is no token: leave these positions out (cross_entropy does it by itself)"),
        (_train(loss=_over_all_positions), "this is the mean over all positions; over those alone "
                                           "that are learned"),
        (_train(loss=_rows_first), "this is a mean of the rows' means; all learned tokens of a "
                                   "batch count the same"),
        (_train(loss=lambda logits, labels: _flat(logits[:, :-1], labels[:, 1:],
                                                  reduction="sum")),
         "this is the sum; the loss is the mean over the learned tokens"),
        (_train(optimizer=torch.optim.SGD), "this is SGD; take torch.optim.AdamW"),
        (_train(optimizer=_decayed), "AdamW decays weights by 0.01 unless you say weight_decay=0"),
        (_train(optimizer=_at_another_rate), "lr is not used"),
        (_train(fresh=True), "a new optimizer in each step forgets its moments: make it once"),
        (_train(later=True), "these losses are taken after the step; return those that backward "
                             "ran on"),
    ],
    rtol=1e-4, atol=1e-5,
    changes=_state))
