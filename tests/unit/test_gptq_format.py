"""GPTQ checkpoints: the layout by hand, there and back to the bit, every damage named."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_models import IDS, adapted, base_of, files, logits, rewrite
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import small_model, small_tokenizer

from qlora_lib import gptq_format
from qlora_lib.checkpoint import WEIGHTS, load_quantized, save_quantized
from qlora_lib.gptq import GPTQOptions
from qlora_lib.gptq_format import INDEX, MARKER, export_gptq, import_gptq
from qlora_lib.gptq_layout import from_gptq, to_gptq
from qlora_lib.grid import QuantizedTensor, QuantSpec, assemble, quantize_rtn
from qlora_lib.linear import QuantizedLinear
from qlora_lib.merge import merge_lora
from qlora_lib.models import quantize_model, quantized_layers
from qlora_lib.packing import BITS
from tests.helpers import PROPERTY, normal


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
    with pytest.raises(ValueError, match=r"p\.g_idx lies outside 0 to 2"):
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


# --- whole models -----------------------------------------------------------------------------

KINDS = ["grid2", "grid3", "grid4", "grid8", "symmetric", "g_idx"]


@pytest.mark.parametrize("checkpoint_format", ["gptq_v2", "gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_to_the_bit(kind, checkpoint_format, tmp_path):
    model = base_of(kind)
    if checkpoint_format == "gptq":  # it has no zero-point of 0, and random rows have some
        for layer in quantized_layers(model).values():
            layer.zero_point.clamp_(min=1)
    export_gptq(model, tmp_path / "new" / "m", checkpoint_format, small_tokenizer())
    again, tokenizer = import_gptq(tmp_path / "new" / "m", "cpu", "fp32")
    ours, theirs = quantized_layers(model), quantized_layers(again)
    assert ours.keys() == theirs.keys() and len(ours) == 14
    for path, layer in ours.items():
        assert theirs[path].spec == layer.spec
        assert torch.equal(theirs[path].dequantize(), layer.dequantize())
        assert (theirs[path].g_idx is None) == (layer.g_idx is None)
    assert torch.equal(logits(again), logits(model))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert tokenizer("Ava has 12").input_ids == small_tokenizer()("Ava has 12").input_ids
    save_quantized(again, tokenizer, tmp_path / "ours")  # the config says nothing of GPTQ now
    assert "quantization_config" not in json.loads((tmp_path / "ours/config.json").read_text())
    assert torch.equal(logits(load_quantized(tmp_path / "ours", "cpu", "fp32")[0]), logits(model))


def test_the_folder_is_what_readers_ask_for(tmp_path):
    model = base_of("grid4")
    export_gptq(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    described = config["quantization_config"]
    assert described == json.loads((tmp_path / "m" / MARKER).read_text())
    wanted = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 16,
              "sym": False, "desc_act": False, "lm_head": False, "pack_dtype": "int32"}
    assert wanted.items() <= described.items()
    assert "modules_in_block_to_quantize" not in described and "dynamic" not in described
    with safe_open(tmp_path / "m" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    prefix = "model.layers.1.self_attn.q_proj"
    assert {n for n in names if n.startswith(prefix)} == {
        f"{prefix}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")
    }
    assert "model.norm.weight" in names and "lm_head.weight" not in names  # tied: stored once
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        WEIGHTS, "config.json", "generation_config.json", MARKER
    }  # fmt: skip
    assert not hasattr(model.config, "quantization_config")  # of the file, not of our model
    assert import_gptq(tmp_path / "m", "cpu", "fp32")[1] is None  # it has no tokenizer


def test_act_order_is_said_only_where_groups_are_shuffled(tmp_path):
    data = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    for options, expected in ((GPTQOptions(), False), (GPTQOptions(static_groups=False), True)):
        model = small_model(layers=1)
        quantize_model(model, data, QuantSpec(4, 16), options=options)
        export_gptq(model, tmp_path / "m")
        assert json.loads((tmp_path / "m" / MARKER).read_text())["desc_act"] == expected


def test_shards_with_an_index(tmp_path):
    model = base_of("grid4")
    export_gptq(model, tmp_path / "m", max_shard_size=30_000)
    parts = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(parts) > 2 and WEIGHTS not in parts
    again, _ = import_gptq(tmp_path / "m", "cpu", "fp32")
    assert torch.equal(logits(again), logits(model))
    (tmp_path / "m" / parts[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{parts[1]} does not exist"):
        import_gptq(tmp_path / "m")


def test_biases_and_dense_layers(tmp_path):
    from transformers import LlamaForCausalLM

    config = small_model().config
    config.attention_bias = True
    model = LlamaForCausalLM(config).eval()
    for i, block in enumerate(model.model.layers):
        block.self_attn.q_proj.bias.data = normal(64, seed=i)
    quantize_model(model, None, QuantSpec(4, 32), "rtn", target_modules=("q_proj", "up_proj"))
    export_gptq(model, tmp_path / "m")
    again, _ = import_gptq(tmp_path / "m", "cpu", "fp32")
    assert torch.equal(logits(again), logits(model))
    assert len(quantized_layers(again)) == 4
    described = json.loads((tmp_path / "m" / MARKER).read_text())
    assert described["modules_in_block_to_quantize"] == [["self_attn.q_proj", "mlp.up_proj"]]
    assert r"-:.*\.mlp\.down_proj$" in described["dynamic"] and len(described["dynamic"]) == 5


# --- models that are refused ------------------------------------------------------------------


def refused(model, tmp_path, message, **given):
    with pytest.raises(ValueError, match=message):
        export_gptq(model, tmp_path / "m", **given)
    assert not list(tmp_path.iterdir())


def test_models_that_the_format_can_not_hold_are_refused(tmp_path):
    refused(small_model(), tmp_path, "no layer is quantized; call quantize_model")
    refused(base_of("nf4"), tmp_path, r"layers\.0\.self_attn\.q_proj is NF4.*QuantSpec")
    refused(adapted(base_of("grid4")), tmp_path, r"q_proj has an adapter.*merge_lora\(.*save_ada")
    refused(base_of("grid4"), tmp_path, "'gptq_v3' must be one of", checkpoint_format="gptq_v3")

    model = base_of("grid4")
    path = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(path)
    other = quantize_rtn(layer.dequantize(), QuantSpec(3, 16))
    model.model.layers[1].mlp.up_proj = QuantizedLinear(other)
    refused(model, tmp_path, rf"one checkpoint has one spec: .*q_proj .*bits=4.*{path} .*bits=3")
    model.model.layers[1].mlp.up_proj = layer.to_linear()
    refused(model, tmp_path, f"{path} is dense, in other blocks it is quantized")
    head = small_model()
    quantize_model(head, None, QuantSpec(4, 16), "rtn", target_modules=("lm_head",))
    refused(head, tmp_path, "lm_head")


def test_an_adapter_merged_and_unloaded_can_be_exported(tmp_path):
    model = adapted(base_of("grid4"))
    merge_lora(model, "rtn", unload=True)
    export_gptq(model, tmp_path / "m")
    assert torch.equal(logits(import_gptq(tmp_path / "m", "cpu", "fp32")[0]), logits(model))


# --- folders that are refused -----------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    export_gptq(base_of("grid4"), tmp_path / "m", tokenizer=small_tokenizer())
    return tmp_path / "m"


def set_config(folder, **change):
    def apply(config):
        config["quantization_config"] |= change

    rewrite(folder, "config.json", apply)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bits=5), r"config.json: bits=5 is not one of \(2, 3, 4, 8\)"),
        (dict(bits=8), r"proj\.qweight is torch.int32 .*for 8 bits"),
        (dict(checkpoint_format="marlin"), "checkpoint_format='marlin' is not one of"),
        (dict(quant_method="awq"), "config.json: quantization_config is 'awq', not 'gptq'"),
        (dict(pack_dtype="int16"), "pack_dtype='int16' must be 'int32'"),
        (dict(dynamic={"+:.*q_proj": {"bits": 8}}), "dynamic gives .*q_proj' settings of its own"),
        (dict(group_size=48), "group_size=48 does not divide"),
        (dict(group_size=32), r"proj\.qzeros is .*for 4 bits in . groups; does config.json"),
        (dict(sym=True), r"qzeros: sym is true, but a zero-point is \d+, not 8"),
    ],
    ids=str,
)
def test_settings_that_are_not_supported_are_named(saved, change, message):
    set_config(saved, **change)
    with pytest.raises(ValueError, match=message):
        import_gptq(saved, "cpu", "fp32")


def test_older_names_of_the_version_are_read(saved):
    want = logits(base_of("grid4"))

    def rename(config):
        described = config["quantization_config"]
        described["format"] = described.pop("checkpoint_format")

    rewrite(saved, "config.json", rename)
    assert torch.equal(logits(import_gptq(saved, "cpu", "fp32")[0]), want)
    rewrite(saved, "config.json", lambda c: c["quantization_config"].pop("format"))
    try:  # a file that names none is v1: read so, or refused, but never taken for v2
        assert not torch.equal(logits(import_gptq(saved, "cpu", "fp32")[0]), want)
    except ValueError as error:
        assert "overflowed" in str(error)


def test_a_dense_model_is_no_gptq_checkpoint(saved):
    rewrite(saved, "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(ValueError, match="config.json: quantization_config is None, not 'gptq'"):
        import_gptq(saved)


def change_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(f"{Q_PROJ}.g_idx"), rf"{Q_PROJ}\.g_idx is missing"),
        (lambda s: s.pop("model.norm.weight"), r"missing \['model.norm.weight'\]"),
        (lambda s: s.update(extra=torch.ones(1)), r"not expected \['extra'\]"),
        (lambda s: s.update({"a.qweight": torch.ones(1)}), r"a\.qweight: the model .* has no a"),
        (
            lambda s: [s.pop(n) for n in list(s) if n.endswith("qweight")],
            "holds no qweight; is it a GPTQ checkpoint",
        ),
    ],
)
def test_damaged_weights_are_named(saved, change, message):
    change_weights(saved, change)
    with pytest.raises(ValueError, match=message):
        import_gptq(saved, "cpu", "fp32")


@pytest.mark.parametrize("size", [0, 100, -1])
def test_truncated_weights_are_named(saved, size):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:size])
    with pytest.raises(ValueError, match="model.safetensors is truncated or corrupt"):
        import_gptq(saved)


def test_missing_files_are_named(saved):
    (saved / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} does not exist"):
        import_gptq(saved)
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        import_gptq(saved / "nowhere")
    (saved / INDEX).write_text('{"weight_map')
    with pytest.raises(ValueError, match="index.json is not valid JSON"):
        import_gptq(saved)


# --- saving -----------------------------------------------------------------------------------


def test_a_failed_export_leaves_the_old_checkpoint(saved, monkeypatch):
    before = files(saved)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(small_tokenizer()), "save_pretrained", fail)  # after the weights
    with pytest.raises(OSError, match="disk full"):
        export_gptq(base_of("grid2"), saved, tokenizer=small_tokenizer())
    monkeypatch.setattr(gptq_format, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_gptq(base_of("grid2"), saved)
    assert files(saved) == before and [p.name for p in saved.parent.iterdir()] == ["m"]


def test_an_export_replaces_an_export_and_nothing_else(saved, tmp_path):
    model = base_of("grid8")
    export_gptq(model, saved)
    assert torch.equal(logits(import_gptq(saved, "cpu", "fp32")[0]), logits(model))
    small_model().save_pretrained(tmp_path / "dense")
    before = files(tmp_path / "dense")
    with pytest.raises(ValueError, match="dense holds other files; give a folder of its own"):
        export_gptq(model, tmp_path / "dense")
    assert files(tmp_path / "dense") == before
