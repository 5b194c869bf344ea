"""Adam with 8-bit moments: AdamW's steps, a quarter of its bytes."""

import pytest
import torch

from qlora_lib.quant.nf4 import dequantize_8bit, dynamic_map, quantize_8bit
from qlora_lib.train import adam8bit
from qlora_lib.train.adam8bit import Adam8bit
from tests.support.tensors import default_dtype, normal

SHAPES = [(64, 80), (4096,), (70, 71), (7, 13)]  # whole blocks; one; a rest; below 4096: fp32


def train(make, steps: int, spread: float = 0.0, dtype=torch.float32, **settings):
    """Parameters and optimizer after `steps` of gradients whose sizes span 10^spread."""
    parameters = [torch.nn.Parameter(normal(*s, seed=i, dtype=dtype)) for i, s in enumerate(SHAPES)]
    optimizer = make(parameters, lr=1e-2, **settings)
    draw = torch.Generator().manual_seed(1)
    sizes = [10 ** (-spread * torch.rand(s, generator=draw)) for s in SHAPES]
    for _ in range(steps):
        for p, size in zip(parameters, sizes):
            p.grad = (torch.randn(p.shape, generator=draw) * size).to(dtype)
        optimizer.step()
    return parameters, optimizer


def furthest(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a, b))


def test_unsigned_map_has_twice_the_fractions():
    levels, signed = dynamic_map(signed=False), dynamic_map()
    assert len(levels) == 256 and levels[0] == 0 and levels[-1] == 1 and (levels.diff() > 0).all()
    for exponent in range(7):
        inside = (levels > 10.0 ** (exponent - 7)) & (levels < 10.0 ** (exponent - 6))
        assert inside.sum() == 2 ** (exponent + 1)
    assert (signed > 0).sum() == 128 and (levels > 0).sum() == 255


@pytest.mark.parametrize("n", [1, 255, 256, 700])
def test_blocks_are_quantized_to_their_nearest_level(n):
    x, levels = normal(n, seed=n), dynamic_map()
    codes, absmax = quantize_8bit(x, levels)
    assert codes.dtype == torch.uint8 and codes.shape == (n,) and len(absmax) == -(-n // 256)
    scales = absmax.repeat_interleave(256)[:n]
    best = ((x / scales).unsqueeze(1) - levels).abs().amin(1)  # by trying all 256
    error = (dequantize_8bit(codes, absmax, levels) - x).abs() / scales
    torch.testing.assert_close(error, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_first_step_is_adamws(weight_decay):
    """The moments that it starts from, zeros, have no rounding error."""
    ours, _ = train(Adam8bit, 1, weight_decay=weight_decay)
    plain, _ = train(torch.optim.AdamW, 1, weight_decay=weight_decay)
    assert furthest(ours, plain) < 1e-6  # rounding of fp32


def test_thirty_steps_stay_close_to_adamws():
    """Each step moves a parameter by about lr; 0.3 is as far as thirty can go."""
    ours, optimizer = train(Adam8bit, 30, weight_decay=0.01)
    plain, _ = train(torch.optim.AdamW, 30, weight_decay=0.01)
    assert furthest(ours[:3], plain[:3]) < 0.01 and furthest(ours[3:], plain[3:]) < 1e-6
    assert furthest(ours[:3], plain[:3]) > 1e-4  # 8 bits they are
    assert optimizer.state[ours[0]]["step"] == 30


def test_small_second_moments_do_not_vanish():
    """Gradients over four decades: stored as 0, a moment would let a parameter jump by 20."""
    ours, _ = train(Adam8bit, 12, spread=4)
    plain, _ = train(torch.optim.AdamW, 12, spread=4)
    assert furthest(ours, plain) < 0.12  # lr times steps


def test_bytes_of_the_state():
    parameters, optimizer = train(Adam8bit, 1)
    for p in parameters:
        state = dict(optimizer.state[p])
        assert state.pop("step").dtype == torch.float32
        n = p.numel()
        expected = 2 * n + 2 * 4 * -(-n // 256) if n >= 4096 else 2 * 4 * n
        assert sum(t.nbytes for t in state.values()) == expected
        assert all(t.dtype == torch.uint8 for t in list(state.values())[::2]) == (n >= 4096)


def test_slices_change_no_bit(monkeypatch):
    whole, one = train(Adam8bit, 3)
    monkeypatch.setattr(adam8bit, "SLICE", 512)
    sliced, two = train(Adam8bit, 3)
    assert furthest(whole, sliced) == 0
    for p, q in zip(whole, sliced):
        assert all(torch.equal(t, two.state[q][k]) for k, t in one.state[p].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_goes_on_to_the_bit(dtype):
    parameters, optimizer = train(Adam8bit, 2, dtype=dtype)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    other = Adam8bit(copies)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(parameters, copies):
        p.grad = q.grad = normal(*p.shape, seed=9, dtype=dtype)
        assert all(t.dtype == other.state[q][k].dtype for k, t in optimizer.state[p].items())
    optimizer.step(), other.step()
    assert furthest(parameters, copies) == 0
    assert parameters[0].dtype == dtype


def test_strided_gradients_closures_and_parameters_without_gradient():
    p, q, alone = (torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(3))
    p.grad = normal(64, 64).t()
    q.grad = p.grad.contiguous()
    optimizer = Adam8bit([p, q, alone])
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(p, q) and alone not in optimizer.state and not alone.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 80), (7, 13)])
def test_a_strided_parameter_is_updated_where_it_lies(shape, dtype):
    p, q = (torch.nn.Parameter(normal(*shape, dtype=dtype)) for _ in range(2))
    p.data = p.data.t().contiguous().t()
    assert not p.is_contiguous()
    lies_at = p.data_ptr(), p.stride()
    one, other = Adam8bit([p]), Adam8bit([q])
    for seed in (1, 2):
        p.grad = q.grad = normal(*shape, seed=seed, dtype=dtype)
        one.step(), other.step()
    assert torch.equal(p, q) and not torch.equal(p, normal(*shape, dtype=dtype))
    assert (p.data_ptr(), p.stride()) == lies_at


def test_the_state_is_fp32_whatever_the_default_dtype():
    adam8bit._levels.cache_clear()  # which are made once
    with default_dtype(torch.bfloat16):
        parameters, optimizer = train(Adam8bit, 2)
    assert all(adam8bit._levels(n, p.device).dtype == torch.float32
               for n in adam8bit.MOMENTS for p in parameters)  # fmt: skip
    adam8bit._levels.cache_clear()
    kinds = {t.dtype for p in parameters for t in optimizer.state[p].values()}
    assert kinds == {torch.uint8, torch.float32}


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match="expected"):
        Adam8bit([torch.nn.Parameter(torch.zeros(1))], **bad)
