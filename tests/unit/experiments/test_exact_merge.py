"""The recorded merges back into the base's bits: whole, and what notebook 11 says of them."""

from dataclasses import replace

import pytest

from experiments import exact_merge
from experiments.exact_merge import DEV, RESULT, SEEDS, main, measure, merge_onto_grid, plan
from experiments.table import Table
from qlora_lib.lora.inject import inject_lora
from tests.support.lora_models import adapted, base_of, logits
from tests.support.tensors import relative


def test_every_row_is_measured_and_exact_merges_are_exact():
    rows = Table(RESULT, SEEDS[0]).rows
    assert set(rows) == set(plan())
    for row in rows.values():
        assert (row["dev_problems"], row["steps"]) == (DEV, 32)
        merged = row["merged"]
        if row["kind"] == "lora":
            assert list(merged) == ["dense", "rtn", "gptq", "own grid"]
            assert merged["dense"]["logit_error"] < 1e-5 < merged["rtn"]["logit_error"]
        elif row["kind"] == "on_grid":
            assert merged["exact"]["logit_error"] == 0 and merged["exact"]["same_token"] == 1
            assert merged["exact"]["dev_loss"] == row["dev_loss"]
        else:
            real, whole = merged["real zero-points"], merged["whole zero-points"]
            assert real["logit_error"] < 0.01 < whole["logit_error"]


def test_codes_follow_an_update_that_was_not_trained_for_them_as_far_as_they_can():
    model = adapted(base_of("grid4"))
    trained = logits(model)
    lost = merge_onto_grid(model)
    assert 0 < lost < 1 and 0 < relative(logits(model), trained) < 1
    assert merge_onto_grid(adapted(base_of("grid8"))) < lost  # a finer grid; its ends cut too
    inject_lora(untrained := base_of("grid4"), ["q_proj"], rank=2)
    assert merge_onto_grid(untrained) == 0


@pytest.mark.long
def test_a_row_of_each_kind(monkeypatch):
    for name, value in {"CONFIG": replace(exact_merge.CONFIG, max_steps=2), "TRAIN": 16, "DEV": 4,
                        "COMPARED": 2}.items():  # fmt: skip
        monkeypatch.setattr(exact_merge, name, value)
    rows = {kind: measure(kind, 4, 8e-3, 0) for kind in exact_merge.KINDS}
    before = {row["base_loss"] for row in rows.values()}
    assert len(before) == 1 and rows["lora"]["dev_loss"] < min(before)
    assert rows["on_grid"]["merged"]["exact"]["dev_loss"] == rows["on_grid"]["dev_loss"]
    assert rows["group_wise"]["parameters"] < rows["lora"]["parameters"]


def test_rows_are_measured_once_each_and_only_those_asked_for(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(*setting):
        measured.append(setting)
        return {"dev_loss": 1.0, "merged": {"exact": {"dev_loss": 1.0}}}

    monkeypatch.setattr(exact_merge, "measure", measure)
    path, names = tmp_path / "rows.json", list(plan())[:2]
    for _ in range(2):
        main(["--out", str(path), "--rows", *names])
    assert measured == [plan()[name] for name in names]
    assert list(Table(path, SEEDS[0]).rows) == names
    with pytest.raises(SystemExit):
        main(["--out", str(path), "--rows", "qat"])
    assert "no rows ['qat']" in capsys.readouterr().err
