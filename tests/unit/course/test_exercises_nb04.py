"""Other right answers to the exercises of notebook 04 pass as the folded solutions do."""
import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from course.kit import check
from course.kit.exercise import registered
from course.nb04.exercises import layer_trial, trial
from course.nb04.step import Logits
from qlora_lib import inject_lora


def in_whole_bytes(packed, rest, adapter):
    """Codes, absmax values and their scales counted one by one."""
    blocks = -(-packed // 64)
    stored = -(-packed // 2) + blocks + 4 * -(-blocks // 256)
    return stored + 2 * rest + 4 * adapter, adapter * 4, adapter * 2 * 4


def in_bits(packed, rest, adapter):
    return (packed * (4 + 8 / 64 + 32 / 64 / 256) / 8 + rest * 16 / 8 + adapter * 32 / 8,
            4.0 * adapter, 8.0 * adapter)


class InFp32(torch.autograd.Function):
    """Nothing is kept, and sums are rounded once: more precise than products in bf16."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return (x.float() @ weight.dequantize().T).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return (grad.float() @ ctx.weight.dequantize()).to(grad.dtype), None


class WithDecoder(torch.autograd.Function):
    """Keeps the function that decodes, not the weight itself."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.decode = weight.dequantize
        return nn.functional.linear(x, ctx.decode(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return torch.einsum("to,oi->ti", grad, ctx.decode(grad.dtype)), None


class ByRows(torch.autograd.Function):
    """The newer form, whose forward has no ctx; one feature after another."""

    @staticmethod
    def forward(x, weight):
        return torch.stack([x @ row for row in weight.dequantize(x.dtype)], 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.weight = inputs

    @staticmethod
    def backward(ctx, grad):
        return (ctx.weight.dequantize(grad.dtype).T @ grad.T).T, None


def padded_lists(pairs, eos):
    """Rows as lists, filled up one by one."""
    ids = [[*prompt, *target, eos] for prompt, target in pairs]
    labels = [[-100] * len(prompt) + [*target, eos] for prompt, target in pairs]
    width = max(map(len, ids))
    return (torch.tensor([row + [eos] * (width - len(row)) for row in ids]),
            torch.tensor([row + [-100] * (width - len(row)) for row in labels]))


def by_pad_sequence(pairs, eos):
    ids = [torch.tensor([*prompt, *target, eos]) for prompt, target in pairs]
    labels = [torch.tensor([-100] * len(p) + [*t, eos]) for p, t in pairs]
    return (pad_sequence(ids, batch_first=True, padding_value=eos),
            pad_sequence(labels, batch_first=True, padding_value=-100))


def by_masks(pairs, eos):
    """Ids first, labels from two comparisons with the lengths."""
    ids, _ = by_pad_sequence(pairs, eos)
    starts = torch.tensor([len(p) for p, _ in pairs])[:, None]
    ends = torch.tensor([len(p) + len(t) for p, t in pairs])[:, None]
    at = torch.arange(ids.shape[1])
    return ids, ids.where((at >= starts) & (at <= ends), -100)


class Sequential(nn.Module):
    """Two calls of linear, the scale first; A as nn.Linear starts."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.frozen, self.alpha, self.rank = base, alpha, rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False).weight
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        thin = nn.functional.linear(x * (self.alpha / self.rank), self.lora_A)
        return nn.functional.linear(thin, self.lora_B) + self.frozen(x)


class ScaledA(Sequential):
    """The scale goes into A, which is small."""

    def forward(self, x):
        a = self.alpha / self.rank * self.lora_A
        return self.frozen(x) + (x @ a.T) @ self.lora_B.T


class Einsum(Sequential):
    def forward(self, x):
        thin = torch.einsum("...i,ri->...r", x, self.lora_A)
        return self.frozen(x).add(torch.einsum("...r,or->...o", thin, self.lora_B),
                                  alpha=self.alpha / self.rank)


def adapter_of(model):
    return [p for name, p in model.named_parameters() if "lora_" in name]


def cleared(first):
    """Everything frozen but A and B, the model's gradients cleared first or last in a step."""
    def mine(model, batches, lr):
        model.requires_grad_(False)
        trained = [p.requires_grad_() for p in adapter_of(model)]
        optimizer = torch.optim.Adam(trained, lr=lr)
        losses = []
        for ids, labels in batches:
            if first:
                model.zero_grad()
            logits, labels = model(ids)[:, :-1], labels[:, 1:]
            learned = labels != -100
            log_p = log_softmax(logits[learned], -1)
            loss = -log_p[torch.arange(len(log_p)), labels[learned]].mean()
            loss.backward()
            optimizer.step()
            if not first:
                model.zero_grad()
            losses.append(loss)
        return losses
    return mine


def asked_of_autograd(model, batches, lr):
    """Nothing is frozen, but gradients are asked for A and B alone; the shift made in labels."""
    trained, losses = adapter_of(model), []
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)
    for ids, labels in batches:
        following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
        loss = nn.functional.cross_entropy(model(ids).transpose(1, 2), following)
        for p, p.grad in zip(trained, torch.autograd.grad(loss, trained)):
            pass
        optimizer.step()
        losses.append(loss.item())
    return losses


def by_hand(model, batches, lr):
    """Adam itself, written out."""
    model.requires_grad_(False)
    state = [(p.requires_grad_(), torch.zeros_like(p), torch.zeros_like(p))
             for p in adapter_of(model)]
    losses = []
    for t, (ids, labels) in enumerate(batches, 1):
        logits = model(ids)[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].reshape(-1))
        for p, m, v in state:
            (g,) = torch.autograd.grad(loss, p, retain_graph=True)
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            p.data -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        losses.append(loss.item())
    return losses


def row_by_row(model, batches, lr):
    """Each row's gradient added to that of the others, by a closure."""
    model.requires_grad_(False)
    optimizer = torch.optim.Adam([{"params": [p.requires_grad_()]} for p in adapter_of(model)], lr)

    def loss_of(ids, labels):
        optimizer.zero_grad(set_to_none=False)
        learned, total = (labels[:, 1:] != -100).sum(), 0.0
        for row, label in zip(ids, labels):
            loss = nn.functional.cross_entropy(model(row[None])[0, :-1], label[1:],
                                               reduction="sum") / learned
            loss.backward()
            total += loss.item()
        return total

    return [optimizer.step(lambda: loss_of(ids, labels)) for ids, labels in batches]


@pytest.mark.parametrize("name, mine", [
    ("training_bytes", in_whole_bytes),
    ("training_bytes", in_bits),
    ("frozen_linear", trial(InFp32)),
    ("frozen_linear", trial(WithDecoder)),
    ("frozen_linear", trial(ByRows)),
    ("padded_batch", padded_lists),
    ("padded_batch", by_pad_sequence),
    ("padded_batch", by_masks),
    ("qlora_linear", layer_trial(Sequential)),
    ("qlora_linear", layer_trial(ScaledA)),
    ("qlora_linear", layer_trial(Einsum)),
    ("train_adapter", cleared(first=True)),
    ("train_adapter", cleared(first=False)),
    ("train_adapter", asked_of_autograd),
    ("train_adapter", by_hand),
    ("train_adapter", row_by_row),
])
def test_another_right_way_passes(name, mine, capsys):
    assert check(name, mine) is mine, capsys.readouterr().out


class KeepsInput(WithDecoder):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.decode, ctx.x = weight.dequantize, x
        return nn.functional.linear(x, ctx.decode(x.dtype))


def test_a_verdict_names_the_value_that_is_wrong(capsys):
    check("frozen_linear", trial(KeepsInput))
    said = capsys.readouterr().out
    assert "bytes_kept: wrong value" in said and "    bytes_kept:" in said


def test_the_reference_loop_finds_the_library_s_adapters():
    """Their parameters are called ...lora_A.default, within a model of many parts."""
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, vocab_size=20,
                                         num_hidden_layers=1, num_attention_heads=2))
    inject_lora(model, "all", rank=2, alpha=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(12).view(2, 6)
    registered()["train_adapter"].reference(Logits(model), [(ids, ids)], 0.01)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_B" in name}  # B is zero: A has no gradient yet
