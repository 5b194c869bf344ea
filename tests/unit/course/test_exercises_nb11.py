"""The references of notebook 11's exercises against the library and other definitions."""
import pytest
import torch

from course.kit import example
from course.nb11 import exercises as nb11
from experiments.group_wise import GroupWiseLinear
from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.init import lost_part
from qlora_lib.lora.layer import LoRAConfig
from qlora_lib.lora.on_grid import OnGridLinear, move_codes
from qlora_lib.quant.gptq import output_error
from qlora_lib.quant.grid import QuantSpec, quantize_rtn

ALL = slice(None)


@pytest.mark.parametrize("case", [1, 2, 3])
def test_the_weighed_loss_is_the_square_of_the_library_s_output_error(case):
    lost, h = example("weighed_loss", case)
    weight = torch.randn(lost.shape, generator=torch.Generator().manual_seed(9))
    size = nb11.weighed_loss(weight, h)
    assert nb11.weighed_loss(lost, h) / size == pytest.approx(
        output_error(weight, weight - lost, h) ** 2, rel=1e-4)


@pytest.mark.parametrize("case", [1, 2, 3, 4])
def test_the_best_product_is_the_library_s_and_nothing_near_it_is_better(case):
    lost, h, rank = example("best_product", case)
    best = nb11.best_product(lost, h, rank)
    b, a = lost_part(lost, rank, "cloq", h, damp_percent=0)
    assert torch.allclose(best, b @ a, rtol=1e-3, atol=1e-4)
    assert torch.linalg.matrix_rank(best, rtol=1e-4) == rank
    least = nb11.weighed_loss(lost - best, h)
    g = torch.Generator().manual_seed(0)
    for step in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(20):
            other = ((b + step * torch.randn(b.shape, generator=g))
                     @ (a + step * torch.randn(a.shape, generator=g)))
            assert nb11.weighed_loss(lost - other, h) >= least * (1 - 1e-5)


@pytest.mark.parametrize("case", [2, 3])
def test_what_is_left_is_what_the_best_products_leave(case):
    lost, h = example("left_at_rank", case)
    left = nb11.left_at_rank(lost, h)
    assert len(left) == min(lost.shape) + 1
    for rank, share in enumerate(left.tolist()):
        off = lost - nb11.best_product(lost, h, rank) if rank else lost
        measured = nb11.weighed_loss(off, h) / nb11.weighed_loss(lost, h)
        assert measured == pytest.approx(share, abs=1e-5)


def moved_layer(bits):
    g = torch.Generator().manual_seed(bits)
    packed = QuantizedLinear(quantize_rtn(torch.randn(6, 16, generator=g), QuantSpec(bits, 16)))
    layer = OnGridLinear(packed, LoRAConfig(rank=2, alpha=2))
    layer.lora_B.data = 3 * torch.randn(6, 2, generator=g)
    return layer, g


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_and_gradients_are_the_library_s(bits):
    layer, g = moved_layer(bits)
    q, b, a = layer.quantized, layer.lora_B.detach(), layer.lora_A.detach()
    codes, top = q.unpacked(ALL).float(), q.spec.max_code
    moved, inside = move_codes(q, b @ a)
    assert torch.equal(nb11.moved_codes(codes, b @ a, q.scale.float(), top),
                       moved.unpacked(ALL).float())
    assert not inside.all()
    x, grad = torch.randn(9, 16, generator=g), torch.randn(9, 6, generator=g)
    layer(x).backward(grad)
    mine = nb11.straight_through(grad.T @ x, codes + b @ a / q.scale.float(), top, b, a)
    for own, p in zip(mine, (layer.lora_B, layer.lora_A)):
        assert torch.allclose(own, p.grad, rtol=1e-4, atol=1e-4)


def test_zero_points_are_those_of_qa_lora_s_merge():
    g = torch.Generator().manual_seed(0)
    layer = GroupWiseLinear(QuantizedLinear(quantize_rtn(
        torch.randn(6, 16, generator=g), QuantSpec(4, 8))), LoRAConfig(rank=2, alpha=2))
    layer.lora_B.data = torch.randn(6, 2, generator=g)
    zero, scale = (t.float() for t in (layer.zero_point, layer.scale))
    mine = nb11.merged_zeros(zero, scale, layer.lora_B.detach(), layer.lora_A.detach())
    assert torch.allclose(layer.merged(torch.float32).zero_point, mine, rtol=1e-5)
