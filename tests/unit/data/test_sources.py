"""Published problems and training sets: from a folder, the bundled data or the hub."""

import json
import os
import sys
from fractions import Fraction
from types import SimpleNamespace

import pytest

from qlora_lib.data import gsm8k, sources
from qlora_lib.evaluation.extraction import equals, is_correct

GSM_HARD = os.environ.get("GSM_HARD_DIR")


def test_minigsm_is_parsable_and_its_splits_share_no_question():
    splits = {s: sources.load_minigsm(s) for s in ("train", "dev", "test")}
    questions = [e["question"] for entries in splits.values() for e in entries]
    assert len(questions) == len(set(questions))
    for entries in splits.values():
        for entry in entries:
            prompt, target = gsm8k.format_gsm8k(entry)
            assert prompt.endswith("Answer:\n") and "<<" not in target
    with pytest.raises(ValueError, match="train, dev and test"):
        sources.load_minigsm("validation")


def test_gsm8k_folder(tmp_path):
    line = '{"question": "A\u2028b?", "answer": "#### 1"}\n\n'
    (tmp_path / "test.jsonl").write_text(line, encoding="utf-8")
    assert sources.load_gsm8k("test", tmp_path) == [{"question": "A\u2028b?", "answer": "#### 1"}]
    with pytest.raises(FileNotFoundError, match="train.jsonl"):
        sources.load_gsm8k("train", tmp_path)
    with pytest.raises(ValueError, match="train and test"):
        sources.load_gsm8k("dev", tmp_path)
    (tmp_path / "train.jsonl").write_text(line + '{"question": "cut')
    with pytest.raises(ValueError, match="line 3"):
        sources.load_gsm8k("train", tmp_path)
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no entries"):
        sources.load_gsm8k("train", tmp_path)


def test_gsm8k_without_folder_and_hub_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(sources, "DATA", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(FileNotFoundError, match="GSM8K_DIR"):
        sources.load_gsm8k("test")
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "q", "answer": "#### 1"}')
    assert len(sources.load_gsm8k("test")) == 1


@pytest.mark.parametrize(
    "target, gold",
    [
        (9867630.0, "9867630"),
        (-9867630.0, "-9867630"),
        (14053029.666666666, "14053029.666666666"),
        (0.0016791648, "0.0016791648"),
        (9284017268534.4, "9284017268534.4"),
        (1e22, "10000000000000000000000"),
        (1.5e-7, "0.00000015"),
        (0.0, "0"),
    ],
)
def test_gsm_hard_golds_are_the_floats_to_the_digit(tmp_path, target, gold):
    row = {"input": "How many?", "target": target, "code": "def solution(): ..."}
    (tmp_path / "gsmhardv2.jsonl").write_text(json.dumps(row) + "\n")
    (entry,) = sources.load_gsm_hard(tmp_path)
    assert entry == {"question": "How many?", "answer": f"#### {gold}"}
    assert float(gsm8k.parse_gold(entry["answer"])) == target
    assert is_correct(entry["answer"], entry["answer"])
    # An integer is compared exactly, any other gold within 1e-6.
    near = gsm8k.parse_gold(entry["answer"]) + Fraction(9, 10**7)
    assert equals(near, gsm8k.parse_gold(entry["answer"])) == (target != int(target))
    assert not equals(near + Fraction(2, 10**7), gsm8k.parse_gold(entry["answer"]))


def test_gsm_hard_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gsmhardv2.jsonl"):
        sources.load_gsm_hard(tmp_path)
    (tmp_path / "gsmhardv2.jsonl").write_text('{"input": "q", "target": Infinity}')
    with pytest.raises(gsm8k.GoldError, match="inf"):
        sources.load_gsm_hard(tmp_path)

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(FileNotFoundError, match="no route.*--data"):
        sources.load_gsm_hard()


@pytest.mark.skipif(not GSM_HARD, reason="GSM_HARD_DIR names no folder with gsmhardv2.jsonl")
def test_all_of_gsm_hard_is_read():
    golds = [gsm8k.parse_gold(entry["answer"]) for entry in sources.load_gsm_hard(GSM_HARD)]
    assert len(golds) == 1319 and sum(gold < 0 for gold in golds) == 146
    assert sum(gold.denominator != 1 for gold in golds) == 303


def test_training_sets_come_from_data_or_the_hub(tmp_path, monkeypatch):
    asked = []

    def hub(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"query": "Q?", "response": "The answer is: 1"}]

    monkeypatch.setattr(sources, "DATA", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=hub))
    assert sources.load_training_set("metamathqa")[0]["query"] == "Q?"
    sources.load_training_set("mathinstruct")
    names = [args[0] for args, _ in asked]
    assert names == ["meta-math/MetaMathQA", "TIGER-Lab/MathInstruct"]
    assert all(kwargs == {"split": "train"} for _, kwargs in asked)
    (tmp_path / "metamathqa").mkdir()
    with pytest.raises(FileNotFoundError, match="no train.jsonl .it holds no JSON file"):
        sources.load_training_set("metamathqa")
    (tmp_path / "metamathqa" / "MetaMathQA-395K.json").write_text('[{"query": "here"}]')
    assert sources.load_training_set("metamathqa") == [{"query": "here"}]
    with pytest.raises(ValueError, match="are metamathqa, mathinstruct, not 'math'"):
        sources.load_training_set("math")
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(FileNotFoundError, match="TIGER-Lab.*ZeroDivision.*mathinstruct.*--data"):
        sources.load_training_set("mathinstruct")


def test_which_file_of_a_folder(tmp_path):
    (tmp_path / "mine.jsonl").touch()
    assert sources.data_file(tmp_path).name == "mine.jsonl"  # the only one
    (tmp_path / "test.jsonl").touch()
    (tmp_path / "dev.json").touch()
    assert sources.data_file(tmp_path).name == "mine.jsonl"  # the only one to train on
    (tmp_path / "mine.jsonl").unlink()
    for left in ("dev.json, test.jsonl", "test.jsonl"):  # neither, nor a single one of them
        with pytest.raises(FileNotFoundError, match=f"no train.jsonl .it holds {left}."):
            sources.data_file(tmp_path)
        (tmp_path / "dev.json").unlink(missing_ok=True)
    (tmp_path / "test.jsonl").rename(tmp_path / "mine.jsonl")
    (tmp_path / "other.json").touch()
    with pytest.raises(FileNotFoundError, match="it holds mine.jsonl, other.json"):
        sources.data_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="no dev.jsonl"):
        sources.data_file(tmp_path, "dev")
    for name in ("train.json", "train.jsonl"):
        (tmp_path / name).touch()
        assert sources.data_file(tmp_path).name == name


def test_which_folders_hold_problems(tmp_path):
    assert not sources.holds_problems(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"messages": []}')
    assert not sources.holds_problems(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"question": "q", "answer": "#### 1"}')
    assert sources.holds_problems(tmp_path)
    (tmp_path / "test.jsonl").rename(tmp_path / "gsmhardv2.jsonl")
    assert sources.holds_problems(tmp_path)
