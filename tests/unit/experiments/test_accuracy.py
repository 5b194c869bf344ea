"""The rows of the merged adapter at four widths, on a small random model."""

import json

import pytest

from experiments import accuracy as experiments
from experiments.accuracy import WIDTHS, main
from tests.support.trained_adapter import make_adapter


@pytest.mark.long
def test_widths_are_stored_with_a_verdict_a_question(argv, capsys, tmp_path):
    rows = ["merged_fp32", "merged_gptq_3bit_row", "merged_rtn_2bit_64"]
    main([*argv, "--limit", "3", "--rows", *rows])
    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == rows
    for row in table.values():
        assert len(row["right"]) == row["n"] == 3 and set(row["right"]) <= {"0", "1"}
        assert row["right"].count("1") == row["strict_correct"]
    main([*argv, "--limit", "3", "--rows", "merged_fp32"])
    assert "merged_fp32: is there" in capsys.readouterr().out
    make_adapter(tmp_path / "adapter", seed=2)  # another adapter: old rows are not its own
    main([*argv, "--limit", "3", "--rows", "merged_fp32"])
    assert "is there" not in capsys.readouterr().out


def test_wrong_answers_are_kept_to_be_read(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "KEPT", 2)
    path = tmp_path / "tiny-wrong-answers.jsonl"
    path.write_text(json.dumps({"row": "merged_gptq_2bit_row"}) + "\n" +
                    json.dumps({"row": "merged_fp32"}) + "\n")
    main([*argv, "--rows", "merged_fp32"])
    first, *new = map(json.loads, path.read_text().splitlines())
    assert first == {"row": "merged_gptq_2bit_row"}  # another row's stay
    assert [entry["row"] for entry in new] == ["merged_fp32"] * 2
    assert [entry["question"] for entry in new] == ["0 + 1?", "3 + 1?"]
    assert all(entry["gold"] and "completion" in entry for entry in new)


def test_each_way_to_merge_is_measured(argv, tmp_path):
    main([*argv, "--limit", "2", "--merges"])
    rows = json.loads((tmp_path / "tiny-merges.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "rtn", "gptq", "original"]
    assert all(row["measured"]["n"] == 2 for row in rows)
    dense, rtn, gptq, original = rows
    assert dense["logit_error"] < 1e-5 < min(rtn["logit_error"], gptq["logit_error"])
    assert original["base_gap"] > 0


def test_without_an_adapter_it_says_what_to_give(argv, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main([*argv[:-1], "elsewhere", "--rows", "merged_fp32"])
    said = capsys.readouterr().err
    assert "merged_fp32 needs an adapter in elsewhere; give another folder" in said


@pytest.mark.parametrize("name", [name for name in WIDTHS if name != "merged_fp32"])
def test_a_row_is_named_after_what_is_quantized_and_how(name):
    method, spec = WIDTHS[name]
    assert name == f"merged_{method}_{spec.bits}bit_{spec.group_size or 'row'}"
