"""Exercises of notebook 03: LoRA's forward, gradients, sizes, targets, merge."""
import math

import torch
from torch import Tensor, nn

from ..kit.exercise import Exercise, register


def _factors(generator, rank, tokens=(5,), inputs=6, outputs=4) -> tuple[Tensor, ...]:
    """x (*tokens, in), W (out, in), A (rank, in), B (out, rank)"""
    shapes = [(*tokens, inputs), (outputs, inputs), (rank, inputs), (outputs, rank)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


# --- 1. The forward pass -----------------------------------------------------------------

def lora_forward(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return x @ weight.T + alpha / a.shape[0] * (x @ a.T) @ b.T


def _scaled(scale):
    """The forward pass with another scale; `scale` is a function of (alpha, A, B)."""
    def wrong(x, weight, a, b, alpha):
        return x @ weight.T + scale(alpha, a, b) * (x @ a.T) @ b.T
    return wrong


register(Exercise(
    name="lora_forward",
    reference=lora_forward,
    cases=[
        (lambda g: (*_factors(g, 2), 8), "rank 2, alpha 8"),
        (lambda g: (*_factors(g, 3, tokens=(2, 5)), 16), "rank 3, x (batch, seq, in)"),
        (lambda g: (*_factors(g, 1), 0.5), "rank 1, alpha 0.5"),
        (lambda g: (*_factors(g, 2, inputs=4), 8), "a square weight"),
    ],
    mistakes=[
        (_scaled(lambda alpha, a, b: alpha),
         "the scale is alpha / r; you multiply by alpha alone, an update r times too large"),
        (_scaled(lambda alpha, a, b: 1.0), "the update is not scaled; multiply it by alpha / r"),
        (_scaled(lambda alpha, a, b: a.shape[0] / alpha),
         "the scale is upside down: alpha / r, not r / alpha"),
        (_scaled(lambda alpha, a, b: alpha / math.sqrt(a.shape[0])),
         "alpha / sqrt(r) is rsLoRA's scale; LoRA's is alpha / r"),
        (_scaled(lambda alpha, a, b: alpha / a.shape[1]),
         "you divide by in_features; the rank is a.shape[0], for A is (r, in)"),
        (_scaled(lambda alpha, a, b: alpha / b.shape[0]),
         "you divide by out_features; the rank is b.shape[1], for B is (out, r)"),
        (lambda x, weight, a, b, alpha: alpha / a.shape[0] * (x @ a.T) @ b.T,
         "the base is gone: the pretrained x W^T comes first, the update is added to it"),
        (lambda x, weight, a, b, alpha: alpha / a.shape[0] * (x @ weight.T + (x @ a.T) @ b.T),
         "you scale the base's output as well; only the update is multiplied by alpha / r"),
        (lambda x, weight, a, b, alpha: x @ weight + alpha / a.shape[0] * (x @ a) @ b,
         "shapes do not fit: a weight is (out, in), so each product needs a transpose, x @ w.T"),
    ]))


# --- 2. The gradients of A and B ---------------------------------------------------------

def lora_gradients(g: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float):
    return scale * (g @ b).T @ x, scale * g.T @ (x @ a.T)


def _gradient_arguments(generator, rank, scale, zero_b=False):
    x, _, a, b = _factors(generator, rank)
    return torch.randn(5, 4, generator=generator), x, a, b * (not zero_b), scale


register(Exercise(
    name="lora_gradients",
    reference=lora_gradients,
    cases=[
        (lambda g: _gradient_arguments(g, 2, 2.0), "rank 2, scale 2"),
        (lambda g: _gradient_arguments(g, 3, 0.5), "rank 3, scale 0.5"),
        (lambda g: _gradient_arguments(g, 2, 2.0, zero_b=True), "B = 0, as at the start"),
    ],
    mistakes=[
        (lambda g, x, a, b, scale: ((g @ b).T @ x, g.T @ (x @ a.T)),
         "the scale is a factor of the output, so it is a factor of both gradients"),
        (lambda g, x, a, b, scale: (scale**2 * (g @ b).T @ x, scale**2 * g.T @ (x @ a.T)),
         "you have the scale twice; each gradient holds it once"),
        (lambda g, x, a, b, scale: lora_gradients(g, x, a, b, scale)[::-1],
         "these are the right gradients in the wrong order: A's first, then B's"),
        (lambda g, x, a, b, scale: tuple(d.T for d in lora_gradients(g, x, a, b, scale)),
         "transposed: a gradient has the shape of its parameter, A (r, in) and B (out, r)"),
        (lambda g, x, a, b, scale: tuple(d / len(x) for d in lora_gradients(g, x, a, b, scale)),
         "you average over the tokens; the loss's own mean is already in g, so sum"),
        (lambda g, x, a, b, scale: (a, b),
         "you return A and B themselves; wanted are the derivatives of the loss in them"),
        (lambda g, x, a, b, scale: (scale * g.T @ x, scale * g.T @ (x @ a.T)),
         "B is missing from A's gradient: g reaches A only through B, as g @ b (tokens, r)"),
        (lambda g, x, a, b, scale: (scale * (g @ b).T @ x, scale * g.T @ x),
         "A is missing from B's gradient: B's input is x @ a.T (tokens, r), not x"),
        (lambda g, x, a, b, scale: (scale * (g @ b) @ x, scale * g @ (x @ a.T)),
         "shapes do not fit: a gradient sums over tokens, so (.., tokens) @ (tokens, ..)"),
    ]))


# --- 3. What an adapter weighs -----------------------------------------------------------

def adapter_size(shapes: list[tuple[int, int]], rank: int) -> tuple[int, int, int]:
    count = sum(rank * (outputs + inputs) for outputs, inputs in shapes)
    return count, 4 * count, 16 * count


def _counted(count):
    """All three sizes from another count; `count` is a function of (shapes, rank)."""
    def wrong(shapes, rank):
        n = count(shapes, rank)
        return n, 4 * n, 16 * n
    return wrong


def _bytes(stored, training):
    def wrong(shapes, rank):
        n = adapter_size(shapes, rank)[0]
        return n, int(stored * n), training * n
    return wrong


register(Exercise(
    name="adapter_size",
    reference=adapter_size,
    cases=[
        (lambda g: ([(4096, 4096)], 8), "one square layer, rank 8"),
        (lambda g: ([(11008, 4096), (4096, 11008)], 16), "up and down, rank 16"),
        (lambda g: ([(768, 256)] * 3, 1), "three layers, rank 1"),
        (lambda g: ([(4096, 4096), (11008, 4096), (512, 4096)], 4), "three shapes, rank 4"),
    ],
    mistakes=[
        (_counted(lambda shapes, rank: sum(o * i for o, i in shapes)),
         "that is the full weights; A has r * in and B has out * r numbers"),
        (_counted(lambda shapes, rank: sum(rank * i for o, i in shapes)),
         "that is A alone; B adds out * r"),
        (_counted(lambda shapes, rank: sum(rank * o for o, i in shapes)),
         "that is B alone; A adds r * in"),
        (_counted(lambda shapes, rank: sum(2 * rank * o for o, i in shapes)),
         "2 * r * out holds for square layers only; it is r * (in + out)"),
        (_counted(lambda shapes, rank: rank * sum(shapes[0])),
         "you count the first layer only; sum over all of them"),
        (_counted(lambda shapes, rank: len(shapes) * rank * sum(shapes[0])),
         "you take the first layer's shape for all of them; each has its own"),
        (_counted(lambda shapes, rank: sum(rank * o * i for o, i in shapes)),
         "you multiply in by out; A and B lie side by side, r * in + out * r"),
        (_bytes(2, 16), "an fp32 number takes 4 bytes, not 2: adapters are kept in fp32"),
        (_bytes(4, 8), "8 bytes a number leave out Adam's two moments, 4 bytes each"),
        (_bytes(4, 12), "12 bytes a number leave out the gradient, or one of Adam's moments"),
        (_bytes(4, 4), "training needs more than the weights: gradient and Adam's two moments"),
        (_bytes(32, 16), "that is bits; a byte has 8 of them"),
        (lambda shapes, rank: adapter_size(shapes, rank)[0],
         "return all three: trained parameters, bytes in the file, bytes in training"),
    ]))


# --- 4. Which layers get an adapter ------------------------------------------------------

def match_targets(names: list[str], targets: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.split(".")[-1] in targets]


_NAMES = [f"model.layers.{i}.{part}" for i in range(2) for part in (
    "self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.block_proj")]

register(Exercise(
    name="match_targets",
    reference=match_targets,
    cases=[
        (lambda g: (_NAMES, ("k_proj",)), "block_proj holds k_proj"),
        (lambda g: (_NAMES, ("up_proj", "q_proj")), "two targets"),
        (lambda g: (["k_proj", "a.k_proj.norm", "k_proj.inner.o_proj"], ("k_proj", "o_proj")),
         "a target as a folder of the path"),
        (lambda g: (_NAMES, ("gate_proj",)), "a target that the model lacks"),
    ],
    mistakes=[
        (lambda names, targets: [n for n in names if any(t in n for t in targets)],
         "`in` looks for a substring, and block_proj holds k_proj; compare whole components"),
        (lambda names, targets: [n for n in names if n.endswith(tuple(targets))],
         "block_proj ends with k_proj as well; split at the dots first"),
        (lambda names, targets: [n for n in names if set(n.split(".")) & set(targets)],
         "only the last component names the layer; the others are what it lies in"),
        (lambda names, targets: [n for n in names if n.split(".")[-1] == targets[0]],
         "only the first target is looked for"),
        (lambda names, targets: [n for t in targets for n in names if n.split(".")[-1] == t],
         "right names, but in the order of the targets; keep the model's order"),
        (lambda names, targets: [n.split(".")[-1] for n in names if n.split(".")[-1] in targets],
         "return whole paths, so that each layer can be found again"),
        (lambda names, targets: [n for n in names if n.split(".")[-1] not in targets],
         "these are the layers that stay as they are; wanted are the others"),
        (lambda names, targets: [n for n in names if n in targets],
         "you compare the whole path with the target; compare its last component"),
    ]))


# --- 5. Merge ----------------------------------------------------------------------------

@torch.no_grad()
def merge_and_run(linear: nn.Linear, a: Tensor, b: Tensor, alpha: float, x: Tensor) -> Tensor:
    linear.weight += alpha / a.shape[0] * b @ a
    return linear(x)


def _merge_arguments(generator, rank, alpha, outputs=4):
    x, weight, a, b = _factors(generator, rank, outputs=outputs)
    linear = nn.Linear(6, outputs, bias=False).requires_grad_(False)
    linear.weight.copy_(weight)
    return linear, a, b, alpha, x


def _merged(change):
    """Another merge; `change` is a function of (W, A, B, alpha) that gives the new weight."""
    @torch.no_grad()
    def wrong(linear, a, b, alpha, x):
        linear.weight.copy_(change(linear.weight, a, b, alpha))
        return linear(x)
    return wrong


@torch.no_grad()
def _assigned(linear, a, b, alpha, x):
    linear.weight = linear.weight + alpha / a.shape[0] * b @ a
    return linear(x)


@torch.no_grad()
def _merged_and_added(linear, a, b, alpha, x):
    update = alpha / a.shape[0] * b @ a
    linear.weight += update
    return linear(x) + x @ update.T


@torch.no_grad()
def _beside(linear, a, b, alpha, x):
    return x @ (linear.weight + alpha / a.shape[0] * b @ a).T


register(Exercise(
    name="merge_and_run",
    reference=merge_and_run,
    cases=[
        (lambda g: _merge_arguments(g, 2, 8), "rank 2, alpha 8"),
        (lambda g: _merge_arguments(g, 3, 1), "rank 3, alpha 1"),
        (lambda g: _merge_arguments(g, 1, 2, outputs=6), "a square weight"),
    ],
    mistakes=[
        (lambda linear, a, b, alpha, x: linear(x),
         "nothing was merged: a sum is a new tensor; write it into linear.weight"),
        (_merged(lambda w, a, b, alpha: w + b @ a),
         "the scaling is forgotten: the adapter's update is alpha / r times B A"),
        (_merged(lambda w, a, b, alpha: w + alpha * b @ a),
         "alpha alone: the update is divided by the rank, alpha / r"),
        (_merged(lambda w, a, b, alpha: alpha / a.shape[0] * b @ a),
         "only the update is left: add it to the pretrained weight"),
        (_merged(lambda w, a, b, alpha: w - alpha / a.shape[0] * b @ a),
         "minus is unmerging; merging adds"),
        (_assigned,
         "a tensor cannot take a Parameter's place; write into linear.weight, with +="),
        (_merged_and_added,
         "the update counts twice: once merged, the adapter must not be added again"),
        (_merged(lambda w, a, b, alpha: w + alpha / a.shape[0] * a @ b),
         "A B has another shape than the weight; the update is B A, (out, r) @ (r, in)"),
        (_beside, "right output, but linear still holds the old weight: write into linear.weight"),
    ],
    changes=lambda arguments: arguments[0].weight.detach()))
