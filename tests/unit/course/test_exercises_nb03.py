"""The exercises of notebook 03 mean what the library does, and take any right answer."""
import copy

import pytest
import torch
from torch import nn

from course.kit import check
from course.kit.exercise import example
from course.nb03 import exercises as nb03
from qlora_lib.lora.inject import inject_lora, trainable_parameters
from qlora_lib.lora.layer import LoRAConfig, LoRALinear, lora_layers
from qlora_lib.lora.targets import find_linears
from qlora_lib.train.config import TrainConfig, learning_rate
from qlora_lib.train.step import Stepper


def layer_and_input():
    g = torch.Generator().manual_seed(0)
    x, weight, a, b = nb03._factors(g, 3)
    layer = LoRALinear(nn.Linear(6, 4, bias=False))
    layer.add("a", LoRAConfig(3, 8))
    for p, value in ((layer.base.weight, weight), (layer.lora_A["a"], a), (layer.lora_B["a"], b)):
        p.data.copy_(value)
    return layer, x, weight, a, b


def test_forward_and_gradients_are_the_librarys():
    layer, x, weight, a, b = layer_and_input()
    y = layer(x)
    assert torch.allclose(nb03.lora_forward(x, weight, a, b, 8), y, atol=1e-5)
    y.retain_grad()
    y.square().sum().backward()
    d_a, d_b = nb03.by_hand(nb03._lora_gradients)(y.grad, x, a, b, 8 / 3)
    assert torch.allclose(d_a, layer.lora_A["a"].grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(d_b, layer.lora_B["a"].grad, rtol=1e-4, atol=1e-4)


TARGETS = ("q_proj", "block_proj")


def test_injection_chooses_and_freezes_as_the_library_does():
    (model, *_), (theirs, *_) = example("inject"), example("inject")
    mine = nb03._inject(model, TARGETS, 2, 4)
    assert mine == inject_lora(theirs, TARGETS, rank=2, alpha=4)
    sizes = [sum(p.numel() for p in trainable_parameters(m).values()) for m in (model, theirs)]
    assert sizes[0] == sizes[1] and mine == list(find_linears(theirs, TARGETS))
    for path, layer in lora_layers(theirs).items():
        own = model.get_submodule(path)
        assert own.lora_A.shape == layer.lora_A["default"].shape
        assert own.scaling == layer.configs["default"].scaling


def test_a_step_is_the_librarys():
    """The same gradient, clipped alike, moves AdamW alike; several batches are one mean."""
    model, _, batches, _ = example("train_step", 4)
    config = TrainConfig(lr=0.01, max_grad_norm=0.02, warmup_ratio=0.0)
    theirs = copy.deepcopy(model)
    model.zero_grad()
    lr = learning_rate(1, 1, config)
    optimizer = torch.optim.AdamW(nb03._parameters(model), lr=lr, weight_decay=0.0)
    loss = nb03._train_step(model, optimizer, batches, 0.02)
    theirs.zero_grad()
    count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    stepper = Stepper(trainable_parameters(theirs), config, 1, torch.float32)
    parts = (theirs(**b).loss * int((b["labels"] != -100).sum()) / count for b in batches)
    metrics = stepper.take(1, parts)
    assert loss == pytest.approx(metrics["loss"], rel=1e-5)
    for a, b in zip(nb03._parameters(model), nb03._parameters(theirs)):
        assert torch.allclose(a, b, atol=1e-5)


def right_forward(x, weight, a, b, alpha):
    update = torch.einsum("...i,ri,or->...o", x, a, b)
    return nn.functional.linear(x, weight) + update * (alpha / b.shape[1])


def forward_by_merging(x, weight, a, b, alpha):
    return x @ (weight + alpha / len(a) * b @ a).transpose(0, 1)


def right_gradients(g, x, a, b, scale):
    d_h = torch.einsum("to,or->tr", g, b).mul(scale)
    return torch.einsum("tr,ti->ri", d_h, x), scale * torch.einsum("to,ti,ri->or", g, x, a)


def gradients_of_the_weight(g, x, a, b, scale):
    whole = scale * g.T @ x  # (out, in)
    return [b.T @ whole, whole @ a.T]


def size_by_tensors(shapes, rank):
    meta = [torch.empty(s, device="meta") for out, inside in shapes
            for s in ((rank, inside), (out, rank))]
    n = sum(t.numel() for t in meta)
    return [n, sum(t.nbytes for t in meta), n * (4 + 4 + 8)]


def match_by_rsplit(names, targets):
    return [n for n in names if n.rsplit(".", 1)[-1] in set(targets)]


def match_by_dots(names, targets):
    return list(filter(lambda n: any(f".{n}".endswith(f".{t}") for t in targets), names))


def merge_by_data(linear, a, b, alpha, x):
    linear.weight.data += alpha / b.shape[1] * torch.mm(b, a)
    return nn.functional.linear(x, linear.weight)


def merge_by_addmm(linear, a, b, alpha, x):
    with torch.no_grad():
        linear.weight.addmm_(b, a, alpha=alpha / len(a))
    return x @ linear.weight.T


@pytest.mark.parametrize("name, mine", [
    ("lora_forward", right_forward), ("lora_forward", forward_by_merging),
    ("lora_gradients", right_gradients), ("lora_gradients", gradients_of_the_weight),
    ("adapter_size", size_by_tensors), ("match_targets", match_by_rsplit),
    ("match_targets", match_by_dots), ("merge_and_run", merge_by_data),
    ("merge_and_run", merge_by_addmm),
])
def test_another_right_way_passes(name, mine, capsys):
    mine = nb03.by_hand(mine) if name == "lora_gradients" else mine
    assert check(name, mine) is mine, capsys.readouterr().out


class OwnLayer(nn.Module):
    """The notebook's MyLoRALinear in other words."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.s = base, alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + nn.functional.linear(x @ self.lora_A.T, self.s * self.lora_B)


def by_recursion(model, targets, rank, alpha, path=""):
    if not path:
        for p in model.parameters():
            p.requires_grad = False
    found = []
    for name, child in list(model.named_children()):
        whole = f"{path}.{name}".lstrip(".")
        if isinstance(child, nn.Linear) and name in targets:
            setattr(model, name, OwnLayer(child, rank, alpha))
            found.append(whole)
        elif not isinstance(child, nn.Linear):
            found += by_recursion(child, targets, rank, alpha, whole)
    return found


def while_walking(model, targets, rank, alpha):
    model.requires_grad_(False)
    found = []
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if type(module) is nn.Linear and name in targets:
            model.get_submodule(parent)._modules[name] = OwnLayer(module, rank, alpha)
            found.append(path)
    return tuple(found)


def freezing_what_is_no_factor(model, targets, rank, alpha):
    paths = [n for n, m in model.named_modules()
             if isinstance(m, nn.Linear) and n.split(".")[-1] in targets]
    for path in paths:
        *parents, name = path.split(".")
        at = model
        for parent in parents:
            at = getattr(at, parent)
        at.register_module(name, OwnLayer(getattr(at, name), rank, alpha))
    for n, p in model.named_parameters():
        p.requires_grad_("lora_" in n)
    return paths


@pytest.mark.parametrize("mine", [by_recursion, while_walking, freezing_what_is_no_factor])
def test_any_way_to_inject_passes(mine, capsys):
    whole = nb03.injected(mine)
    assert check("inject", whole) is whole and whole.inject is mine, capsys.readouterr().out


def one_loss(model, optimizer, batches, max_norm):
    """One backward for all; the model's gradients are cleared, before and after."""
    counts = torch.stack([(b["labels"][:, 1:] != -100).sum() for b in batches])
    losses = torch.stack([model(**b).loss for b in batches])
    loss = (losses * counts).sum() / counts.sum()
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    model.zero_grad()
    return loss.detach()


def sums_divided_last(model, optimizer, batches, max_norm):
    """The gradient of the sum, divided afterwards; scaled by hand."""
    model.zero_grad(set_to_none=False)
    total = count = 0
    for batch in batches:
        own = int(batch["labels"].ne(-100).sum())
        loss = own * model(**batch).loss
        loss.backward()
        total, count = total + loss.item(), count + own
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = sum((p.grad / count).square().sum() for p in parameters) ** 0.5
    for p in parameters:
        p.grad *= min(1.0, max_norm / norm.item()) / count
    optimizer.step()
    return total / count


def by_autograd_grad(model, optimizer, batches, max_norm):
    parameters = [p for p in model.parameters() if p.requires_grad]
    counts = [int((b["labels"] != -100).sum()) for b in batches]
    loss = sum(model(**b).loss * n for b, n in zip(batches, counts)) / sum(counts)
    for p, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
        p.grad = grad
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("mine", [one_loss, sums_divided_last, by_autograd_grad])
def test_any_way_to_step_passes(mine, capsys):
    whole = nb03.stepped(mine)
    assert check("train_step", whole) is whole and whole.step is mine, capsys.readouterr().out


def test_a_function_that_does_nothing_is_not_solved_yet(capsys):
    for name, wrap in (("inject", nb03.injected), ("train_step", nb03.stepped)):
        check(name, wrap(lambda *arguments: None))
        assert capsys.readouterr().out.startswith(f"… {name}: not solved yet")


def test_the_facts_of_an_injection_are_named(capsys):
    check("inject", nb03.injected(lambda model, targets, rank, alpha: []))
    said = capsys.readouterr().out
    assert "adapters in 4 layers" in said and "base weights kept" in said


def test_checks_of_models_leave_the_notebooks_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    example("inject"), example("train_step", 2)
    assert torch.equal(torch.rand(3), expected)
