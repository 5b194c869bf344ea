"""Adam with 8-bit moments against bitsandbytes' AdamW8bit, on the CPU.

Its CPU kernel finds codes in a table of 2^16 cells over [-1, 1], its kernels for other devices
find the nearest level, as we do. So it is compared twice: with its own generic kernel in place
of the CPU's, byte by byte; and as it is, within what a cell may move.
"""

import bitsandbytes as bnb
import bitsandbytes.functional as F
import pytest
import torch
from bitsandbytes.backends.cpu import ops

from qlora_lib.quant.nf4 import dequantize_8bit, dynamic_map
from qlora_lib.train.adam8bit import MOMENTS, Adam8bit
from tests.support.tensors import normal

SHAPES = [(64, 80), (4096,), (70, 71), (7, 13)]  # whole blocks; one; a rest; below 4096: fp32
STEPS = 24
THEIRS = dict(zip(MOMENTS, ("state1", "state2")))


@pytest.fixture
def nearest(monkeypatch):
    """bitsandbytes' generic quantizer instead of its CPU table."""
    kernel = torch.ops.bitsandbytes.quantize_blockwise.default

    def quantize(values, levels, absmax_out, codes_out, block):
        key = torch._C.DispatchKey.CompositeExplicitAutograd
        codes, absmax = kernel._op_dk(key, values, levels, block)
        codes_out.copy_(codes), absmax_out.copy_(absmax)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", quantize)


def steps(spread: float):
    """After each of STEPS steps, for each shape: parameter and state of ours, then of theirs, and
    AdamW's parameter. Gradients of one sign whose sizes span 10^spread."""
    triples = [
        [torch.nn.Parameter(normal(*s, seed=i)) for _ in range(3)] for i, s in enumerate(SHAPES)
    ]
    kinds = (Adam8bit, bnb.optim.AdamW8bit, torch.optim.AdamW)
    optimizers = [
        kind(list(parameters), lr=1e-2, weight_decay=0.01)
        for kind, parameters in zip(kinds, zip(*triples))
    ]
    draw = torch.Generator().manual_seed(1)
    sizes = [10 ** (-spread * torch.rand(s, generator=draw)) for s in SHAPES]
    for _ in range(STEPS):
        for triple, size in zip(triples, sizes):
            gradient = (0.5 + torch.rand(size.shape, generator=draw)) * size
            for p in triple:
                p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        ours, theirs, _ = (optimizer.state for optimizer in optimizers)
        yield [(a, ours[a], b, theirs[b], c) for a, b, c in triples]


def codes(state: dict, other: dict, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Our codes and theirs, as integers."""
    return state[name].int(), other[THEIRS[name]].flatten().int()


def test_maps_are_the_same_bits():
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed), F.create_dynamic_map(signed=signed))


def test_states_and_trajectories_with_their_generic_kernel(nearest):
    """They multiply by 1 / absmax, we divide: a value halfway between two levels may go either
    way, one code in some thousands. All else are the same bits, 24 steps long."""
    for rows in steps(spread=1):
        for a, state, b, other, _ in rows[:3]:
            for name in MOMENTS:
                x, y = codes(state, other, name)
                assert (x - y).abs().max() <= 1 and (x != y).float().mean() < 1e-3
                absmax = other[f"absmax{THEIRS[name][-1]}"]
                torch.testing.assert_close(state[f"{name}_absmax"], absmax, rtol=1e-6, atol=0)
            apart = (a - b).abs()
            assert (apart > 1e-6).float().mean() < 1e-3 and apart.max() < 5e-3
        a, state, b, other, _ = rows[3]  # fp32 moments
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state["exp_avg"].view_as(a), other["state1"])


def test_the_one_rule_that_is_not_theirs(nearest):
    """Where they store a second moment as 0, we store the lowest level, and stay by AdamW."""
    for rows in steps(spread=4):
        for _, state, _, other, _ in rows[:3]:
            x, y = codes(state, other, "exp_avg")
            assert (x != y).float().mean() < 1e-3
            x, y = codes(state, other, "exp_avg_sq")
            zeros = (y == 0) & (x == 1)
            # Others differ where the two went on from a 0 and a 1.
            assert zeros.any() and (x != y)[~zeros].float().mean() < 1e-2
    for a, _, b, _, plain in rows[:3]:
        assert (a - plain).abs().max() < 0.24 < 3 * (a - plain).abs().max()  # lr times steps
        assert (b - plain).abs().max() > 0.5


def test_trajectories_with_their_cpu_kernel():
    """Their table moves a value by up to half a cell, 1.5e-5 of the absmax, before it is rounded:
    other codes, but no further from AdamW than we are. A parameter moves by 0.24."""
    for rows in steps(spread=1):
        for a, state, b, other, _ in rows[:3]:
            for name, signed in MOMENTS.items():
                x, y = codes(state, other, name)
                absmax = other[f"absmax{THEIRS[name][-1]}"]
                assert (x != y).float().mean() < 0.1
                ours, theirs = (
                    dequantize_8bit(c, m, dynamic_map(signed))
                    for c, m in ((x, state[f"{name}_absmax"]), (y, absmax))
                )
                assert (ours - theirs).norm() < 0.01 * theirs.norm()
    for a, _, b, _, plain in rows[:3]:
        apart, from_plain = (a - b).norm(), (a - plain).norm()
        assert apart < from_plain and (a - b).abs().max() < 0.05
        assert 0.8 < (b - plain).norm() / from_plain < 1.2
