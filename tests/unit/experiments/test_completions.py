"""The stored real completions, and that a new run keeps what was labelled by hand."""
from experiments import completions
from qlora_lib.data.rows import read_jsonl


def test_the_stored_ones_are_twenty_of_several_models_and_all_are_labelled():
    rows = read_jsonl(completions.RESULT)
    assert len(rows) == 20 and len({row["model"] for row in rows}) == 5
    assert sum(row["model"] == completions.REAL for row in rows) == 12
    assert not [row for row in rows if "?" in (row["strict"], row["flexible"])]


def test_a_label_stays_with_its_text_and_a_new_text_has_none(tmp_path, monkeypatch):
    texts = iter([["a #### 1", "b"], ["a #### 1", "c"]])
    monkeypatch.setattr(completions, "completions",
                        lambda weights: [{"completion": text} for text in next(texts)])
    out = tmp_path / "real.jsonl"
    completions.main(["--out", str(out)])
    rows = read_jsonl(out)
    assert [row["strict"] for row in rows] == ["?", "?"]
    rows[0] |= {"strict": "1", "flexible": "1"}
    completions.write_jsonl(out, rows)
    completions.main(["--out", str(out)])
    assert [row["strict"] for row in read_jsonl(out)] == ["1", "?"]
