"""One block at a time: the bits of quantize_model, kills that cost a block, one block's memory."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lib.base.files import read_json
from qlora_lib.base.folders import check_folder
from qlora_lib.lora.targets import ATTENTION
from qlora_lib.models import stream as streaming
from qlora_lib.models import stream_output
from qlora_lib.models.checkpoint import QUANTIZATION, load_quantized, save_quantized
from qlora_lib.models.load import load_model
from qlora_lib.models.quantize import quantize_model, quantized_layers
from qlora_lib.models.stored_weights import INDEX, WEIGHTS
from qlora_lib.models.stream import REPORT, folder_identity
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.fp4 import FP4Spec
from qlora_lib.quant.nf4 import NF4Spec
from tests.support import families
from tests.support.streamed_models import CALIBRATION, IDS, SPEC, folder, store, stored, stream  # noqa: F401


def without_seconds(rows):
    return [replace(row, seconds=0.0) for row in rows]


def shards(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A model of three blocks, quantized without interruption: (folder, out, rows)."""
    folder = store(tmp_path_factory.mktemp("three") / "model", layers=3)
    out = folder.parent / "whole"
    return folder, out, stream(folder, out)


# --- the same bits ----------------------------------------------------------------------------

WAYS = {
    "gptq": (SPEC, CALIBRATION, {"shard_size": "20kB"}, {}),
    "rtn": (SPEC, CALIBRATION, {"tied": False, "bias": True}, {"target_modules": ATTENTION}),
    "gptq, nvfp4": (FP4Spec("nvfp4"), CALIBRATION, {}, {}),
    "rtn, mxfp4": (FP4Spec("mxfp4"), None, {}, {}),
    "nf4": (NF4Spec(32), None, {"dtype": torch.bfloat16, "shard_size": "20kB"}, {}),
}


@pytest.mark.parametrize("method", WAYS)
def test_the_result_is_that_of_the_whole_model_in_memory(method, tmp_path):
    spec, calibration, stored, given = WAYS[method]
    method = method.partition(",")[0]
    folder = store(tmp_path / "model", **stored)
    assert (folder / INDEX).is_file() == ("shard_size" in stored)
    model, tokenizer = load_model(folder, "cpu", "fp32")
    rows = quantize_model(model, calibration, spec, method, **given)
    save_quantized(model, tokenizer, tmp_path / "whole")
    streamed = stream(folder, tmp_path / "out", spec, calibration, method, **given)
    assert without_seconds(streamed) == without_seconds(rows)
    assert (streamed[0].output_error is None) == (calibration is None)

    for name in ("config.json", "generation_config.json", QUANTIZATION, "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ours, theirs = (load_quantized(tmp_path / n, "cpu", "fp32")[0] for n in ("out", "whole"))
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and quantized_layers(ours).keys() == quantized_layers(theirs).keys()
    assert all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_shards_are_blocks_and_dense_tensors_stay_as_stored(tmp_path):
    folder = store(tmp_path / "model", dtype=torch.bfloat16)
    stream(folder, tmp_path / "out", calibration=None, method="rtn")
    first, *blocks = (load_file(p) for p in sorted((tmp_path / "out").glob("*.safetensors")))
    assert set(first) == {"model.embed_tokens.weight", "model.norm.weight"}  # the head is tied
    for i, block in enumerate(blocks):
        assert all(name.startswith(f"model.layers.{i}.") for name in block)
    stored = load_file(folder / WEIGHTS)
    for state in (first, *blocks):
        for name in state.keys() & stored.keys():
            assert state[name].dtype == torch.bfloat16 and torch.equal(state[name], stored[name])
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    size = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    count = sum(t.numel() for t in stored.values())
    assert report["weight_bytes"] == size and report["parameters"] == count
    assert report["bits_per_parameter"] == pytest.approx(8 * size / count, abs=1e-4)


def test_spilled_activations_change_nothing_and_leave_nothing(three, tmp_path):
    folder, whole, _ = three
    stream(folder, tmp_path / "disk", spill=tmp_path / "spill")
    assert shards(tmp_path / "disk") == shards(whole)
    assert not list((tmp_path / "spill").iterdir())


def test_the_first_blocks_alone_are_a_model(three, tmp_path):
    folder, whole, all_rows = three
    rows = stream(folder, tmp_path / "one", blocks=1)
    model, _ = load_quantized(tmp_path / "one", "cpu", "fp32")
    assert len(rows) == len(quantized_layers(model)) == 7 and len(model.model.layers) == 1
    assert without_seconds(all_rows)[:7] == without_seconds(rows)
    one, same = (sorted(out.glob("*.safetensors"))[1] for out in (tmp_path / "one", whole))
    assert one.read_bytes() == same.read_bytes()


def test_one_block_is_in_memory_and_each_dense_weight_goes_with_its_layer(
    stored, tmp_path, monkeypatch
):
    made, dense = [], []
    real_model, real_layer = streaming.StreamedModel, streaming.quantize_layer

    def keep(*args):
        made.append(real_model(*args))
        return made[0]

    def look(path, layer, *args):
        """Before a layer is quantized, and after all that came before it."""
        model = made[0].model
        state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        real = {n for n, t in state if not t.is_meta}
        inside = {made[0].block_of(n) for n in real}
        assert inside - {-1} == {made[0].block_of(path)}
        assert not any("embed" in n or "lm_head" in n for n in real)
        # Layers that share an input are done together; the first of them showed it.
        assert sum(ref() is not None for ref in dense) <= 1
        dense.append(weakref.ref(layer.weight))
        return real_layer(path, layer, *args)

    monkeypatch.setattr(streaming, "StreamedModel", keep)
    monkeypatch.setattr(streaming, "quantize_layer", look)
    stream(stored, tmp_path / "out", method="rtn", spill=tmp_path / "spill")
    assert len(dense) == 14 and not any(ref() is not None for ref in dense)


# --- kills ------------------------------------------------------------------------------------


class Kill(Exception):
    pass


def killed_after(layers: int, folder, out, **given):
    seen = []

    def progress(row):
        seen.append(row.name)
        if len(seen) == layers:
            raise Kill

    with pytest.raises(Kill):
        stream(folder, out, **given, progress=progress)


@pytest.mark.parametrize("layers", [3, 8, 21])
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(layers, three, tmp_path):
    folder, whole, rows = three
    out, unfinished = tmp_path / "out", tmp_path / "out.unfinished"
    killed_after(layers, folder, out)
    assert not out.exists()
    with pytest.raises(FileNotFoundError, match=QUANTIZATION):
        load_quantized(unfinished, "cpu", "fp32")
    kept = {p.name: p.stat().st_ino for p in unfinished.glob("*.safetensors")}
    assert len(kept) == 1 + (layers - 1) // 7  # a block whose last layer was cut off comes again
    (unfinished / ".model-00009-of-00009.safetensors").write_text("half")  # as a kill may leave
    again = []
    resumed = stream(folder, out, progress=again.append)
    assert without_seconds(resumed) == without_seconds(rows)
    assert again == resumed[7 * (len(kept) - 1) :]
    assert shards(out) == shards(whole) and not unfinished.exists()
    assert {n: (out / n).stat().st_ino for n in kept} == kept
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.parametrize("shard", [1, 2, 3])
def test_a_shard_that_was_damaged_meanwhile_is_made_anew(shard, three, tmp_path, capsys):
    folder, whole, rows = three
    out, unfinished = tmp_path / "out", tmp_path / "out.unfinished"
    killed_after(16, folder, out)  # two blocks are done
    path = sorted(unfinished.glob("*.safetensors"))[shard - 1]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert without_seconds(stream(folder, out)) == without_seconds(rows)
    assert shards(out) == shards(whole)
    assert f"{path.name}: damaged since it was written, made anew" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "[]", "{}", '{"made_from": 5}', '{"made_from": {}}'])
def test_a_damaged_report_of_an_unfinished_run_is_named(text, three, tmp_path):
    folder, out = three[0], tmp_path / "out"
    killed_after(8, folder, out)
    report = tmp_path / "out.unfinished" / REPORT
    before = report.read_text()
    report.write_text(before.replace("down_proj", "down_prom", 1) if text is None else text)
    with pytest.raises(ValueError, match="out.unfinished can't be gone on with .*; delete it"):
        stream(folder, out)


def test_an_unfinished_run_of_an_older_version_goes_on(three, tmp_path):
    """Its report has no hashes."""
    folder, whole, _ = three
    out = tmp_path / "out"
    killed_after(16, folder, out)
    report = tmp_path / "out.unfinished" / REPORT
    said = json.loads(report.read_text())
    for name in ("shards", "format", "sha256"):
        said.pop(name)
    report.write_text(json.dumps(said))
    stream(folder, out)
    assert shards(out) == shards(whole)


def test_a_finished_run_that_was_damaged_is_named(folder, tmp_path):
    stream(folder, tmp_path / "out", calibration=None, method="rtn")
    path = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    for use in (lambda: stream(folder, tmp_path / "out", calibration=None, method="rtn"),
                lambda: load_quantized(tmp_path / "out", "cpu", "fp32")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{path.name} is not as it was written"):
            use()


def test_a_finished_run_is_not_made_again(folder, tmp_path):
    rows = stream(folder, tmp_path / "out", calibration=None, method="rtn")

    def fail(row):
        raise AssertionError(row)

    same = {"calibration": None, "method": "rtn"}
    assert stream(folder, tmp_path / "out", progress=fail, **same) == rows
    other = stream(folder, tmp_path / "out", QuantSpec(2, 32), **same)  # other settings replace it
    assert other[0].bits_per_weight < rows[0].bits_per_weight
    assert quantized_layers(load_quantized(tmp_path / "out", "cpu", "fp32")[0])


@pytest.mark.parametrize("finished", [True, False])
def test_what_belongs_beside_a_model_is_there_when_the_model_is(finished, folder, tmp_path):
    out = tmp_path / "out"
    if finished:  # by who had nothing to put there
        stream(folder, out, calibration=None, method="rtn")
    before = shards(out)
    for said in ({"a": (1, 2)}, {"a": 2}, {"a": 2}):
        stream(folder, out, calibration=None, method="rtn", beside={"recipe.json": said})
        assert read_json(out / "recipe.json") == json.loads(json.dumps(said)) and check_folder(out)
    assert not before or shards(out) == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == ["out"]


@pytest.mark.parametrize("what", ["spec", "targets", "calibration", "weights"])
def test_an_unfinished_run_of_another_kind_is_refused_by_name(what, folder, tmp_path):
    killed_after(8, folder, tmp_path / "out", method="rtn")
    before = shards(tmp_path / "out.unfinished")
    given = {
        "spec": {"spec": QuantSpec(3, 32)},
        "targets": {"target_modules": ATTENTION},
        "calibration": {"calibration": CALIBRATION[:1]},
    }.get(what, {})
    if what == "weights":
        state = load_file(folder / WEIGHTS)
        state["model.norm.weight"] *= 2
        save_file(state, folder / WEIGHTS, {"format": "pt"})
    message = (
        rf"out.unfinished holds an unfinished run of other settings: {what} was .*, is .*delete"
    )
    with pytest.raises(ValueError, match=message):
        stream(folder, tmp_path / "out", method="rtn", **given)
    assert shards(tmp_path / "out.unfinished") == before


def test_a_change_of_any_tensor_is_another_model(folder):
    def identity():
        return folder_identity(folder)

    first, state = identity(), load_file(folder / WEIGHTS)
    assert identity() == first
    for name, tensor in state.items():
        save_file({**state, name: tensor * 1.001}, folder / WEIGHTS, {"format": "pt"})
        assert identity() != first, name
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    assert identity() == first
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert identity() != first


def test_a_failed_write_leaves_no_shard(folder, tmp_path, monkeypatch):
    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(stream_output, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        stream(folder, tmp_path / "out", calibration=None, method="rtn")
    assert not shards(tmp_path / "out.unfinished").keys() - {".model-00001-of-00003.safetensors"}
    assert not (tmp_path / "out").exists()


# --- bad input --------------------------------------------------------------------------------


def damage(folder, what):
    state = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    if what == "missing":
        del state[name]
    elif what == "not expected":
        state["model.layers.1.self_attn.q_proj.bias"] = torch.ones(32)
    elif what == "a block too many":
        state["model.layers.2.mlp.up_proj.weight"] = torch.ones(2)
    elif what == "shape":
        state[name] = state[name][:-1].contiguous()
    elif what == "NaN":
        state[name][3, 4] = float("nan")
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    if what == "truncated":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    elif what == "gone":
        (folder / WEIGHTS).unlink()


@pytest.mark.parametrize("what, message", [
    ("missing", r"missing \['model.layers.1.mlp.up_proj.weight'\]"),
    ("not expected", r"not expected \['model.layers.1.self_attn.q_proj.bias'\]"),
    ("a block too many", r"not expected \['model.layers.2.mlp.up_proj.weight'\]"),
    ("shape", r"up_proj.weight is \(63, 32\), by config.json \(64, 32\)"),
    ("NaN", "model.layers.1.mlp.up_proj.weight holds NaN"),
    ("truncated", "model.safetensors is truncated or corrupt"),
    ("gone", "model.safetensors does not exist"),
])  # fmt: skip
def test_damaged_weights_are_named(what, message, folder, tmp_path):
    damage(folder, what)
    with pytest.raises(FileNotFoundError if what == "gone" else ValueError, match=message):
        stream(folder, tmp_path / "out", calibration=None, method="rtn")
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_fit_are_named(folder, tmp_path):
    for given, message in (
        ({"blocks": 3}, "blocks=3, but .*model has 2"),
        ({"blocks": 0}, "blocks=0"),
        ({"target_modules": ("lm_head",)}, r"\['lm_head'\] lie outside the decoder blocks"),
        ({"target_modules": ("nothing",)}, "nothing"),
        ({"calibration": None}, "needs calibration"),
        ({"spec": NF4Spec()}, "does not go with"),
    ):
        with pytest.raises(ValueError, match=message):
            stream(folder, tmp_path / "out", **given)
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        stream(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="out holds other files"):
        stream(folder, tmp_path / "out")


def test_blocks_with_masks_or_inputs_of_their_own_are_streamed_as_in_memory(tmp_path):
    """Gemma 3's blocks differ in mask and angles, Gemma 3n's get an input each."""
    for family in ("gemma3", "gemma3n"):
        folder, targets = families.store(family, tmp_path / family), ("k_proj", "down_proj")
        model, tokenizer = load_model(folder, "cpu", "fp32")
        rows = quantize_model(model, CALIBRATION, SPEC, target_modules=targets)
        streamed = stream(folder, tmp_path / f"{family} out", target_modules=targets)
        assert without_seconds(streamed) == without_seconds(rows)
        ours, _ = load_quantized(tmp_path / f"{family} out", "cpu", "fp32")
        assert torch.equal(ours(IDS).logits, model(IDS).logits)


def test_what_old_checkpoints_hold_besides_is_left_out(folder, tmp_path):
    state = load_file(folder / WEIGHTS)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    stream(folder, tmp_path / "out", calibration=None, method="rtn")
    load_quantized(tmp_path / "out", "cpu", "fp32")
