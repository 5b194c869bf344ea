"""The exercises of notebook 10: right answers in other words are taken, plausible wrong ones are
not, and the references mean what the library and the package gguf do."""

import math
import struct

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from course.kit import check
from course.kit.exercise import registered
from course.nb10 import exercises as nb10
from course.tools.normal_form import NOTEBOOKS, exercises, read
from qlora_lib.models.gguf_layout import layout
from qlora_lib.quant.gguf_blocks import dense_blocks, pack_blocks, to_blocks
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.packing import pack
from qlora_lib.serving.contract import MEASURED, MISSING, TWICE
from qlora_lib.serving.engines import Answer
from qlora_lib.serving.verify import CLOSE, FAR, LEAST, NEAR, REMEDIES, distances
from tests.support.gguf_models import random_model

BOOK = read(NOTEBOOKS / "10_ship_it.ipynb")
NAMES = [name for _, name, _ in exercises(BOOK)]


# --- Right, in other words ---------------------------------------------------------------------


def blocks_by_struct(codes, d):
    found = []
    for row, scale in zip(codes.reshape(-1, 32).tolist(), d.reshape(-1).tolist()):
        body = bytes(row[i] + 16 * row[i + 16] for i in range(16))
        found.append(list(struct.pack("<e", scale) + body))
    return torch.tensor(found, dtype=torch.uint8).view(*codes.shape[:-1], 18)


def blocks_with_numpy(codes, d):
    q = codes.numpy()
    head = d.numpy()[..., None].view(np.uint8)
    return torch.from_numpy(np.concatenate([head, q[..., :16] | q[..., 16:] << 4], -1))


def blocks_by_a_product(codes, d):
    halves = codes.unflatten(-1, (2, 16)).int()
    body = (halves * torch.tensor([[1], [16]])).sum(-2)
    return torch.cat([d.reshape(*d.shape, 1).view(torch.uint8), body.to(torch.uint8)], -1)


def blocks_filled(codes, d):
    blocks = torch.zeros(*codes.shape[:-1], 18, dtype=torch.uint8)
    blocks[..., :2] = d.unsqueeze(-1).view(torch.uint8)
    low, high = codes.chunk(2, -1)
    blocks[..., 2:] = low.bitwise_or(high.bitwise_left_shift(4))
    return blocks


def read_by_struct(blocks):
    rows = []
    for block in blocks.reshape(-1, 18).tolist():
        (d,) = struct.unpack("<e", bytes(block[:2]))
        codes = [byte % 16 for byte in block[2:]] + [byte // 16 for byte in block[2:]]
        rows.append([d * (q - 8) for q in codes])
    return torch.tensor(rows).view(*blocks.shape[:-1], 32)


def read_from_a_table(blocks):
    table = torch.arange(-8.0, 8.0)
    q = torch.cat([blocks[..., 2:] & 0xF, blocks[..., 2:] >> 4], -1).long()
    return table[q] * blocks[..., :2].clone().view(torch.half).float()


def read_signed(blocks):
    body = blocks[..., 2:].to(torch.int8)
    low, high = (body & 15) - 8, ((body >> 4) & 15) - 8
    d = blocks[..., :2].contiguous().view(torch.float16)
    return torch.cat([low, high], -1).float().mul(d.float())


def read_filled(blocks):
    weights = torch.empty(*blocks.shape[:-1], 32)
    weights[..., :16] = (blocks[..., 2:] % 16).float()
    weights[..., 16:] = (blocks[..., 2:] // 16).float()
    return (weights - 8) * blocks[..., :2].contiguous().view(torch.float16).to(torch.float32)


def read_with_numpy(blocks):
    raw = np.ascontiguousarray(blocks.numpy())
    d = np.ascontiguousarray(raw[..., :2]).view(np.float16).astype(np.float32)
    q = np.concatenate([raw[..., 2:] & 15, raw[..., 2:] >> 4], -1).astype(np.float32)
    return torch.from_numpy(d * (q - 8))


def loss_in_fp64(scale, zero):
    exact = scale.double() * zero.double()
    return (exact.half().double() - exact).abs(), exact / 2048


def loss_with_numpy(scale, zero):
    exact = scale.numpy().astype(np.float32) * zero.numpy()
    lost = np.abs(exact.astype(np.float16).astype(np.float32) - exact)
    return torch.from_numpy(lost), torch.from_numpy(exact * np.float32(2**-11))


def loss_in_two_cases(scale, zero):
    m = -scale.float() * zero
    lost = torch.where(m.abs() < 2**-14, 0, (m - m.half()).abs())  # below, each product is held
    return lost, m.abs() / 2**11


def loss_one_by_one(scale, zero):
    found = []
    for s, z in zip(scale.tolist(), zero.tolist()):
        (stored,) = struct.unpack("e", struct.pack("e", s * z))
        found.append((abs(stored - s * z), s * z * 2**-11))
    return tuple(torch.tensor(column) for column in zip(*found))


def loss_as_a_list(scale, zero):
    exact = torch.mul(scale.float(), zero)
    lost = torch.maximum(exact - exact.half(), exact.half() - exact)
    return [lost, torch.ldexp(exact, torch.tensor(-11))]


def rows_by_index(weight, heads):
    d = len(weight) // heads
    order = [h * d + i for h in range(heads) for i in [*range(0, d, 2), *range(1, d, 2)]]
    return weight[order]


def rows_by_slices(weight, heads):
    parts = [part for head in weight.chunk(heads) for part in (head[0::2], head[1::2])]
    return torch.cat(parts)


def rows_inverted(weight, heads):
    return weight[nb10.rows_there(torch.arange(len(weight)), heads).argsort()]


def rows_scattered(weight, heads):
    out = torch.empty_like(weight)
    out[nb10.rows_there(torch.arange(len(weight)), heads)] = weight
    return out


def rows_reshaped(weight, heads):
    d = weight.shape[0] // heads
    return weight.reshape(heads, d // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def adapter_by_index(a, b, scale, heads):
    if heads:
        b = b[nb10.rows_there(torch.arange(len(b)), heads)]
    return a.clone(), b.clone(), a.shape[0] * scale


def adapter_as_a_list(a, b, scale, heads):
    there = b if heads is None else b.view(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
    return [a, there, float(scale) * b.shape[1]]


def adapter_column_by_column(a, b, scale, heads):
    if heads is not None:
        b = torch.stack([nb10.rows_there(column, heads) for column in b.T], 1)
    return a, b, torch.tensor(scale * len(a), dtype=torch.float64)


def adapter_by_its_update(a, b, scale, heads):
    """Moved as the base is, with the identity as A."""
    return a, b if heads is None else nb10.rows_there(b @ torch.eye(len(a)), heads), scale * len(a)


def adapter_pair_by_pair(a, b, scale, heads):
    rows = []
    for head in b.chunk(heads) if heads else ():
        half = len(head) // 2
        rows += [row for i in range(half) for row in (head[i], head[i + half])]
    return a, torch.stack(rows) if heads else b, scale * a.size(0)


def ids_by_candidates(measured, served, bos):
    wanted = {"": measured, "bos twice": [[bos] + ids for ids in measured]}
    if bos is not None and all(ids[0] == bos for ids in measured):
        wanted["bos missing"] = [ids[1:] for ids in measured]
    return next((name for name, ids in wanted.items() if ids == served), "wrong tokenizer")


def _of_one(m, s, bos):
    if m == s:
        return ""
    if s[:1] == [bos] and s[1:] == m:
        return "bos twice"
    return "bos missing" if m[:1] == [bos] and m[1:] == s else "wrong tokenizer"


def ids_by_verdicts(measured, served, bos):
    verdicts = {_of_one(m, s, bos) for m, s in zip(measured, served)}
    return verdicts.pop() if len(verdicts) == 1 else "wrong tokenizer"


def ids_first_then_the_rest(measured, served, bos):
    first = _of_one(measured[0], served[0], bos)
    alike = all(_of_one(*pair, bos) == first for pair in zip(measured, served))
    return first if alike else "wrong tokenizer"


def ids_by_what_is_in_front(measured, served, bos):
    if served == measured:
        return ""
    front = [s[: len(s) - len(m)] for m, s in zip(measured, served)]
    ends = all(s[len(f) :] == m for f, m, s in zip(front, measured, served))
    if ends and all(f == [bos] for f in front):
        return "bos twice"
    lacks = all(m == [bos, *s] for m, s in zip(measured, served))
    return "bos missing" if lacks else "wrong tokenizer"


def ids_as_texts(measured, served, bos):
    one, two = ([",".join(map(str, ids)) for ids in rows] for rows in (measured, served))
    if one == two:
        return ""
    if [f"{bos},{text}" for text in one] == two:
        return "bos twice"
    return "bos missing" if [f"{bos},{text}" for text in two] == one else "wrong tokenizer"


def distance_with_numpy(measured, served):
    gaps = []
    for ours, theirs in zip(measured, served):
        least = np.maximum(-12, np.min(list(theirs.values())))
        p = np.maximum(np.array(list(ours.values())), least)
        q = np.maximum(np.array([theirs.get(token, -np.inf) for token in ours]), least)
        gaps.append(np.abs(p - q))
    return np.concatenate(gaps).mean()


def distance_with_torch(measured, served):
    rows = [[theirs.get(t, -1e9), p, max(-12.0, min(theirs.values()))]
            for ours, theirs in zip(measured, served) for t, p in ours.items()]  # fmt: skip
    q, p, least = torch.tensor(rows, dtype=torch.float64).T
    return (q.maximum(least) - p.maximum(least)).abs().mean()


def distance_running(measured, served):
    total = count = 0
    for i, ours in enumerate(measured):
        least = sorted([-12.0, min(served[i].values())])[1]
        for token in ours:
            p, q = ours[token], served[i][token] if token in served[i] else least
            total, count = total + abs((p if p > least else least) - max(q, least)), count + 1
    return total / count


def distance_weighed(measured, served):
    """Means of prompts, each counted as often as it has tokens."""
    n = sum(map(len, measured))
    return sum(nb10.distance([m], [s]) * len(m) for m, s in zip(measured, served)) / n


def distance_from_copies(measured, served):
    floors = [max(-12, min(s.values())) for s in served]
    ours = [{t: max(p, f) for t, p in m.items()} for m, f in zip(measured, floors)]
    theirs = [{t: max(s.get(t, f), f) for t in m} for m, s, f in zip(measured, served, floors)]
    gaps = [math.fabs(m[t] - s[t]) for m, s in zip(ours, theirs) for t in m]
    return math.fsum(gaps) / len(gaps)


def weights_by_the_faults(far):
    right = far["as measured"]
    faults = {name: p for name, p in far.items() if name != "as measured"}
    if right <= 0.1:
        return ""
    if faults and min(faults.values()) < min(0.6, right / 2):
        return min(faults, key=faults.__getitem__)
    return "rounding" if right <= 1.2 else "wrong base"


def weights_sorted(far):
    (name, least), right = sorted(far.items(), key=lambda pair: pair[1])[0], far["as measured"]
    if right > 0.1 and name != "as measured" and least < 0.6 and 2 * least < right:
        return name
    return ["", "rounding", "wrong base"][(right > 0.1) + (right > 1.2)]


def weights_in_a_loop(far):
    best, limit = None, min(0.6, far["as measured"] / 2)
    for name, p in far.items():
        if name != "as measured" and p < limit and (best is None or p < far[best]):
            best = name
    if far["as measured"] <= 0.1:
        return ""
    return best or ("wrong base" if far["as measured"] > 1.2 else "rounding")


def weights_swapped(far):
    pairs = [(p, name) for name, p in far.items()]
    least, name = min(pairs)
    right = far["as measured"]
    if not right > 0.1:
        return ""
    near = least < 0.6 and least / right < 0.5
    return name if near and name != "as measured" else "rounding" if right <= 1.2 else "wrong base"


def weights_on_a_copy(far):
    left = dict(far)
    right = left.pop("as measured")
    left = {name: p for name, p in left.items() if p < 0.6 and p < right / 2}
    if right <= 0.1:
        return ""
    return min(left, key=left.get, default="rounding" if right <= 1.2 else "wrong base")


def _shared(golden, served, bos):
    far = {name: nb10.distance(rows, served["first"]) for name, rows in golden["first"].items()}
    return nb10.ids_cause(golden["ids"], served["ids"], bos) or nb10.weights_cause(far)


def _chat(golden, served, bos):
    found = nb10.ids_cause(golden["ids"], served["chat"], bos)
    return {"wrong tokenizer": "template lost or changed"}.get(found, found)


def cause_with_counts(golden, served, bos):
    on = ended = same = 0
    for (wanted, done), said in zip(golden["texts"], served["texts"]):
        same += said == wanted
        ended += done
        on += done and len(said) > len(wanted) and said[: len(wanted)] == wanted
    first = _shared(golden, served, bos)
    if first:
        return first
    if ended and 2 * on >= ended:
        return "eos is not a stop token"
    return "rounding" if 2 * same < len(golden["texts"]) else _chat(golden, served, bos)


def cause_from_steps(golden, served, bos):
    def texts():
        pairs = [(*pair, said) for pair, said in zip(golden["texts"], served["texts"])]
        ended = [said.removeprefix(text) not in ("", said) or (text == "" and said != "")
                 for text, done, said in pairs if done]  # fmt: skip
        if ended and sum(ended) / len(ended) >= 0.5:
            return "eos is not a stop token"
        return "rounding" if sum(t == s for t, _, s in pairs) / len(pairs) < 0.5 else ""

    steps = (lambda: _shared(golden, served, bos), texts, lambda: _chat(golden, served, bos))
    return next(filter(None, (step() for step in steps)), "")


def cause_from_the_end(golden, served, bos):
    """All are asked, and an earlier one takes the place of a later one."""
    cause = _chat(golden, served, bos)
    pairs = list(zip(golden["texts"], served["texts"]))
    if sum(g[0] == s for g, s in pairs) < 0.5 * len(pairs):
        cause = "rounding"
    ended = [s.startswith(g[0]) and s != g[0] for g, s in pairs if g[1]]
    if any(ended) and ended.count(True) >= ended.count(False):
        cause = "eos is not a stop token"
    return _shared(golden, served, bos) or cause


def cause_with_numpy(golden, served, bos):
    texts, done = map(np.array, zip(*golden["texts"]))
    said = np.array(served["texts"])
    goes_on = np.char.startswith(said, texts) & (said != texts)
    if first := _shared(golden, served, bos):
        return first
    if done.any() and goes_on[done].mean() >= 0.5:
        return "eos is not a stop token"
    return "rounding" if (said == texts).mean() < 0.5 else _chat(golden, served, bos)


def cause_by_returns(golden, served, bos):
    cause = nb10.ids_cause(golden["ids"], served["ids"], bos)
    if cause != "":
        return cause
    far = {}
    for name in golden["first"]:
        far[name] = nb10.distance(golden["first"][name], served["first"])
    cause = nb10.weights_cause(far)
    if cause != "":
        return cause
    finished = [i for i, (_, done) in enumerate(golden["texts"]) if done]
    longer = [i for i in finished if served["texts"][i] != golden["texts"][i][0]
              and served["texts"][i].startswith(golden["texts"][i][0])]  # fmt: skip
    if finished and len(longer) * 2 >= len(finished):
        return "eos is not a stop token"
    equal = [i for i, (text, _) in enumerate(golden["texts"]) if text == served["texts"][i]]
    if len(equal) * 2 < len(golden["texts"]):
        return "rounding"
    return _chat(golden, served, bos)


RIGHT = {
    "q4_0_blocks": [
        blocks_by_struct, blocks_with_numpy, blocks_by_a_product, blocks_filled,
        lambda codes, d: pack_blocks("Q4_0", codes, d),
    ],
    "read_q4_0": [read_by_struct, read_from_a_table, read_signed, read_filled, read_with_numpy],
    "offset_loss": [
        loss_in_fp64, loss_with_numpy, loss_in_two_cases, loss_one_by_one, loss_as_a_list,
    ],
    "rows_back": [rows_by_index, rows_by_slices, rows_inverted, rows_scattered, rows_reshaped],
    "adapter_tensors": [
        adapter_by_index, adapter_as_a_list, adapter_column_by_column, adapter_by_its_update,
        adapter_pair_by_pair,
    ],
    "ids_cause": [
        ids_by_candidates, ids_by_verdicts, ids_first_then_the_rest, ids_by_what_is_in_front,
        ids_as_texts,
    ],
    "distance": [
        distance_with_numpy, distance_with_torch, distance_running, distance_weighed,
        distance_from_copies,
    ],
    "weights_cause": [
        weights_by_the_faults, weights_sorted, weights_in_a_loop, weights_swapped,
        weights_on_a_copy,
    ],
    "find_cause": [
        cause_with_counts, cause_from_steps, cause_from_the_end, cause_with_numpy,
        cause_by_returns,
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


def _texts(change):
    """find_cause, of golden and served as `change` makes them."""
    return lambda golden, served, bos: nb10.find_cause(*change(golden, served), bos)


def ids_by_counting_bos(measured, served, bos):
    more = {s.count(bos) - m.count(bos) for m, s in zip(measured, served)}
    if measured == served:
        return ""
    return {1: "bos twice", -1: "bos missing"}.get(
        more.pop() if len(more) == 1 else 0, "wrong tokenizer")


def weights_far_from_every_other(far):
    """A fault must be half as far as each other entry, the other fault too."""
    nearest = min(far, key=far.get)
    rest = [p for name, p in far.items() if name != nearest]
    alone = all(far[nearest] < p / 2 for p in rest)
    return nb10.weights_cause(far if alone else {"as measured": far["as measured"]})


WRONG = {
    "q4_0_blocks": [
        lambda codes, d: nb10.q4_0_blocks(codes.flip(-1), d),
        lambda codes, d: nb10.q4_0_blocks(15 - codes, d),
        lambda codes, d: nb10.q4_0_blocks(codes, d).flatten(),
        lambda codes, d: nb10.q4_0_blocks(codes, d.abs()),
        lambda codes, d: nb10.q4_0_blocks(codes, d).view(torch.int8),
    ],
    "read_q4_0": [
        lambda blocks: nb10.read_q4_0(blocks).abs(),
        lambda blocks: nb10.read_q4_0(blocks).flip(-1),
        lambda blocks: nb10.read_q4_0(blocks).flatten(),
        lambda blocks: nb10.read_q4_0(blocks) + 1e-3,
        lambda blocks: nb10.read_q4_0(blocks).double(),
    ],
    "offset_loss": [
        lambda scale, zero: nb10.offset_loss(scale, 15 - zero),
        lambda scale, zero: (nb10._lost(scale, zero),) * 2,
        lambda scale, zero: (nb10._lost(scale, zero), (scale.float() * zero).abs()),
        lambda scale, zero: (torch.zeros(len(scale)), nb10.offset_loss(scale, zero)[1]),
        lambda scale, zero: (nb10.offset_loss(scale, zero)[1],) * 2,
        lambda scale, zero: (nb10._lost(scale, zero), nb10._exact(scale, zero).half() * 2**-11),
    ],
    "rows_back": [
        lambda weight, heads: weight,
        lambda weight, heads: weight.flip(0),
        lambda weight, heads: nb10.rows_back(weight, heads).flip(0),
        lambda weight, heads: nb10.rows_back(weight, len(weight) // 2),
        lambda weight, heads: nb10.rows_back(weight, heads)[: len(weight) // heads],
    ],
    "adapter_tensors": [
        lambda a, b, scale, heads: nb10.adapter_tensors(a, b, scale, heads)[:2],
        lambda a, b, scale, heads: (*nb10.adapter_tensors(a, b, scale, heads)[:2], 16.0),
        lambda a, b, scale, heads: nb10.adapter_tensors(a, b, scale, heads and 1),
        lambda a, b, scale, heads: nb10.adapter_tensors(a / 2, b * 2, scale, heads),
        lambda a, b, scale, heads: nb10.adapter_tensors(a, b, scale, heads and 2 * heads),
    ],
    "ids_cause": [
        lambda measured, served, bos: "" if measured == served else "bos twice",
        lambda measured, served, bos: nb10.ids_cause(measured, served, bos or 0).title(),
        lambda measured, served, bos: nb10.ids_cause(measured, served, 1) if sum(
            map(len, served)) != sum(map(len, measured)) else "",
        lambda measured, served, bos: nb10.ids_cause(measured[1:], served[1:], bos),
        lambda measured, served, bos: nb10.ids_cause(
            [ids[:2] for ids in measured], [ids[:2] for ids in served], bos),
        ids_by_counting_bos,
        lambda measured, served, bos: nb10.ids_cause([sum(measured, [])], [sum(served, [])], bos),
    ],
    "distance": [
        lambda measured, served: nb10.distance(measured[:1], served[:1]),
        lambda measured, served: nb10.distance([{k: v for k, v in list(m.items())[:1]}
                                                for m in measured], served),
        lambda measured, served: -nb10.distance(measured, served),
        lambda measured, served: nb10.distance(measured, served) / len(measured),
        lambda measured, served: nb10.distance(measured, served) / math.log(2),
    ],
    "weights_cause": [
        lambda far: min(far, key=far.get),
        lambda far: nb10.weights_cause(far) or "rounding",
        lambda far: "" if far["as measured"] < 0.6 else nb10.weights_cause(far),
        lambda far: nb10.weights_cause({k: v / 2 for k, v in far.items()}),
        lambda far: "adapter missing" if far["as measured"] > 0.1 else "",
        lambda far: "" if far["as measured"] < 0.1 else nb10.weights_cause(
            far | {"as measured": far["as measured"] + 1e-9}),
        weights_far_from_every_other,
    ],
    "find_cause": [
        lambda golden, served, bos: "",
        lambda golden, served, bos: nb10.find_cause(golden, served | {"chat": served["ids"]}, bos),
        lambda golden, served, bos: nb10.find_cause(golden, served, None),
        lambda golden, served, bos: nb10.find_cause(golden, served | {"chat": [
            *served["chat"][:1], *served["ids"][1:]]}, bos),
        lambda golden, served, bos: nb10.find_cause(
            golden, served, bos).replace("bos missing", "template lost or changed"),
        _texts(lambda golden, served: (
            golden | {"first": {n: rows[:1] for n, rows in golden["first"].items()}}, served)),
        nb10._verifier(texts=nb10._goes_on(longer=lambda g, s: g in s and g != s)),
        _texts(lambda golden, served: (golden | {"texts": golden["texts"][:2]},
                                       served | {"texts": served["texts"][:2]})),
        _texts(lambda golden, served: (golden, served | {"texts": [
            text[: len(g)] for text, (g, _) in zip(served["texts"], golden["texts"])]})),
        _texts(lambda golden, served: (golden | {"first": {MEASURED: golden["first"][MEASURED]}},
                                       served)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name, mine", [
    pytest.param(name, mine, id=f"{name}-{i}")
    for name, answers in WRONG.items() for i, mine in enumerate(answers, 1)])  # fmt: skip
def test_a_wrong_answer_is_refused(name, mine, capsys):
    assert check(name, mine) is not mine, capsys.readouterr().out


# --- The same thing in the library ----------------------------------------------------------------


def test_blocks_are_the_librarys_and_those_of_gguf():
    torch.manual_seed(0)
    weight = torch.randn(6, 96)
    grid = quantize_rtn(weight, QuantSpec(4, 32, symmetric=True))
    codes = grid.unpacked(slice(None)).unflatten(1, (-1, 32))
    blocks = nb10.q4_0_blocks(codes, grid.scale)
    kind, library = to_blocks(grid)
    assert kind == "Q4_0" and torch.equal(blocks.flatten(1), library)
    read = nb10.read_q4_0(blocks).flatten(1)
    assert torch.equal(read, dense_blocks("Q4_0", library))
    assert torch.equal(read, grid.dequantize())
    theirs = quants.dequantize(library.numpy(), GGMLQuantizationType.Q4_0)
    assert torch.equal(read, torch.from_numpy(theirs))


def test_our_own_packing_in_a_block_is_the_first_mistake(capsys):
    def mine(codes, d):
        return torch.cat([d.unsqueeze(-1).view(torch.uint8), pack(codes, 4)], -1)

    check("q4_0_blocks", mine)
    assert f"diagnosis: {registered()['q4_0_blocks'].mistakes[0][1]}" in capsys.readouterr().out


def test_what_an_offset_loses_is_what_the_librarys_blocks_lose():
    torch.manual_seed(0)
    grid = quantize_rtn(torch.randn(8, 64) + 0.4, QuantSpec(4, 32))
    kind, blocks = to_blocks(grid)
    moved = (dense_blocks(kind, blocks) - grid.dequantize()).unflatten(1, (-1, 32)).abs()
    lost, bound = nb10.offset_loss(grid.scale.flatten(), grid.zero_point.flatten())
    assert kind == "Q4_1" and (lost > 0).any() and (lost <= bound).all()
    assert torch.allclose(moved.flatten(0, 1).median(1).values, lost, atol=1e-6)


def test_rows_move_as_the_library_moves_them():
    model = random_model("llama")
    lay = layout(model.config, type(model).__name__)
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj"):
        weight, heads = getattr(attention, name).weight.detach(), lay.heads[name]
        there = lay.rows(f"model.layers.0.self_attn.{name}", weight)
        assert torch.equal(nb10.rows_there(weight, heads), there)
        assert torch.equal(nb10.rows_back(there, heads), weight)


def test_the_verifier_has_the_librarys_limits_and_names():
    assert (nb10.RIGHT, nb10.MISSING, nb10.TWICE) == (MEASURED, MISSING, TWICE)
    assert (CLOSE, NEAR, FAR, LEAST) == (0.1, 0.6, 1.2, -12.0)
    causes = {registered()[name].reference(*make(None)) for name in ("ids_cause", "weights_cause",
              "find_cause") for make, _ in registered()[name].cases}  # fmt: skip
    assert causes - {""} == set(REMEDIES) - {"changed file"}


@pytest.mark.parametrize("case", range(6))
def test_a_distance_is_the_librarys(case):
    make, _ = registered()["distance"].cases[case]
    measured, served = make(None)
    golden = [{"first": {MEASURED: [[i, "", p] for i, p in row.items()]}} for row in measured]
    answers = [Answer("", first=row) for row in served]
    mine = nb10.distance(measured, served)
    assert mine == pytest.approx(distances(golden, answers)[MEASURED])
