"""Exercises of notebook 03: LoRA's forward, its gradients, its size and its merge; and a model that
is adapted and trained, in three steps: which layers, inject, a training step."""
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..kit.exercise import Exercise, register


def _factors(generator, rank, tokens=(5,), inputs=6, outputs=4) -> tuple[Tensor, ...]:
    """x (*tokens, in), W (out, in), A (rank, in), B (out, rank)"""
    shapes = [(*tokens, inputs), (outputs, inputs), (rank, inputs), (outputs, rank)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _trained(generator, rank, alpha, train="AB", **sizes) -> tuple:
    """The arguments of a forward pass whose factors in `train` are to be trained."""
    x, weight, a, b = _factors(generator, rank, **sizes)
    return x, weight, a.requires_grad_("A" in train), b.requires_grad_("B" in train), alpha


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
        (lambda g: _trained(g, 2, 8), "rank 2, alpha 8"),
        (lambda g: _trained(g, 3, 16, tokens=(2, 5)), "rank 3, x (batch, seq, in)"),
        (lambda g: _trained(g, 1, 0.5), "rank 1, alpha 0.5"),
        (lambda g: _trained(g, 2, 8, inputs=4), "a square weight"),
        (lambda g: _trained(g, 2, 8, train="A"), "A alone is trained"),
        (lambda g: _trained(g, 2, 8, train="B"), "B alone is trained"),
    ],
    mistakes=[
        (lambda x, weight, a, b, alpha: lora_forward(x, weight, a.detach(), b, alpha),
         "right values, but A is cut off from autograd and gets no gradient"),
        (lambda x, weight, a, b, alpha: lora_forward(x, weight, a, b.detach(), alpha),
         "right values, but B is cut off from autograd and gets no gradient"),
        (torch.no_grad()(lora_forward),
         "right values, but without a graph A and B get no gradient: leave out no_grad and detach"),
        (_scaled(lambda alpha, a, b: (alpha / a.shape[0])**2),
         "you have the scale twice; multiply by alpha / r once"),
        (_scaled(lambda alpha, a, b: alpha * a.shape[0]),
         "you multiply by the rank; the scale is alpha / r"),
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

class AutogradIsOff(ValueError):
    """Somebody asked autograd for gradients that are to be written by hand."""


def by_hand(function: Callable) -> Callable:
    """The same function, during which autograd records nothing."""
    @functools.wraps(function)
    def without_autograd(*arguments, **named):
        try:
            with torch.no_grad():
                return function(*arguments, **named)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise AutogradIsOff("autograd is switched off here") from error

    return without_autograd


def _lora_gradients(g: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float):
    return scale * (g @ b).T @ x, scale * g.T @ (x @ a.T)


def _gradient_arguments(generator, rank, scale, zero_b=False):
    x, _, a, b = _factors(generator, rank)
    return torch.randn(5, 4, generator=generator), x, a, b * (not zero_b), scale


def _by_autograd(g, x, a, b, scale):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    return torch.autograd.grad(scale * (x @ a.T) @ b.T, (a, b), g)


register(Exercise(
    name="lora_gradients",
    reference=by_hand(_lora_gradients),
    cases=[
        (lambda g: _gradient_arguments(g, 2, 2.0), "rank 2, scale 2"),
        (lambda g: _gradient_arguments(g, 3, 0.5), "rank 3, scale 0.5"),
        (lambda g: _gradient_arguments(g, 2, 2.0, zero_b=True), "B = 0, as at the start"),
    ],
    mistakes=[
        (by_hand(_by_autograd),
         "write the two products yourself: what arrives at a layer's output, times its input"),
        (lambda g, x, a, b, scale: ((g @ b).T @ x, scale * g.T @ (x @ a.T)),
         "only B's gradient has the scale; g reaches A through it as well"),
        (lambda g, x, a, b, scale: (scale * (g @ b).T @ x, g.T @ (x @ a.T)),
         "only A's gradient has the scale; B's output is multiplied by it as well"),
        (lambda g, x, a, b, scale: ((g @ b).T @ x / scale, g.T @ (x @ a.T) / scale),
         "you divide by the scale; a factor of the output is a factor of the gradient"),
        (lambda g, x, a, b, scale: tuple(-d for d in _lora_gradients(g, x, a, b, scale)),
         "the sign is turned: the gradient points uphill, the optimizer subtracts it"),
        (lambda g, x, a, b, scale: ((g @ b).T @ x, g.T @ (x @ a.T)),
         "the scale is a factor of the output, so it is a factor of both gradients"),
        (lambda g, x, a, b, scale: (scale**2 * (g @ b).T @ x, scale**2 * g.T @ (x @ a.T)),
         "you have the scale twice; each gradient holds it once"),
        (lambda g, x, a, b, scale: _lora_gradients(g, x, a, b, scale)[::-1],
         "these are the right gradients in the wrong order: A's first, then B's"),
        (lambda g, x, a, b, scale: tuple(d.T for d in _lora_gradients(g, x, a, b, scale)),
         "transposed: a gradient has the shape of its parameter, A (r, in) and B (out, r)"),
        (lambda g, x, a, b, scale: tuple(d / len(x) for d in _lora_gradients(g, x, a, b, scale)),
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
        (_counted(lambda shapes, rank: sum(o + i for o, i in shapes)),
         "the rank is missing: A has r rows and B has r columns"),
        (_counted(lambda shapes, rank: sum(rank**2 * (o + i) for o, i in shapes)),
         "you have the rank twice; it is r * (in + out)"),
        (_counted(lambda shapes, rank: sum(o * i + rank * (o + i) for o, i in shapes)),
         "the frozen weight is counted too; the adapter alone is trained, stored and counted"),
        (_bytes(16, 4), "right numbers, in another order: parameters, file, training"),
        (_bytes(4, 20), "that is five numbers; weight, gradient and Adam's two moments are four"),
        (_bytes(2, 16), "an fp32 number takes 4 bytes, not 2: adapters are kept in fp32"),
        (_bytes(4, 8), "8 bytes a number leave out Adam's two moments, 4 bytes each"),
        (_bytes(4, 12), "12 bytes a number leave out the gradient, or one of Adam's moments"),
        (_bytes(4, 4), "training needs more than the weights: gradient and Adam's two moments"),
        (_bytes(32, 16), "that is bits; a byte has 8 of them"),
        (lambda shapes, rank: adapter_size(shapes, rank)[0],
         "return all three: trained parameters, bytes in the file, bytes in training"),
    ]))


# --- 4. A model of one's own, step 1: which layers get an adapter --------------------------

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
        (lambda g: (["a.proj", "b.up_proj", "c._proj q"], ("up_proj", "q_proj")),
         "proj is a part of up_proj"),
        (lambda g: (["a.up_proj_gate", "b.up_proj", "b.up_gate", "up_proj.1"], ("up_proj",)),
         "up_proj_gate begins with up_proj"),
    ],
    mistakes=[
        (lambda names, targets: [n for n in names if any(t in n for t in targets)],
         "`in` looks for a substring, and block_proj holds k_proj; compare whole components"),
        (lambda names, targets: [n for n in names if n.endswith(tuple(targets))],
         "block_proj ends with k_proj as well; split at the dots first"),
        (lambda names, targets: [n for n in names
                                 if n.split(".")[-1].startswith(tuple(targets))],
         "up_proj_gate begins with up_proj and is another layer; compare whole components"),
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
        (lambda names, targets: [n for n in names if n.split(".")[-1] in " ".join(targets)],
         "`in` a text looks for a substring, and up_proj holds proj; look into the tuple"),
        (lambda names, targets: [n for n in names if n.endswith(tuple(f".{t}" for t in targets))],
         "a layer at the top of the model has a path without a dot; split, and take the last"),
        (lambda names, targets: [n for n in names if any(n.split(".")[-1] in t for t in targets)],
         "`n in t` looks for a substring of a target, and up_proj holds proj; compare with =="),
        (lambda names, targets: [n for n in names if n.split(".")[0] in targets],
         "that is the first component; the layer's own name is the last"),
        (lambda names, targets: [n for n in names if len(n.split(".")) > 1
                                 and n.split(".")[-2] in targets],
         "that is the module which the layer lies in; its own name is the last component"),
        (lambda names, targets: sorted(match_targets(names, targets), reverse=True),
         "right names in another order; keep the model's"),
        (lambda names, targets: match_targets(names, targets)[:1],
         "only the first layer that matches; the model has more"),
    ]))


# --- Step 2: inject ------------------------------------------------------------------------

class LoRALayer(nn.Module):
    """A frozen layer with two factors beside it, as the notebook's MyLoRALinear."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        device, bound = base.weight.device, base.in_features**-0.5
        a = torch.empty(rank, base.in_features, device=device).uniform_(-bound, bound)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * (x @ self.lora_A.T) @ self.lora_B.T


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(width, width),
                                   "k_proj": nn.Linear(width, width, bias=False)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, width + 2),
                                  "up_proj_gate": nn.Linear(width, width + 2),
                                  "block_proj": nn.Linear(width + 2, width)})

    def forward(self, x: Tensor) -> Tensor:
        h, mlp = self.norm(x), self.mlp
        up = mlp["up_proj"](h) * torch.tanh(mlp["up_proj_gate"](h))
        return x + self.attn["q_proj"](h) * torch.tanh(self.attn["k_proj"](h)) + \
            mlp["block_proj"](up)


class _Model(nn.Module):
    """A model of a few hundred numbers that is called as those of transformers are."""

    def __init__(self, blocks: int = 2, width: int = 4, words: int = 9):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, input_ids: Tensor, attention_mask=None, labels: Tensor | None = None):
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))  # (batch, seq, words)
        loss = None if labels is None else cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return SimpleNamespace(loss=loss, logits=logits)


def _model(generator: torch.Generator) -> _Model:
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws from the notebook's generator
        model = _Model()
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _linears(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]


def _inject(model: nn.Module, targets: tuple[str, ...], rank: int, alpha: float) -> list[str]:
    model.requires_grad_(False)
    paths = match_targets(_linears(model), targets)
    for path in paths:
        _put(model, path, LoRALayer(model.get_submodule(path), rank, alpha))
    return paths


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with factors that a call reaches, by path."""
    found = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base")}
    return {n: m for n, m in found.items() if model.get_submodule(n) is m}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """All but the factors, by the names that they have in a model without adapters."""
    return {n.replace(".base.", "."): p.detach().clone() for n, p in model.named_parameters()
            if not n.endswith(("lora_A", "lora_B"))}


def injected(inject: Callable) -> Callable:
    """A function that injects, as a function that returns what there is to see afterwards: paths,
    then a text a fact, then logits with all factors filled. It is the attribute `inject`."""
    def facts(model, targets, rank, alpha):
        ids, weights = torch.arange(6).view(2, 3), base_weights(model)
        with torch.no_grad():
            before = model(ids).logits
        paths, layers = inject(model, targets, rank, alpha), adapted_layers(model)
        if paths is None and not layers:
            return None
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        kinds = sorted({n.rpartition(".")[2] for n in trained})
        now = base_weights(model)
        kept = now.keys() == weights.keys() and all(
            torch.equal(now[n], w) for n, w in weights.items())
        with torch.no_grad():
            same = torch.equal(model(ids).logits, before)
            drawn = all(layer.lora_A.any() for layer in layers.values())
            for i, layer in enumerate(layers.values() if kept else ()):
                draws = torch.Generator().manual_seed(i)
                for p in (layer.lora_A, layer.lora_B):
                    p.copy_(torch.randn(p.shape, generator=draws))
            filled = model(ids).logits if kept else torch.zeros(1)
        return [
            "no paths" if paths is None else [f"{p}" for p in paths],
            f"adapters in {len(layers)} layers", f"base weights {'kept' if kept else 'lost'}",
            f"trained: {len(trained)} tensors", f"they are {', '.join(kinds)[:24] or 'none'}",
            f"at the start {'as before' if same else 'other logits'}",
            f"A {'drawn at random' if drawn else 'all zeros'}", filled]

    facts.inject = inject
    return facts


def _freeze_last(model, targets, rank, alpha):
    paths = _inject(model, targets, rank, alpha)
    model.requires_grad_(False)
    return paths


def _without(freeze=True, match=match_targets, put=_put, layer=LoRALayer, said=lambda path: path):
    """Another injection; each part is done otherwise."""
    def wrong(model, targets, rank, alpha):
        if freeze:
            model.requires_grad_(False)
        paths = match(_linears(model), targets)
        for path in paths:
            put(model, path, layer(model.get_submodule(path), rank, alpha))
        return [said(path) for path in paths]
    return wrong


def _one_for_all(model, targets, rank, alpha):
    model.requires_grad_(False)
    paths = match_targets(_linears(model), targets)
    one = LoRALayer(model.get_submodule(paths[0]), rank, alpha)
    for path in paths:
        _put(model, path, one)
    return paths


def _at_the_top(model, targets, rank, alpha):
    model.requires_grad_(False)
    paths = [n for n, m in model.named_children() if n in targets and isinstance(m, nn.Linear)]
    for path in paths:
        _put(model, path, LoRALayer(model.get_submodule(path), rank, alpha))
    return paths


def _new_base(base, rank, alpha):
    return LoRALayer(nn.Linear(base.in_features, base.out_features, base.bias is not None), rank,
                     alpha)


def _both_random(base, rank, alpha):
    layer = LoRALayer(base, rank, alpha)
    nn.init.ones_(layer.lora_B)
    return layer


def _zero_a(base, rank, alpha):
    layer = LoRALayer(base, rank, alpha)
    nn.init.zeros_(layer.lora_A)
    return layer


def _whatever_matches(model, targets, rank, alpha):
    model.requires_grad_(False)
    paths = match_targets([n for n, _ in model.named_modules()], targets)
    for path in paths:
        _put(model, path, LoRALayer(model.get_submodule(path), rank, alpha))
    return paths


def _frozen_a(base, rank, alpha):
    layer = LoRALayer(base, rank, alpha)
    layer.lora_A.requires_grad_(False)
    return layer


def _unfrozen_base(base, rank, alpha):
    layer = LoRALayer(base, rank, alpha)
    layer.base.requires_grad_(True)
    return layer


def _nothing_returned(model, targets, rank, alpha):
    _inject(model, targets, rank, alpha)


register(Exercise(
    name="inject",
    reference=injected(_inject),
    cases=[
        (lambda g: (_model(g), ("q_proj", "k_proj"), 2, 4), "two targets, two blocks"),
        (lambda g: (_model(g), ("up_proj",), 3, 6), "a layer that is not square"),
        (lambda g: (_model(g), ("k_proj",), 1, 8), "block_proj ends with k_proj"),
        (lambda g: (_model(g), ("head", "block_proj"), 2, 2), "a layer at the top of the model"),
        (lambda g: (_model(g), ("norm", "q_proj"), 2, 6), "a target that names norms as well"),
    ],
    mistakes=[(injected(wrong), message) for wrong, message in [
        (_without(freeze=False),
         "embedding, norms and all other layers are still trained: model.requires_grad_(False)"),
        (_freeze_last, "you freeze last, and the adapters with the rest: freeze the model first"),
        (_without(layer=_unfrozen_base),
         "the layers beside the adapters are trained too: what was pretrained stays frozen"),
        (_without(layer=_frozen_a),
         "A is frozen: both factors are trained, A as soon as B has left 0"),
        (_without(match=lambda names, targets: [n for n in names
                                                if any(t in n for t in targets)]),
         "a substring of the path matches too much: compare the last component, as in step 1"),
        (_without(match=lambda names, targets: [n for n in names if n.endswith(targets)]),
         "block_proj ends with k_proj as well: compare the last component, as in step 1"),
        (_without(match=lambda names, targets: names),
         "every linear layer got an adapter: only the targets should"),
        (_without(match=lambda names, targets: match_targets(names, targets)[:1]),
         "only the first layer that matches: go on to the end of the model"),
        (_without(match=lambda names, targets: match_targets(names, targets[:1])),
         "only the first target is looked for"),
        (_without(put=setattr),
         "setattr(model, path, ...) takes dots for letters, and the new layer hangs where no call "
         "comes by: replace the child of model.get_submodule(parent)"),
        (_without(put=lambda model, path, layer: None),
         "the new layers are made and dropped: put each in the place of the old one"),
        (_without(put=lambda model, path, layer: setattr(model, path.rpartition(".")[2], layer)),
         "the new layer hangs at the top of the model: its parent is what stands before the last "
         "dot"),
        (_without(layer=_new_base),
         "the pretrained weight is gone: the adapter stands beside a new layer, not the old one"),
        (_without(layer=lambda base, rank, alpha: LoRALayer(base, rank, alpha / rank)),
         "MyLoRALinear divides alpha by the rank itself: pass alpha as it is"),
        (_without(layer=lambda base, rank, alpha: LoRALayer(base, alpha, rank)),
         "rank and alpha have changed places"),
        (_without(layer=lambda base, rank, alpha: LoRALayer(base, rank, 2 * rank)),
         "alpha is an argument: do not take 2 r for it"),
        (_without(layer=_both_random),
         "the model starts out changed: B begins as zeros"),
        (_without(layer=_zero_a),
         "A is 0 at the start, and with B = 0 neither ever gets a gradient: A is drawn at random"),
        (_whatever_matches,
         "a norm has no in_features: adapt those modules that are an nn.Linear, ask isinstance"),
        (_without(said=lambda path: path.rpartition(".")[2]),
         "return whole paths, so that each layer can be found again"),
        (_one_for_all, "one layer stands in all places: make a new one for each path"),
        (_at_the_top, "named_children lists the top alone: named_modules goes all the way down"),
        (_nothing_returned, "the model is right; return the paths as well"),
    ]]))


# --- Step 3: a training step ---------------------------------------------------------------

def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _train_step(model: nn.Module, optimizer, batches: list[dict], max_norm: float) -> float:
    optimizer.zero_grad()
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, counts):
        loss = model(**batch).loss * count / sum(counts)
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(_parameters(model), max_norm)
    optimizer.step()
    return total


def stepped(step: Callable) -> Callable:
    """A training step, as a function that returns what there is to see of it: the loss, whether
    frozen weights moved, and how far each trained tensor did. It is the attribute `step`."""
    def facts(model, optimizer, batches, max_norm):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss = step(model, optimizer, batches, max_norm)
        moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        if loss is None and not any(d.any() for d in moved.values()):
            return None
        frozen = any(d.any() for n, d in moved.items() if n not in trained)
        return ["no loss returned" if loss is None else loss,
                f"frozen weights {'moved' if frozen else 'kept'}", *(moved[n] for n in trained)]

    facts.step = step
    return facts


def _adapted(generator: torch.Generator) -> nn.Module:
    model = _model(generator)
    with torch.random.fork_rng(devices=[]):
        _inject(model, ("q_proj", "up_proj"), 2, 2)
    for p in _parameters(model):
        p.data.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model


def _batch(generator: torch.Generator, prompt: int, targets: list[int]) -> dict[str, Tensor]:
    """A row for each of `targets`, which says how many tokens it supervises."""
    length = prompt + max(targets)
    ids = torch.randint(0, 9, (len(targets), length), generator=generator)
    at = torch.arange(length)
    ends = prompt + torch.tensor(targets)[:, None]
    labels = torch.where((at >= prompt) & (at < ends), ids, -100)
    return {"input_ids": ids, "attention_mask": (at < ends).long(), "labels": labels}


def _step_arguments(generator, sizes, max_norm=1e3, left=0.0, optimizer=torch.optim.SGD) -> tuple:
    """sizes: (prompt, targets) a batch; left: what stands in the gradients before the step."""
    model = _adapted(generator)
    for p in _parameters(model):
        p.grad = torch.full_like(p, left)
    batches = [_batch(generator, *size) for size in sizes]
    return model, optimizer(_parameters(model), lr=0.5), batches, max_norm


def _step(clear=True, share=lambda batch, count, counts: count / sum(counts), clear_each=False,
          step_each=False, clear_last=False, clip=nn.utils.clip_grad_norm_, clip_each=False,
          say=lambda losses, shares: sum(a * b for a, b in zip(losses, shares)),
          count=lambda batch: int((batch["labels"] != -100).sum())):
    """Another training step; each part is done otherwise."""
    def wrong(model, optimizer, batches, max_norm):
        if clear:
            optimizer.zero_grad()
        counts = [count(batch) for batch in batches]
        losses, shares = [], []
        for batch, own in zip(batches, counts):
            if clear_each:
                optimizer.zero_grad()
            shares.append(share(batch, own, counts))
            loss = model(**batch).loss
            losses.append(loss.item())
            (loss * shares[-1]).backward()
            if clip_each:
                clip(_parameters(model), max_norm)
            if step_each:
                optimizer.step()
        if clear_last:
            optimizer.zero_grad()
        if not clip_each:
            clip(_parameters(model), max_norm)
        if not step_each:
            optimizer.step()
        return say(losses, shares)
    return wrong


def _no_clip(parameters, max_norm):
    pass


def _each_tensor_alone(parameters, max_norm):
    for p in parameters:
        nn.utils.clip_grad_norm_([p], max_norm)


def _always_scaled(parameters, max_norm):
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    for p in parameters:
        p.grad *= max_norm / norm


def _first_batch_only(model, optimizer, batches, max_norm):
    return _train_step(model, optimizer, batches[:1], max_norm)


def _no_loss(model, optimizer, batches, max_norm):
    _train_step(model, optimizer, batches, max_norm)


register(Exercise(
    name="train_step",
    reference=stepped(_train_step),
    cases=[
        (lambda g: _step_arguments(g, [(2, [3, 3])]), "one batch"),
        (lambda g: _step_arguments(g, [(3, [1, 2]), (2, [6, 4])]), "two batches of unequal size"),
        (lambda g: _step_arguments(g, [(2, [3, 5])], left=0.3), "gradients left from before"),
        (lambda g: _step_arguments(g, [(2, [2]), (1, [4, 5]), (3, [3])], max_norm=0.02),
         "a norm above max_norm, in three batches"),
        (lambda g: _step_arguments(g, [(2, [4, 1]), (2, [2])], left=-0.1,
                                   optimizer=torch.optim.AdamW), "AdamW"),
    ],
    mistakes=[(stepped(wrong), message) for wrong, message in [
        (_step(clear=False),
         "gradients that were left from before are added to yours: clear them first"),
        (_step(share=lambda batch, own, counts: 1 / len(counts)),
         "each batch counts the same here; each supervised token should, so a batch's mean loss "
         "weighs its supervised tokens over those of all batches"),
        (_step(share=lambda batch, own, counts: 1.0),
         "the batches' mean losses are added up, so more batches mean a larger gradient: weigh "
         "them by their share of the supervised tokens"),
        (_step(count=lambda batch: batch["labels"].numel()),
         "you count all positions, prompt and padding too; supervised are those with a label "
         "other than -100"),
        (_step(count=lambda batch: int(batch["attention_mask"].sum())),
         "you count the prompt's tokens as well; supervised are those with a label other than "
         "-100"),
        (_step(count=lambda batch: len(batch["labels"])),
         "you weigh by rows; some have more supervised tokens than others"),
        (_step(share=lambda batch, own, counts: own),
         "the sum over tokens, not the mean: divide by the supervised tokens of all batches"),
        (_step(clear_each=True),
         "the gradients are cleared before each batch, so only the last one's are left: clear "
         "once, before the loop"),
        (_step(step_each=True),
         "the weights move after each batch; a step moves them once, after the last"),
        (_step(clear_last=True),
         "nothing moves: when step() is called there are no gradients, or it is not called"),
        (_step(clip=_no_clip), "max_norm has no effect: clip the gradient, before the step"),
        (_step(clip_each=True),
         "you clip after each batch; clip once, when the whole gradient is there"),
        (_step(clip=_each_tensor_alone),
         "each tensor is clipped by itself; the norm is that of all gradients together"),
        (_step(clip=nn.utils.clip_grad_value_),
         "that limits every entry; clip_grad_norm_ scales all by one factor, and keeps the "
         "direction"),
        (_step(clip=_always_scaled),
         "you scale to max_norm always; a gradient that is shorter stays as it is"),
        (_step(say=lambda losses, shares: losses[-1]),
         "you return the last batch's loss; return the mean over all supervised tokens"),
        (_step(say=lambda losses, shares: losses[-1] * shares[-1]),
         "you return the last batch's part of the mean; add up those of all batches"),
        (_step(say=lambda losses, shares: sum(losses)),
         "you return the sum of the batches' means; return the mean over all supervised tokens"),
        (_step(say=lambda losses, shares: sum(losses) / len(losses)),
         "right step, but the loss you return lets each batch count the same: weigh it as the "
         "gradient"),
        (_first_batch_only, "only the first batch is used"),
        (_no_loss, "the step is right; return its loss as well"),
    ]]))


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


def _as_a_parameter(linear, a, b, alpha, x):
    linear.weight = nn.Parameter(linear.weight + alpha / a.shape[0] * b @ a)
    return linear(x).detach()


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
        (_as_a_parameter,
         "right numbers, but a new nn.Parameter asks for gradients again: the base stays frozen; "
         "write into the weight that is there, with +="),
        (_merged(lambda w, a, b, alpha: w + alpha / b.shape[0] * b @ a),
         "you divide by out_features; the rank is a.shape[0]"),
        (_merged(lambda w, a, b, alpha: w + (alpha / a.shape[0])**2 * b @ a),
         "you have the scale twice; the update is alpha / r times B A"),
        (_merged(lambda w, a, b, alpha: w + a.shape[0] / alpha * b @ a),
         "the scale is upside down: alpha / r, not r / alpha"),
        (_merged(lambda w, a, b, alpha: w + alpha / a.shape[0]**0.5 * b @ a),
         "alpha / sqrt(r) is rsLoRA's scale; this adapter's is alpha / r"),
        (_merged(lambda w, a, b, alpha: alpha / a.shape[0] * (w + b @ a)),
         "you scale the pretrained weight as well; only the update is multiplied by alpha / r"),
    ],
    changes=lambda arguments: [arguments[0].weight.detach(), arguments[0].weight.requires_grad]))
