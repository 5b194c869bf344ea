"""Exercises of notebook 10: blocks of GGUF, rows in llama.cpp's order, an adapter's file, and a
verifier of what is served, in four steps."""
import torch
from torch import Tensor

from ..kit.exercise import Exercise, register

# --- 1. A block of Q4_0 -----------------------------------------------------------------------


def q4_0_blocks(codes: Tensor, d: Tensor) -> Tensor:
    head = d.unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat([head, codes[..., :16] | codes[..., 16:] << 4], -1)


def _head(d):
    return d.unsqueeze(-1).contiguous().view(torch.uint8)


def _packed(body, head=_head):
    return lambda codes, d: torch.cat([head(d), body(codes)], -1)


def _halves(codes):
    return codes[..., :16] | codes[..., 16:] << 4


def _codes(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 16, (*shape, 32), generator=g).to(torch.uint8)


def _half(*numbers) -> Tensor:
    return torch.tensor(numbers).half()


register(Exercise(
    name="q4_0_blocks",
    reference=q4_0_blocks,
    cases=[
        (lambda g: (_codes(g), torch.tensor(0.0123).half()), "one block"),
        (lambda g: (_codes(g, 3), _half(0.01, 0.7, 3.3)), "three blocks"),
        (lambda g: (_codes(g, 2, 2), _half(0.01, 0.02, 0.03, 0.04).view(2, 2)),
         "two rows of two blocks"),
        (lambda g: (_codes(g, 2), _half(-0.11, 6e-6)), "a d below 0, and one near 0"),
    ],
    mistakes=[
        (_packed(lambda codes: codes[..., 0::2] | codes[..., 1::2] << 4),
         "these are neighbors in one byte, as our own `pack` has them: in GGUF code i shares its "
         "byte with code i + 16"),
        (_packed(lambda codes: codes[..., :16] << 4 | codes[..., 16:]),
         "the halves are swapped: codes 0 to 15 go into the low halves"),
        (_packed(lambda codes: codes[..., 0::2] << 4 | codes[..., 1::2]),
         "this is the order of bitsandbytes: neighbors in one byte, the first in the high half"),
        (lambda codes, d: torch.cat([_halves(codes), _head(d)], -1), "d comes before the codes"),
        (_packed(_halves, lambda d: _head(d).flip(-1)), "d's low byte comes first: view shows the "
                                                        "bytes as the file has them"),
        (_packed(_halves, lambda d: _head(d.float())), "d has two bytes: fp16, as it is"),
        (_packed(_halves, lambda d: d.unsqueeze(-1).to(torch.uint8)),
         "to(torch.uint8) turns d's value into a whole number; view(torch.uint8) shows its bytes"),
        (_packed(lambda codes: codes[..., :16] | codes[..., 16:]),
         "both codes lie on the low half: shift the second by 4"),
        (_packed(lambda codes: _halves(codes - 8 & 15)),
         "codes go in as they are, 0 to 15: it is the reader who subtracts 8"),
        (_packed(lambda codes: codes[..., :16] | codes[..., 16:].flip(-1) << 4),
         "the high halves run forward too: code 16 first, code 31 last"),
    ]))

# --- 2. Reading one ---------------------------------------------------------------------------


def read_q4_0(blocks: Tensor) -> Tensor:
    d = blocks[..., :2].contiguous().view(torch.float16).float()
    body = blocks[..., 2:]
    return d * (torch.cat([body & 15, body >> 4], -1).float() - 8)


def _read(order=lambda low, high: torch.cat([low, high], -1), minus=lambda q: q.float() - 8,
          d=lambda blocks: blocks[..., :2].contiguous().view(torch.float16).float(),
          body=lambda blocks: blocks[..., 2:]):
    return lambda blocks: d(blocks) * minus(order(body(blocks) & 15, body(blocks) >> 4))


register(Exercise(
    name="read_q4_0",
    reference=read_q4_0,
    cases=[
        (lambda g: (q4_0_blocks(_codes(g), torch.tensor(0.0123).half()),), "one block"),
        (lambda g: (q4_0_blocks(_codes(g, 3), _half(0.01, 0.7, 3.3)),), "three blocks"),
        (lambda g: (q4_0_blocks(_codes(g, 2, 2), _half(0.01, 0.02, 0.03, 0.04).view(2, 2)),),
         "two rows of two blocks"),
        (lambda g: (q4_0_blocks(_codes(g, 2), _half(-0.11, 0.4)),), "a d below 0"),
    ],
    mistakes=[
        (_read(lambda low, high: torch.stack([low, high], -1).flatten(-2)),
         "the two halves of a byte are no neighbors: first all the low ones, then all the high"),
        (_read(lambda low, high: torch.cat([high, low], -1)),
         "the low halves hold codes 0 to 15, the high ones 16 to 31"),
        (_read(minus=lambda q: q.float()), "the codes are 0 to 15; weights are d (q - 8)"),
        (_read(minus=lambda q: (q - 8).float()),
         "uint8 knows nothing below 0, so 3 - 8 is 251: turn codes into floats, then subtract"),
        (_read(minus=lambda q: q.float() - 7.5), "the zero-point is a code, 8, not the middle"),
        (_read(minus=lambda q: q.float() - 16 * (q > 7)),
         "the halves are no signed numbers: 15 stands for +7, not for -1"),
        (_read(d=lambda blocks: blocks[..., -2:].contiguous().view(torch.float16).float(),
               body=lambda blocks: blocks[..., :-2]), "d are the first two bytes, not the last"),
        (_read(d=lambda blocks: blocks[..., :2].flip(-1).contiguous().view(torch.float16).float()),
         "d's low byte comes first, as `view` takes it"),
        (lambda blocks: _read(d=lambda b: b[..., :2].contiguous().view(torch.float16))(
            blocks).half(), "asked is fp32: in fp16 the product of d and a code is rounded"),
        (lambda blocks: _read(minus=lambda q: q.float())(blocks) - 8,
         "subtract 8 from the code, before d multiplies it"),
        (_read(d=lambda blocks: blocks[..., :1].float()), "d is one fp16 of two bytes: view them "
                                                          "as torch.float16"),
    ],
    atol=1e-8))

# --- 3. What Q4_1 loses -----------------------------------------------------------------------


def offset_loss(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    exact = scale.float() * zero.float()
    return (exact.half().float() - exact).abs(), exact * 2**-11


def _lost(scale, zero):
    return offset_loss(scale, zero)[0]


def _exact(scale, zero):
    return scale.float() * zero.float()


def _in_fp16(scale, zero):
    exact = (scale * zero.half()).float()
    return (exact.half().float() - exact).abs(), exact * 2**-11


def _half_step(scale, zero):
    exact = _exact(scale, zero)
    return _lost(scale, zero), torch.where(exact > 0, 2.0 ** (exact.log2().floor() - 11), 0)


def _grids(g: torch.Generator, n: int, low: float, high: float) -> tuple[Tensor, Tensor]:
    scale = low + (high - low) * torch.rand(n, generator=g)
    return scale.half(), torch.randint(0, 16, (n,), generator=g).to(torch.uint8)


register(Exercise(
    name="offset_loss",
    reference=offset_loss,
    cases=[
        (lambda g: _grids(g, 8, 0.005, 0.05), "scales of a real layer"),
        (lambda g: (_half(0.0123, 0.0123, 0.0123, 0.0123, 0.0123),
                    torch.tensor([0, 1, 2, 4, 8], dtype=torch.uint8)),
         "zero-points 0, 1, 2, 4 and 8"),
        (lambda g: _grids(g, 6, 1e-6, 4e-6), "scales near 0, where nothing is lost"),
        (lambda g: _grids(g, 6, 1.0, 90.0), "large scales"),
    ],
    mistakes=[
        (lambda scale, zero: (_lost(scale, zero), _exact(scale, zero) * 2**-10),
         "a number lies at most half a step from the nearest one: 2^-11"),
        (lambda scale, zero: (_lost(scale, zero), (_exact(scale, zero) * 2**-11).clamp(
            min=2**-25)), "the bound needs no floor: a scale near 0 is a multiple of 2^-24, so its "
                          "product is one too, and is held exactly"),
        (_half_step, "this is half a step where m lies, which is right and tighter; asked is the "
                     "simple bound, 2^-11 |m|"),
        (lambda scale, zero: (_lost(scale, zero), -offset_loss(scale, zero)[1]),
         "m is negative, but a bound is a size: 2^-11 |m|"),
        (lambda scale, zero: (_exact(scale, zero).half().float() - _exact(scale, zero),
                              offset_loss(scale, zero)[1]), "asked is a size: take abs()"),
        (_in_fp16, "the product was rounded before you looked: multiply in fp32, which holds it "
                   "exactly"),
        (lambda scale, zero: (_lost(scale, zero), _exact(scale, zero) * 2**-9),
         "this is bfloat16's half step, 2^-9; fp16 has 10 bits behind the point"),
        (lambda scale, zero: (_lost(scale, zero) / _exact(scale, zero).clamp(min=1e-12),
                              offset_loss(scale, zero)[1]),
         "asked is how far the weights move, not the part of the offset"),
        (lambda scale, zero: (_lost(scale, zero) / scale.float(), offset_loss(scale, zero)[1]),
         "asked is how far the weights move, not how many steps of the grid that is"),
        (lambda scale, zero: (_lost(scale, zero), 15 * scale.float() * 2**-11),
         "each block has a zero-point of its own: 15 is the largest"),
        (lambda scale, zero: tuple(t.max() for t in offset_loss(scale, zero)),
         "one number a block, not the largest of all"),
        (lambda scale, zero: offset_loss(scale, zero)[::-1], "first what is lost, then the bound"),
        (lambda scale, zero: offset_loss(scale, torch.ones_like(zero)),
         "what is rounded is scale times zero; the scale alone is fp16 already"),
        (_lost, "two tensors are asked: what is lost, and its bound"),
        (lambda scale, zero: (_lost(scale, 8 - zero.float()), offset_loss(scale, zero)[1]),
         "Q4_1 does not subtract 8: m is minus scale times zero"),
    ],
    rtol=1e-5, atol=1e-13, exact_dtype=False))

# --- 4. Rows of q and k -----------------------------------------------------------------------


def rows_there(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * n, ...) of q or k in llama.cpp's order: i and i + n / 2 become neighbors."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rows_back(weight: Tensor, heads: int) -> Tensor:
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _back_in_place(weight, heads):
    weight.copy_(rows_back(weight, heads).clone())
    return weight


def _rows(g: torch.Generator, heads: int, n: int, *rest: int) -> tuple[Tensor, int]:
    return torch.randn(heads * n, *rest, generator=g), heads


register(Exercise(
    name="rows_back",
    reference=rows_back,
    cases=[
        (lambda g: _rows(g, 1, 8, 3), "one head of 8 features"),
        (lambda g: _rows(g, 2, 8, 4), "two heads of 8"),
        (lambda g: _rows(g, 3, 6, 2), "three heads of 6"),
        (lambda g: _rows(g, 2, 16), "a bias: one number a row"),
    ],
    mistakes=[
        (rows_there, "this goes to llama.cpp's order once more; the way back splits a head into "
                     "n / 2 pairs"),
        (lambda weight, heads: rows_back(weight, 1),
         "each head is in order by itself: the first comes before the second, whole"),
        (lambda weight, heads: weight.unflatten(0, (heads, -1, 2)).flatten(0, 2),
         "nothing has moved: swap the two axes of a head before you flatten them"),
        (lambda weight, heads: rows_back(
            weight.unflatten(0, (-1, 2)).flip(1).flatten(0, 1), heads),
         "the even rows of a head come first, then the odd ones"),
        (lambda weight, heads: weight.unflatten(0, (heads, -1)).flip(1).flatten(0, 1),
         "these are the rows of a head upside down"),
        (lambda weight, heads: weight.unflatten(0, (-1, 2, heads)).transpose(1, 2).transpose(
            0, 1).flatten(0, 2), "rows of one head lie together: the heads are the first axis"),
        (_back_in_place, "right rows, but they are written into the weight you were given"),
        (lambda weight, heads: weight.unflatten(0, (heads, -1, 2)).transpose(1, 2),
         "put the rows together again: flatten the three axes"),
    ]))

# --- 5. The adapter's file --------------------------------------------------------------------


def adapter_tensors(a: Tensor, b: Tensor, scale: float, heads: int | None):
    return a, b if heads is None else rows_there(b, heads), scale * len(a)


def _adapter(g: torch.Generator, rank: int, out: int, features: int, scale: float,
             heads: int | None) -> tuple:
    return (torch.randn(rank, features, generator=g), torch.randn(out, rank, generator=g), scale,
            heads)


def _written(a=lambda a, heads: a,
             b=lambda b, heads: b if heads is None else rows_there(b, heads),
             alpha=lambda scale, a, b: scale * len(a)):
    return lambda x, y, scale, heads: (a(x, heads), b(y, heads), alpha(scale, x, y))


register(Exercise(
    name="adapter_tensors",
    reference=adapter_tensors,
    cases=[
        (lambda g: _adapter(g, 8, 32, 12, 2.0, 4), "a q of four heads, rank 8"),
        (lambda g: _adapter(g, 8, 16, 12, 0.25, 2), "a k of two heads"),
        (lambda g: _adapter(g, 8, 12, 10, 2.0, None), "a v: its rows stay"),
        (lambda g: _adapter(g, 16, 32, 12, 8 / 3, 2), "a scale that is no whole number"),
    ],
    mistakes=[
        (_written(alpha=lambda scale, a, b: scale),
         "llama.cpp divides alpha by the rank: write scale times rank"),
        (lambda a, b, scale, heads: (a, scale * adapter_tensors(a, b, scale, heads)[1],
                                     scale * len(a)), "the scale is in B and in alpha: twice"),
        (_written(b=lambda b, heads: b),
         "the rows of q and k have moved, so B's rows must move along"),
        (_written(a=lambda a, heads: a if heads is None else rows_there(a, heads),
                  b=lambda b, heads: b), "A's rows are ranks, not features of a head: B's move"),
        (_written(a=lambda a, heads: a if heads is None else rows_there(a, heads)),
         "A's rows are ranks, not features of a head: A stays as it is"),
        (_written(b=lambda b, heads: b if heads is None else rows_back(b, heads)),
         "this is the way back; the file is in llama.cpp's order"),
        (_written(alpha=lambda scale, a, b: scale / len(a)),
         "upside down: scale is alpha / rank, so alpha is scale times rank"),
        (_written(alpha=lambda scale, a, b: scale * len(b)),
         "the rank is the number of A's rows, or of B's columns"),
        (_written(alpha=lambda scale, a, b: int(scale * len(a))),
         "alpha is a float in the file: do not cut it off"),
        (lambda a, b, scale, heads: adapter_tensors(a, b, scale, heads)[1::-1] + (
            scale * len(a),), "first A, then B"),
        (_written(b=lambda b, heads: rows_there(b, heads or 1)),
         "heads is None where no rows move: v, o and the MLP"),
    ]))

# --- 6. A verifier, in four steps -------------------------------------------------------------

RIGHT, MISSING, TWICE = "as measured", "adapter missing", "adapter merged twice"
Ids = list[list[int]]
Tokens = list[dict[int, float]]


def ids_cause(measured: Ids, served: Ids, bos: int | None) -> str:
    pairs = list(zip(measured, served))
    if all(s == m for m, s in pairs):
        return ""
    if all(s == [bos, *m] for m, s in pairs):
        return "bos twice"
    return "bos missing" if all([bos, *s] == m for m, s in pairs) else "wrong tokenizer"


def _by_length(measured, served, bos):
    more = {len(s) - len(m) for m, s in zip(measured, served)}
    return {0: "", 1: "bos twice", -1: "bos missing"}.get(
        more.pop() if len(more) == 1 else None, "wrong tokenizer")


def _without_bos(measured, served, bos):
    own = [[[i for i in ids if i != bos] for ids in rows] for rows in (measured, served)]
    return "" if own[0] == own[1] else "wrong tokenizer"


def _any_of(measured, served, bos):
    pairs = list(zip(measured, served))
    if measured == served:
        return ""
    if any(s == [bos, *m] for m, s in pairs):
        return "bos twice"
    return "bos missing" if any([bos, *s] == m for m, s in pairs) else "wrong tokenizer"


def _as_sets(measured, served, bos):
    same = all(set(m) == set(s) for m, s in zip(measured, served))
    return "" if same else ids_cause(measured, served, bos)


def _named(names: dict):
    return lambda measured, served, bos: names.get(
        cause := ids_cause(measured, served, bos), cause)


def _fronts(measured, served, bos):
    """Looks at what stands in front, and at nothing behind it."""
    if measured == served:
        return ""
    if all(s[:2] == [bos, bos] for s in served):
        return "bos twice"
    lacks = all(len(s) == len(m) - 1 and s[:1] != [bos] for m, s in zip(measured, served))
    return "bos missing" if lacks else "wrong tokenizer"


def _first_gone(measured, served, bos):
    lacks = all(m[1:] == s for m, s in zip(measured, served))
    return "bos missing" if lacks else ids_cause(measured, served, bos)


def _each_by_itself(measured, served, bos):
    causes = {ids_cause([m], [s], bos) for m, s in zip(measured, served)}
    alike = causes <= {"bos twice", "bos missing"}
    return sorted(causes)[-1] if alike else ids_cause(measured, served, bos)


def _begins_alike(measured, served, bos):
    cause = ids_cause(measured, served, bos)
    if cause == "wrong tokenizer" and all(s[:1] == [bos] for s in served):
        return ""
    return cause


_IDS = [[1, 5, 6, 7], [1, 8, 9], [1, 5, 5, 4, 3]]


def _prefixed(*first: int) -> Ids:
    return [[*first, *ids] for ids in _IDS]


register(Exercise(
    name="ids_cause",
    reference=ids_cause,
    cases=[
        (lambda g: (_IDS, _prefixed(1), 1), "a bos more, in every prompt"),
        (lambda g: (_IDS, [list(ids) for ids in _IDS], 1), "the same ids"),
        (lambda g: (_IDS, [ids[1:] for ids in _IDS], 1), "no bos in any prompt"),
        (lambda g: (_IDS, [[*ids, 1] for ids in _IDS], 1), "a bos more, but at the end"),
        (lambda g: (_IDS, [ids[:-1] for ids in _IDS], 1), "a token less, at the end"),
        (lambda g: (_IDS, [_IDS[0], [1, 9, 8], _IDS[2]], 1), "as many tokens, two have changed "
                                                             "places in the second prompt"),
        (lambda g: (_IDS, [[1, *_IDS[0]], *_IDS[1:]], 1), "a bos more in the first prompt alone"),
        (lambda g: (_IDS, [_IDS[0][1:], *_IDS[1:]], 1), "no bos in the first prompt alone"),
        (lambda g: (_IDS, _prefixed(0), 1), "another token more, in front"),
        (lambda g: ([ids[1:] for ids in _IDS], [[3, *ids[1:]] for ids in _IDS], None),
         "a tokenizer without bos, and a token more"),
        (lambda g: ([ids[1:] for ids in _IDS], [ids[2:] for ids in _IDS], None),
         "a tokenizer without bos, and a token less, in front"),
        (lambda g: (_IDS, [[1, 1, 7, 6, 5], [1, 1, 9, 8], [1, 1, 5, 4, 5, 3]], 1),
         "bos twice, and other tokens behind"),
        (lambda g: (_IDS, [[7, 6, 5], [9, 8], [5, 4, 5, 3]], 1),
         "no bos, and other tokens"),
        (lambda g: (_IDS, [[1, *_IDS[0]], _IDS[1][1:], [1, *_IDS[2]]], 1),
         "a bos more in two prompts, none in the third"),
    ],
    mistakes=[
        (_by_length, "one token more need not be a bos: compare the ids, not their numbers"),
        (lambda measured, served, bos: ids_cause(measured[:1], served[:1], bos),
         "all prompts must be so, not the first alone"),
        (_any_of, "a bos that only some prompts have more is no setting of the server: all must"),
        (_named({"bos twice": "bos missing", "bos missing": "bos twice"}),
         "twice and missing are swapped"),
        (_as_sets, "two lists with the same tokens are not the same prompt: order and number "
                   "count"),
        (_named({"bos twice": "wrong tokenizer", "bos missing": "wrong tokenizer"}),
         "a bos too many or too few has causes of its own"),
        (_without_bos, "bos belongs to the prompt: leave it in"),
        (_named({"": None}), "where nothing differs the answer is the empty text, not None"),
        (_named({"bos missing": "wrong tokenizer"}),
         "a prompt without its bos is a cause of its own: bos missing"),
        (_begins_alike, "that prompts begin alike is not enough: compare them to their end"),
        (_fronts, "what stands in front is not enough: the tokens behind it must be the measured "
                  "ones"),
        (_first_gone, "the token that is missing in front must be the bos"),
        (_each_by_itself, "some with one more and some without is no setting of a server: all "
                          "prompts must be the same way off"),
    ]))


def distance(measured: Tokens, served: Tokens) -> float:
    gaps = []
    for ours, theirs in zip(measured, served):
        least = max(-12.0, min(theirs.values()))
        gaps += [abs(max(theirs.get(token, least), least) - max(p, least))
                 for token, p in ours.items()]
    return sum(gaps) / len(gaps)


def _gaps(gap=lambda p, q, least: abs(max(q, least) - max(p, least)),
          shown=lambda theirs, token, least: theirs.get(token, least),
          tokens=lambda ours, theirs: ours, floor=-12.0):
    """What each prompt's tokens are off by; each argument is a place where one goes wrong."""
    def rows(measured, served):
        found = []
        for ours, theirs in zip(measured, served):
            least = max(floor, min(theirs.values()))
            found.append([gap(ours.get(t, least), shown(theirs, t, least), least)
                          for t in tokens(ours, theirs)])
        return found
    return rows


def _mean(rows):
    def mean(measured, served):
        gaps = sum(rows(measured, served), [])
        return sum(gaps) / len(gaps)
    return mean


def _mean_of_means(measured, served):
    means = [sum(gaps) / len(gaps) for gaps in _gaps()(measured, served)]
    return sum(means) / len(means)


def _by_rank(measured, served):
    gaps = [abs(p - q) for ours, theirs in zip(measured, served)
            for p, q in zip(ours.values(), theirs.values())]
    return sum(gaps) / len(gaps)


def _exp(x: float) -> float:
    return 2.718281828459045 ** x


_SHOWN = [{7: -0.1, 8: -2.5, 9: -5.0, 4: -6.0}, {3: -0.2, 5: -1.9, 6: -7.0}]

register(Exercise(
    name="distance",
    reference=distance,
    cases=[
        (lambda g: ([{7: -0.1, 8: -2.7}, {3: -0.25, 5: -1.8}], _SHOWN), "all tokens are shown"),
        (lambda g: ([{7: -0.3, 2: -1.4}, {3: -0.2, 8: -3.0}], _SHOWN), "two are not shown"),
        (lambda g: ([{7: -0.1, 8: -2.7, 9: -5.5}, {5: -0.6}], _SHOWN),
         "three tokens of one prompt, one of the other"),
        (lambda g: ([{7: -0.1, 8: -14.0}, {3: -0.2, 5: -30.0}],
                    [{7: -0.2, 8: -25.0}, {3: -0.1, 5: -13.0}]), "tokens below -12"),
        (lambda g: ([{7: -0.1, 8: -9.0}, {3: -0.2, 1: -9.5}], _SHOWN),
         "a measured one below all that are shown"),
        (lambda g: ([{8: -0.1, 7: -2.7}, {5: -0.25, 3: -1.8}], _SHOWN), "two have changed places"),
    ],
    mistakes=[
        (_mean(_gaps(tokens=lambda ours, theirs: [t for t in ours if t in theirs])),
         "a token that the server does not show is evidence too: it counts as the least it shows"),
        (_mean(_gaps(shown=lambda theirs, t, least: theirs.get(t, 0.0))),
         "0 is the log probability of certainty; what is not shown is unlikely"),
        (_mean(_gaps(shown=lambda theirs, t, least: theirs.get(t, -12.0),
                     gap=lambda p, q, least: abs(max(q, -12.0) - max(p, -12.0)))),
         "what is not shown may lie just below the least that is: count it as that"),
        (_mean_of_means, "one mean over all tokens of all prompts, not a mean of means"),
        (lambda measured, served: sum(sum(_gaps()(measured, served), [])),
         "this is the sum: divide by the number of tokens"),
        (_mean(_gaps(gap=lambda p, q, least: max(q, least) - max(p, least))),
         "differences of both signs cancel: take their size"),
        (_mean(_gaps(gap=lambda p, q, least: abs(_exp(max(q, least)) - _exp(max(p, least))))),
         "these are probabilities, in which unlikely tokens vanish: compare the logs"),
        (lambda measured, served: _mean(_gaps(gap=lambda p, q, least: (
            max(q, least) - max(p, least)) ** 2))(measured, served) ** 0.5,
         "this is the root of the mean square; asked is the mean"),
        (_mean(_gaps(gap=lambda p, q, least: abs(q - p))),
         "far below what is shown, noise is all there is: count nothing as less than the least"),
        (_mean(_gaps(tokens=lambda ours, theirs: theirs)),
         "ask for the measured tokens, not for those that the server shows"),
        (lambda measured, served: max(sum(_gaps()(measured, served), [])),
         "this is the largest difference; asked is the mean"),
        (_by_rank, "compare token by token: the likeliest of one may not be that of the other"),
        (_mean(_gaps(floor=-torch.inf)), "below -12 a log probability is noise: count it as -12"),
    ],
    rtol=1e-5))


def weights_cause(far: dict[str, float]) -> str:
    right = far[RIGHT]
    if right <= 0.1:
        return ""
    nearest = min(far, key=far.get)
    if nearest != RIGHT and far[nearest] < min(0.6, right / 2):
        return nearest
    return "rounding" if right <= 1.2 else "wrong base"


def _nearest_of_all(far):
    nearest = min(far, key=far.get)
    return "" if nearest == RIGHT else nearest


def _first_near(far):
    limit = min(0.6, far[RIGHT] / 2)
    near = [name for name, p in far.items() if name != RIGHT and p < limit]
    return weights_cause(far) if far[RIGHT] <= 0.1 or not near else near[0]


def _weighed(close=0.1, near=0.6, half=2.0, limit=1.2, names=("rounding", "wrong base")):
    def cause(far):
        right = far[RIGHT]
        if right <= close:
            return ""
        nearest = min(far, key=far.get)
        if nearest != RIGHT and far[nearest] < min(near, right / half):
            return nearest
        return names[right > limit]
    return cause


def _to_the_next(far):
    nearest, *rest = sorted(far, key=far.get)
    lone = rest and far[nearest] < min(0.6, far[rest[0]] / 2)
    return weights_cause(far if lone or far[RIGHT] <= 0.1 else {RIGHT: far[RIGHT]})


def _at_limits(far):
    """Each limit is taken the other way round."""
    right, nearest = far[RIGHT], min(far, key=far.get)
    if right < 0.1:
        return ""
    if nearest != RIGHT and far[nearest] <= min(0.6, right / 2):
        return nearest
    return "rounding" if right < 1.2 else "wrong base"


def _rounding_first(far):
    return "rounding" if 0.1 < far[RIGHT] <= 1.2 else weights_cause(far)


def _far(right: float, missing: float, twice: float) -> tuple[dict]:
    return ({RIGHT: right, MISSING: missing, TWICE: twice},)


register(Exercise(
    name="weights_cause",
    reference=weights_cause,
    cases=[
        (lambda g: _far(5.2, 0.03, 6.1), "as the base alone"),
        (lambda g: _far(0.04, 5.2, 3.3), "as measured, but for the engine's rounding"),
        (lambda g: _far(3.1, 6.0, 0.2), "as the adapter twice"),
        (lambda g: _far(0.5, 4.9, 3.2), "a little off, far from every fault"),
        (lambda g: _far(4.0, 5.1, 3.7), "far from all"),
        (lambda g: _far(0.9, 0.5, 3.0), "nearer to a fault, but not half as far"),
        (lambda g: _far(4.0, 1.1, 3.7), "nearer to a fault, and yet 1.1 from it"),
        (lambda g: _far(0.08, 0.02, 0.06), "an adapter that changes little"),
        (lambda g: _far(4.0, 0.5, 0.4), "near to both faults"),
        (lambda g: _far(1.3, 0.5, 3.0), "less than half as far, by a little"),
        (lambda g: _far(1.0, 2.0, 0.1), "near a fault, and not far from the right model"),
        (lambda g: _far(1.5, 1.4, 3.0), "beyond 1.2, by a little"),
        (lambda g: _far(0.1, 3.0, 2.0), "0.1, which is still as measured"),
        (lambda g: _far(1.2, 3.0, 2.0), "1.2, which is still rounding"),
        (lambda g: _far(4.0, 0.6, 3.7), "0.6 from a fault, which is not nearer than 0.6"),
        (lambda g: _far(1.0, 0.5, 3.0), "half as far, which is not less than half"),
        (lambda g: ({RIGHT: 2.5},), "a model without an adapter"),
        (lambda g: ({RIGHT: 0.5},), "the same, a little off"),
    ],
    mistakes=[
        (_nearest_of_all, "the nearest of three may be far off, and it may be as measured and yet "
                          "too far: ask how far"),
        (_weighed(near=torch.inf, half=1.0), "to be named, a fault must be near: below 0.6, and "
                                             "less than half as far as the right model"),
        (_weighed(half=1.0), "a fault that is only a little nearer proves nothing: it must be less "
                             "than half as far as the right model"),
        (_weighed(near=torch.inf), "half as far is not enough: a fault must also be nearer than "
                                   "0.6"),
        (_weighed(names=("wrong base", "wrong base")), "a model that is off by at most 1.2 was "
                                                       "rounded again; another base is further"),
        (_weighed(names=("wrong base", "rounding")), "rounding moves a model a little, another "
                                                     "base far"),
        (_rounding_first, "ask for the adapter's faults before you blame the rounding"),
        (lambda far: weights_cause(far) or RIGHT, "where nothing is wrong, return the empty text"),
        (_first_near, "of two faults that are near, the nearer is meant"),
        (_weighed(close=0.0), "an engine rounds, too: up to 0.1 is as measured"),
        (_weighed(half=3.0), "a fault need not be a third as far as the right model: less than "
                             "half is enough"),
        (_weighed(limit=2.0), "beyond 1.2 from the right model no rounding explains it"),
        (_to_the_next, "compare the nearest fault with the right model, not with the other fault"),
        (_at_limits, "at a limit: up to 0.1 and up to 1.2 hold the limit itself, nearer than 0.6 "
                     "and less than half do not"),
        (_weighed(names=("rounding", "rounding")), "beyond 1.2 no rounding explains it: wrong "
                                                   "base"),
        (lambda far: weights_cause({RIGHT: far[RIGHT]}), "no fault of the adapter is ever named"),
    ]))


def _texts_cause(golden, served) -> str:
    texts = [text for text, _ in golden["texts"]]
    ended = [(g, s) for (g, done), s in zip(golden["texts"], served["texts"]) if done]
    on = sum(s != g and s.startswith(g) for g, s in ended)
    if ended and on >= len(ended) / 2:
        return "eos is not a stop token"
    return "rounding" if sum(map(str.__eq__, texts, served["texts"])) < len(texts) / 2 else ""


def _weights_of(golden, served) -> str:
    return weights_cause({name: distance(rows, served["first"])
                          for name, rows in golden["first"].items()})


def _chat_cause(golden, served, bos) -> str:
    cause = ids_cause(golden["ids"], served["chat"], bos)
    return "template lost or changed" if cause == "wrong tokenizer" else cause


def find_cause(golden: dict, served: dict, bos: int | None) -> str:
    return (ids_cause(golden["ids"], served["ids"], bos) or _weights_of(golden, served)
            or _texts_cause(golden, served) or _chat_cause(golden, served, bos))


def _verifier(ids=lambda g, s, bos: ids_cause(g["ids"], s["ids"], bos),
              weights=lambda g, s, bos: _weights_of(g, s),
              texts=lambda g, s, bos: _texts_cause(g, s), chat=_chat_cause,
              order=("ids", "weights", "texts", "chat")):
    steps = {"ids": ids, "weights": weights, "texts": texts, "chat": chat}
    return lambda golden, served, bos: next(
        (c for name in order if (c := steps[name](golden, served, bos))), "")


def _silent(golden, served, bos):
    return ""


def _goes_on(share=0.5, of=lambda golden, served: [
        (g, s) for (g, done), s in zip(golden["texts"], served["texts"]) if done],
        longer=lambda g, s: s != g and s.startswith(g)):
    """The texts' cause with another rule for what goes on."""
    def cause(golden, served, bos):
        ended = of(golden, served)
        on = sum(longer(g, s) for g, s in ended)
        if ended and on >= max(share * len(ended), 1):
            return "eos is not a stop token"
        texts = [text for text, _ in golden["texts"]]
        same = sum(map(str.__eq__, texts, served["texts"]))
        return "rounding" if same < len(texts) / 2 else ""
    return cause


def _all_texts(golden, served, bos):
    cause = _texts_cause(golden, served)
    same = [text for text, _ in golden["texts"]] == served["texts"]
    return cause or ("" if same else "rounding")


def _half_is_few(golden, served, bos):
    texts = [text for text, _ in golden["texts"]]
    few = sum(map(str.__eq__, texts, served["texts"])) <= len(texts) / 2
    return _texts_cause(golden, served) or "rounding" * few


def _eos_alone(golden, served, bos):
    cause = _texts_cause(golden, served)
    return cause if cause.startswith("eos") else ""


_FIRST = {RIGHT: [{5: -0.1, 6: -2.4}] * 3, MISSING: [{5: -4.0, 6: -0.2}] * 3,
          TWICE: [{5: -0.01, 6: -5.4}] * 3}
_GOLDEN = {"ids": _IDS, "first": _FIRST, "texts": [("#### 4", True), ("#### 12", True),
                                                    ("She has 3 and", False)]}
_SERVED = {"ids": _IDS, "first": _FIRST[RIGHT], "chat": _IDS,
           "texts": [text for text, _ in _GOLDEN["texts"]]}


def _seen(**changed):
    return lambda g: (_GOLDEN, _SERVED | changed, 1)


_OTHER = ["She", "has", "gone"]
_MIXED = [[1, 5, 7, 6], [1, 9, 8], [1, 5, 5, 3, 4]]  # as many tokens a prompt as _IDS

register(Exercise(
    name="find_cause",
    reference=find_cause,
    cases=[
        (_seen(texts=["#### 4 and", "#### 12#### 12", "She has 3 and"]), "answers that go on"),
        (_seen(), "as measured"),
        (_seen(ids=_prefixed(1), texts=_OTHER, chat=_prefixed(1)), "bos twice, so texts differ"),
        (_seen(first=_FIRST[MISSING], texts=_OTHER), "no adapter, so texts differ"),
        (_seen(first=_FIRST[TWICE], texts=["#### 4 #### 4", "#### 12 and", "She"]),
         "the adapter twice, and its answers go on"),
        (_seen(chat=[_IDS[0], [1, 8], [1, 9]]), "all chats but the first have other ids"),
        (_seen(chat=_prefixed(1)), "chats alone have bos twice"),
        (_seen(texts=["#### 4", "#### 12", "She has 3 and 4. In all"]),
         "one was cut when it was measured, and is longer here"),
        (_seen(texts=["#### 4", "#### 13", "She has 3 and"]), "one text of three differs"),
        (_seen(texts=["#### 5", "#### 13", "She has 3 and"]), "two texts of three differ"),
        (_seen(first=[{5: -3.0, 6: -6.0}] * 3, chat=[[1], [1], [1]]),
         "another base, and another template"),
        (_seen(texts=["", "", ""]), "it says nothing"),
        (lambda g: (_GOLDEN | {"texts": [("3", False)] * 3}, _SERVED | {"texts": ["3 and"] * 3}, 1),
         "none had ended when it was measured, and all are longer"),
        (_seen(texts=["#### 4", "#### 12 12", "She has 3 and"]), "one of two answers goes on"),
        (lambda g: (_GOLDEN | {"texts": [("#### 4", True)] * 3},
                    _SERVED | {"texts": ["#### 42", "#### 4", "#### 4"]}, 1),
         "one of three answers happens to be longer"),
        (_seen(ids=_MIXED, chat=_MIXED, texts=_OTHER), "another tokenizer, with as many tokens"),
        (_seen(chat=[ids[1:] for ids in _IDS]), "chats alone have no bos"),
        (_seen(texts=["So #### 4", "Thus #### 12", "She has 3 and"]),
         "two answers hold the measured ones, and begin otherwise"),
        (_seen(first=[_FIRST[RIGHT][0], *_FIRST[MISSING][1:]]),
         "first tokens as measured for one prompt, as without the adapter for two"),
        (_seen(texts=["#### 4 and", "#### 12#### 12", "She has 3 and"], chat=[[1], [1], [1]]),
         "answers that go on, and another template"),
        (lambda g: ({"ids": _IDS[:2], "texts": _GOLDEN["texts"][:2],
                     "first": {name: rows[:2] for name, rows in _FIRST.items()}},
                    {"ids": _IDS[:2], "chat": _IDS[:2], "first": _FIRST[RIGHT][:2],
                     "texts": ["#### 4", "#### 13"]}, 1), "one text of two is the same"),
    ],
    mistakes=[
        (_verifier(order=("texts", "ids", "weights", "chat")),
         "texts differ for every cause: ask the ids and the weights first, the texts after them"),
        (_verifier(ids=_silent), "the prompts' ids are never compared"),
        (_verifier(chat=_silent), "the chats are never asked, so a lost template is not found"),
        (_verifier(weights=_silent), "the weights are never asked: first tokens tell of them"),
        (_verifier(texts=_silent), "the texts are never compared"),
        (_verifier(chat=lambda g, s, bos: ids_cause(g["ids"], s["chat"], bos)),
         "the tokenizer was right for the prompts, so other ids of a chat mean its template"),
        (_verifier(texts=_goes_on(of=lambda golden, served: [
            (g, s) for (g, _), s in zip(golden["texts"], served["texts"])])),
         "a text that was cut when it was measured may go on; ask those that had ended"),
        (_verifier(texts=_goes_on(share=0.0)),
         "one answer that goes on may be another answer: at least half of those that had ended"),
        (_verifier(texts=_goes_on(share=1.0)),
         "half of the answers that go on are enough; not all need to"),
        (_verifier(texts=_goes_on(longer=lambda g, s: s != g)),
         "an answer goes on if it begins with the measured one; another text is another thing"),
        (_verifier(texts=_goes_on(longer=lambda g, s: len(s) > len(g))),
         "an answer that goes on begins with the measured one; that it is longer is not enough"),
        (_verifier(texts=_goes_on(longer=lambda g, s: s.startswith(g))),
         "the same text begins with itself, and it does not go on"),
        (_verifier(texts=_all_texts), "near ties fall otherwise on another engine: a text or two "
                                      "may differ"),
        (_verifier(texts=_eos_alone), "where fewer than half of the texts are the same, something "
                                      "was rounded: say so"),
        (lambda golden, served, bos: find_cause(golden, served, bos) or RIGHT,
         "where nothing is wrong, return the empty text"),
        (_verifier(chat=lambda g, s, bos: _chat_cause(g, s, bos) and "template lost or changed"),
         "a chat whose ids have one bos too many: bos twice is its cause"),
        (_verifier(ids=lambda g, s, bos: _chat_cause(g, s | {"chat": s["ids"]}, bos)),
         "other ids of the prompts mean the tokenizer; the template only shows in the chats"),
        (_verifier(order=("ids", "weights", "chat", "texts")),
         "texts come before the chats' ids: that is the order asked for"),
        (_verifier(texts=_half_is_few), "half of the texts the same is not fewer than half"),
        (_verifier(order=("chat", "ids", "weights", "texts")),
         "weights come before the template: another base answers wrongly whatever it is asked"),
    ]))
