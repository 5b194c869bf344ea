"""Exercises of notebook 13: twelve faults of the field's tools, each to be mended.

The first mistake of an exercise is the fault itself, as the notebook shows it.
"""
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kit.exercise import Exercise, register

# --- 1. Zero-points, stored minus one --------------------------------------------------------

SHIFTS = 4 * torch.arange(8)


def v1_words(zeros: Tensor) -> Tensor:
    """Zero-points (groups, out) as GPTQ's older format stores them: one less, eight to a word.
    int32 (groups, out / 8)."""
    stored = ((zeros.long() - 1) & 15).unflatten(1, (-1, 8))
    words = (stored << SHIFTS).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _nibbles(words: Tensor) -> Tensor:
    return ((words.unsqueeze(-1) >> SHIFTS.int()) & 15).flatten(1)


def v1_zeros(words: Tensor) -> Tensor:
    return (_nibbles(words) + 1) & 15


def _zeros_with_a_carry(words):
    return _nibbles(words + 0x11111111)


def _zeros_from_the_top(words):
    return ((_nibbles(words).unflatten(1, (-1, 8)).flip(-1) + 1) & 15).flatten(1)


def _zeros_without_and(words):
    return (words.unsqueeze(-1) >> SHIFTS.int()).flatten(1) + 1


register(Exercise(
    name="v1_zeros",
    reference=v1_zeros,
    cases=[
        (lambda g: (v1_words(torch.randint(1, 16, (2, 8), generator=g)),), "no zero-point is 0"),
        (lambda g: (v1_words(torch.tensor([[8, 0, 8, 8, 3, 0, 1, 15]])),), "two are 0"),
        (lambda g: (v1_words(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 0]])),), "the last is 0"),
        (lambda g: (v1_words(torch.randint(0, 16, (3, 24), generator=g)),), "three words a row"),
    ],
    mistakes=[
        (_zeros_with_a_carry, "15 + 1 carries into the next zero-point: take the word apart "
                              "first, then add 1 to each"),
        (_nibbles, "these are the stored numbers, each one too small"),
        (lambda words: _nibbles(words) + 1, "16 is no code of 4 bits: a stored 15 stands for 0"),
        (lambda words: (_nibbles(words) - 1) & 15, "writing takes 1 off, so reading adds it"),
        (lambda words: (_nibbles(words) + 1).clamp(max=15), "a stored 15 stands for 0, not for 15: "
                                                           "wrap around, do not clamp"),
        (_zeros_from_the_top, "the first zero-point sits in the lowest four bits"),
        (_zeros_without_and, "after the shift keep four bits: & 15"),
        (lambda words: v1_zeros(words).unflatten(1, (-1, 8)),
         "one row a group: flatten the words of a row"),
        (lambda words: ((words.view(torch.uint8) & 15) + 1) & 15,
         "a byte holds two zero-points; this reads one"),
    ],
    exact_dtype=False))

# --- 2. The order of the columns, lost on export ----------------------------------------------


def sort_by_group(codes: Tensor, g_idx: Tensor) -> tuple[Tensor, Tensor]:
    order = g_idx.argsort(stable=True)
    return codes[order], order


def _order(g_idx):
    return g_idx.argsort(stable=True)


def _codes_and_groups(g: torch.Generator, features: int, out: int, size: int, shuffled=True):
    groups = torch.arange(features) // size
    if shuffled:
        groups = groups[torch.randperm(features, generator=g)]
    return torch.randint(0, 16, (features, out), generator=g), groups


register(Exercise(
    name="sort_by_group",
    reference=sort_by_group,
    cases=[
        (lambda g: _codes_and_groups(g, 8, 3, 4), "two groups, mixed"),
        (lambda g: _codes_and_groups(g, 12, 5, 3), "four groups, mixed"),
        (lambda g: _codes_and_groups(g, 8, 3, 4, shuffled=False), "in order already"),
        (lambda g: _codes_and_groups(g, 9, 2, 4), "the last group is short"),
    ],
    mistakes=[
        (lambda codes, g_idx: (codes, torch.arange(len(codes))),
         "the rows keep their places, so the reader's i // group_size takes wrong scales"),
        (lambda codes, g_idx: (codes[_order(g_idx)], torch.arange(len(codes))),
         "the rows have moved; return the order by which the inputs must move too"),
        (lambda codes, g_idx: (codes, _order(g_idx)),
         "the order is right; the rows must be moved by it"),
        (lambda codes, g_idx: (codes[_order(g_idx)], _order(g_idx).argsort()),
         "this is the way back: inputs are taken by x[:, order], as the rows were"),
        (lambda codes, g_idx: (codes[_order(g_idx).argsort()], _order(g_idx)),
         "row i of the result is row order[i] of the codes, not the other way round"),
        (lambda codes, g_idx: (codes[_order(g_idx)], g_idx[_order(g_idx)]),
         "these are the sorted groups; return the order itself"),
        (lambda codes, g_idx: (codes[_order(-g_idx)], _order(-g_idx)),
         "the first group comes first"),
        (lambda codes, g_idx: (codes[g_idx], g_idx), "g_idx says which group an input has; where "
                                                    "it goes says g_idx.argsort"),
        (lambda codes, g_idx: (codes[:, _order(g_idx)], _order(g_idx)),
         "inputs are the rows of the codes here, outputs the columns"),
        (lambda codes, g_idx: (codes[(o := _order(g_idx.flip(0)).sub(len(g_idx) - 1).neg())], o),
         "within a group the inputs keep their order: argsort(stable=True)"),
    ],
    exact_dtype=False))

# --- 3. Two kinds of index in GPTQ's loop ----------------------------------------------------


def _blocks(spill=lambda j, end, n: end, row=lambda j, start: j - start,
            rows=slice, divisor=lambda factor, j, start: factor[j, j], sign=1, own=True,
            later=True, last=lambda n, block: n):
    """GPTQ in blocks; each argument is a place where one goes wrong."""
    def quantize(weight, factor, step, block):
        w, n = weight.clone(), weight.shape[1]
        for start in range(0, last(n, block), block):
            end = min(start + block, n)
            errors = torch.zeros(len(w), end - start)
            for j in range(start, end):
                q = step * (w[:, j] / step).round()
                e = (w[:, j] - q) / divisor(factor, j, start)
                to = spill(j, end, n)
                if own:
                    w[:, j + 1:to] -= sign * torch.outer(e, factor[j, j + 1:to])
                w[:, j] = q
                errors[:, row(j, start):row(j, start) + 1] = e[:, None]
            if later:
                w[:, end:] -= sign * errors @ factor[rows(start, end), end:]
        return w
    return quantize


gptq_blocks = _blocks()


def _gptq_in_place(weight, factor, step, block):
    weight.copy_(gptq_blocks(weight, factor, step, block))
    return weight


def _layer(g: torch.Generator, out: int, features: int, step: float, block: int) -> tuple:
    """Weights, and a factor of the inverse Hessian as correlated inputs give it."""
    x = torch.randn(4 * features, features, generator=g)
    x = x @ (torch.eye(features) + 0.5 * torch.randn(features, features, generator=g))
    h = x.T @ x / len(x) + 0.01 * torch.eye(features)
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    return torch.randn(out, features, generator=g), factor, step, block


_FAULTY_BLOCKS = _blocks(spill=lambda j, end, n: j + end, row=lambda j, start: j)

register(Exercise(
    name="gptq_blocks",
    reference=gptq_blocks,
    cases=[
        (lambda g: _layer(g, 3, 8, 0.5, 8), "one block: all columns"),
        (lambda g: _layer(g, 3, 12, 0.5, 4), "three blocks"),
        (lambda g: _layer(g, 4, 10, 0.4, 4), "the last block is short"),
        (lambda g: _layer(g, 5, 9, 0.4, 3), "three blocks of three"),
        (lambda g: _layer(g, 3, 8, 0.05, 4), "a fine step, far from zero"),
    ],
    mistakes=[
        (_FAULTY_BLOCKS, "two indices are mixed up: errors go to place j - start of the block, "
                         "and its own updates stop at end"),
        (_blocks(spill=lambda j, end, n: j + end), "the updates of the block spill over its end, "
                                                   "and the later columns get them twice"),
        (lambda weight, factor, step, block: _blocks(spill=lambda j, end, n: j + block)(
            weight, factor, step, block),
         "a block's own updates end where the block ends, not `block` columns further"),
        (_blocks(row=lambda j, start: j), "after the first block, errors[:, j] lies outside of "
                                          "`errors`: torch writes nothing there and says nothing"),
        (_blocks(later=False), "the later blocks never hear of this one's errors: "
                               "w[:, end:] -= errors @ factor[start:end, end:]"),
        (_blocks(own=False), "within a block, too, the error moves on, column by column"),
        (_blocks(own=False, later=False), "this is rounding to the nearest: no error moves on"),
        (_blocks(rows=lambda start, end: slice(0, end - start)),
         "the rows of the factor are global: factor[start:end, end:]"),
        (_blocks(divisor=lambda factor, j, start: 1.0), "divide the error by factor[j, j]"),
        (_blocks(divisor=lambda factor, j, start: factor[j - start, j - start]),
         "the divisor is global: factor[j, j]"),
        (_blocks(divisor=lambda factor, j, start: factor[j, j] ** 2),
         "divide once by factor[j, j]: it is the factor, not the inverse Hessian"),
        (_blocks(sign=-1), "the sign is wrong: the later columns take the error off"),
        (_blocks(spill=lambda j, end, n: n), "the block's own updates reach all later columns, "
                                             "which then get the errors once more"),
        (_blocks(last=lambda n, block: n - n % block), "a short last block is left as it was: min"
                                                      "(start + block, n)"),
        (lambda weight, factor, step, block: gptq_blocks(weight, factor, step, block).clamp(
            -8 * step, 7 * step), "nothing says how far from zero a multiple of step may lie: "
                                  "round, and do not clamp"),
        (_gptq_in_place, "right values, but it writes into the weight it was given: clone it"),
    ],
    rtol=1e-3, atol=1e-4))

# --- 4. Merged twice ----------------------------------------------------------------------------


def set_merged(weight: Tensor, merged: bool, delta: Tensor, on: bool) -> tuple[Tensor, bool]:
    if on == merged:
        return weight, merged
    return (weight + delta if on else weight - delta), on


def _set_in_place(weight, merged, delta, on):
    if on != merged:
        weight += delta if on else -delta
    return weight, on


def _layer_to_merge(merged: bool, on: bool):
    def make(g: torch.Generator) -> tuple:
        return torch.randn(3, 4, generator=g), merged, torch.randn(3, 4, generator=g), on
    return make


register(Exercise(
    name="set_merged",
    reference=set_merged,
    cases=[
        (_layer_to_merge(False, True), "merge"),
        (_layer_to_merge(True, True), "merge what is merged"),
        (_layer_to_merge(True, False), "take it out again"),
        (_layer_to_merge(False, False), "take out what is not in"),
    ],
    mistakes=[
        (lambda weight, merged, delta, on: ((weight + delta if on else weight - delta), on),
         "it adds or subtracts each time; look first whether the update is in"),
        (lambda weight, merged, delta, on: (weight, merged) if on and merged else (
            (weight + delta if on else weight - delta), on),
         "taking out what is not in subtracts an update that nobody added"),
        (lambda weight, merged, delta, on: (weight + delta, True) if on and not merged else
         (weight, merged), "it never takes the update out"),
        (lambda weight, merged, delta, on: (set_merged(weight, merged, delta, on)[0], merged),
         "the weight is right, but nobody will know: return the new state too"),
        (lambda weight, merged, delta, on: (weight - delta if merged else weight + delta,
                                            not merged),
         "this is a switch: called twice, it undoes itself. `on` says what is wanted"),
        (lambda weight, merged, delta, on: (weight if on == merged else weight + delta, on),
         "taking out subtracts"),
        (lambda weight, merged, delta, on: (weight if on == merged else
                                            weight + 2 * delta if on else weight - 2 * delta, on),
         "twice the update: add it once"),
        (lambda weight, merged, delta, on: (weight if on == merged else
                                            weight - delta if on else weight + delta, on),
         "the two directions are swapped"),
        (_set_in_place, "right values, but it writes into its weight: return a new one"),
        (lambda weight, merged, delta, on: (weight if on == merged else delta if on
                                            else weight - delta, on),
         "the update does not replace the weight; it is added"),
    ]))

# --- 5. An adapter on a tied head ----------------------------------------------------------------


def merge_head(embed: Tensor, head: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    if delta is None:
        return embed, head, embed is head
    return embed, head + delta, False


def _head_in_place(embed, head, delta):
    if delta is not None:
        head += delta
    return embed, head, embed is head


def _tables(g: torch.Generator, tied: bool, adapted: bool = True) -> tuple:
    embed = torch.randn(6, 4, generator=g)
    head = embed if tied else torch.randn(6, 4, generator=g)
    return embed, head, torch.randn(6, 4, generator=g) if adapted else None


register(Exercise(
    name="merge_head",
    reference=merge_head,
    cases=[
        (lambda g: _tables(g, True), "one tied table"),
        (lambda g: _tables(g, False), "two tables"),
        (lambda g: _tables(g, True, False), "tied, no adapter on the head"),
        (lambda g: _tables(g, False, False), "two tables, no adapter on the head"),
    ],
    mistakes=[
        (_head_in_place, "head and embedding are one tensor: += changes both; make a new one"),
        (lambda embed, head, delta: (embed, head if delta is None else head + delta,
                                     embed is head),
         "the head is its own now, and the file must say so: stored as tied, it is lost when the "
         "model is loaded"),
        (lambda embed, head, delta: (embed, head, embed is head) if delta is None else (
            embed + delta, embed + delta, True),
         "the embedding got the update too: every token now enters the model changed"),
        (lambda embed, head, delta: (embed, head, embed is head) if delta is None else (
            embed + delta, head, False), "the update belongs to the head"),
        (lambda embed, head, delta: (embed, head + delta, False),
         "delta is None where the head has no adapter: then nothing changes"),
        (lambda embed, head, delta: (embed, head if delta is None else head + delta, False),
         "without an adapter a tied head stays tied: a second table would be stored for nothing"),
        (lambda embed, head, delta: (embed, head, True) if delta is None else (
            embed, head + delta, False), "two tables are not tied: embed is head says it"),
        (lambda embed, head, delta: (embed, head, embed is head) if delta is None else (
            embed, embed + delta, False), "an untied head has a weight of its own: add to that"),
        (lambda embed, head, delta: (embed, head, embed is head) if delta is None else (
            embed, delta, False), "the update does not replace the head; it is added"),
        (lambda embed, head, delta: (embed, head, embed is head) if delta is None else (
            embed, head - delta, False), "merging adds the update"),
        (lambda embed, head, delta: (embed, head, embed is head) if delta is None or embed is head
         else (embed, head + delta, False), "a tied head may have an adapter as well: untie it"),
    ]))

# --- 6. What a file of an adapter must hold -------------------------------------------------------


def names_to_save(trained: dict, base: dict) -> list[str]:
    return sorted(name for name, value in trained.items()
                  if name not in base or not torch.equal(value, base[name]))


def _named(wanted):
    return lambda trained, base: sorted(n for n in trained if wanted(n, trained[n], base.get(n)))


def _states(g: torch.Generator, **changed) -> tuple[dict, dict]:
    """A small model's tensors with an adapter, some of them changed, and those of its base."""
    base = {"embed.weight": torch.randn(5, 3, generator=g), "q.weight": torch.ones(3, 3),
            "norm.weight": torch.ones(3),
            "head.weight": torch.randn(5, 3, generator=g).mul(8).round()}  # exact in any order
    trained = {"q.lora_B": torch.randn(3, 2, generator=g), "q.lora_A": torch.ones(2, 3)}
    trained |= {name: value.clone() for name, value in base.items()}
    for name, change in changed.items():
        name = name.replace("__", ".")
        trained[name] = change(trained[name])
    return trained, base


def _swapped(table):
    """The first two rows have changed places, so sum and norm are the same."""
    return torch.cat([table[:2].flip(0), table[2:]])


def _longer(table):
    return torch.cat([table, torch.ones(2, 3)])


register(Exercise(
    name="names_to_save",
    reference=names_to_save,
    cases=[
        (lambda g: _states(g), "the adapter alone"),
        (lambda g: _states(g, embed__weight=_longer, head__weight=_longer),
         "two tokens were added"),
        (lambda g: _states(g, embed__weight=_longer), "two tokens were added to one table"),
        (lambda g: _states(g, norm__weight=lambda w: w * 1.5), "a norm was trained too"),
        (lambda g: _states(g, q__weight=lambda w: w + 2e-7), "a weight has moved by one last bit"),
        (lambda g: _states(g, embed__weight=lambda w: torch.cat([w[:4], w[4:] + 1])),
         "one row of a table was trained"),
        (lambda g: _states(g, head__weight=_swapped), "two rows of a table have changed places"),
    ],
    mistakes=[
        (_named(lambda n, new, old: "lora_" in n),
         "a name says nothing of what was trained: the tables with new tokens are missing. Save "
         "what the base lacks or has otherwise"),
        (_named(lambda n, new, old: ".lora_" in n or n.startswith(("embed", "head"))),
         "the tables are saved though nothing in them is new: gigabytes for nothing"),
        (_named(lambda n, new, old: old is None or new.shape != old.shape),
         "a tensor may be trained and keep its shape"),
        (_named(lambda n, new, old: old is None or new.shape != old.shape
                or not torch.allclose(new, old)), "allclose forgives small changes, and a small "
                                                  "change is a change: torch.equal"),
        (_named(lambda n, new, old: old is None or new.shape != old.shape or (new != old).all()),
         "one changed value is enough: any, not all"),
        (_named(lambda n, new, old: old is None or new.sum() != old.sum()),
         "two tensors may have the same sum, or norm, and be two: compare them value by value"),
        (_named(lambda n, new, old: True), "this saves the whole base with each adapter"),
        (_named(lambda n, new, old: old is None or (new != old).any()),
         "tensors of different shapes cannot be compared by !=; torch.equal is False for them"),
        (lambda trained, base: [n for n in trained if n in names_to_save(trained, base)],
         "right names; return them sorted, so that two runs write the same file"),
        (lambda trained, base: sorted(set(trained) - set(names_to_save(trained, base))),
         "these are the tensors that the base has already"),
    ]))

# --- 7. The stop token that padding masks away --------------------------------------------------


def labels_of(ids: Tensor, mask: Tensor, eos: int) -> Tensor:
    return ids.masked_fill(mask == 0, -100)


def _until_the_first_eos(ids, mask, eos):
    labels = ids.clone()
    for row in labels:
        end = row.tolist().index(eos) + 1
        row[end:] = -100
    return labels


def _by_length(ids, mask, eos):
    lengths = mask.sum(1, keepdim=True)
    return ids.masked_fill(torch.arange(ids.shape[1]) >= lengths, -100)


def _labels_in_place(ids, mask, eos):
    ids[mask == 0] = -100
    return ids


def _filled(ids, where):
    labels = ids.clone()
    labels[where] = -100
    return labels


def _padded(rows: list, side: str = "right", eos: int = 2) -> tuple[Tensor, Tensor, int]:
    width = max(map(len, rows))
    fills = [width - len(row) for row in rows]
    if side == "right":
        ids = [row + [eos] * n for row, n in zip(rows, fills)]
        mask = [[1] * len(row) + [0] * n for row, n in zip(rows, fills)]
    else:
        ids = [[eos] * n + row for row, n in zip(rows, fills)]
        mask = [[0] * n + [1] * len(row) for row, n in zip(rows, fills)]
    return torch.tensor(ids), torch.tensor(mask), eos


register(Exercise(
    name="labels_of",
    reference=labels_of,
    cases=[
        (lambda g: _padded([[1, 5, 6, 2], [1, 7, 2]]), "padded on the right with eos"),
        (lambda g: _padded([[1, 5, 2, 6, 8, 2], [1, 7, 2]]), "two turns, each ends in eos"),
        (lambda g: _padded([[1, 5, 6, 2], [1, 2]], "left"), "padded on the left"),
        (lambda g: _padded([[1, 5, 6], [1, 7, 8, 9, 2], [1, 4]], eos=2), "a cut text has no eos"),
    ],
    mistakes=[
        (lambda ids, mask, eos: ids.masked_fill(ids == eos, -100),
         "the real eos is masked as well, and the model never learns to stop: ask the mask"),
        (lambda ids, mask, eos: ids.clone(), "padding is learned: after its eos the model would "
                                             "learn to say eos again and again"),
        (_until_the_first_eos, "a text may hold an eos before its end, or none: ask the mask"),
        (_by_length, "this counts the padding as if it stood on the right"),
        (lambda ids, mask, eos: ids.masked_fill(mask == 1, -100),
         "this is upside down: where the mask is 0, nothing is learned"),
        (lambda ids, mask, eos: ids * mask, "0 is the label of a token; what cross-entropy leaves "
                                            "out is -100"),
        (lambda ids, mask, eos: ids.masked_fill(mask.roll(-1, 1) == 0, -100),
         "one label too many is masked: labels stand at their own tokens, the model shifts them"),
        (lambda ids, mask, eos: ids.masked_fill(mask.roll(1, 1) == 0, -100),
         "the mask is shifted by one, so one padding token is learned in a row"),
        (lambda ids, mask, eos: _filled(ids, ~mask),
         "the mask holds whole numbers, of which ~ makes -1 and -2, places counted from the end: "
         "compare, mask == 0"),
        (_labels_in_place, "right labels, but the ids are overwritten: the model would be given "
                           "-100 as a token"),
        (lambda ids, mask, eos: ids.masked_fill(mask == 0, -100)[:, 1:],
         "keep the shape: the model itself shifts the labels by one"),
    ]))

# --- 8. Gradients over micro-batches -------------------------------------------------------------


def _accumulated(weigh):
    """The gradient of each micro-batch's sum, weighed by weigh(its tokens, all counts)."""
    def gradient(w, micro):
        counts = [len(y) for _, y in micro]
        total = torch.zeros_like(w)
        for (x, y), n in zip(micro, counts):
            total += 2 * x.T @ (x @ w - y) * weigh(n, counts)
        return total
    return gradient


def accumulate(w: Tensor, micro: list) -> Tensor:
    tokens = sum(len(y) for _, y in micro)
    grad = torch.zeros_like(w)
    for x, y in micro:
        grad += 2 * x.T @ (x @ w - y) / tokens
    return grad


def _means_averaged(w, micro):
    grad = torch.zeros_like(w)
    for x, y in micro:
        grad += 2 * x.T @ (x @ w - y) / len(y) / len(micro)
    return grad


def _micro(g: torch.Generator, *lengths: int) -> tuple[Tensor, list]:
    return torch.randn(3, generator=g), [
        (torch.randn(n, 3, generator=g), torch.randn(n, generator=g)) for n in lengths]


register(Exercise(
    name="accumulate",
    reference=accumulate,
    cases=[
        (lambda g: _micro(g, 4, 4), "two micro-batches of 4 tokens"),
        (lambda g: _micro(g, 1, 7), "1 token and 7 tokens"),
        (lambda g: _micro(g, 2, 9, 4), "three lengths"),
        (lambda g: _micro(g, 5, 0, 2), "one with nothing to learn"),
    ],
    mistakes=[
        (_means_averaged, "a mean of means: each micro-batch counts the same, however few its "
                          "tokens. Divide every sum by the tokens of all"),
        (_accumulated(lambda n, counts: 1 / max(n, 1)), "a sum of means: it grows with the number "
                                                        "of micro-batches"),
        (_accumulated(lambda n, counts: 1.0), "this is the sum's gradient; divide by the tokens of "
                                              "all micro-batches"),
        (_accumulated(lambda n, counts: 1 / sum(counts) / len(counts)),
         "divided twice: by the tokens and by the number of micro-batches"),
        (_accumulated(lambda n, counts: 1 / counts[0] / len(counts)),
         "the first micro-batch's tokens stand for all; count each one"),
        (_accumulated(lambda n, counts: 1 / max(counts) / len(counts)),
         "the longest micro-batch's tokens stand for all; count each one"),
        (_accumulated(lambda n, counts: 1 / len(counts)),
         "divided by the number of micro-batches; wanted is the number of tokens"),
        (_accumulated(lambda n, counts: 0.5 / sum(counts)), "half of it: the square's derivative "
                                                            "has a factor of 2"),
        (_accumulated(lambda n, counts: n / sum(counts)), "n counts twice: x.T @ (...) is a sum "
                                                          "over the n tokens already"),
        (_accumulated(lambda n, counts: n / sum(counts) * (1 / n if n else torch.nan)),
         "the mean over no token is 0/0, which is NaN: add up sums, not means"),
        (lambda w, micro: accumulate(w, micro[-1:]), "this is the last micro-batch alone; add up"),
        (lambda w, micro: -accumulate(w, micro), "the sign: this points downhill, the gradient up"),
        (lambda w, micro: accumulate(w, micro) / w.numel(),
         "divided by the number of weights; the mean goes over tokens"),
    ]))

# --- 9. Two masks in half precision -------------------------------------------------------------


def _allowed(real: Tensor) -> Tensor:
    """(batch, seq, seq): a query sees itself and what is before it, of that the real tokens."""
    seq = real.shape[1]
    return torch.ones(seq, seq, dtype=torch.bool).tril() & real[:, None, :]


def attention_weights(scores: Tensor, real: Tensor) -> Tensor:
    allowed = _allowed(real)
    weights = scores.float().masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights.masked_fill(~allowed, 0)


def _two_masks(scores, real):
    low = torch.finfo(scores.dtype).min
    causal = torch.full(scores.shape[1:], low, dtype=scores.dtype).triu(1)
    padding = torch.where(real, 0, low).to(scores.dtype)[:, None, :]
    return (scores + causal + padding).float().softmax(-1)


def _softmax_where(allowed, low=-torch.inf):
    return lambda scores, real: scores.float().masked_fill(
        ~allowed(real).expand(scores.shape), low).softmax(-1).nan_to_num(0)


def _without_future(real):
    return torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()[None]


def _added(low):
    return lambda scores, real: (scores.float() + torch.where(_allowed(real), 0.0, low)
                                 ).softmax(-1).masked_fill(~_allowed(real).any(-1, True), 0)


def _scores(g: torch.Generator, real: list, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    real = torch.tensor(real).bool()
    scores = torch.randn(*real.shape, real.shape[1], generator=g) + shift
    return scores.half(), real


def _far_apart(g: torch.Generator) -> tuple[Tensor, Tensor]:
    scores, real = _scores(g, [[0, 1, 1, 1]])
    scores[:, :, 1:] -= 30_000
    return scores, real


register(Exercise(
    name="attention_weights",
    reference=attention_weights,
    cases=[
        (lambda g: _scores(g, [[1, 1, 1, 1], [1, 1, 0, 0]]), "padded on the right"),
        (lambda g: _scores(g, [[0, 1, 1], [0, 0, 1]], -40.0), "padded on the left, scores near "
                                                              "-40"),
        (lambda g: _scores(g, [[1, 1, 1, 1], [0, 0, 1, 1]]), "padded on the left"),
        (_far_apart, "what is padding scores 30,000 more"),
    ],
    mistakes=[
        (_two_masks, "two masks of the lowest number add up to -inf, and a row of nothing but -inf "
                     "becomes NaN: combine the masks as booleans, before any number"),
        (lambda scores, real: scores.float().masked_fill(~_allowed(real), -torch.inf).softmax(-1),
         "a query that sees nothing has -inf everywhere, and its softmax is NaN: give it zeros"),
        (_softmax_where(_allowed, torch.finfo(torch.float32).min),
         "a query that sees nothing spreads its weight over what is forbidden: give it zeros"),
        (_softmax_where(lambda real: real[:, None, :]), "queries see the future: mask k > q as "
                                                        "well"),
        (_softmax_where(_without_future), "padding is seen: mask the keys that are not real"),
        (_softmax_where(lambda real: _without_future(real) & real[:, :, None]),
         "the mask of real tokens lies along the queries; padding must be hidden as a key"),
        (_added(-1e4), "-10,000 is not low enough: a forbidden score may lie 30,000 above. Fill, "
                       "do not add"),
        (lambda scores, real: scores.masked_fill(~_allowed(real), -torch.inf).softmax(-1).float()
         .nan_to_num(0), "the softmax is taken in fp16, of three digits: turn the scores into fp32 "
                         "before it"),
        (_softmax_where(lambda real: _allowed(real) & real[:, :, None]),
         "the query of a pad may look, too: at the real tokens before it"),
        (lambda scores, real: attention_weights(scores, real).half(),
         "the weights come back in fp16; asked is fp32"),
        (lambda scores, real: attention_weights(scores, real.flip(1)),
         "the padding stands on the other side"),
        (lambda scores, real: scores.float().softmax(-1) * _allowed(real),
         "masked after the softmax, the weights of a row no longer add up to 1"),
    ],
    atol=1e-5))

# --- 10. Two tokens that begin a text -----------------------------------------------------------

BOS = "<s>"


@dataclass(frozen=True)
class Words:
    """A tokenizer that needs no model: a token a word, `<s>` is 1, and like many it puts its bos
    before each text unless told not to."""

    bos_token_id: int | None = 1
    bos: str = BOS

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [self.bos_token_id if word == self.bos else 10 + sum(map(ord, word)) % 989
               for word in text.replace(self.bos, f" {self.bos} ").split()]
        return ids if self.bos_token_id is None or not add_special_tokens else \
            [self.bos_token_id, *ids]


def prompt_ids(tokenizer, text: str) -> list[int]:
    ids, bos = tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _plain(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def _one_of_two(tokenizer, text):
    ids = tokenizer.encode(text)
    return ids[1:] if ids[:1] == ids[1:2] else ids


def _unless_bos_is_false(tokenizer, text):
    ids, bos = _plain(tokenizer, text), tokenizer.bos_token_id
    return ids if not bos or ids[:1] == [bos] else [bos, *ids]


def _if_anywhere(tokenizer, text):
    return _plain(tokenizer, text) if BOS in text else tokenizer.encode(text)


def _all_but_the_first(tokenizer, text):
    ids, bos = _plain(tokenizer, text), tokenizer.bos_token_id
    return ids if bos is None else [bos, *(i for i in ids if i != bos)]


register(Exercise(
    name="prompt_ids",
    reference=prompt_ids,
    cases=[
        (lambda g: (Words(), "<s>[user] How many eggs?"), "the template writes bos"),
        (lambda g: (Words(), "Question: How many eggs?"), "a plain text"),
        (lambda g: (Words(), "<s>[user] Two.<s>[user] And three?"), "two turns, a bos each"),
        (lambda g: (Words(), "What does <s> mean?"), "a text about bos"),
        (lambda g: (Words(None), "How How many eggs?"), "a tokenizer without bos"),
        (lambda g: (Words(), "How How many?"), "the first word twice"),
        (lambda g: (Words(), ""), "an empty text"),
        (lambda g: (Words(), "<s>seven eggs"), "a bos, then a word that begins with s"),
        (lambda g: (Words(7, "<|begin|>"), "<|begin|>[user] Two."), "a bos of another name"),
        (lambda g: (Words(0), "Two eggs?"), "the bos has the id 0"),
        (lambda g: (Words(), "Why <s><s>?"), "a text about two bos"),
    ],
    mistakes=[
        (lambda tokenizer, text: tokenizer.encode(text),
         "the template has written a bos, and the tokenizer puts a second before it"),
        (_plain, "a text that no template wrote has no bos now"),
        (lambda tokenizer, text: _plain(tokenizer, text.removeprefix(BOS)),
         "the template's bos is gone, and none is put there"),
        (_all_but_the_first, "only the beginning may be touched: later turns have a bos of their "
                             "own, and a user may ask about it"),
        (_if_anywhere, "a bos somewhere in the text is none at its beginning: ask the first token"),
        (lambda tokenizer, text: ids if (ids := _plain(tokenizer, text))
         and ids[0] == tokenizer.bos_token_id else tokenizer.encode(text)[1:],
         "a plain text has lost its bos: the tokenizer's own must stay"),
        (lambda tokenizer, text: ids if (ids := _plain(tokenizer, text))[0] == 1
         or tokenizer.bos_token_id is None else [1, *ids],
         "an empty text has no first token: ids[:1] never fails"),
        (lambda tokenizer, text: tokenizer.encode(text.lstrip(BOS)),
         "lstrip takes any of the letters <, s and > off, as often as they come: removeprefix"),
        (lambda tokenizer, text: ids if (ids := _plain(tokenizer, text))
         and ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids],
         "a tokenizer may have no bos: then bos_token_id is None, and None is no token"),
        (lambda tokenizer, text: ids if (ids := _plain(tokenizer, text))[0]
         == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids],
         "bos_token_id may be None, which is no token, and an empty text has no ids[0]"),
        (lambda tokenizer, text: ids if tokenizer.bos_token_id in (
            ids := _plain(tokenizer, text)) else [tokenizer.bos_token_id, *ids],
         "ask the first token, not all of them; and bos_token_id may be None, which is no token"),
        (lambda tokenizer, text: tokenizer.encode(text, not text.startswith(BOS)),
         "each tokenizer writes its bos in a way of its own: compare ids, not texts"),
        (_unless_bos_is_false,
         "0 may be the id of bos, and 0 counts as False: ask `is None`"),
        (_one_of_two, "two like words at the beginning are no fault; only two bos are"),
    ]))

# --- 11. Positions in a padded batch -----------------------------------------------------------


def positions(mask: Tensor, past: int) -> Tensor:
    return ((mask.cumsum(1) - 1) * mask)[:, past:]


def _columns(mask, past):
    return torch.arange(past, mask.shape[1]).expand(len(mask), -1)


def _masks(*rows: list) -> Tensor:
    return torch.tensor(rows)


register(Exercise(
    name="positions",
    reference=positions,
    cases=[
        (lambda g: (_masks([1, 1, 1, 1], [0, 0, 1, 1]), 0), "padded on the left, no cache yet"),
        (lambda g: (_masks([1, 1, 1, 1, 1], [0, 0, 1, 1, 1]), 4), "one new token"),
        (lambda g: (_masks([0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]), 3),
         "two new tokens"),
        (lambda g: (_masks([1, 1, 0, 1, 1], [1, 1, 1, 1, 0]), 0), "a gap, and padding on the "
                                                                  "right"),
    ],
    mistakes=[
        (_columns, "these are columns of the batch, the same in each row: a row counts its own "
                   "real tokens"),
        (lambda mask, past: (mask.cumsum(1) * mask)[:, past:], "positions begin at 0: subtract 1"),
        (lambda mask, past: (mask.cumsum(1) - 1)[:, past:], "a pad gets 0, not the position of a "
                                                            "neighbor, and never -1"),
        (lambda mask, past: (mask.cumsum(1) - 1).clamp(min=0)[:, past:],
         "a pad behind a text gets 0 as well"),
        (lambda mask, past: (mask[:, past:].cumsum(1) - 1) * mask[:, past:],
         "the cached tokens count: cut off the cached columns after counting"),
        (lambda mask, past: mask[:, past:].cumsum(1) - 1,
         "count all columns before you cut the cached ones off; and a pad gets 0"),
        (lambda mask, past: (mask.cumsum(1) - 1) * mask, "only the new columns are asked for: "
                                                         "[:, past:]"),
        (lambda mask, past: ((mask.cumsum(0) - 1) * mask)[:, past:],
         "this counts down the batch: the tokens are along dimension 1"),
        (lambda mask, past: ((mask.cumsum(1) - 1) * mask + past)[:, past:],
         "the cached tokens are counted twice"),
        (lambda mask, past: (torch.arange(mask.shape[1]) - (mask == 0).sum(1, True)).clamp(min=0)
         [:, past:], "this takes all padding to stand on the left"),
        (lambda mask, past: torch.arange(mask.shape[1] - past).expand(len(mask), -1),
         "these begin at 0 again with each step, as if nothing were cached"),
        (lambda mask, past: ((mask.cumsum(1) - 1) * mask)[:, :past] if past
         else (mask.cumsum(1) - 1) * mask, "these are the cached columns; asked are the new ones"),
        (lambda mask, past: (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)[:, past:],
         "a pad's position is never looked at; here it shall be 0"),
    ]))

# --- 12. The last number of everything ---------------------------------------------------------

_MARKED = re.compile(r"#### *(-?\d[\d,]*)")


def answer_of(prompt: str, sequence: str) -> str:
    completion = sequence[len(prompt):].split("Question:")[0]
    found = _MARKED.search(completion)
    return found[1].replace(",", "") if found else ""


def _pick(of, pattern=_MARKED, place=0, clean=lambda text: text.replace(",", "")):
    def read(prompt, sequence):
        found = pattern.findall(of(prompt, sequence))
        return clean(found[place]) if found else ""
    return read


def _new(prompt, sequence):
    return sequence[len(prompt):]


def _first_turn(prompt, sequence):
    return _new(prompt, sequence).split("Question:")[0]


_NUMBER = re.compile(r"-?\d[\d,]*")
_SHOT = "Question: 2 and 2?\nAnswer: 2+2=4\n#### 4\n\n"
_ASKED = _SHOT + "Question: 3 boxes of 6?\nAnswer:"
_ALONE = "Question: 3 boxes of 6?\nAnswer:"

register(Exercise(
    name="answer_of",
    reference=answer_of,
    cases=[
        (lambda g: (_ASKED, _ASKED + " 3*6=18\n#### 18"), "it stops after its answer"),
        (lambda g: (_ASKED, _ASKED + " 3*6=18\n#### 18\n\nQuestion: 5 and 9?\nAnswer: 14\n#### 14"),
         "it goes on with a question of its own"),
        (lambda g: (_ASKED, _ASKED + " 3*6=18, of 20"), "no marked answer"),
        (lambda g: (_ASKED, _ASKED + " I can't say.\n\nQuestion: 1 and 1?\nAnswer: 2\n#### 2"),
         "no answer, then a question of its own"),
        (lambda g: (_ASKED, _ASKED + "\n#### 18\n\n" + _ASKED + " 18"),
         "it repeats its prompt"),
        (lambda g: (_ASKED, _ASKED + " a loss\n#### -1,234,450 dollars in 2 years"),
         "a sign, two commas, words behind"),
        (lambda g: (_ASKED, _ASKED + " 18\n#### 18\n#### 19"), "two marked answers"),
        (lambda g: (_ASKED, _ASKED + " 36*40=1440\n\nSo there are 1440.\n#### 1440"),
         "an empty line, and an answer that ends in 0"),
        (lambda g: (_ASKED, _ASKED + " 18-3*6=0\n#### 0"), "the answer 0"),
        (lambda g: (_ASKED, _ASKED + " 3*6=18\n#### 18."), "a full stop behind the answer"),
        (lambda g: (_ASKED, _ASKED + "\n\n" + _ASKED + " 3*6=18\n#### 18"),
         "it repeats its prompt before it answers"),
        (lambda g: (_ASKED, _ASKED), "it says nothing"),
        (lambda g: (_ASKED, _ASKED + " I can't say.\nQuestion: 1 and 1?\nAnswer: 2\n#### 2"),
         "no answer, and the next question in the next line"),
        (lambda g: (_ASKED, _ASKED + " Question 1 is 3*6, box #1 first.\n#### 18"),
         "a question without a colon, a # before another number"),
        (lambda g: (_ALONE, _ALONE + " 3*6=18\n#### 18\n\nQuestion: 1 and 1?\nAnswer: 2\n#### 2"),
         "a prompt without an example"),
    ],
    mistakes=[
        (_pick(lambda prompt, sequence: sequence, _NUMBER, -1),
         "the last number of everything: that of the prompt's example, or of a question that the "
         "model asks itself"),
        (_pick(_new, _NUMBER, -1), "the last number is not the answer: look for the mark, and stop "
                                   "where a new question begins"),
        (_pick(lambda prompt, sequence: sequence), "this is the prompt's example, the same for "
                                                   "every question: read the completion only"),
        (_pick(lambda prompt, sequence: sequence, place=-1),
         "the last mark of prompt and completion may be the prompt's own, or that of the next "
         "question"),
        (_pick(_new), "without an answer of its own the model gets that of the next question: cut "
                      "at 'Question:'"),
        (_pick(_new, place=-1), "the model has gone on: its answer to this question is the first"),
        (_pick(_first_turn, place=-1), "of two marked answers the first one counts here"),
        (_pick(_first_turn, clean=lambda text: text), "1,450 and 1450 are one number: take the "
                                                      "commas out"),
        (_pick(_first_turn, clean=lambda text: text.replace(",", "", 1)),
         "a number may have more than one comma: take them all out"),
        (_pick(_first_turn, clean=lambda text: text.replace(",", "").rstrip("0")),
         "rstrip takes zeros off whole numbers too, and 1440 becomes 144"),
        (_pick(_first_turn, re.compile(r"#### *(-?[\d,.]+)")),
         "a full stop behind the number is none of its digits"),
        (lambda prompt, sequence: answer_of("", sequence.replace(prompt, "")),
         "replace takes the prompt out wherever it stands: cut its length off, once"),
        (_pick(_first_turn, re.compile(r"#### *(.+)")),
         "words may stand behind the number: take its sign, digits and commas only"),
        (lambda prompt, sequence: (answer := answer_of(prompt, sequence)) and (
            answer if int(answer) else ""), "0 is an answer as well, and no empty text"),
        (_pick(lambda prompt, sequence: _first_turn(prompt, sequence).split("\n\n")[0]),
         "an empty line ends no answer: cut at 'Question:' only"),
        (_pick(_first_turn, re.compile(r"#### *(-?\d{1,3}(?:,\d{3})*)")),
         "not every long number has commas: 1440 is cut behind its third digit"),
        (_pick(_first_turn, re.compile(r"#### *-?(\d[\d,]*)")), "the sign is lost"),
        (_pick(_first_turn, re.compile(r"#+ *(-?\d[\d,]*)")),
         "the mark is four #, and one of them may stand before any number"),
        (_pick(lambda prompt, sequence: _new(prompt, sequence).split("\n\nQuestion:")[0]),
         "the next question may come without an empty line before it: cut at 'Question:'"),
        (_pick(lambda prompt, sequence: _new(prompt, sequence).split("Question")[0]),
         "an answer may hold the word Question; a new one begins with 'Question:', and a colon"),
        (_pick(lambda prompt, sequence: sequence.split("Answer:", 2)[-1].split("Question:")[0]),
         "not every prompt has one example: cut it off by its length"),
        (_pick(_first_turn, re.compile(r"#### *(-?\d+)")), "a number is cut at its first comma"),
        (_pick(_first_turn, _NUMBER), "the first number belongs to the working; look for the mark"),
        (_pick(_first_turn, _NUMBER, -1), "without a mark there is no answer, whatever number "
                                          "comes last"),
        (_pick(lambda prompt, sequence: sequence.split(prompt)[-1].split("Question:")[0]),
         "the model may repeat its prompt: cut its length off, once"),
        (lambda prompt, sequence: _MARKED.search(_first_turn(prompt, sequence))[1].replace(",", ""),
         "without a mark, search returns None: the answer is then the empty text"),
    ]))
