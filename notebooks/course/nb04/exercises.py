"""Exercises of notebook 04: bytes of training, a frozen layer's backward, labels, two bugs."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from experiments.measured_step import AllocationMeter
from qlora_lib import QuantizedTensor, QuantSpec, quantize_rtn
from qlora_lib.data.tokens import IGNORE

from ..kit.exercise import Exercise, register

# --- 1. What training keeps --------------------------------------------------------------

def training_bytes(base: int, adapter: int) -> tuple[int, int, int]:
    return 2 * base + 4 * adapter, 4 * adapter, 8 * adapter


register(Exercise(
    name="training_bytes",
    reference=training_bytes,
    cases=[
        (lambda g: (1_000_000, 10_000), "a base of a million"),
        (lambda g: (6_738_415_616, 39_976_960), "LLaMA-2-7B, rank 16 on all linears"),
        (lambda g: (500, 0), "no adapter: nothing is trained"),
    ],
    mistakes=[
        (lambda base, adapter: (2 * base + 4 * adapter, 2 * base + 4 * adapter, 8 * adapter),
         "the base is frozen: it gets no gradient"),
        (lambda base, adapter: (2 * base + 4 * adapter, 2 * base + 4 * adapter,
                                8 * (base + adapter)),
         "that trains the base as well; gradients and moments belong to the adapter alone"),
        (lambda base, adapter: (2 * base + 4 * adapter, 4 * adapter, 4 * adapter),
         "Adam keeps two moments a parameter, 4 bytes each; you have one"),
        (lambda base, adapter: (2 * base + 4 * adapter, 4 * adapter, 12 * adapter),
         "an fp32 copy is for 16-bit parameters; the adapter is fp32 already"),
        (lambda base, adapter: (2 * base + 2 * adapter, 2 * adapter, 8 * adapter),
         "the adapter is fp32: 4 bytes for a parameter and for its gradient"),
        (lambda base, adapter: (4 * base + 4 * adapter, 4 * adapter, 8 * adapter),
         "the frozen base is stored in bf16, 2 bytes a parameter"),
        (lambda base, adapter: (2 * base, 4 * adapter, 8 * adapter),
         "the adapter's own weights are missing from the first number"),
        (lambda base, adapter: (16 * base + 32 * adapter, 32 * adapter, 64 * adapter),
         "those are bits; a byte has 8 of them"),
    ]))


# --- 2. A frozen layer's forward and backward --------------------------------------------

def trial(function: type[torch.autograd.Function]) -> Callable:
    """Turn an autograd Function of (x, weight) into a function that `check` can run.

    The result takes x (tokens, in), a QuantizedTensor (out, in) and the gradient of y, and
    returns y (tokens, out), the gradient of x, and the bytes kept between forward and backward.
    """
    def run(x: Tensor, weight: QuantizedTensor, grad: Tensor) -> tuple[Tensor, Tensor, int]:
        leaf = x.detach().requires_grad_()
        with AllocationMeter() as meter:
            h = leaf + 0  # the layer's input, which only the layer could keep alive
            y = function.apply(h, weight)
            del h
            kept = meter.alive - y.nbytes
        (grad_x,) = torch.autograd.grad(y, leaf, grad)
        return y.detach(), grad_x, kept
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
        (trial(_TransposedBack), "backward multiplies by W, not by W^T: grad (tokens, out) @ "
                                 "W (out, in) gives (tokens, in)"),
        (trial(_multiplied(lambda x, weight: x @ weight.dequantize(x.dtype))),
         "forward needs the transpose: x (tokens, in) @ W^T (in, out)"),
        (trial(_OneGradient), "backward returns one value for each argument of forward: the "
                              "gradient of x, and None for the frozen weight"),
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
    ],
    mistakes=[
        (_relabelled(_padding_counts), "the padding is supervised: behind its one real eos a row's "
                                       "labels are -100, though the ids there are eos too"),
        (_relabelled(_every_eos_masked), "labels[ids == eos] = -100 masks the real eos with the "
                                         "padding: the model would never learn to stop"),
        (_relabelled(_behind_the_first_eos_masked), "you mask behind the first eos, but a prompt "
                                                    "may hold one too: go by the lengths"),
        (_relabelled(_prompt_counts), "the prompt is supervised; its labels are -100: the model "
                                      "must answer questions, not write them"),
        (_relabelled(_shifted), "the labels are shifted by one. Label and id stand at the same "
                                "place here; the loss shifts them, as every Hugging Face model"),
        (_relabelled(_last_prompt_token_counts), "the mask is short by one: the prompt's last "
                                                 "token has label -100 too"),
        (_relabelled(_zero_ignored), "what is ignored has label -100; 0 is a token like others"),
        (_without_eos, "no row ends in eos: ids are prompt + target + eos, then the padding"),
        (_left_padded, "padded on the left; that is for generation, training pads on the right"),
        (lambda pairs, eos: padded_batch(pairs, eos)[::-1], "the ids come first, then the labels"),
    ]))


# --- 4. Find the bugs --------------------------------------------------------------------

class ToyLoRA(nn.Module):
    """Embedding, a linear layer `base`, and an adapter beside it. Nothing is frozen yet."""

    def __init__(self, vocabulary: int = 7, features: int = 4, rank: int = 2,
                 generator: torch.Generator | None = None):
        super().__init__()
        def random(*shape):
            return nn.Parameter(0.5 * torch.randn(*shape, generator=generator))
        self.embedding = random(vocabulary, features)
        self.base = random(features, features)  # (out, in)
        self.lora_A = random(rank, features)
        self.lora_B = nn.Parameter(torch.zeros(features, rank))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (tokens,) -> (tokens, features)"""
        x = self.embedding[ids]
        return x @ self.base.T + (x @ self.lora_A.T) @ self.lora_B.T


Batches = list[tuple[Tensor, Tensor]]


def _train(names: tuple[str, ...], zeroed: tuple[str, ...] | None = None, when: str = "before"):
    """Training of the parameters whose names begin with one of `names`, all of which the
    optimizer holds; `zeroed`: whose gradients are cleared, and `when`."""
    def run(model: ToyLoRA, batches: Batches, lr: float) -> list[Tensor]:
        named = dict(model.named_parameters())
        for name, p in named.items():
            p.requires_grad_(name.startswith(names))
        optimizer = torch.optim.SGD([p for p in named.values() if p.requires_grad], lr=lr)
        clear = [p for n, p in named.items() if n.startswith(names if zeroed is None else zeroed)]

        def zero():
            for p in clear:
                p.grad = None

        for ids, y in batches:
            if when == "before":
                zero()
            (model(ids) - y).square().mean().backward()
            if when == "too late":
                zero()
            optimizer.step()
        return [p.detach() for p in named.values()]
    return run


EVERYTHING = ("embedding", "base", "lora")
train_adapter = _train(("lora",))


def _nothing_frozen(model: ToyLoRA, batches: Batches, lr: float) -> list[Tensor]:
    optimizer = torch.optim.SGD([model.lora_A, model.lora_B], lr=lr)
    for ids, y in batches:
        optimizer.zero_grad()
        (model(ids) - y).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def _toy(steps: int, lr: float, vocabulary: int = 7):
    def make(g):
        model = ToyLoRA(vocabulary, generator=g)
        batches = [(torch.randint(vocabulary, (6,), generator=g), torch.randn(6, 4, generator=g))
                   for _ in range(steps)]
        return model, batches, lr
    return make


register(Exercise(
    name="train_adapter",
    reference=train_adapter,
    cases=[
        (_toy(1, 0.5), "one step"),
        (_toy(5, 0.5), "five steps"),
        (_toy(4, 0.2, vocabulary=20), "four steps, 20 tokens"),
    ],
    mistakes=[
        (_train(EVERYTHING, zeroed=("lora",)), "both bugs are still there: embedding and base are "
                                               "trained, and their gradients pile up"),
        (_train(EVERYTHING), "gradients are cleared now, but embedding and base still move: freeze "
                             "whatever is not the adapter"),
        (_train(("embedding", "lora")), "the base is frozen, the embedding is not: it moves"),
        (_train(("base", "lora")), "the embedding is frozen, the base is not: it moves"),
        (_train(("lora",), zeroed=()), "gradients of all steps pile up: clear them in every step"),
        (_train(("lora",), when="too late"), "nothing moves. Are gradients cleared between "
                                             "backward and step, or is B frozen?"),
        (_train(("lora_B",)), "B alone is trained; A belongs to the adapter too"),
        (_train(()), "everything is frozen, the adapter as well"),
        (_nothing_frozen, "right numbers, but embedding and base still get gradients: freeze them "
                          "with requires_grad_(False), so that none is computed"),
    ],
    rtol=1e-4, atol=1e-6,
    changes=lambda given: [p.requires_grad for p in (given[0].embedding, given[0].base)]))
