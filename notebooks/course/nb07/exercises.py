"""Exercises of notebook 07: a mixed batch, an exact combination; then an adapter cut to a budget,
in three steps."""
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from ..kit.exercise import Exercise, register

# --- 1. A batch whose rows use different adapters ------------------------------------------


def mixed_batch(x: Tensor, weight: Tensor, adapters: dict, names: list) -> Tensor:
    y = x @ weight.T  # (rows, in) -> (rows, out): the base once, for all rows
    for name, (a, b, scale) in adapters.items():
        rows = [i for i, chosen in enumerate(names) if chosen == name]
        y[rows] += scale * (x[rows] @ a.T) @ b.T
    return y


def _all_on_every_row(x, weight, adapters, names):
    return x @ weight.T + sum(s * (x @ a.T) @ b.T for a, b, s in adapters.values())


def _first_for_all(x, weight, adapters, names):
    first = next(name for name in names if name is not None)
    return mixed_batch(x, weight, adapters, [first] * len(names))


def _no_scale(x, weight, adapters, names):
    plain = {name: (a, b, 1.0) for name, (a, b, _) in adapters.items()}
    return mixed_batch(x, weight, plain, names)


def _adapter_alone(x, weight, adapters, names):
    return mixed_batch(x, torch.zeros_like(weight), adapters, names)


def _left_grouped(x, weight, adapters, names):
    order = sorted(range(len(names)), key=lambda i: str(names[i]))
    return mixed_batch(x, weight, adapters, names)[order]


def _none_is_zero(x, weight, adapters, names):
    y = mixed_batch(x, weight, adapters, names)
    y[[i for i, name in enumerate(names) if name is None]] = 0
    return y


def _one_row_each(x, weight, adapters, names):
    kept = [name if name not in names[:i] else None for i, name in enumerate(names)]
    return mixed_batch(x, weight, adapters, kept)


def _overwritten(x, weight, adapters, names):
    chosen = torch.tensor([name is not None for name in names])
    return torch.where(chosen[:, None], _adapter_alone(x, weight, adapters, names), x @ weight.T)


def _layer(g: torch.Generator, rows: int, ranks: dict[str, int], out: int = 3, inside: int = 5):
    x, weight = torch.randn(rows, inside, generator=g), torch.randn(out, inside, generator=g)
    adapters = {
        name: (torch.randn(r, inside, generator=g), torch.randn(out, r, generator=g), 2.0 / r)
        for name, r in ranks.items()}
    return x, weight, adapters


register(Exercise(
    name="mixed_batch",
    reference=mixed_batch,
    cases=[
        (lambda g: (*_layer(g, 4, {"a": 1, "b": 3}), ["b", "a", None, "b"]),
         "two adapters, a bare row"),
        (lambda g: (*_layer(g, 3, {"a": 4, "b": 1}), ["a", "a", "a"]), "one adapter for all"),
        (lambda g: (*_layer(g, 2, {"a": 1}), [None, None]), "the base alone"),
        (lambda g: (*_layer(g, 5, {"a": 1, "b": 4, "c": 3}), ["c", "b", "a", "b", "c"]),
         "three ranks"),
    ],
    mistakes=[
        (_all_on_every_row, "every row got every adapter: pick the rows whose name is this "
                            "adapter's"),
        (_first_for_all, "all rows got the first row's adapter: each row has its own name"),
        (_no_scale, "the third value of an adapter is its scale, alpha / r: multiply by it"),
        (_adapter_alone, "the base's output is missing: y = x W^T + the adapter's part"),
        (_left_grouped, "right rows, in the order of their names: put each back at its place"),
        (_none_is_zero, "None means the base alone, x W^T, not zero"),
        (_one_row_each, "several rows may share an adapter: take all of them, not the first"),
        (lambda x, weight, adapters, names: x @ weight.T,
         "this is the base for every row: add the adapters (y[rows] alone is a copy; "
         "y[rows] += ... writes into y)"),
        (_overwritten, "the adapter's part took the base's place: add it, y[rows] += ..."),
        (lambda x, weight, adapters, names: mixed_batch(x, weight, {
            n: (a, b, s / len(a)) for n, (a, b, s) in adapters.items()}, names),
         "the scale is alpha / r already: do not divide by the rank again"),
        (lambda x, weight, adapters, names: mixed_batch(x, weight, {
            n: (a, b, s * s) for n, (a, b, s) in adapters.items()}, names),
         "the scale counts squared: multiply by it once"),
        (lambda x, weight, adapters, names: mixed_batch(x, weight, adapters,
                                                        names[-1:] + names[:-1]),
         "each row has the adapter of the row before it: row i uses names[i]"),
        (lambda x, weight, adapters, names: mixed_batch(x, weight, adapters,
                                                        names[1:] + names[:1]),
         "each row has the adapter of the row after it: row i uses names[i]"),
        (lambda x, weight, adapters, names: mixed_batch(
            x, weight * len({n for n in names if n}), adapters, names),
         "the base's output is there once for each adapter: compute it once, before the loop"),
        (lambda x, weight, adapters, names: adapters[None],
         "None is no adapter's name: such a row stays as the base makes it"),
        (lambda x, weight, adapters, names: x @ weight,
         "shapes do not fit: weights are (out, in), A (r, in), B (out, r), so each product takes "
         "a transpose, and an adapter's part has the rows of x[rows] alone"),
    ],
))

# --- 2. A weighted sum of adapters, exactly ------------------------------------------------


def combine(adapters: list, weights: list) -> tuple[Tensor, Tensor]:
    b = torch.cat([b for _, b, _ in adapters], dim=1)  # (out, sum of ranks)
    a = torch.cat([w * s * a for w, (a, _, s) in zip(weights, adapters)])  # (sum of ranks, in)
    return b, a


def _sum_of_factors(adapters, weights):
    b = sum(b for _, b, _ in adapters)
    return b, sum(w * s * a for w, (a, _, s) in zip(weights, adapters))


def _weighted_both(adapters, weights):
    b, a = combine(adapters, weights)
    return torch.cat([w * b for w, (_, b, _) in zip(weights, adapters)], dim=1), a


def _forgot_scales(adapters, weights):
    return combine([(a, b, 1.0) for a, b, _ in adapters], weights)


def _forgot_weights(adapters, weights):
    return combine(adapters, [1.0] * len(weights))


def _mean(adapters, weights):
    return combine(adapters, [w / sum(weights) for w in weights])


def _dense(adapters, weights):
    b, a = combine(adapters, weights)
    return b @ a


def _a_first(adapters, weights):
    return combine(adapters, weights)[::-1]


def _b_carries(adapters, weights):
    b = torch.cat([w * s * b for w, (_, b, s) in zip(weights, adapters)], dim=1)
    return b, torch.cat([a for a, _, _ in adapters])


def _scales_in_b(adapters, weights):
    b = torch.cat([s * b for _, b, s in adapters], dim=1)
    return b, torch.cat([w * a for w, (a, _, _) in zip(weights, adapters)])


def _shared_between(adapters, weights):
    roots = [abs(w * s) ** 0.5 for w, (_, _, s) in zip(weights, adapters)]
    signs = [1 if w >= 0 else -1 for w in weights]
    b = torch.cat([root * b for root, (_, b, _) in zip(roots, adapters)], dim=1)
    return b, torch.cat([sign * root * a
                         for sign, root, (a, _, _) in zip(signs, roots, adapters)])


def _absolute(adapters, weights):
    return combine(adapters, [abs(w) for w in weights])


def _pairs(g: torch.Generator, *ranks: int, out: int = 4, inside: int = 3) -> list:
    return [(torch.randn(r, inside, generator=g), torch.randn(out, r, generator=g), 2.0 / (r + 1))
            for r in ranks]


register(Exercise(
    name="combine",
    reference=combine,
    cases=[
        (lambda g: (_pairs(g, 2, 2), [0.5, 0.75]), "two of rank 2"),
        (lambda g: (_pairs(g, 1, 1, 1), [0.25, 0.25, 0.25]), "three, a quarter each"),
        (lambda g: (_pairs(g, 2, 2), [1.0, -0.5]), "one is subtracted"),
        (lambda g: (_pairs(g, 1, 3), [0.5, 2.0]), "ranks 1 and 3"),
    ],
    mistakes=[
        (_sum_of_factors, "adding A to A and B to B makes cross terms B1 A2 that no adapter ever "
                          "was: put the B's side by side and the A's below one another"),
        (_weighted_both, "the weight is in A and in B, so it counts squared: A alone carries it"),
        (_forgot_scales, "each adapter has a scale, alpha / r, of its own: A carries weight times "
                         "scale"),
        (_forgot_weights, "the weights are not used"),
        (_mean, "weights are taken as they are: they need not sum to 1"),
        (_dense, "this is the dense update; return the two thin factors B and A"),
        (_a_first, "right factors, in the other order: return B, then A"),
        (_b_carries, "the same update, but B carries the factors: let A carry them"),
        (_scales_in_b, "its product is right, but B carries the scales: let A carry w_i s_i"),
        (lambda adapters, weights: combine(adapters[::-1], weights[::-1]),
         "the same update, with the adapters in another order than they came"),
        (lambda adapters, weights: combine([(a, s * b, s) for a, b, s in adapters], weights),
         "the scale is in A and in B, so it counts squared: A alone carries it"),
        (lambda adapters, weights: combine([(a, b, 1.0) for a, b, _ in adapters],
                                           [1.0] * len(weights)),
         "neither weights nor scales are used: A carries w_i s_i"),
        (lambda adapters, weights: _shared_between(adapters, weights),
         "its product is right, but the factor is shared between A and B as roots: let A carry "
         "all of it"),
        (lambda adapters, weights: combine([(a, b, 1 / s) for a, b, s in adapters], weights),
         "divided by the scale: multiply by it"),
        (lambda adapters, weights: combine([(a, b, adapters[0][2]) for a, b, _ in adapters],
                                           weights),
         "all have the first one's scale: each adapter has its own"),
        (lambda adapters, weights: combine(adapters, [w / len(weights) for w in weights]),
         "this is divided by the number of adapters: wanted is the sum, not the mean"),
        (_absolute, "a negative weight subtracts: keep its sign"),
    ],
))

# --- 3. What a lower rank keeps --------------------------------------------------------------


def kept_energy(b: Tensor, a: Tensor, rank: int) -> float:
    squares = torch.linalg.svdvals(b @ a) ** 2  # (min(out, in),), falling
    return (squares[:rank].sum() / squares.sum()).item()


def _not_squared(b, a, rank):
    s = torch.linalg.svdvals(b @ a)
    return (s[:rank].sum() / s.sum()).item()


def _first_columns(b, a, rank):
    return ((b[:, :rank] @ a[:rank]).norm() ** 2 / (b @ a).norm() ** 2).item()


def _of_b_alone(b, a, rank):
    return kept_energy(b, torch.eye(b.shape[1]), rank)


def _lost(b, a, rank):
    return 1 - kept_energy(b, a, rank)


def _smallest(b, a, rank):
    squares = torch.linalg.svdvals(b @ a).flip(0) ** 2
    squares = squares[-b.shape[1]:] if len(squares) > b.shape[1] else squares
    return (squares[:rank].sum() / squares.sum()).item()


def _norm_of_what_is_lost(b, a, rank):
    return 1 - max(0.0, 1 - kept_energy(b, a, rank)) ** 0.5


def _ratio_of_norms(b, a, rank):
    return kept_energy(b, a, rank) ** 0.5


def _ratio_of_ranks(b, a, rank):
    return rank / b.shape[1]


def _one_more(b, a, rank):
    return kept_energy(b, a, rank + 1)


def _factors(g: torch.Generator, out: int, rank: int, inside: int) -> tuple[Tensor, Tensor]:
    spread = torch.arange(1, rank + 1.0)
    return torch.randn(out, rank, generator=g) * spread, torch.randn(rank, inside, generator=g)


register(Exercise(
    name="kept_energy",
    reference=kept_energy,
    cases=[
        (lambda g: (*_factors(g, 6, 4, 5), 1), "rank 4 to 1"),
        (lambda g: (*_factors(g, 8, 4, 8), 3), "rank 4 to 3"),
        (lambda g: (*_factors(g, 5, 2, 7), 1), "rank 2 to 1"),
        (lambda g: (*_factors(g, 6, 3, 4), 3), "all of it: 1"),
    ],
    mistakes=[
        (_not_squared, "energy is the sum of SQUARED singular values"),
        (_first_columns, "the first columns of B are not its best ones: the singular values of "
                         "the product B A tell what to keep"),
        (_of_b_alone, "these are the singular values of B; those of the product B A count"),
        (_lost, "this is the share that is lost: 1 minus it is kept"),
        (_smallest, "the LARGEST singular values are kept; svdvals gives them in falling order"),
        (_ratio_of_norms, "this is the ratio of the norms; the energy is its square"),
        (_ratio_of_ranks, "the directions do not weigh the same: sum their squared singular "
                          "values"),
        (lambda b, a, rank: kept_energy(b, a, rank - 1),
         "one too few: [:rank] are the first `rank` of them"),
        (lambda b, a, rank: _not_squared(b, a, rank) ** 2,
         "square each singular value, then sum; you sum first"),
        (lambda b, a, rank: kept_energy(b, a, rank) * ((b @ a) ** 2).sum().item(),
         "this is the energy that is kept; asked is its share of all of it"),
        (lambda b, a, rank: kept_energy(b, a, rank) - kept_energy(b, a, rank - 1),
         "this is the share of one direction; sum those of the first `rank`"),
        (lambda b, a, rank: kept_energy(a, b, rank),
         "shapes do not fit: the update is B A, (out, r) @ (r, in)"),
        (_one_more, "one too many: [:rank] are the first `rank` of them"),
        (_norm_of_what_is_lost, "this is 1 - |R| / |BA| with the rest R: energies are squares, so "
                                "it is 1 - |R|^2 / |BA|^2"),
        (lambda b, a, rank: kept_energy(torch.eye(len(a)), a, rank),
         "these are the singular values of A; those of the product B A count"),
        (lambda b, a, rank: kept_energy(b, a, rank) * b.shape[1] / rank,
         "divided by the mean share of a rank; asked is the share itself"),
    ],
))

# --- Cut it, without ever forming B A ----------------------------------------------------------


class WrongShape(ValueError):
    """Two factors that do not have the lower rank."""


def update_of(cut: Callable) -> Callable:
    """A function that cuts (b, a) to a rank, as a function that returns the product of what it
    returns: the factors of an update are not unique. It is the function's attribute `cut`."""
    def update(b: Tensor, a: Tensor, rank: int) -> Tensor:
        factors = cut(b, a, rank)
        if factors is None:
            return None
        new_b, new_a = factors
        if new_b.shape != (len(b), rank) or new_a.shape != (rank, a.shape[1]):
            raise WrongShape(f"got B {tuple(new_b.shape)} and A {tuple(new_a.shape)}; expected "
                             f"{(len(b), rank)} and {(rank, a.shape[1])}")
        return new_b @ new_a

    update.cut = cut
    return update


def _cut(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best B (out, rank) and A (rank, in), by the singular values of the small core."""
    q1, r1 = torch.linalg.qr(b)
    q2, r2 = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r1 @ r2.T)
    return q1 @ (u[:, :rank] * s[:rank]), (q2 @ vh.T)[:, :rank].T


def _parts(b, a):
    q1, r1 = torch.linalg.qr(b)
    q2, r2 = torch.linalg.qr(a.T)
    return q1, r1, q2, r2


def _first_ranks(b, a, rank):
    return b[:, :rank], a[:rank]


def _without_values(b, a, rank):
    q1, r1, q2, r2 = _parts(b, a)
    u, _, vh = torch.linalg.svd(r1 @ r2.T)
    return q1 @ u[:, :rank], (q2 @ vh.T)[:, :rank].T


def _values_twice(b, a, rank):
    q1, r1, q2, r2 = _parts(b, a)
    u, s, vh = torch.linalg.svd(r1 @ r2.T)
    return q1 @ (u[:, :rank] * s[:rank]), s[:rank, None] * (q2 @ vh.T)[:, :rank].T


def _the_smallest(b, a, rank):
    q1, r1, q2, r2 = _parts(b, a)
    u, s, vh = torch.linalg.svd(r1 @ r2.T)
    return q1 @ (u[:, -rank:] * s[-rank:]), (q2 @ vh.T)[:, -rank:].T


def _core_not_turned(b, a, rank):
    q1, r1, q2, r2 = _parts(b, a)
    u, s, vh = torch.linalg.svd(r1 @ r2)
    return q1 @ (u[:, :rank] * s[:rank]), (q2 @ vh.T)[:, :rank].T


def _v_not_turned(b, a, rank):
    q1, r1, q2, r2 = _parts(b, a)
    u, s, vh = torch.linalg.svd(r1 @ r2.T)
    return q1 @ (u[:, :rank] * s[:rank]), (q2 @ vh)[:, :rank].T


def _around_the_core(b, a, rank):
    q1, r1, q2, r2 = _parts(b, a)
    u, s, vh = torch.linalg.svd(r1 @ r2.T)
    return b @ (u[:, :rank] * s[:rank]), vh[:rank] @ a


def _each_alone(b, a, rank):
    def best(m):
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        return u[:, :rank] * s[:rank] @ vh[:rank]

    return _cut_of_product(best(b) @ best(a), rank)


def _cut_of_product(m, rank):
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def _not_cut(b, a, rank):
    raise WrongShape


def _scaled_up(b, a, rank):
    """What is left is made as long as the whole was."""
    new_b, new_a = _cut(b, a, rank)
    return new_b * ((b @ a).norm() / (new_b @ new_a).norm()), new_a


register(Exercise(
    name="cut_adapter",
    reference=update_of(_cut),
    cases=[
        (lambda g: (*_factors(g, 6, 4, 5), 1), "rank 4 to 1"),
        (lambda g: (*_factors(g, 8, 4, 8), 3), "rank 4 to 3"),
        (lambda g: (*_factors(g, 40, 8, 30), 2), "rank 8 to 2, a wider layer"),
        (lambda g: (*_factors(g, 7, 3, 9), 3), "all of it: the update stays"),
    ],
    mistakes=[
        (update_of(_first_ranks), "the first columns of B are not its best ones: take singular "
                                  "values of the core R1 R2^T"),
        (update_of(_without_values), "the singular values are missing: one of the two factors "
                                     "carries them"),
        (update_of(_values_twice), "both factors carry the singular values, so they count "
                                   "squared: one alone, or each their square roots"),
        (update_of(_the_smallest), "these are the smallest singular values: the first are the "
                                   "largest"),
        (update_of(_core_not_turned), "A^T = Q2 R2, so A = R2^T Q2^T: the core is R1 R2^T"),
        (update_of(_v_not_turned), "svd returns V^T: Q2 V is q2 @ vh.T"),
        (update_of(_around_the_core), "U and V belong to the core: multiply them by Q1 and Q2, not "
                                      "by B and A, which hold R1 and R2 too"),
        (update_of(_each_alone), "B and A are cut apart: what counts are the singular values of "
                                 "their product"),
        (update_of(_not_cut), "shapes do not fit: B must come back as (out, rank), A as "
                              "(rank, in)"),
        (update_of(_scaled_up), "the best cut keeps the singular values as they are: do not "
                                "scale it up for what is lost"),
        (update_of(lambda b, a, rank: tuple(2**0.5 * f for f in _cut(b, a, rank))),
         "twice the update: the factors are not scaled"),
    ],
    atol=1e-4))

# --- Ranks under a budget ----------------------------------------------------------------


def _shared(value):
    """Ranks by falling worth; value(s, cost) is the worth of a rank with singular value s."""
    def share(values: list, costs: list, budget: int) -> list:
        ranks, left = [0] * len(values), budget
        offers = [(value(s, cost), layer) for layer, (own, cost) in enumerate(zip(values, costs))
                  for s in own]
        for _, layer in sorted(offers, reverse=True):
            if costs[layer] <= left:
                ranks[layer] += 1
                left -= costs[layer]
        return ranks

    return share


share_ranks = _shared(lambda s, cost: s * s / cost)  # the most energy for each parameter


def _offers(values, costs):
    return sorted(((s * s / costs[i], i) for i, own in enumerate(values) for s in own),
                  reverse=True)


def _equal(values, costs, budget):
    return [budget // sum(costs)] * len(values)


def _stops_at_the_first_misfit(values, costs, budget):
    ranks, left = [0] * len(values), budget
    for _, layer in _offers(values, costs):
        if costs[layer] > left:
            break
        ranks[layer] += 1
        left -= costs[layer]
    return ranks


def _over_budget(values, costs, budget):
    ranks, left = [0] * len(values), budget
    for _, layer in _offers(values, costs):
        if left > 0:
            ranks[layer] += 1
            left -= costs[layer]
    return ranks


def _never_less(values, costs, budget):
    ranks = [0] * len(values)
    for _, layer in _offers(values, costs):
        ranks[layer] += costs[layer] <= budget
    return ranks


def _something_must_be_left(values, costs, budget):
    return share_ranks(values, costs, budget - 1)


def _best_of_all(values, costs, budget):
    """The most energy that the budget can keep, tried out."""
    best, found = -1.0, [0] * len(values)
    for ranks in product(*(range(len(own) + 1) for own in values)):
        if sum(r * c for r, c in zip(ranks, costs)) <= budget:
            energy = sum(s * s for own, n in zip(values, ranks) for s in own[:n])
            if energy > best + 1e-12:
                best, found = energy, list(ranks)
    return found


def _everything_at_once(values, costs, budget):
    """A layer's worth is that of all its ranks together."""
    ranks, left = [0] * len(values), budget
    for i in sorted(range(len(values)), key=lambda i: -sum(s * s for s in values[i]) / costs[i]):
        while ranks[i] < len(values[i]) and costs[i] <= left:
            ranks[i] += 1
            left -= costs[i]
    return ranks


def _in_turns(values, costs, budget):
    ranks, left = [0] * len(values), budget
    for step in range(max(map(len, values))):
        for i, own in enumerate(values):
            if step < len(own) and costs[i] <= left:
                ranks[i] += 1
                left -= costs[i]
    return ranks


def _counts_ranks(values, costs, budget):
    return share_ranks(values, [1] * len(costs), budget // max(costs))


def _one_layer_after_the_other(values, costs, budget):
    ranks, left = [0] * len(values), budget
    for layer in sorted(range(len(values)), key=lambda i: -sum(s * s for s in values[i])):
        ranks[layer] = min(len(values[layer]), left // costs[layer])
        left -= ranks[layer] * costs[layer]
    return ranks


register(Exercise(
    name="share_ranks",
    reference=share_ranks,
    cases=[
        (lambda g: ([[5.0, 1.0, 0.5], [4.0, 3.0, 2.0]], [8, 8], 16), "equal costs"),
        (lambda g: ([[3.0, 2.9, 1.0], [4.0, 3.9, 3.8]], [4, 16], 16),
         "one costs four times as much"),
        (lambda g: ([[9.0, 8.0], [1.0, 0.5], [0.4, 0.2]], [10, 6, 4], 25), "what is left over fits "
                                                                       "a cheap one"),
        (lambda g: ([[0.5, 0.4], [0.9, 0.8]], [3, 5], 11), "values below 1"),
        (lambda g: ([[2.0], [3.0]], [5, 5], 4), "nothing fits"),
        (lambda g: ([[4.0], [2.2]], [16, 4], 16), "a small layer whose rank is worth a little more "
                                               "for each parameter"),
        (lambda g: ([[3.0], [2.2, 2.1]], [6, 5], 10), "two ranks of the second layer would keep "
                                                      "more than one of the first"),
    ],
    mistakes=[
        (_shared(lambda s, cost: s * s), "a rank in a large layer costs more: compare the energy "
                                         "for each parameter, s² / cost"),
        (_shared(lambda s, cost: s / cost), "energy is the SQUARE of the singular value, and the "
                                            "cost is not squared: s² / cost"),
        (_shared(lambda s, cost: -s * s / cost), "this serves the smallest first; sort the offers "
                                                 "from the most energy a parameter down"),
        (_equal, "this gives every layer the same rank; the layers compete, rank by rank"),
        (_stops_at_the_first_misfit, "an offer that no longer fits is skipped: a cheaper one "
                                     "further down may still fit"),
        (_over_budget, "the last rank exceeds the budget: it must fit into what is left"),
        (_never_less, "what was given out is gone: take it off the budget"),
        (_something_must_be_left, "a rank that costs exactly what is left still fits: <=, not <"),
        (lambda values, costs, budget: [r * c for r, c in zip(share_ranks(values, costs, budget),
                                                              costs)],
         "these are parameters a layer; return ranks"),
        (_counts_ranks, "the budget counts parameters, not ranks: each rank costs its layer's "
                        "in + out"),
        (_best_of_all, "this is the best share of all, a knapsack's: asked is rank by rank, the "
                       "best offer first, and nothing is taken back"),
        (_everything_at_once, "a layer's ranks are offered one by one: its second one is worth "
                              "less than its first"),
        (_in_turns, "every layer gets one in turn; sort the ranks of all layers by their worth"),
        (_one_layer_after_the_other, "one layer takes all it can before the next is asked; sort "
                                     "the ranks of all layers together"),
    ],
))
