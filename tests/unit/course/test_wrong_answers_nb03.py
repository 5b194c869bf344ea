"""Wrong answers to the exercises of notebook 03, as learners write them."""

import re

import torch
from torch import nn

from course.nb03.exercises import LoRALayer, by_hand, injected, stepped
from tests.support.wrong_answers import assert_told, each


def sizes(count):
    """03's fourth; `count` is a function of (shapes, rank)."""
    return lambda shapes, rank: ((n := count(shapes, rank)), 4 * n, 16 * n)


def forward(update):
    """03's first; `update` is a function of (x, a, b, alpha, r)."""
    return lambda x, weight, a, b, alpha: x @ weight.T + update(x, a, b, alpha, a.shape[0])


def forward_without_graph(x, weight, a, b, alpha):
    with torch.no_grad():
        return x @ weight.T + alpha / a.shape[0] * (x @ a.T) @ b.T


def gradients_by_autograd(g, x, a, b, scale):
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    (scale * (x @ a.T) @ b.T).backward(g)
    return a.grad, b.grad


def inject(freeze="first", matches=lambda path, targets: path.split(".")[-1] in targets,
           place=lambda model, parent, name, path, layer: setattr(
               model.get_submodule(parent), name, layer),
           wrap=LoRALayer, said=lambda path: path):
    """The solution of 03's injection, with a part done otherwise."""
    def mine(model, targets, rank, alpha):
        if freeze == "first":
            model.requires_grad_(False)
        paths = [n for n, m in model.named_modules()
                 if isinstance(m, nn.Linear) and matches(n, targets)]
        for path in paths:
            parent, _, name = path.rpartition(".")
            place(model, parent, name, path, wrap(model.get_submodule(path), rank, alpha))
        if freeze == "last":
            model.requires_grad_(False)
        return [said(path) for path in paths]
    return injected(mine)


def new_layer(base, rank, alpha):
    new = LoRALayer(nn.Linear(base.in_features, base.out_features), rank, alpha)
    return new


def without_an_a(base, rank, alpha):
    layer = LoRALayer(base, rank, alpha)
    layer.lora_A.data.zero_()
    return layer


def whatever_matches(model, targets, rank, alpha):
    """Nobody asks whether a module is linear."""
    model.requires_grad_(False)
    paths = [n for n, _ in model.named_modules() if n.split(".")[-1] in targets]
    for path in paths:
        parent, _, name = path.rpartition(".")
        layer = LoRALayer(model.get_submodule(path), rank, alpha)
        setattr(model.get_submodule(parent), name, layer)
    return paths


def first_and_back(model, targets, rank, alpha):
    """`return` within the loop."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.split(".")[-1] in targets:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, LoRALayer(module, rank, alpha))
            return [path]


def supervised(batch):
    return (batch["labels"] != -100).sum().item()


def step(clear=True, weigh=lambda batch, batches: supervised(batch) / sum(map(supervised, batches)),
         each=lambda optimizer: None, after=lambda optimizer: None,
         clip=nn.utils.clip_grad_norm_, say=lambda mean, losses: mean):
    """The solution of 03's training step, with a part done otherwise."""
    def mine(model, optimizer, batches, max_norm):
        if clear:
            optimizer.zero_grad()
        mean, losses = 0.0, []
        for batch in batches:
            loss = model(**batch).loss * weigh(batch, batches)
            loss.backward()
            mean, losses = mean + loss.item(), [*losses, loss.item()]
            each(optimizer)
        clip([p for p in model.parameters() if p.requires_grad], max_norm)
        after(optimizer)
        optimizer.step()
        return say(mean, losses)
    return stepped(mine)


def never_stepped(model, optimizer, batches, max_norm):
    optimizer.zero_grad()
    n = sum(map(supervised, batches))
    losses = [model(**b).loss * supervised(b) / n for b in batches]
    sum(losses).backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return sum(losses).item()


def merge(scale):
    """03's merge; `scale` is a function of (alpha, a, b)."""
    def mine(linear, a, b, alpha, x):
        linear.weight += scale(alpha, a, b) * b @ a
        return linear(x)
    return mine


def merge_unfrozen(linear, a, b, alpha, x):
    linear.weight.requires_grad_(True)
    with torch.no_grad():
        linear.weight += alpha / a.shape[0] * b @ a
        return linear(x)


WRONG = {
    "lora_forward": [
        (forward_without_graph, "without a graph A and B get no gradient"),
        (lambda x, weight, a, b, alpha: (x @ weight.T + alpha / len(a) * (x @ a.T) @ b.T).detach(),
         "leave out no_grad and detach"),
        (forward(lambda x, a, b, alpha, r: alpha / r * alpha / r * x @ (b @ a).T), "scale twice"),
        (forward(lambda x, a, b, alpha, r: alpha * r * (x @ a.T) @ b.T), "multiply by the rank"),
        (forward(lambda x, a, b, alpha, r: alpha / r**0.5 * (x @ a.T) @ b.T), "rsLoRA's scale"),
        (forward(lambda x, a, b, alpha, r: alpha / len(b) * (x @ a.T) @ b.T), "out_features"),
        (forward(lambda x, a, b, alpha, r: alpha / x.shape[-1] * (x @ a.T) @ b.T), "in_features"),
        (forward(lambda x, a, b, alpha, r: (x @ a.T) @ b.T), "not scaled"),
        (forward(lambda x, a, b, alpha, r: r / alpha * (x @ a.T) @ b.T), "upside down"),
        (forward(lambda x, a, b, alpha, r: alpha / r * (x @ a) @ b), "shapes do not fit"),
        (forward(lambda x, a, b, alpha, r: alpha / r * (x @ a.data.T) @ b.T), "A is cut off"),
        (forward(lambda x, a, b, alpha, r: alpha / r * (x @ a.T) @ b.detach().T), "B is cut off"),
        (forward(lambda x, a, b, alpha, r: alpha / r * (x @ torch.tensor(a.tolist()).T) @ b.T),
         "A is cut off"),
    ],
    "lora_gradients": [
        (by_hand(gradients_by_autograd), "write the two products yourself"),
        (by_hand(lambda g, x, a, b, scale: ((g @ b).T @ x, scale * g.T @ x @ a.T)),
         "only B's gradient has the scale"),
        (by_hand(lambda g, x, a, b, scale: (scale * b.T @ g.T @ x, g.T @ x @ a.T)),
         "only A's gradient has the scale"),
        (by_hand(lambda g, x, a, b, scale: (b.T @ g.T @ x / scale, g.T @ x @ a.T / scale)),
         "divide by the scale"),
        (by_hand(lambda g, x, a, b, scale: (b.T @ g.T @ x * scale**2, g.T @ x @ a.T * scale**2)),
         "scale twice"),
        (by_hand(lambda g, x, a, b, scale: (x.T @ (g @ b) * scale, (x @ a.T).T @ g * scale)),
         "transposed"),
        (by_hand(lambda g, x, a, b, scale: (-scale * b.T @ g.T @ x, -scale * g.T @ x @ a.T)),
         "uphill"),
    ],
    "match_targets": [
        (lambda names, targets: [x for x in names if x.split(".")[-1] in " ".join(targets)],
         "`in` a text looks for a substring"),
        (lambda names, targets: [x for x in names if x.split(".")[-1] in str(targets)],
         "looks for a substring"),
        (lambda names, targets: [x for x in names if x.endswith(tuple("." + t for t in targets))],
         "at the top of the model"),
        (lambda names, targets: [x for x in names for t in targets if t in x], "substring"),
        (lambda names, targets: [x for x in names for t in targets
                                 if x.split(".")[-1].startswith(t)], "begins with up_proj"),
        (lambda names, targets: [x for x in names for t in targets
                                 if re.match(t, x.split(".")[-1])], "begins with up_proj"),
        (lambda names, targets: [x for x in names if x.split(".")[0] in targets], "first compo"),
        (lambda names, targets: sorted(
            (x for x in names if x.split(".")[-1] in targets), key=lambda x: targets.index(
                x.split(".")[-1])), "order of the targets"),
    ],
    "inject": [
        (inject(freeze=""), "are still trained: model.requires_grad_(False)"),
        (inject(freeze="last"), "freeze the model first"),
        (inject(matches=lambda path, targets: any(t in path for t in targets)), "substring"),
        (inject(matches=lambda path, targets: path.endswith(targets)), "block_proj ends with"),
        (inject(matches=lambda path, targets: True), "every linear layer"),
        (inject(place=lambda model, parent, name, path, layer: setattr(model, path, layer)),
         "takes dots for letters"),
        (inject(place=lambda model, parent, name, path, layer: setattr(model, name, layer)),
         "at the top of the model"),
        (inject(place=lambda *arguments: None), "made and dropped"),
        (inject(wrap=new_layer), "pretrained weight is gone"),
        (inject(wrap=lambda base, rank, alpha: LoRALayer(base, rank, alpha / rank)), "itself"),
        (inject(wrap=lambda base, rank, alpha: LoRALayer(base, alpha, rank)), "changed places"),
        (inject(said=lambda path: path.split(".")[-1]), "return whole paths"),
        (inject(wrap=without_an_a), "A is drawn at random"),
        (injected(whatever_matches), "ask isinstance"),
        (injected(first_and_back), "only the first layer"),
    ],
    "train_step": [
        (step(clear=False), "clear them first"),
        (step(weigh=lambda batch, batches: 1 / len(batches)), "each supervised token should"),
        (step(weigh=lambda batch, batches: 1), "more batches mean a larger gradient"),
        (step(weigh=lambda batch, batches: batch["labels"].numel() / sum(
            b["labels"].numel() for b in batches)), "prompt and padding too"),
        (step(weigh=lambda batch, batches: batch["attention_mask"].sum().item() / sum(
            b["attention_mask"].sum().item() for b in batches)), "the prompt's tokens as well"),
        (step(weigh=lambda batch, batches: supervised(batch)), "the sum over tokens, not the mean"),
        (step(each=lambda optimizer: optimizer.zero_grad(), after=lambda optimizer: None),
         "nothing moves"),
        (step(after=lambda optimizer: optimizer.zero_grad()), "there are no gradients"),
        (step(clip=lambda parameters, max_norm: None), "max_norm has no effect"),
        (step(clip=nn.utils.clip_grad_value_), "limits every entry"),
        (step(clip=lambda parameters, max_norm: [
            nn.utils.clip_grad_norm_(p, max_norm) for p in parameters]), "clipped by itself"),
        (step(say=lambda mean, losses: losses[-1]), "last batch's part"),
        (step(say=lambda mean, losses: None), "return its loss as well"),
        (stepped(never_stepped), "nothing moves"),
    ],
    "merge_and_run": [
        (merge_unfrozen, "the base stays frozen"),
        (merge(lambda alpha, a, b: alpha / len(b)), "out_features"),
        (merge(lambda alpha, a, b: (alpha / len(a)) ** 2), "scale twice"),
        (merge(lambda alpha, a, b: alpha / len(a) ** 0.5), "rsLoRA's scale"),
        (merge(lambda alpha, a, b: len(a) / alpha), "upside down"),
        (merge(lambda alpha, a, b: 1), "forgotten"),
        (merge(lambda alpha, a, b: alpha), "divided by the rank"),
    ],
    "adapter_size": [
        (sizes(lambda shapes, rank: sum(a + b for a, b in shapes)), "the rank is missing"),
        (sizes(lambda shapes, rank: rank * rank * sum(map(sum, shapes))), "the rank twice"),
        (sizes(lambda shapes, rank: sum(a * b + rank * (a + b) for a, b in shapes)),
         "the frozen weight is counted too"),
        (lambda shapes, rank: ((n := rank * sum(map(sum, shapes))), 16 * n, 4 * n),
         "in another order"),
        (sizes(lambda shapes, rank: len(shapes) * rank * (shapes[0][0] + shapes[0][1])),
         "diagnosis: you take the first layer's shape for all of them"),
    ],
}


@each(WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, mine, told, capsys):
    assert_told(name, mine, told, capsys)
