"""SmolLM2's outliers: what is kept of a row, on a small random model."""

import copy
from dataclasses import replace

import pytest
import torch

from experiments import smollm2_outliers as own
from experiments.smollm2_outliers import REPAIRS, losses, measure, plan, where
from experiments.table import Table
from qlora_lib.models.rescale import plant_outliers
from qlora_lib.runs.profiles import load_profile
from tests.support.calibrated_models import batches
from tests.support.small_models import small_model


@pytest.fixture
def texts(monkeypatch):
    """(calibration batches, ids of the test text), in windows of 32."""
    monkeypatch.setattr(own, "WINDOW", 32)
    monkeypatch.setattr(own, "TEST_WINDOW", 32)
    seen = [{"input_ids": b["input_ids"]} for b in batches(4, rows=1, length=32)]
    return seen, batches(1, rows=1, length=128, seed=5)[0]["input_ids"][0]


def test_the_largest_hidden_states_are_found_where_they_are(texts):
    model, (seen, _) = small_model(), texts
    model.model.layers[0].mlp.down_proj.weight.data[7] *= 300  # one channel, from block 0 on
    with torch.no_grad():
        want = torch.cat([model.model(**b, output_hidden_states=True).hidden_states[1]
                          for b in seen]).abs()  # fmt: skip
    row = where(model, seen)["blocks"][0]
    assert row["channel"] == row["later_channel"] == 7
    assert row["largest"] == pytest.approx(float(want.max()), rel=1e-5)
    at = want.amax(0)[:, 7].argmax()
    assert row["position"] == int(at)
    assert row["later"] == pytest.approx(float(want[:, 1:, 7].max()), rel=1e-5)
    assert row["later_median"] < row["later"] / 20


def test_a_rotation_shows_in_the_inputs_of_layers(texts):
    model, (seen, _) = small_model(), texts
    plant_outliers(model, 64)
    ratios = {how: measure(model, seen, None, "where", how)["largest_over_median"]
              for how in REPAIRS}  # fmt: skip
    assert set(ratios["none"]) == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    assert all(len(found) == 2 for found in ratios["none"].values())
    for kind in ("q_proj", "gate_proj"):
        assert max(ratios["rotate"][kind]) < min(ratios["none"][kind]) / 4
    assert max(ratios["rotate online"]["down_proj"]) < min(ratios["rotate"]["down_proj"]) / 4
    assert where(model, seen)["largest_over_median"] == ratios["none"]  # as it was


def test_a_row_of_each_kind(texts):
    model, (seen, ids) = small_model(), texts
    before = copy.deepcopy(model)
    exact = measure(model, seen, ids, "inputs", "none", None)
    assert exact["tokens"] == 128 and len(exact["losses"]) == 4
    assert exact["wikitext2"] == pytest.approx(losses(model, ids)["wikitext2"])
    rounded = measure(model, seen, ids, "inputs", "none", 4)
    assert rounded["losses"] != exact["losses"]
    best = measure(model, seen, ids, "weights", "none", 3, "best", "own")
    assert best["text"] == "own" and best["losses"] != exact["losses"]
    rows = {how: measure(model, seen, ids, "weights", how, 3, "rtn")
            for how in ("none", "awq", "rotate")}  # fmt: skip
    assert len({row["bits_per_weight"] for row in rows.values()}) == 1
    # The head, no longer tied, is stored once more, in 16 bits.
    head = 2 * model.lm_head.weight.numel()
    assert rows["rotate"]["stored_bytes"] - rows["none"]["stored_bytes"] == head
    assert rows["awq"]["stored_bytes"] == rows["none"]["stored_bytes"]
    assert len(rows["awq"]["exponents"]) == 8
    assert all(torch.equal(p, before.get_parameter(n)) for n, p in model.named_parameters())


def test_texts_to_calibrate_on_are_cut_to_as_many_tokens(tmp_path, monkeypatch):
    profile = load_profile("tiny")
    model, tokenizer = profile.load()
    (tmp_path / "valid.txt").write_text("A tower stands by the sea. " * 99, encoding="utf-8")
    monkeypatch.setattr(own, "CALIBRATION", 96)
    monkeypatch.setattr(own, "WINDOW", 64)
    monkeypatch.setattr(own, "OWN", replace(own.OWN, samples=8, max_new_tokens=32))
    said = {}
    for text in own.TEXTS:
        seen = own.calibration(text, model, tokenizer, profile, tmp_path)
        assert [b["input_ids"].shape for b in seen] == [(1, 64), (1, 32)]
        said[text] = tokenizer.decode(seen[0]["input_ids"][0])
    assert said["wikitext"].startswith("A tower") and said["gsm8k"].startswith("Question:")
    assert "Answer:" in said["gsm8k"]
    with pytest.raises(ValueError, match="tokens, where 96 are needed"):
        own.encoded(tokenizer, ["1 + 1"])


@pytest.mark.long
def test_a_row_sees_its_own_text(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(own, "calibration", lambda text, *_: text)
    monkeypatch.setattr(own, "text_ids", lambda *_: None)
    monkeypatch.setattr(own, "measure", lambda model, seen, *_: asked.append(seen) or {})
    monkeypatch.setattr(own, "load_profile", lambda *_, **__: load_profile("tiny"))
    names = [f"weights, none, 3, gptq{text}" for text in ("", ", gsm8k", ", own")]
    own.main(["--out", str(tmp_path / "rows.json"), "--rows", *names])
    assert asked == ["wikitext", "gsm8k", "own"]


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    path, name = tmp_path / "rows.json", next(iter(plan()))
    Table(path, 0).keep(name, {"repair": "none"})
    monkeypatch.setattr(own, "load_profile", None)  # would be called for a row that is missing
    own.main(["--out", str(path), "--rows", name])
    assert set(Table(path, 0).rows) == {name}
