"""An evaluation as one file: its verdicts, what it asked, and what is refused."""

from dataclasses import asdict

import pytest

from qlora_lib.base.hashes import file_hash
from qlora_lib.base.statistics import wilson
from qlora_lib.data.sources import load_minigsm
from qlora_lib.evaluation.evaluate import evaluate, few_shot
from qlora_lib.evaluation.result_row import read_row, result_row, write_row
from qlora_lib.generation.generate import Decoding, Generator

PROBLEMS = load_minigsm("test")[:6]


class Knows(Generator):
    """A model that knows the first answers."""

    def __init__(self, right: int, weights: str = "w", **decoding):
        info = {"model": "m", "decoding": asdict(Decoding(**decoding)), "date": "2026-01-01"}
        answers = [e["answer"] if i < right else "no" for i, e in enumerate(PROBLEMS)]
        super().__init__(lambda prompts: answers[: len(prompts)], info)
        self.weights = weights

    def fingerprint(self) -> str:
        return self.weights


def row_of(folder, generate, problems=PROBLEMS, **how):
    evaluate(generate, problems, folder, canaries=False, **how)
    return result_row(folder)


def test_a_row_holds_verdicts_counts_intervals_and_comes_back(tmp_path):
    row = row_of(tmp_path / "a", Knows(4))
    assert row["right"] == row["right_flexible"] == "111100" and row["n"] == 6
    assert row["strict"] == 4 / 6 and row["strict_interval"] == list(wilson(4, 6))
    assert row["answers"] == file_hash(tmp_path / "a" / "predictions.jsonl")
    assert row["model"]["weights"] == "w" and row["stamp"]["date"] == "2026-01-01"
    write_row(tmp_path / "row.json", row)
    assert read_row(tmp_path / "row.json") == row


def test_the_protocol_is_what_was_asked_not_of_whom(tmp_path):
    one = row_of(tmp_path / "1", Knows(4))["protocol_hash"]
    same = [Knows(1), Knows(4, weights="v"), Knows(4, batch_size=3)]
    assert {row_of(tmp_path / f"s{i}", g)["protocol_hash"] for i, g in enumerate(same)} == {one}
    others = {
        row_of(tmp_path / "tokens", Knows(4, max_new_tokens=7))["protocol_hash"],
        row_of(tmp_path / "fewer", Knows(4), PROBLEMS[:5])["protocol_hash"],
        row_of(tmp_path / "shots", Knows(4), prompt=few_shot(PROBLEMS, 1))["protocol_hash"],
    }
    assert len(others) == 3 and one not in others


@pytest.mark.parametrize(
    "name, value",
    [("right", "111110"), ("strict", 0.9), ("n", 7), ("right", "11110x"), ("right", 3),
     ("protocol", {}), ("strict_interval", [0, 1]), ("protocol_hash", "0" * 16), ("right", "")],
)  # fmt: skip
def test_a_row_that_contradicts_itself_is_refused(tmp_path, name, value):
    write_row(tmp_path / "row.json", row_of(tmp_path / "a", Knows(4)) | {name: value})
    with pytest.raises(ValueError, match="not those of its verdicts|no row of an evaluation"):
        read_row(tmp_path / "row.json")


def test_a_changed_file_and_other_json_are_refused(tmp_path):
    path = tmp_path / "row.json"
    write_row(path, row_of(tmp_path / "a", Knows(4)))
    path.write_text(path.read_text().replace("111100", "111110"))
    with pytest.raises(ValueError, match="was changed or is damaged"):
        read_row(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no row of an evaluation"):
        read_row(path)


def test_an_evaluation_that_does_not_say_what_it_asked_has_no_row(tmp_path):
    evaluate(lambda prompts: ["no"] * len(prompts), PROBLEMS, tmp_path / "a", canaries=False)
    with pytest.raises(ValueError, match="does not say its decoding"):
        result_row(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="no .*report.json"):
        result_row(tmp_path / "none")
