"""Wrong answers as learners write them: each is told what is wrong with it, by the message meant.

That each registered mistake gets its own message is tested in test_exercise.py. Here the same
mistakes are made another way, in the words of the notebooks' solutions.
"""
import math
import re
from collections import Counter
from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy

from course.kit import check
from course.nb01 import exercises as nb01
from course.nb02 import exercises as nb02
from course.nb03.exercises import LoRALayer, by_hand, injected, stepped
from course.nb04.exercises import layer_trial, trial
from course.nb07.exercises import update_of
from course.nb08 import exercises as nb08
from course.nb09 import exercises as nb09
from qlora_lib.data.gsm8k import to_number
from qlora_lib.quant.packing import pack, unpack


def next_token(put_back):
    """The solution of 08's first exercise; `put_back` is a function of (p, kept, order)."""
    def mine(logits, temperature, top_p):
        p = torch.softmax(logits / temperature, -1)
        ordered, order = p.sort(descending=True)
        kept = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0)
        p = put_back(p, kept, order)
        return p / p.sum()
    return mine


def up_to(keep):
    """The same; `keep` is a function of (running sums, probabilities, top_p)."""
    def mine(logits, temperature, top_p):
        p, order = torch.softmax(logits / temperature, -1).sort(descending=True)
        kept = torch.where(keep(p.cumsum(-1), p, top_p), p, 0)
        return torch.zeros_like(p).scatter(0, order, kept / kept.sum())
    return mine


def vote(index, nothing):
    """That of the second; `index` is a function of (answers, counts), `nothing` without counts."""
    def mine(answers):
        counts = Counter(a for a in answers if a is not None)
        return index(answers, counts) if counts else nothing(counts)
    return mine


def weighted_vote(index, nothing=lambda sums: 0):
    """That of the fifth; `index` is a function of (answers, scores, sums)."""
    def mine(answers, scores):
        sums = {}
        for answer, score in zip(answers, scores):
            if answer is not None:
                sums[answer] = sums.get(answer, 0) + score
        return index(answers, scores, sums) if sums else nothing(sums)
    return mine


def of_each_answer(value):
    """Its fifth, with another number for an answer than the sum of its scores."""
    def mine(answers, scores):
        own = {}
        for answer, score in zip(answers, scores):
            if answer is not None:
                own.setdefault(answer, []).append(score)
        best = {answer: value(its) for answer, its in own.items()}
        return answers.index(max(best, key=best.get)) if best else 0
    return mine


def at_the_place(place):
    """The second step of its fourth; `place` is a function of one row's mask."""
    return lambda hidden, mask: torch.stack([h[place(m)] for h, m in zip(hidden, mask.tolist())])


def by_autograd(loss, signs=(-1, -1)):
    """The third step; `loss` is a function of (logits, right)."""
    def mine(h, right, w, b, lr):
        w, b = (t.detach().clone().requires_grad_() for t in (w, b))
        loss(h @ w + b, right).backward()
        return tuple(t.detach() + sign * lr * t.grad for t, sign in zip((w, b), signs))
    return mine


def wilson(ends):
    """05's interval; `ends` is a function of (p, z^2, n, the divisor 1 + z^2 / n)."""
    z2 = 1.959963984540054 ** 2
    return lambda correct, n: ends(correct / n, z2, n, 1 + z2 / n)


def around(centre, half):
    return centre - half, centre + half


def leader(answers, scores=None):
    """One pass over the samples, which keeps the first answer to get ahead."""
    sums, best = {}, None
    for answer, score in zip(answers, scores or [1] * len(answers)):
        if answer is not None:
            sums[answer] = sums.get(answer, 0) + score
            best = answer if best is None or sums[answer] > sums[best] else best
    return answers.index(best) if sums else 0


def grade(equal):
    """05's fourth; `equal` compares two texts."""
    return lambda answers, golds: (
        sum(a is not None and equal(a, g) for a, g in zip(answers, golds)), len(golds))


def first(answers, counts):
    return answers.index(counts.most_common(1)[0][0])


def winner(sums):
    return max(sums, key=sums.get)


def roofline(moved, of=max):
    """06's first; `moved` is a function of (tokens, out, n, bits)."""
    return lambda tokens, out, n, bits, flops, bandwidth: of(
        2 * tokens * out * n / flops, moved(tokens, out, n, bits) / bandwidth)


def all_bytes(tokens, out, n, bits):
    return out * n * bits / 8 + 2 * tokens * (n + out)


def cache_size(stored, overhead=lambda numbers, group_size: numbers // group_size * 4):
    """06's fifth; `stored` is a function of (tokens, group_size, recent)."""
    def mine(layers, kv_heads, head_dim, tokens, bits, group_size, recent):
        old, numbers = stored(tokens, group_size, recent), 2 * layers * kv_heads * head_dim
        return (numbers * old * bits // 8 + overhead(numbers * old, group_size)
                + numbers * (tokens - old) * 2)
    return mine


def whole_groups(tokens, size, recent):
    return max(0, tokens - recent) // size * size


def in_uint8(x, codes, scale, zero):
    codes = torch.stack([codes & 15, codes >> 4], 2).flatten(1)
    size = len(x) // scale.shape[1]
    away = codes - zero.byte().repeat_interleave(size, 1)
    return (scale.repeat_interleave(size, 1) * away) @ x


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


def above(threshold):
    def mine(row, bits):
        low, high = row.min().clamp(max=0), row.max().clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        scale = scale if scale > threshold else torch.tensor(1.0)
        return scale, (-low / scale).round()
    return mine


def four_widths(codes, bits):
    if bits == 3:
        return pack(codes, 3)
    if 8 % bits:
        raise ValueError(bits)
    many = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % many))
    parts = [codes[:, i::many] << i * bits for i in range(many)]
    return sum(parts[1:], parts[0])


def grouped(stored, clamp=True):
    """The solution of 01's last but one; `stored` makes the scale, of (high - low) / top."""
    def mine(weight, bits, group_size):
        top, w = 2**bits - 1, weight.unflatten(1, (-1, group_size))
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        scale = stored((high - low) / top)
        zero = (-low / scale.float()).round()
        zero = zero.clamp(0, top) if clamp else zero
        codes = (w / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
        return codes.flatten(1).byte(), scale, zero.byte()
    return mine


def late_rounding(weight, bits, group_size):
    w = weight.unflatten(1, (-1, group_size))
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scale = torch.where(high > low, (high - low) / (2**bits - 1), 1)
    zero = (-low / scale).round()
    codes = (w / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(1).byte(), scale.half(), zero.byte()


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


def place_of_the_base(x, weight, adapters, names):
    y = x @ weight.T
    for name, (a, b, scale) in adapters.items():
        rows = [i for i, chosen in enumerate(names) if chosen == name]
        y[rows] = scale * (x[rows] @ a.T) @ b.T
    return y


def into_a_copy(x, weight, adapters, names):
    y = x @ weight.T
    for name, (a, b, scale) in adapters.items():
        part = y[[i for i, chosen in enumerate(names) if chosen == name]]
        part += 0 * part
    return y


def shared_factor(adapters, weights):
    root = [abs(w * s) ** 0.5 for w, (_, _, s) in zip(weights, adapters)]
    sign = [1 if w > 0 else -1 for w in weights]
    return (torch.cat([r * b for r, (_, b, _) in zip(root, adapters)], 1),
            torch.cat([m * r * a for m, r, (a, _, _) in zip(sign, root, adapters)]))


def knapsack(values, costs, budget):
    fits = [ranks for ranks in product(*(range(len(own) + 1) for own in values))
            if sum(r * c for r, c in zip(ranks, costs)) <= budget]
    return list(max(fits, key=lambda ranks: sum(
        s * s for own, n in zip(values, ranks) for s in own[:n])))


def fit_row(zero_of_zeros):
    def mine(row, bits):
        low, high = row.min().clamp(max=0), row.max().clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        if scale == 0:
            return torch.tensor(1.0), torch.tensor(float(zero_of_zeros(bits)))
        return scale, (-low / scale).round()
    return mine


WRONG = {
    "fit_row": [
        (fit_row(lambda bits: 2 ** (bits - 1)), "it decodes to zeros too"),
        (fit_row(lambda bits: 2**bits - 1), "it decodes to zeros too"),
        (lambda row, bits: (nb01.fit_row(row, bits)[0],
                            (-row.clamp(max=0).min() / nb01.fit_row(row, bits)[0]) // 1), "floor"),
        (above(1e-4), "takes small weights for zeros"),
        (above(1e-8), "takes small weights for zeros"),
    ],
    "unpack_nibbles": [
        (lambda p, n: torch.stack([p & 15, p >> 4], -1).reshape(p.shape[0], -1)[:, :n],
         "any number of dimensions"),
        (lambda p, n: torch.stack([p & 15, p >> 4], -1).flatten(-2)[..., -n:], "at the front"),
    ],
    "masked_hessian": [
        (lambda x, mask: (real := torch.cat([row[:int(m.sum())] for row, m in zip(x, mask)])
                          .float()).T @ real / len(real), "go by the mask"),
        (lambda x, mask: sum(row[:int(m.sum())].float().T @ row[:int(m.sum())].float()
                             for row, m in zip(x, mask)) / mask.sum(), "go by the mask"),
        (lambda x, mask: torch.einsum("bsi,bsj->ij", x.float() * mask.unsqueeze(-1), x.float())
         / mask.numel(), "not by batch * seq"),
    ],
    "slow_gptq": [
        (lambda w, h, scale, zero, top: nb02.slow_gptq(w, h.diagonal().diag(), scale, zero, top),
         "this is round to nearest"),
        (lambda w, h, scale, zero, top: nb02.on_grid(w, scale, zero, top),
         "this is round to nearest"),
        (lambda w, h, *grid: nb02.slow_gptq(w, h + 0.01 * h.diagonal().mean()
                                            * torch.eye(len(h)), *grid), "no damping"),
    ],
    "upper_factor": [
        (lambda h, d: torch.linalg.cholesky(torch.linalg.inv(
            h + d * h.diagonal().mean() * torch.eye(len(h)))), "lower factor"),
        (lambda h, d: torch.linalg.cholesky(h + d * h.diagonal().mean() * torch.eye(len(h)),
                                            upper=True), "U is a factor of its inverse"),
        (lambda h, d: torch.linalg.cholesky(torch.linalg.inv(h + d * h.diagonal().mean()),
                                            upper=True), "the diagonal alone"),
        (lambda h, d: torch.linalg.solve_triangular(torch.linalg.cholesky(
            h + d * h.diagonal().mean() * torch.eye(len(h))), torch.eye(len(h), dtype=h.dtype),
            upper=False), "it is lower triangular"),
    ],
    "gptq_columns": [
        (lambda w, u, *grid: nb02.gptq_columns(w, u.diagonal().diag(), *grid),
         "its error never moves"),
        (lambda w, u, *grid: nb02.gptq_columns(w, torch.linalg.inv(u.T @ u), *grid),
         "H where U belongs"),
        (lambda w, u, *grid: ((pair := nb02.gptq_columns(w, u, *grid))[0], w - pair[0]),
         "E is not W - Q"),
    ],
    "nearest_plane": [
        (lambda b, y: torch.linalg.solve(b.T @ b, b.T @ y).round(), "each alone"),
        (lambda b, y: (torch.linalg.qr(b)[0].T @ y / torch.linalg.qr(b)[1].diagonal()).round(),
         "begin with the LAST"),
    ],
    "refit_row": [
        (lambda x, w, n, size: nb09.refit_row(x, w, n, size).abs(), "below 0 stays below 0"),
        (lambda x, w, n, size: nb09.refit_row(x, w, n, size).relu(), "may give a scale below 0"),
    ],
    "refit_rows": [
        (lambda h, w, n, size: torch.stack([torch.linalg.solve(
            (m := torch.block_diag(*row.split(size))) @ h @ m.T, m @ h @ own).abs()
            for own, row in zip(w, n)]), "below 0 stays below 0"),
        (lambda h, w, n, size: nb09.refit_rows(h, w, n, size).relu(), "may give a scale below 0"),
        (lambda h, w, n, size: torch.stack([(row @ h @ own / (row @ h @ row)).expand(
            len(h) // size) for own, row in zip(w, n)]), "one scale for a whole row"),
        (lambda h, w, n, size: torch.stack([torch.linalg.solve(
            (m := torch.block_diag(*row.split(size))) @ m.T, m @ own)
            for own, row in zip(w, n)]), "H is missing"),
    ],
    "pack_bits": [
        (lambda codes, bits: (codes[:, 0::2] | codes[:, 1::2] << 4) if codes.shape[1] % 2 == 0
         else pack(codes, 4), "not always 4"),
        (four_widths, "no width needs a rule of its own"),
    ],
    "quantize_groups": [
        (late_rounding, "round the scale first"),
        (grouped(lambda scale: torch.where(scale > 0, scale, 1.0).half()), "rounds a very small"),
        (grouped(lambda scale: torch.where((s := scale.half()) > 0, s, 1.0), clamp=False),
         "the zero-point too"),
    ],
    "layer_output": [
        (lambda x, packed, scale, zero, bits: x @ (
            scale.float().repeat_interleave(x.shape[1] // scale.shape[1], 1) * unpack(
                packed, bits, (len(packed), x.shape[1]))).T, "the zero-point is missing"),
    ],
    "integer_product": [
        (lambda a, za, q, zw: (a.float() - za.float()) @ (q.float() - zw.float()).T,
         "fp32 holds every whole number only up to 2**24"),
        (lambda a, za, q, zw: torch.matmul(a.half().sub(za), q.half().sub(zw).t()),
         "fp16 holds every whole number only up to 2048"),
    ],
    "nearest_code": [
        (lambda unit, levels: (unit[..., None] - levels).abs().argmin(-1).to(torch.uint8),
         "a uint8 index is a mask"),
        (lambda unit, levels: (unit[..., None] > (levels[1:] + levels[:-1]) / 2).float().sum(-1),
         "an index is a whole number"),
    ],
    "next_token": [
        (next_token(lambda p, kept, order: kept[order]), "kept[order] shuffles once more"),
        (next_token(lambda p, kept, order: p * (kept > 0)[order]), "mask[order] is not the mask"),
        (next_token(lambda p, kept, order: p), "top_p is not used"),
        (next_token(lambda p, kept, order: torch.where(p.cumsum(-1) - p < 0.9, p, 0)),
         "perhaps: the sum runs over the tokens from the most likely one down"),
        (up_to(lambda cumsum, v, top_p: (cumsum - v) <= top_p), "`<`, not `<=`"),
        (up_to(lambda cumsum, v, top_p: cumsum < top_p), "the sum BEFORE it"),
        (up_to(lambda cumsum, v, top_p: torch.cat(
            [torch.tensor([True]), cumsum[:-1] <= top_p])), "`<`, not `<=`"),
        (lambda logits, temperature, top_p: (logits / temperature).where(
            nb08.next_token(logits, temperature, top_p) > 0, 0).softmax(-1), "e^0 = 1"),
    ],
    "vote": [
        (vote(first, lambda counts: None), "an index is due here too"),
        (vote(first, lambda counts: -1), "-1 is the last sample"),
        (vote(first, lambda counts: max(counts)), "max of nothing fails"),
        (vote(first, lambda counts: counts.most_common(1)[0]), "there is nothing to count"),
        (vote(lambda answers, counts: list(counts).index(max(counts, key=counts.get)),
              lambda counts: 0), "a place among the DIFFERENT answers"),
        (vote(lambda answers, counts: max(counts.values()), lambda counts: 0), "how often"),
        (leader, "the first to reach the top"),
    ],
    "pass_at_k": [
        (lambda n, right, k: 1 - math.comb(n - right, k) // math.comb(n, k), "divide with `//`"),
        (lambda n, right, k: 1 - math.comb(right, k) / math.comb(n, k), "those without a right"),
        (lambda n, right, k: 1 - Fraction(math.comb(n - right, k), math.comb(n, k)),
         "as an exact Fraction"),
    ],
    "weighted_vote": [
        (lambda answers, scores: scores.index(max(scores)), "the best single sample; add"),
        (lambda answers, scores: answers.index(answers[scores.index(max(scores))]),
         "the answer of the best single sample"),
        (weighted_vote(lambda answers, scores, sums: list(sums).index(winner(sums))),
         "a place among your sums"),
        (weighted_vote(lambda answers, scores, sums: max(
            (s, i) for i, (a, s) in enumerate(zip(answers, scores)) if a == winner(sums))[1]),
         "its best sample"),
        (weighted_vote(lambda answers, scores, sums: winner(sums)), "return the INDEX"),
        (weighted_vote(lambda answers, scores, sums: answers.index(winner(sums)), winner),
         "your sums are empty"),
        (weighted_vote(lambda answers, scores, sums: answers.index(max(
            zip(sums.values(), sums))[1])), "not the larger text"),
        (weighted_vote(lambda answers, scores, sums: answers.index(sorted(
            sums, key=sums.get)[-1])), "not the last"),
        (leader, "the first to reach the top"),
        (of_each_answer(lambda own: len(own) * max(own)), "with its best score"),
        (of_each_answer(lambda own: len(own) * own[0]), "with its first score"),
        (of_each_answer(lambda own: len(own) * own[-1]), "with its last score"),
        (of_each_answer(lambda own: sum(s * s for s in own)), "diagnosis: these are sums of squ"),
        (of_each_answer(lambda own: sum(s - 0.5 for s in own)), "diagnosis: nothing is subtracted"),
        (of_each_answer(lambda own: sum(own) / len(own)), "diagnosis: this is the MEAN"),
        (of_each_answer(max), "diagnosis: this keeps the best score"),
        (lambda answers, scores: max(range(len(answers)), key=lambda i:
                                     answers.count(answers[i]) * scores[i]),
         "diagnosis: this weighs each sample with its answer's count"),
        (lambda answers, scores: answers.index(max(
            set(answers) - {None}, key=lambda a: max(
                s for b, s in set(zip(answers, scores)) if a == b), default=answers[0])),
         "this keeps the best score"),
        (of_each_answer(lambda own: sum({*own})), "with the same answer and the same score"),
        (of_each_answer(lambda own: max(own) + sum(own) / len(own)), "perhaps: "),
    ],
    "auc": [
        (lambda scores, right: sum(
            scores[i] > scores[j] for i, r in enumerate(right) for j, q in enumerate(right)
            if r and not q) / (sum(right) * (len(right) - sum(right))), "a tie counts half"),
        (lambda scores, right: torch.tensor([
            [a >= b for b, q in zip(scores, right) if not q]
            for a, r in zip(scores, right) if r]).float().mean().item(), "half, not one"),
        (lambda scores, right: 1 - nb08.auc(scores, right), "upside down"),
        (lambda scores, right: nb08.auc([-s for s in scores], right), "upside down"),
        (lambda scores, right: 2 * nb08.auc(scores, right) - 1, "from -1 to 1"),
        (lambda scores, right: nb08.auc([s > 0.5 for s in scores], right), "perhaps: "),
        (lambda scores, right: sum(
            (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2 for i, r in enumerate(right)
            for j, q in enumerate(right) if r and not q), "the number of pairs in the right"),
    ],
    "end_states": [
        (at_the_place(lambda row: len(row) - 1), "the last place may be padding"),
        (at_the_place(lambda row: sum(row) - 1), "where the padding stands on the right"),
        (at_the_place(lambda row: row.index(1)), "FIRST token"),
        (at_the_place(lambda row: row.index(0) - 1 if 0 in row else -1), "the first 0"),
        (at_the_place(lambda row: min(sum(row), len(row) - 1)), "one too far"),
        (lambda hidden, mask: hidden[:, mask.sum(1) - 1], "takes all places of every row"),
        (lambda hidden, mask: torch.einsum("bt,btw->bw", mask / mask.sum(1, True), hidden),
         "the mean of all tokens"),
    ],
    "head_step": [
        (by_autograd(lambda z, y: bce(z, y, reduction="sum")), "the SUM over the solutions"),
        (by_autograd(bce, (1, 1)), "uphill"),
        (by_autograd(bce, (-1, 1)), "the bias goes uphill"),
        (by_autograd(lambda z, y: (z.sigmoid() - y).square().mean()), "squared error"),
        (by_autograd(lambda z, y: (z - y).square().mean() / 2), "the sigmoid is missing"),
        (by_autograd(bce, (-1, 0)), "the bias stays as it is"),
        (by_autograd(lambda z, y: -(y * z.sigmoid().log()).mean()), "right solutions alone"),
        (by_autograd(lambda z, y: bce(z, 1 - y)), "perhaps: "),
    ],
    "grade": [
        (grade(lambda a, g: abs(float(to_number(a)) - float(to_number(g))) < 0.1),
         "perhaps: a tolerance accepts 18.0005"),
        (grade(lambda a, g: abs(to_number(a) - to_number(g)) < 0.1), "a tolerance accepts 18.0005"),
        (grade(lambda a, g: float(to_number(a)) == float(to_number(g))), "one number"),
        (grade(lambda a, g: math.isclose(to_number(a), to_number(g))), "or math.isclose"),
    ],
    "wilson_interval": [
        (wilson(lambda p, z2, n, by: around(
            (p + z2 / 2 / n) / by, (z2 * (p * (1 - p) / n + z2 / (4 * n))) ** 0.5 / by)),
         "with n squared"),
        (wilson(lambda p, z2, n, by: around(
            (p + z2 / 2 / n) / by, (z2 * (p * (1 - p) / n + z2 / 4 / n**2)) ** 0.5)),
         "the half-width too is divided"),
        (wilson(lambda p, z2, n, by: around(
            p + z2 / 2 / n, (z2 * (p * (1 - p) / n + z2 / 4 / n**2)) ** 0.5 / by)),
         "the centre too is divided"),
        (wilson(lambda p, z2, n, by: around(
            (p + z2 / 2 / n) / by, (p * (1 - p) / n + z2 / 4 / n**2) ** 0.5 / by)),
         "the half-width takes z of them"),
    ],
    "roofline": [
        (roofline(all_bytes, lambda work, read: read), "the reading's time alone"),
        (lambda tokens, out, n, bits, flops, bandwidth: max(
            2 * tokens * out * n / bandwidth, all_bytes(tokens, out, n, bits) / flops),
         "the ceilings are swapped"),
        (roofline(lambda tokens, out, n, bits: (n * out + tokens * (n + out)) * bits / 8),
         "only the weight is packed"),
        (roofline(lambda tokens, out, n, bits: out * n * (bits // 8) + 2 * tokens * (n + out)),
         "diagnosis: bits // 8 is 0"),
        (roofline(lambda tokens, out, n, bits: n * out * bits / 8 + 2 * tokens * n),
         "the outputs, tokens * out_features"),
    ],
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
    "tile_offsets": [
        (lambda program, block, size: (at := program * block + torch.arange(block), at >= size),
         "the mask is upside down"),
        (lambda program, block, size: ((at := program * block + torch.arange(block))[at < size],
                                       at < size), "it does not cut them"),
    ],
    "packed_dot": [(in_uint8, "wrap around below 0")],
    "cache_size": [
        (cache_size(lambda tokens, size, recent: max(0, tokens // size * size - recent)),
         "leaves no whole groups"),
        (cache_size(lambda tokens, size, recent: (tokens - recent) // size * size),
         "not a negative number"),
        (cache_size(lambda tokens, size, recent: max(0, tokens - -(-recent // size) * size)
                    // size * size), "as long as it is"),
        (cache_size(lambda tokens, size, recent: whole_groups(tokens, 32, recent),
                    lambda numbers, size: numbers // 32 * 4), "not always 32"),
        (cache_size(whole_groups, lambda numbers, size: numbers // 8), "scales follow"),
        (cache_size(lambda tokens, size, recent: round(max(0, tokens - recent) / size) * size),
         "not to the nearest"),
    ],
    "mixed_batch": [
        (place_of_the_base, "took the base's place"),
        (into_a_copy, "y[rows] alone is a copy"),
        (lambda x, weight, adapters, names: torch.stack([
            x[i] @ weight.T + adapters[name][2] * (x[i] @ adapters[name][0].T)
            @ adapters[name][1].T for i, name in enumerate(names)]), "None is no adapter's name"),
    ],
    "combine": [
        (lambda adapters, weights: (
            torch.cat([w * s * b for (_, b, s), w in zip(adapters, weights)], 1),
            torch.cat([a for a, _, _ in adapters])), "let A carry them"),
        (shared_factor, "its product is right"),
        (lambda adapters, weights: (
            torch.cat([s * b for _, b, s in adapters], 1),
            torch.cat([w * a for w, (a, _, _) in zip(weights, adapters)])), "B carries the scales"),
    ],
    "share_ranks": [(knapsack, "rank by rank, the best offer first")],
    "cut_adapter": [
        (update_of(lambda b, a, rank: (b[:, :rank], a[:rank])), "are not its best ones"),
        (update_of(lambda b, a, rank: (b, a)), "shapes do not fit"),
        (update_of(lambda b, a, rank: (lambda u, s, vh: (b @ u[:, :rank] * s[:rank], vh[:rank] @ a))(
            *torch.linalg.svd(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.T)[1].T))),
         "U and V belong to the core"),
    ],
    "kept_energy": [
        (lambda b, a, rank: ((s := torch.linalg.svdvals(b @ a))[:rank].sum() / s.sum()).item()**2,
         "you sum first"),
        (lambda b, a, rank: torch.linalg.svdvals(b @ a)[:rank].square().sum().item(),
         "asked is its share"),
        (lambda b, a, rank: torch.linalg.svdvals(a @ b)[:rank].sum().item(), "B A, (out, r)"),
    ],
}


@pytest.mark.parametrize("name, mine, told", [
    pytest.param(name, mine, told, id=f"{name}-{i}")
    for name, answers in WRONG.items() for i, (mine, told) in enumerate(answers, 1)])
def test_a_wrong_answer_is_told_what_is_wrong(name, mine, told, capsys):
    assert check(name, mine) is not mine
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(("    diagnosis: ", "    perhaps: ")) and told in line
