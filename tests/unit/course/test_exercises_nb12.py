"""The references of notebook 12's exercises against the library and other definitions."""
import pytest
import torch

from course.kit import example
from course.nb12 import exercises as nb12
from qlora_lib.quant.channel_scales import smoothing_scales
from qlora_lib.quant.fp4 import FP4Spec, quantize_fp4
from qlora_lib.quant.hadamard import hadamard


def test_the_values_are_those_of_sign_exponent_and_mantissa():
    sizes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = nb12.e2m1_values(torch.arange(16).byte())
    assert values.tolist() == sizes + [-size for size in sizes]


@pytest.mark.parametrize("case", [1, 2, 3, 4, 5])
def test_a_block_has_the_library_s_bytes(case):
    (block,) = example("encode_mx", case)
    byte, packed = nb12.encode_mx(block)
    stored = quantize_fp4(block.view(1, 32), FP4Spec("mxfp4"))
    assert byte == stored.scale.item() and torch.equal(packed, stored.codes[0])


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_scales_are_the_library_s(size):
    w = size * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    stored = quantize_fp4(w, FP4Spec("nvfp4"))
    scales, whole = nb12.nv_scales(w.unflatten(1, (-1, 16)).abs().amax(-1))
    assert torch.equal(scales, stored.scale.view(torch.float8_e4m3fn).float())
    assert torch.equal(whole, stored.tensor_scale)


@pytest.mark.parametrize("case", [1, 2, 3, 4])
def test_range_moves_by_the_library_s_factors_and_the_function_stays(case):
    gain, weight, absmax, alpha = example("migrated", case)
    new_gain, new_weight = nb12.migrated(gain, weight, absmax, alpha)
    s = smoothing_scales(absmax, weight.abs().amax(0), alpha)
    assert torch.allclose(gain / new_gain, s, rtol=1e-5)
    x = torch.randn(5, len(gain), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(x * new_gain @ new_weight.T, x * gain @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [4.0, 64.0])
@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_a_planted_factor_is_taken_off_whole(size, alpha):
    gain, weight, absmax, _ = example("migrated", 2)
    planted = torch.tensor([1, 1, size, 1, 1])
    once = nb12.migrated(gain, weight, absmax, alpha)
    again = nb12.migrated(gain * planted, weight / planted, absmax * planted, alpha)
    for a, b in zip(once, again):
        assert torch.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("case", [1, 2, 3, 4])
def test_the_exponent_is_the_best_by_far_so_that_no_processor_finds_another(case):
    weight, x, quantize, exponents = example("awq_exponent", case)
    best = nb12.awq_exponent(weight, x, quantize, exponents)
    losses = {}
    for a in exponents:
        s = x.abs().mean(0) ** a
        losses[a] = (x @ (quantize(weight * s) / s - weight).T).square().mean().item()
    ranked = sorted(exponents, key=losses.get)
    assert ranked[0] == best and losses[ranked[1]] > 1.1 * losses[best]


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_hadamard_is_the_library_s_and_orthogonal(n):
    h = nb12.hadamard(n)
    assert torch.allclose(h, hadamard(n, torch.float32), atol=1e-6)
    assert torch.allclose(h @ h.T, torch.eye(n), atol=1e-5)


def test_a_rotated_stream_gives_the_same_outputs():
    gain, reads, writes, r = example("rotated", 2)
    new_reads, new_writes = nb12.rotated(gain, reads, writes, r)
    h = torch.randn(7, writes.shape[1], generator=torch.Generator().manual_seed(0))
    norm = torch.nn.RMSNorm(len(gain), eps=1e-6, elementwise_affine=False)
    before, after = h @ writes.T, h @ new_writes.T
    assert torch.allclose(after, before @ r, atol=1e-5)
    assert torch.allclose(norm(after) @ new_reads.T, norm(before) * gain @ reads.T, atol=1e-4)
