"""The long samplings, whole, on a small random model."""

import json

import pytest

from experiments import sampling as long
from experiments.samples import read_samples


@pytest.fixture
def argv(argv, monkeypatch):
    monkeypatch.setattr(long, "TEMPERATURES", (0.5, 2.0))
    # A random model is right by chance only: answers are its lengths, golds are even.
    monkeypatch.setattr(long, "text_answer", lambda said: str(2 + len(said) % 2))
    return [*argv, "--verifier", "verifier", "--train", "4", "--samples", "3",
            "--max-steps", "2"]  # fmt: skip


@pytest.mark.long
def test_five_stages_are_stored_and_kept(argv, tmp_path, capsys):
    long.main(argv)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["temperatures"]["chosen"] in (0.5, 2.0)
    assert table["verifier"]["solutions"] == 12 and len(table["verifier"]["losses"]) == 2
    assert table["test"]["samples"] == 3 and table["test"]["stamp"]["seed"] == 0
    rows = read_samples(tmp_path / "tiny-samples.jsonl")
    assert len(rows) == 6 and all(len(row["verifier"]) == 3 for row in rows)
    assert all(0 < p < 1 for row in rows for p in row["verifier"])
    assert all(x < 0 for row in rows for x in row["likelihood"])
    temperatures = read_samples(tmp_path / "tiny-temperatures.jsonl")
    assert [row["temperature"] for row in temperatures] == [0.0, 0.5, 2.0]
    shown = json.loads((tmp_path / "tiny-shown.json").read_text())
    assert all(len(group) == 3 for group in shown["samples"])
    assert len(shown["greedy"]) == len(shown["samples"]) and shown["prompt"].endswith("37-17=")
    assert len(shown["logits"]) > 100 and all(isinstance(s, str) for s in shown["greedy"])
    lessons = json.loads((tmp_path / "tiny-lessons.json").read_text())["solutions"]
    assert list(lessons) == ["train", "dev", "test"]
    assert all(len(pair) == 2 for groups in lessons.values() for pair in groups)
    capsys.readouterr()
    long.main(argv)  # nothing is sampled again
    assert " at " not in capsys.readouterr().out
    assert json.loads((tmp_path / "table.json").read_text()) == table


def test_the_chosen_temperature_has_most_right_majorities_and_of_equals_is_the_lowest():
    good = {"gold": "1", "answers": ["1", "2", "1"]}
    bad = {"gold": "1", "answers": ["2", "1", "2"]}
    rows = [{"temperature": t, "problems": p} for t, p in
            ((0.0, [good, good]), (0.3, [bad, good]), (0.5, [good, good]), (1.0, [good, good]))]
    assert long.best_temperature(rows) == 0.5


def test_answers_are_texts_of_exact_numbers():
    assert long.text_answer("#### 1,200") == "1200" and long.text_answer("nothing") is None
    assert long.text_answer("The answer is 7/2.") == "7/2"
