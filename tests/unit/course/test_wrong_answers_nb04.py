"""Wrong answers to the exercises of notebook 04, as learners write them."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from course.nb04.exercises import layer_trial, trial
from tests.support.wrong_answers import assert_told, each


def until_the_first_eos(pairs, eos):
    rows = [[*prompt, *target, eos] for prompt, target in pairs]
    ids = torch.tensor([row + [eos] * (max(map(len, rows)) - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for row, (prompt, _) in enumerate(pairs):
        end = ids[row].tolist().index(eos) + 1
        labels[row, len(prompt):end] = ids[row, len(prompt):end]
    return ids, labels


def until_the_targets_first_eos(pairs, eos):
    """In the ids the search begins behind the prompt."""
    rows = [[*prompt, *target, eos] for prompt, target in pairs]
    ids = torch.tensor([row + [eos] * (max(map(len, rows)) - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for row, (prompt, _) in enumerate(pairs):
        end = ids[row].tolist().index(eos, len(prompt)) + 1
        labels[row, len(prompt):end] = ids[row, len(prompt):end]
    return ids, labels


def frozen(keep=lambda ctx, x, weight, y: None,
           product=lambda x, weight: x @ weight.dequantize(x.dtype).T):
    """04's frozen layer, which keeps something more or multiplies in another way."""
    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.weight = weight
            y = product(x, weight)
            keep(ctx, x, weight, y)
            return y

        @staticmethod
        def backward(ctx, grad):
            return grad @ ctx.weight.dequantize(grad.dtype), None
    return trial(Mine)


def qlora_layer(forward, **attributes):
    """04's layer with another forward pass of (layer, x), or other attributes, made of a layer."""
    class Mine(nn.Module):
        def __init__(self, base, rank, alpha):
            super().__init__()
            self.base, self.rank, self.alpha = base, rank, alpha
            bound = base.in_features**-0.5
            self.lora_A = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound))
            self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
            for name, made in attributes.items():
                setattr(self, name, made(self))

        def forward(self, x):
            return forward(self, x)
    return layer_trial(Mine)


def beside(m, x):
    return m.base(x) + m.alpha / m.rank * (x @ m.lora_A.T) @ m.lora_B.T


def trained(prepare, end=lambda model: None, loss=lambda logits, labels: cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), steps=1):
    """04's loop; `prepare` freezes and returns what the optimizer moves, `end` comes last."""
    def mine(model, batches, lr):
        optimizer = torch.optim.AdamW(prepare(model), lr=lr, weight_decay=0.0)
        losses = []
        for ids, labels in batches:
            for _ in range(steps):
                optimizer.zero_grad()
                now = loss(model(ids), labels)
                now.backward()
                optimizer.step()
            losses.append(now.item())
        end(model)
        return losses
    return mine


def adapter_alone(model):
    return chosen(lambda name: "lora_" in name)(model)


def not_frozen(model):
    return [p for name, p in model.named_parameters() if "lora_" in name]


def chosen(found):
    """Freezes all but the parameters whose names `found` accepts."""
    def prepare(model):
        for name, p in model.named_parameters():
            p.requires_grad_(found(name))
        return [p for p in model.parameters() if p.requires_grad]
    return prepare


def attributes_alone(model):
    for p in (model.embedding, model.base, model.head):
        p.requires_grad_(False)
    return [model.lora_A, model.lora_B]


def freeze_and_clear(model):
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.requires_grad_(False)
            p.grad = None


WRONG = {
    "padded_batch": [
        (until_the_first_eos, "diagnosis: you mask behind the first eos"),
        (until_the_targets_first_eos, "diagnosis: you mask behind the first eos after the prompt"),
        (lambda pairs, eos: (nn.utils.rnn.pad_sequence(
            [torch.tensor([*p, *t, eos]) for p, t in pairs], batch_first=True),
            nn.utils.rnn.pad_sequence([torch.tensor([-100] * len(p) + [*t, eos])
                                       for p, t in pairs], batch_first=True, padding_value=-100)),
         "padded with 0"),
        (lambda pairs, eos: tuple(nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=filling)
            for filling, rows in ((eos, [[*p, *t, eos] for p, t in pairs]),
                                  (-100, [[-100] * (len(p) + 1) + [*t[1:], eos]
                                          for p, t in pairs]))), "long by one"),
    ],
    "training_bytes": [
        (lambda packed, rest, adapter: (packed / 2 + packed / 64 * 4 + 2 * rest + 4 * adapter,
                                        4 * adapter, 8 * adapter), "absmax values are in fp32"),
        (lambda packed, rest, adapter: (packed / 2 + packed / 64 + 2 * rest + 4 * adapter,
                                        4 * adapter, 8 * adapter), "the second level is missing"),
        (lambda packed, rest, adapter: (packed // 2 + packed // 64 * 65 // 64 + 2 * rest
                                        + 4 * adapter, 4 * adapter, 4 * adapter),
         "Adam keeps two moments"),
        (lambda packed, rest, adapter: (packed * (4 + 8 / 64 + 32 / 64 / 256) / 8 + 2 * rest
                                        + 4 * adapter, 8 * adapter, 4 * adapter),
         "gradients come second"),
        (lambda packed, rest, adapter: (packed * (4 + 8 / 256 + 32 / 64 / 256) / 8 + 2 * rest
                                        + 4 * adapter, 4 * adapter, 8 * adapter),
         "not the other way round"),
    ],
    "frozen_linear": [
        (frozen(lambda ctx, x, weight, y: ctx.save_for_backward(y)), "the output is kept"),
        (frozen(lambda ctx, x, weight, y: ctx.save_for_backward(x)), "x is kept"),
        (frozen(lambda ctx, x, weight, y: ctx.save_for_backward(weight)), "packed weight is none"),
        (frozen(lambda ctx, x, weight, y: setattr(ctx, "dense",
                                                     weight.dequantize(x.dtype))),
         "the dense weight stays alive"),
        (frozen(product=lambda x, weight: x @ weight), "packed weight is none"),
    ],
    "qlora_linear": [
        (qlora_layer(lambda m, x: m.base(x) + m.alpha * (x @ m.lora_A.T) @ m.lora_B.T),
         "this is alpha alone"),
        (qlora_layer(lambda m, x: m.base(x) + m.alpha / m.rank * x @ (m.lora_B @ m.lora_A).T),
         "two thin products"),
        (qlora_layer(lambda m, x: x @ m.base.dequantize().T
                     + m.alpha / m.rank * (x @ m.lora_A.T) @ m.lora_B.T), "call the base"),
        (qlora_layer(beside, weight=lambda m: nn.Parameter(m.base.dequantize())),
         "lora_A and lora_B and nothing else"),
        (qlora_layer(beside, lora_B=lambda m: nn.Parameter(torch.randn(m.base.out_features,
                                                                       m.rank))),
         "B starts at zero"),
        (qlora_layer(beside, lora_A=lambda m: nn.Parameter(torch.zeros(m.rank,
                                                                       m.base.in_features))),
         "A is not random"),
        (qlora_layer(lambda m, x: x @ m.dense.T + m.alpha / m.rank * (x @ m.lora_A.T) @ m.lora_B.T,
                     dense=lambda m: m.base.dequantize()), "the decoded weight"),
        (qlora_layer(lambda m, x: m.base(x) + m.alpha / m.rank * m.lora_B @ m.lora_A @ x),
         "shapes do not fit"),
        *[(qlora_layer(beside, lora_A=lambda m, start=start: nn.Parameter(start(
            torch.empty(m.rank, m.base.in_features)))), "diagnosis: A comes from another range")
          for start in (torch.rand_like, torch.randn_like, nn.init.kaiming_uniform_,
                        lambda a: a.uniform_(-1 / a.shape[1], 1 / a.shape[1]),
                        lambda a: a.uniform_(0, a.shape[1]**-0.5),
                        lambda a: a.uniform_(-a.shape[1]**0.5, a.shape[1]**0.5))],
        (qlora_layer(lambda m, x: m.base(x) + int(m.alpha / m.rank) * (x @ m.lora_A.T)
                     @ m.lora_B.T), "alpha // rank rounds down"),
        (qlora_layer(lambda m, x: m.base(x) + (m.alpha / m.rank * (x @ m.lora_A.T)
                                               @ m.lora_B.T).detach()),
         "no gradient reaches A and B"),
    ],
    "train_adapter": [
        (trained(not_frozen), "diagnosis: right numbers, but"),
        (trained(not_frozen, freeze_and_clear),
         "diagnosis: right numbers, but"),
        (trained(lambda model: model.parameters()), "embedding, base and head are trained too"),
        (trained(adapter_alone, loss=lambda logits, labels: cross_entropy(
            logits.flatten(0, 1), labels.flatten())), "predicts token t + 1"),
        (trained(adapter_alone, loss=lambda logits, labels: cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").mean()),
         "over all positions"),
        (trained(attributes_alone), "diagnosis: a model need not have these attributes"),
        (trained(chosen(lambda name: name.startswith("lora_"))),
         "diagnosis: nothing is found to train"),
        (trained(chosen(lambda name: name in ("lora_A", "lora_B"))),
         "diagnosis: nothing is found to train"),
        (trained(chosen(lambda name: not any(
            part in name for part in ("embedding", "base", "head")))), "nothing is found to train"),
        (trained(chosen(lambda name: name not in ("embedding", "base", "head"))),
         "embedding, base and head are trained too"),
    ],
}


@each(WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, mine, told, capsys):
    assert_told(name, mine, told, capsys)
