"""One layer in the GPTQ layout: a hand-written one, there and back, versions, bad tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.formats.gptq_layout import from_gptq, to_gptq
from qlora_lib.quant.grid import QuantizedTensor, QuantSpec, assemble, quantize_rtn
from qlora_lib.quant.packing import BITS
from tests.support.tensors import PROPERTY, normal


def random_layer(bits, out, in_features, groups, shuffled=False, low=0, seed=0) -> QuantizedTensor:
    """Random codes and grids; zero-points from `low` up."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (out, in_features), generator=g)
    zero = torch.randint(low, 2**bits, (out, groups), generator=g)
    scale = torch.rand(out, groups, generator=g).half() + 0.01
    order = torch.randperm(in_features, generator=g)
    g_idx = order // (in_features // groups) if shuffled else None
    spec = QuantSpec(bits, None if groups == 1 else in_features // groups)
    return assemble(q, scale, zero, g_idx, spec)


# --- the layout -------------------------------------------------------------------------------


def test_a_hand_written_layer():
    """32 inputs, 32 outputs, 4 bits, two groups; what each word must be, digit by digit."""
    q = (torch.arange(32) % 16).repeat(32, 1)  # each output has the codes 0 to 15, twice
    q[1] = 15 - q[1]
    zero = torch.full((32, 2), 8)
    zero[0], zero[7] = torch.tensor([1, 2]), torch.tensor([15, 14])
    scale = torch.full((32, 2), 0.5)
    scale[3, 1] = 0.25
    layer = assemble(q, scale, zero, None, QuantSpec(4, 16))

    def words(t):
        return [f"{v & 0xFFFFFFFF:08x}" for v in t.tolist()]

    t = to_gptq("p", layer, v1=False)
    assert {n: (x.dtype, tuple(x.shape)) for n, x in t.items()} == {
        "qweight": (torch.int32, (4, 32)),
        "qzeros": (torch.int32, (2, 4)),
        "scales": (torch.float16, (2, 32)),
        "g_idx": (torch.int32, (32,)),
    }
    assert words(t["qweight"][:, 0]) == ["76543210", "fedcba98"] * 2  # first code lowest
    assert words(t["qweight"][:, 1]) == ["89abcdef", "01234567"] * 2
    assert words(t["qzeros"][0]) == ["f8888881", "88888888", "88888888", "88888888"]
    assert words(t["qzeros"][1]) == ["e8888882", "88888888", "88888888", "88888888"]
    assert t["scales"][:, 3].tolist() == [0.5, 0.25]
    assert t["g_idx"].tolist() == [0] * 16 + [1] * 16
    v1 = to_gptq("p", layer, v1=True)
    assert words(v1["qzeros"][0]) == ["e7777770", "77777777", "77777777", "77777777"]
    assert all(torch.equal(v1[n], t[n]) for n in ("qweight", "scales", "g_idx"))


@pytest.mark.parametrize("bits, word", [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_v1_words_are_the_well_known_ones(bits, word):
    quantized = quantize_rtn(normal(32, 64), QuantSpec(bits, 32, symmetric=True))
    assert (to_gptq("p", quantized, v1=True)["qzeros"] == word).all()


@PROPERTY
@given(
    bits=st.sampled_from(BITS),
    out=st.integers(1, 3).map(lambda n: 32 * n),
    in_features=st.integers(1, 4).map(lambda n: 32 * n),
    groups=st.sampled_from([1, 2, 4, 8]),
    shuffled=st.booleans(),
    v1=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_there_and_back_to_the_bit(bits, out, in_features, groups, shuffled, v1, seed):
    layer = random_layer(bits, out, in_features, groups, shuffled, low=int(v1), seed=seed)
    tensors = to_gptq("p", layer, v1)
    assert all(t.is_contiguous() for t in tensors.values())
    again = from_gptq("p", tensors, layer.shape, layer.spec, v1)
    assert torch.equal(again.dequantize(), layer.dequantize())
    for name in ("codes", "scale", "zero_point"):
        a, b = getattr(again, name), getattr(layer, name)
        assert a.dtype == b.dtype and torch.equal(a, b)


@PROPERTY
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 10**6))
def test_the_words_decode_by_the_published_formula(bits, seed):
    """W[n, k] = scales[g_idx[k], n] * (q[k, n] - zero[g_idx[k], n]), codes taken from one
    big integer a column (a row, for zero-points): none of the library's own unpacking."""
    layer = random_layer(bits, 32, 64, 2, shuffled=True, seed=seed)
    t = to_gptq("p", layer, v1=False)

    def stream(words):
        whole = sum((w & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(words.tolist()))
        n = 32 * len(words) // bits
        return torch.tensor([(whole >> (bits * i)) & (2**bits - 1) for i in range(n)])

    q = torch.stack([stream(column) for column in t["qweight"].t()])  # (out, in)
    zero = torch.stack([stream(row) for row in t["qzeros"]]).t()  # (out, groups)
    g = t["g_idx"].long()
    decoded = t["scales"].t().float()[:, g] * (q - zero[:, g])
    assert torch.equal(decoded, layer.dequantize())


# --- version 1 and the zero-point 0 -----------------------------------------------------------


@PROPERTY
@given(bits=st.sampled_from(BITS), shuffled=st.booleans(), seed=st.integers(0, 10**6))
def test_v1_moves_a_zero_point_of_0_up_and_changes_no_weight(bits, shuffled, seed):
    layer = random_layer(bits, 32, 64, 2, shuffled, seed=seed)
    g = torch.Generator().manual_seed(seed)
    zero = torch.randint(0, 2, (32, 2), generator=g)
    codes = torch.randint(0, 2**bits - 1, (32, 64), generator=g)  # the highest stays free
    layer = assemble(codes, layer.scale, zero, layer.g_idx, layer.spec)
    again = from_gptq("p", to_gptq("p", layer, True), layer.shape, layer.spec, True)
    assert (again.zero_point == 1).all()
    assert torch.equal(again.dequantize(), layer.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_v1_refuses_a_zero_point_of_0_beside_the_highest_code(bits):
    layer = random_layer(bits, 32, 64, 2, low=1)
    layer.zero_point[[3, 5], 1] = 0
    codes = torch.full((32, 64), 2**bits - 1)
    layer = assemble(codes, layer.scale, layer.zero_point, None, layer.spec)
    with pytest.raises(ValueError, match=r"p\.qzeros: 2 of 32 outputs.*zero-point of 0.*gptq_v2"):
        to_gptq("p", layer, v1=True)
    again = from_gptq("p", to_gptq("p", layer, False), layer.shape, layer.spec, False)
    assert torch.equal(again.zero_point, layer.zero_point)


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_that_overflowed_in_a_v1_file_are_refused(bits):
    layer = random_layer(bits, 32, 64, 2)
    layer.zero_point[:] = 1
    layer.zero_point[4, 1] = 2**bits - 1
    tensors = to_gptq("p", layer, v1=False)
    with pytest.raises(ValueError, match=rf"p\.qzeros: 1 zero-points are stored as {2**bits - 1}"):
        from_gptq("p", tensors, layer.shape, layer.spec, v1=True)


@pytest.mark.parametrize("stored, read_as", [(True, False), (False, True)])
def test_a_symmetric_file_with_the_wrong_version_is_refused(stored, read_as):
    layer = quantize_rtn(normal(32, 64), QuantSpec(4, 32, symmetric=True))
    tensors = to_gptq("p", layer, v1=stored)
    value = 9 if read_as else 7
    with pytest.raises(ValueError, match=f"a zero-point is {value}, not 8.*checkpoint_format"):
        from_gptq("p", tensors, layer.shape, layer.spec, v1=read_as)


# --- tensors that do not fit ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales", "g_idx"])
def test_missing_and_misshapen_tensors_are_named(name):
    layer = random_layer(3, 64, 96, 3)
    tensors = to_gptq("a.b", layer, False)

    def read(**change):
        return from_gptq("a.b", {**tensors, **change}, layer.shape, layer.spec, False)

    less = {n: t for n, t in tensors.items() if n != name}
    with pytest.raises(ValueError, match=rf"a\.b\.{name} is missing; export"):
        from_gptq("a.b", less, layer.shape, layer.spec, False)
    with pytest.raises(ValueError, match=rf"a\.b\.{name} is torch.*expected .* for 3 bits in 3"):
        read(**{name: tensors[name][:-1].contiguous()})
    other = tensors[name].int() if name == "scales" else tensors[name].float()
    with pytest.raises(ValueError, match=rf"a\.b\.{name} is {other.dtype}"):
        read(**{name: other})


@pytest.mark.parametrize("bad", [-1, 3])
def test_a_group_that_does_not_exist_is_refused(bad):
    layer = random_layer(4, 32, 96, 3)
    tensors = to_gptq("p", layer, False)
    tensors["g_idx"][5] = bad
    with pytest.raises(ValueError, match="p: g_idx lies outside 0 to 2"):
        from_gptq("p", tensors, layer.shape, layer.spec, False)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_shapes_that_do_not_fill_words_are_refused(shape):
    layer = quantize_rtn(normal(*shape), QuantSpec(4, 16))
    message = f"p has {shape[1]} inputs and {shape[0]} outputs.*multiples of 32: leave"
    with pytest.raises(ValueError, match=message):
        to_gptq("p", layer, False)
    with pytest.raises(ValueError, match=message):
        from_gptq("p", {}, layer.shape, layer.spec, False)


def test_groups_that_do_not_divide_the_inputs_are_refused():
    with pytest.raises(ValueError, match="p: group_size=128 does not divide in_features=96"):
        from_gptq("p", {}, torch.Size((32, 96)), QuantSpec(4, 128), False)
