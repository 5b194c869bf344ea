"""The exercises of notebook 13: its faulty functions are refused, right ones in other words are
taken, plausible wrong ones are not, and the references mean what the library does."""

import re

import pytest
import torch

from course.kit import check
from course.kit.exercise import registered
from course.nb13 import exercises as nb13
from course.tools.normal_form import NOTEBOOKS, definitions, exercises, read
from qlora_lib.data.tokens import Example, collate, encode_prompt
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec

BOOK = read(NOTEBOOKS / "13_museum_of_bugs.ipynb")
NAMES = [name for _, name, _ in exercises(BOOK)]


@pytest.fixture(scope="module")
def shown():
    """What the notebook defines: the faulty functions and the tests that they fail."""
    names = {}
    exec(definitions(BOOK), names)
    return names


@pytest.mark.parametrize("name", NAMES)
def test_the_fault_that_the_notebook_shows_is_refused_and_diagnosed(name, shown, capsys):
    fault, exercise = shown[f"faulty_{name}"], registered()[name]
    assert check(name, fault) is exercise.reference
    assert f"    diagnosis: {exercise.mistakes[0][1]}\n" in capsys.readouterr().out


def test_there_are_twelve_rooms_each_with_its_report():
    words = "\n".join(c.source for c in BOOK.cells if c.cell_type == "markdown")
    rooms = re.split(r"^## \d+\. ", words, flags=re.M)[1:]
    assert len(rooms) == len(NAMES) == 12
    for room in rooms:
        report = r"^\*\*Reports?:\*\* .*https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+"
        assert re.search(report, room, re.M), room[:40]


# --- Right, in other words ---------------------------------------------------------------------


def zeros_one_by_one(words):
    rows = [[((int(w) & 0xFFFFFFFF) // 16**i + 1) % 16 for w in row for i in range(8)]
            for row in words]  # fmt: skip
    return torch.tensor(rows)


def zeros_by_bytes(words):
    pairs = words.contiguous().view(torch.uint8)
    return (torch.stack([pairs & 15, pairs >> 4], -1).flatten(1) + 1) % 16


def zeros_with_numpy(words):
    stored = (words.numpy()[..., None] >> (4 * torch.arange(8)).numpy()) & 15
    return torch.from_numpy((stored.reshape(len(words), -1) + 1) & 15)


def order_by_groups(codes, g_idx):
    order = torch.cat([(g_idx == group).nonzero()[:, 0] for group in range(int(g_idx.max()) + 1)])
    return codes.index_select(0, order), order


def order_in_python(codes, g_idx):
    order = sorted(range(len(g_idx)), key=g_idx.tolist().__getitem__)
    return codes[order], torch.tensor(order)


def gptq_without_blocks(weight, factor, step, block):
    w = weight.clone()
    for j in range(w.shape[1]):
        q = step * (w[:, j] / step).round()
        w[:, j + 1 :] -= torch.outer((w[:, j] - q) / factor[j, j], factor[j, j + 1 :])
        w[:, j] = q
    return w


def gptq_with_a_global_buffer(weight, factor, step, block):
    w, errors = weight.clone(), torch.zeros_like(weight)
    for j in range(w.shape[1]):
        end = (j // block + 1) * block
        q = torch.round(w[:, j] / step) * step
        errors[:, j] = (w[:, j] - q) / factor[j, j]
        w[:, j:end] -= errors[:, j : j + 1] @ factor[j : j + 1, j:end]
        w[:, j] = q
        if j + 1 == end:
            w[:, end:] -= errors[:, end - block : end] @ factor[end - block : end, end:]
    return w


def gptq_in_fp64(weight, factor, step, block):
    return gptq_without_blocks(weight.double(), factor.double(), step, block).float()


def gptq_that_looks_back(weight, factor, step, block):
    """Each column takes what it owes to those before it when its turn comes."""
    w, errors = weight.clone(), []
    for j in range(w.shape[1]):
        for i, e in enumerate(errors):
            w[:, j] -= e * factor[i, j]
        q = step * torch.round(w[:, j] / step)
        errors.append((w[:, j] - q) / factor[j, j])
        w[:, j] = q
    return w


def loss_with_autograd(w, micro):
    w = w.detach().clone().requires_grad_()
    tokens = sum(y.numel() for _, y in micro)
    for x, y in micro:
        ((x @ w - y).square().sum() / tokens).backward()
    return w.grad


def weighted_means(w, micro):
    n, grad = sum(len(y) for _, y in micro), 0
    for x, y in micro:
        if len(y):
            grad = grad + len(y) / n * (2 * x.T @ (x @ w - y) / len(y))
    return grad


def running_mean(w, micro):
    seen, grad = 0, torch.zeros_like(w)
    for x, y in micro:
        if len(y):
            mean = 2 * ((x @ w - y)[:, None] * x).mean(0)
            grad = (seen * grad + len(y) * mean) / (seen + len(y))
            seen += len(y)
    return grad


def all_at_once(w, micro):
    x, y = (torch.cat(parts) for parts in zip(*micro))
    return 2 * x.T @ (x @ w - y) / len(y)


def labels_in_a_loop(ids, mask, eos):
    return torch.tensor([[i if m else -100 for i, m in zip(*rows)]
                         for rows in zip(ids.tolist(), mask.tolist())])  # fmt: skip


def labels_on_a_copy(ids, mask, eos):
    labels = ids.clone()
    labels[~mask.bool()] = -100
    return labels


def softmax_by_hand(scores, real):
    seq = real.shape[1]
    seen = (torch.arange(seq)[:, None] >= torch.arange(seq)) & real[:, None]
    scores = torch.where(seen, scores.float(), -1e30)
    e = (scores - scores.amax(-1, keepdim=True)).exp() * seen
    return e / e.sum(-1, keepdim=True).clamp(min=1e-30)


def softmax_row_by_row(scores, real):
    weights = torch.zeros(scores.shape)
    for b, keys in enumerate(real):
        for q in range(scores.shape[1]):
            seen = keys[: q + 1].nonzero()[:, 0]
            if len(seen):
                weights[b, q, seen] = scores[b, q, seen].float().softmax(0)
    return weights


def softmax_without_nan(scores, real):
    hidden = ~real[:, None] | torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.float().masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)


def prompt_put_in_front(tokenizer, text):
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if tokenizer.bos_token_id is not None and (not ids or ids[0] != tokenizer.bos_token_id):
        ids.insert(0, tokenizer.bos_token_id)
    return ids


def one_of_two_bos(tokenizer, text):
    ids, bos = tokenizer.encode(text), tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def one_way_or_the_other(tokenizer, text):
    plain = tokenizer.encode(text, add_special_tokens=False)
    return plain if plain[:1] == [tokenizer.bos_token_id] else tokenizer.encode(text)


def positions_in_a_loop(mask, past):
    rows = []
    for row in mask.tolist():
        at, counted = 0, []
        for real in row:
            counted.append(at if real else 0)
            at += real
        rows.append(counted[past:])
    return torch.tensor(rows)


def positions_by_what_stands_before(mask, past):
    before = mask.cumsum(1) - mask
    return before.masked_fill(mask == 0, 0)[:, past:]


def positions_from_the_cache(mask, past):
    cached, new = mask[:, :past].sum(1, keepdim=True), mask[:, past:]
    return (cached + new.cumsum(1) - 1) * new


def positions_clamped(mask, past):
    return torch.where(mask > 0, mask.cumsum(1) - 1, 0).narrow(1, past, mask.shape[1] - past)


def answer_with_match(prompt, sequence):
    said = sequence.removeprefix(prompt).partition("Question:")[0]
    found = re.match(r".*?#### *(-?[\d,]+)", said, re.S)
    return found.group(1).replace(",", "") if found else ""


def answer_by_splitting(prompt, sequence):
    said = sequence[len(prompt) :]
    said = said[: said.index("Question:")] if "Question:" in said else said
    _, mark, rest = said.partition("####")
    digits = rest.split()[0].strip(".").replace(",", "") if mark and rest.split() else ""
    return digits


def answer_line_by_line(prompt, sequence):
    for line in sequence[len(prompt) :].split("\n"):
        if line.lstrip().startswith("Question:"):
            return ""
        if found := re.search(r"####\s*(-?\d[\d,]*)", line):
            return "".join(found[1].split(","))
    return ""


RIGHT = {
    "v1_zeros": [
        zeros_one_by_one, zeros_by_bytes, zeros_with_numpy,
        lambda words: (words.unsqueeze(-1).bitwise_right_shift(4 * torch.arange(8)) % 16 + 1)
        .remainder(16).reshape(len(words), -1).to(torch.uint8),
        lambda words: torch.cat([((word[:, None] >> torch.arange(0, 32, 4)) + 1) & 15
                                 for word in words.unbind(1)], 1),
    ],
    "sort_by_group": [
        order_by_groups, order_in_python,
        lambda codes, g_idx: (codes[(at := torch.sort(g_idx, stable=True).indices)], at),
        lambda codes, g_idx: [codes[(at := (g_idx * 1000 + torch.arange(len(g_idx))).argsort())],
                              at.int()],
        lambda codes, g_idx: (codes.gather(0, (at := g_idx.argsort(stable=True))[:, None].expand(
            codes.shape)), at),
    ],
    "gptq_blocks": [
        gptq_without_blocks, gptq_with_a_global_buffer, gptq_in_fp64, gptq_that_looks_back,
        lambda weight, factor, step, block: nb13.gptq_blocks(weight, factor, step, 1),
    ],
    "set_merged": [
        lambda weight, merged, delta, on: (weight + (int(on) - int(merged)) * delta, on),
        lambda weight, merged, delta, on: ((weight - delta if merged else weight)
                                           + (delta if on else 0), on),
        lambda weight, merged, delta, on: [weight + delta, True] if on > merged else
        [weight - delta, False] if merged > on else [weight, on],
        lambda weight, merged, delta, on: (weight.clone() if on is merged else
                                           torch.add(weight, delta, alpha=1 if on else -1), on),
        lambda weight, merged, delta, on: (torch.tensor([1.0, on - merged]) @ torch.stack(
            [weight, delta], 1), on),
    ],
    "merge_head": [
        lambda embed, head, delta: (embed, head if delta is None else head.add(delta),
                                    delta is None and embed is head),
        lambda embed, head, delta: (embed, head, embed is head) if delta is None else
        (embed.clone(), head.clone() + delta, False),
        lambda embed, head, delta: (embed, (own := head if delta is None else head + delta),
                                    own is embed),
        lambda embed, head, delta: (embed, (own := head if delta is None else head + delta),
                                    own.data_ptr() == embed.data_ptr()),
        lambda embed, head, delta: [embed, head + (0 if delta is None else delta),
                                    delta is None and embed.data_ptr() == head.data_ptr()],
    ],
    "names_to_save": [
        lambda trained, base: sorted(n for n in trained if n not in base
                                     or trained[n].shape != base[n].shape
                                     or bool((trained[n] != base[n]).any())),
        lambda trained, base: sorted(set(trained) - {n for n in base
                                                     if torch.equal(base[n], trained[n])}),
        lambda trained, base: [n for n in sorted(trained)
                               if trained[n].tolist() != (base[n].tolist() if n in base else None)],
        lambda trained, base: tuple(sorted(filter(lambda n: not torch.equal(
            trained[n], base.get(n, torch.empty(0))), trained))),
        lambda trained, base: sorted(n for n, t in trained.items()
                                     if n not in base or t.numpy().tobytes()
                                     != base[n].numpy().tobytes()),
    ],
    "labels_of": [
        labels_in_a_loop, labels_on_a_copy,
        lambda ids, mask, eos: torch.where(mask.bool(), ids, -100),
        lambda ids, mask, eos: ids * mask - 100 * (1 - mask),
        lambda ids, mask, eos: ids.where(mask != 0, torch.tensor(-100)),
    ],
    "accumulate": [loss_with_autograd, weighted_means, running_mean, all_at_once,
                   lambda w, micro: sum(2 * (x @ w - y) @ x for x, y in micro)
                   / sum(len(x) for x, _ in micro)],
    "attention_weights": [
        softmax_by_hand, softmax_row_by_row, softmax_without_nan,
        lambda scores, real: softmax_without_nan(scores.double(), real),
        lambda scores, real: torch.where(
            nb13._allowed(real), scores.float().masked_fill(
                ~nb13._allowed(real), torch.finfo(torch.float32).min).softmax(-1), 0),
    ],
    "prompt_ids": [
        prompt_put_in_front, one_of_two_bos, one_way_or_the_other,
        lambda tokenizer, text: tuple(nb13.prompt_ids(tokenizer, text)),
        encode_prompt,
    ],
    "positions": [
        positions_in_a_loop, positions_by_what_stands_before, positions_from_the_cache,
        positions_clamped,
        lambda mask, past: ((mask.cumsum(-1) - 1) * mask).split([past, mask.shape[1] - past], 1)[1],
    ],
    "answer_of": [
        answer_with_match, answer_by_splitting, answer_line_by_line,
        lambda prompt, sequence: next(iter(re.findall(
            r"#### *(-?\d[\d,]*)", re.split("Question:", sequence[len(prompt):])[0])), ""
        ).replace(",", ""),
        lambda prompt, sequence: re.sub(
            ",", "", (re.search(r"####\s*([-\d,]+)", sequence[len(prompt):].split("Question:")[0])
                      or ("", ""))[1]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name, mine", [
    pytest.param(name, mine, id=f"{name}-{i}")
    for name, answers in RIGHT.items() for i, mine in enumerate(answers, 1)])  # fmt: skip
def test_a_right_answer_in_other_words_is_taken(name, mine, capsys):
    assert check(name, mine) is mine, capsys.readouterr().out


def test_each_exercise_has_five_of_them():
    assert sorted(RIGHT) == sorted(NAMES) and min(map(len, RIGHT.values())) >= 5


# --- Wrong, beyond the registered mistakes -------------------------------------------------------


def gptq_error_of_the_moved_column(weight, factor, step, block):
    """The column is overwritten before its error is taken."""
    w = weight.clone()
    for j in range(w.shape[1]):
        w[:, j] = step * (w[:, j] / step).round()
        e = (w[:, j] - step * (w[:, j] / step).round()) / factor[j, j]
        w[:, j:] -= torch.outer(e, factor[j, j:])
    return w


WRONG = {
    "v1_zeros": [
        lambda words: (nb13._nibbles(words) + 1) % 15,
        lambda words: nb13._nibbles(words - 0x11111111),
        lambda words: (nb13._nibbles(words) + 1).where(nb13._nibbles(words) > 0, 0),
        lambda words: nb13.v1_zeros(words).flip(1),
        lambda words: nb13.v1_zeros(words).float() / 15,
        lambda words: nb13.v1_zeros(words.flip(1)),
        lambda words: nb13.v1_zeros(words).T,
        lambda words: nb13.v1_zeros(words).float(),
        lambda words: (nb13._nibbles(words) | 1) & 15,
        lambda words: nb13._nibbles(words) ^ 15,
    ],
    "sort_by_group": [
        lambda codes, g_idx: (codes[g_idx.argsort(stable=True)], g_idx),
        lambda codes, g_idx: (codes.sort(0).values, g_idx.argsort(stable=True)),
        lambda codes, g_idx: codes[g_idx.argsort(stable=True)],
        lambda codes, g_idx: (g_idx.argsort(stable=True), codes[g_idx.argsort(stable=True)]),
        lambda codes, g_idx: (codes.flip(0), torch.arange(len(codes)).flip(0)),
        lambda codes, g_idx: (codes[g_idx.sort().values], g_idx.sort().values),
        lambda codes, g_idx: (codes[g_idx.argsort(stable=True)].T, g_idx.argsort(stable=True)),
        lambda codes, g_idx: (codes[torch.unique(g_idx)], torch.unique(g_idx)),
        lambda codes, g_idx: (codes[g_idx.argsort(stable=True)].float(),
                              g_idx.argsort(stable=True)),
        lambda codes, g_idx: (codes.roll(1, 0), torch.arange(len(codes)).roll(1)),
    ],
    "gptq_blocks": [
        gptq_error_of_the_moved_column,
        nb13._blocks(divisor=lambda factor, j, start: factor[j, j] ** 0.5),
        nb13._blocks(divisor=lambda factor, j, start: 1 / factor[j, j]),
        nb13._blocks(rows=lambda start, end: slice(end - 1, end)),
        nb13._blocks(row=lambda j, start: 0),
        nb13._blocks(spill=lambda j, end, n: end - 1),
        nb13._blocks(spill=lambda j, end, n: j + 2),
        lambda weight, factor, step, block: nb13.gptq_blocks(weight, factor.T, step, block),
        lambda weight, factor, step, block: nb13.gptq_blocks(weight, factor, 2 * step, block),
        lambda weight, factor, step, block: nb13.gptq_blocks(weight, factor, step, block) / step,
        lambda weight, factor, step, block: nb13.gptq_blocks(weight.flip(1), factor, step, block),
        lambda weight, factor, step, block: nb13.gptq_blocks(weight, factor, step, block).clamp(
            -8 * step, 8 * step),
    ],
    "set_merged": [
        lambda weight, merged, delta, on: (weight, on),
        lambda weight, merged, delta, on: (weight + delta, on),
        lambda weight, merged, delta, on: (weight + delta * on, on),
        lambda weight, merged, delta, on: (weight if merged else weight + delta, on),
        lambda weight, merged, delta, on: (weight - delta if merged else weight, on),
        lambda weight, merged, delta, on: nb13.set_merged(weight, not merged, delta, on),
        lambda weight, merged, delta, on: nb13.set_merged(weight, merged, delta, not on),
        lambda weight, merged, delta, on: nb13.set_merged(weight, merged, delta, on)[0],
        lambda weight, merged, delta, on: (nb13.set_merged(weight, merged, delta, on)[0], int(on)),
        lambda weight, merged, delta, on: (nb13.set_merged(weight, merged, delta, on)[0], not on),
    ],
    "merge_head": [
        lambda embed, head, delta: (embed, head, embed is head),
        lambda embed, head, delta: (embed, head if delta is None else head + 2 * delta,
                                    delta is None and embed is head),
        lambda embed, head, delta: nb13.merge_head(embed, head, delta)[:2],
        lambda embed, head, delta: (embed, head if delta is None else embed + delta,
                                    delta is None and embed is head),
        lambda embed, head, delta: (head if delta is None else head + delta, embed,
                                    delta is None and embed is head),
        lambda embed, head, delta: (embed, head if delta is None else head + delta, True),
        lambda embed, head, delta: (embed, head if delta is None else head + delta,
                                    delta is not None),
        lambda embed, head, delta: (embed, head if delta is None else head @ delta.T,
                                    delta is None and embed is head),
        lambda embed, head, delta: (embed, head if delta is None else head * delta,
                                    delta is None and embed is head),
        lambda embed, head, delta: (embed, head, True) if delta is None else
        (embed, head + delta, embed is head),
    ],
    "names_to_save": [
        lambda trained, base: sorted(n for n in trained if n in base),
        lambda trained, base: sorted(n for n in trained if "lora" in n or "embed" in n),
        lambda trained, base: sorted(n for n in trained if len(trained[n]) not in map(
            len, base.values())),
        lambda trained, base: sorted(n for n in trained if n not in base
                                     or len(trained[n]) > len(base[n])),
        lambda trained, base: sorted((n for n in trained if n not in base
                                      or not torch.equal(trained[n], base[n])), reverse=True),
        lambda trained, base: sorted(n for n in trained if n not in base or trained[n].sum()
                                     .half() != base[n].sum().half()),
        lambda trained, base: {n for n in trained if n not in base
                               or not torch.equal(trained[n], base[n])},
        lambda trained, base: {n: trained[n] for n in nb13.names_to_save(trained, base)},
        lambda trained, base: sorted(n for n in trained if n.endswith("weight")),
        lambda trained, base: sorted(n for n in trained if n not in base
                                     or trained[n].sum() != base[n].sum()),
        lambda trained, base: sorted(n for n in trained if n not in base
                                     or trained[n].norm() != base[n].norm()),
        lambda trained, base: sorted(n for n in trained if n not in base
                                     or sorted(trained[n].flatten().tolist())
                                     != sorted(base[n].flatten().tolist())),
        lambda trained, base: sorted(n for n in trained if n not in base or trained[n].mean()
                                     != base[n].mean())[:2],
    ],
    "labels_of": [
        lambda ids, mask, eos: ids.masked_fill(ids == 0, -100),
        lambda ids, mask, eos: ids.masked_fill(mask == 0, 100),
        lambda ids, mask, eos: ids.masked_fill(mask == 0, eos),
        lambda ids, mask, eos: ids.masked_fill(mask == 0, -1),
        lambda ids, mask, eos: ids.masked_fill(mask == 0, -100).roll(-1, 1),
        lambda ids, mask, eos: ids.masked_fill((ids == eos) & (ids.roll(-1, 1) == eos), -100),
        lambda ids, mask, eos: ids.masked_fill((ids == eos) & (ids.roll(1, 1) == eos), -100),
        lambda ids, mask, eos: mask.masked_fill(mask == 0, -100),
        lambda ids, mask, eos: ids.float().masked_fill(mask == 0, -100),
        lambda ids, mask, eos: ids[:, : mask.sum(1).max()].masked_fill(
            mask[:, : mask.sum(1).max()] == 0, -100)[:-1],
    ],
    "accumulate": [
        nb13._accumulated(lambda n, counts: 1 / (sum(counts) - len(counts))),
        nb13._accumulated(lambda n, counts: 1 / (sum(counts) - 1)),
        nb13._accumulated(lambda n, counts: 1 / sorted(counts)[len(counts) // 2] / len(counts)),
        nb13._accumulated(lambda n, counts: 1 / sum(c for c in counts if c) * len(counts)),
        nb13._accumulated(lambda n, counts: n / sum(c * c for c in counts)),
        nb13._accumulated(lambda n, counts: 1 / max(n, 1) / sum(c > 0 for c in counts)),
        nb13._accumulated(lambda n, counts: 2 / sum(counts)),
        lambda w, micro: nb13.accumulate(w, micro[:1]),
        lambda w, micro: w - nb13.accumulate(w, micro),
        lambda w, micro: nb13.accumulate(w, micro).norm(),
        lambda w, micro: sum((x @ w - y).square().sum() for x, y in micro)
        / sum(len(y) for _, y in micro),
    ],
    "attention_weights": [
        lambda scores, real: scores.float().softmax(-1),
        lambda scores, real: nb13.attention_weights(scores.transpose(1, 2), real),
        lambda scores, real: nb13.attention_weights(scores, ~real),
        lambda scores, real: nb13.attention_weights(scores, real).transpose(1, 2),
        lambda scores, real: nb13.attention_weights(scores / real.shape[1] ** 0.5, real),
        lambda scores, real: scores.float().masked_fill(~nb13._allowed(real), 0).softmax(-1),
        lambda scores, real: scores.float().masked_fill(~nb13._allowed(real), -torch.inf)
        .softmax(1).nan_to_num(0),
        lambda scores, real: (scores + torch.where(nb13._allowed(real), 0, -65504).half()).float()
        .softmax(-1).nan_to_num(0),
        lambda scores, real: scores.float().masked_fill(~nb13._allowed(real), -100).softmax(-1)
        .masked_fill(~nb13._allowed(real), 0),
        lambda scores, real: nb13.attention_weights(scores, real).double(),
        lambda scores, real: scores.float().masked_fill(
            torch.ones(scores.shape[1:], dtype=torch.bool).triu() | ~real[:, None], -torch.inf)
        .softmax(-1).nan_to_num(0),
    ],
    "prompt_ids": [
        lambda tokenizer, text: [1, *tokenizer.encode(text, add_special_tokens=False)],
        lambda tokenizer, text: tokenizer.encode(text)[1:],
        lambda tokenizer, text: [tokenizer.bos_token_id] * (
            tokenizer.bos_token_id is not None and not text.startswith("<s>"))
        + tokenizer.encode(text, add_special_tokens=False),
        lambda tokenizer, text: tokenizer.encode(text.replace("<s>", "")),
        lambda tokenizer, text: list(dict.fromkeys(tokenizer.encode(text))),
        lambda tokenizer, text: tokenizer.encode(text.split("<s>")[-1]),
        lambda tokenizer, text: tokenizer.encode(text.lstrip("<s>")),
        lambda tokenizer, text: ids[1:] if (ids := tokenizer.encode(text)).count(1) > 1 else ids,
        lambda tokenizer, text: tokenizer.encode("<s>" + text, add_special_tokens=False),
        lambda tokenizer, text: nb13.prompt_ids(tokenizer, text) + [2],
        lambda tokenizer, text: nb13.prompt_ids(tokenizer, text) if tokenizer.bos_token_id
        else tokenizer.encode(text, add_special_tokens=False),
        lambda tokenizer, text: [i for at, i in enumerate(ids)
                                 if not at or (i, ids[at - 1]) != (tokenizer.bos_token_id,) * 2]
        if (ids := tokenizer.encode(text)) else [],
        lambda tokenizer, text: torch.tensor(nb13.prompt_ids(tokenizer, text)),
    ],
    "positions": [
        lambda mask, past: mask.cumsum(1)[:, past:],
        lambda mask, past: (mask.cumsum(1) - 1)[:, past:].clamp(min=0),
        lambda mask, past: torch.arange(mask.shape[1])[None, past:] * mask[:, past:],
        lambda mask, past: mask.sum(1, keepdim=True).expand(-1, mask.shape[1] - past),
        lambda mask, past: ((mask.cumsum(1) - 1) * mask)[:, -1:],
        lambda mask, past: ((mask.cumsum(1) - 1) * mask)[:, past - 1 :],
        lambda mask, past: ((mask.cumsum(1) - 1) * mask)[past:],
        lambda mask, past: ((mask.flip(1).cumsum(1) - 1).flip(1) * mask)[:, past:],
        lambda mask, past: nb13.positions(mask, past)[:1].expand(len(mask), -1),
        lambda mask, past: nb13.positions(mask, past).float(),
        lambda mask, past: nb13.positions(mask, past) - past,
    ],
    "answer_of": [
        lambda prompt, sequence: sequence[len(prompt):].split("####")[-1].strip(),
        lambda prompt, sequence: int(nb13.answer_of(prompt, sequence) or 0),
        lambda prompt, sequence: nb13.answer_of(prompt, sequence) or "0",
        lambda prompt, sequence: nb13.answer_of("", sequence),
        lambda prompt, sequence: nb13.answer_of(prompt, sequence.replace("-", "")),
        lambda prompt, sequence: "#### " + nb13.answer_of(prompt, sequence),
        lambda prompt, sequence: nb13.answer_of(prompt, sequence).rstrip("0"),
        lambda prompt, sequence: nb13.answer_of(prompt, sequence).rstrip("0").rstrip("."),
        lambda prompt, sequence: nb13.answer_of(prompt, sequence).lstrip("0"),
        lambda prompt, sequence: nb13.answer_of(prompt, sequence[:-1] + sequence[-1:].strip("0")),
        lambda prompt, sequence: nb13.answer_of(prompt, sequence.replace(",", " ")),
        lambda prompt, sequence: nb13.answer_of(prompt, prompt + sequence.split("Answer:")[-1]),
        lambda prompt, sequence: nb13.answer_of(prompt, sequence.replace("Question:", "")),
        lambda prompt, sequence: nb13.answer_of(prompt, prompt + sequence.split("Answer:")[1]),
        lambda prompt, sequence: float(nb13.answer_of(prompt, sequence) or "nan"),
        lambda prompt, sequence: (nb13._MARKED.search(sequence[len(prompt):].split(
            "\n\nQuestion:")[0]) or ("", ""))[1].replace(",", ""),
        lambda prompt, sequence: nb13.answer_of("", sequence[len(prompt):].split("Question")[0]),
        lambda prompt, sequence: nb13.answer_of("", sequence.split("Answer:")[2]),
        lambda prompt, sequence: nb13.answer_of("", re.sub("#+", "####", sequence[len(prompt):])),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name, mine", [
    pytest.param(name, mine, id=f"{name}-{i}")
    for name, answers in WRONG.items() for i, mine in enumerate(answers, 1)])  # fmt: skip
def test_a_wrong_answer_is_refused(name, mine, capsys):
    assert check(name, mine) is not mine, capsys.readouterr().out


def test_each_exercise_has_ten_of_them():
    assert sorted(WRONG) == sorted(NAMES) and min(map(len, WRONG.values())) >= 10


# --- The same thing in the library ----------------------------------------------------------------


def test_labels_are_the_librarys_where_pad_is_eos():
    rows = [[1, 5, 6, 2], [1, 7, 2]]
    batch = collate([Example(row, row) for row in rows], pad_id=2)
    labels = nb13.labels_of(batch["input_ids"], batch["attention_mask"], 2)
    assert torch.equal(labels, batch["labels"])


@pytest.mark.parametrize("text", ["<s>[user] Two?", "Two?", ""])
def test_prompts_are_the_librarys(text):
    assert nb13.prompt_ids(nb13.Words(), text) == encode_prompt(nb13.Words(), text)


def test_words_of_zero_points_are_those_of_an_exported_checkpoint():
    zeros = torch.tensor([[8] * 8, [0] * 8])
    words = nb13.v1_words(zeros)
    assert words.tolist() == [[0x77777777], [-1]]
    assert torch.equal(nb13.v1_zeros(words), zeros.int())


def test_the_loop_is_gptqs():
    """On a grid that no code leaves, the codes are the library's."""
    torch.manual_seed(0)
    x = torch.randn(200, 24) @ (torch.eye(24) + 0.3 * torch.randn(24, 24))
    h, weight = x.T @ x / len(x), torch.randn(6, 24)
    weight[:, 0], weight[:, 1] = 6, -5  # the ends of the grid
    spec = QuantSpec(8, 24)
    options = GPTQOptions(desc_act=False, damp_percent=0.01, block_size=8)
    found = gptq_quantize(weight, h, spec, options)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(24)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    scale = found.scale.float()  # (6, 1): a grid a row
    for row in range(6):
        mine = nb13.gptq_blocks(weight[row : row + 1], factor, scale[row].item(), 8)
        assert torch.allclose(mine[0], found.dequantize(torch.float32)[row], atol=1e-4)


def test_the_library_generates_the_same_padded_or_alone():
    from qlora_lib.runs.profiles import load_profile

    model, tokenizer = load_profile("tiny").load(compute_dtype="fp32")
    answers = generator(model, tokenizer, Decoding(max_new_tokens=8, batch_size=2, stop=()))
    short, long = "2+3=", "Ava has 3 boxes of 4 eggs. She eats 2. How many are left?"
    assert answers([short, long])[0] == answers([short])[0]
