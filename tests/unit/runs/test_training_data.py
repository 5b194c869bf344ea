"""What a run trains on: held out, compared with the test set, counted."""

import json

import pytest

from qlora_lib.data.calibration import calibration_hash
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.data.tokens import IGNORE, Example, encode_example
from qlora_lib.runs import training_data
from qlora_lib.runs.profiles import load_profile
from qlora_lib.runs.training_data import count_tokens, prepare
from tests.support.small_models import small_tokenizer

TEST = "Ava has 3 red and 4 green apples in a basket and eats 2 of them. How many are left over?"


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def profile(tmp_path):
    """Real problems (no templates) in a folder: 30 to train on, one to be tested on."""
    folder = tmp_path / "problems"
    folder.mkdir()
    rows = [{"question": f"{i} + 1?", "answer": f"<<1>>so\n#### {i + 1}"} for i in range(30)]
    write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", [{"question": TEST, "answer": "#### 5"}])
    return load_profile("smollm2", data=folder)


def metamath(i: int, query: str | None = None, original: int | None = None) -> dict:
    original = i if original is None else original
    return {
        "query": query or f"What is {i} plus one?",
        "response": f"#### {i + 1}\nThe answer is: {i + 1}",
        "original_question": f"{original} + 1?",
    }


def test_the_profiles_own_problems_in_their_order(profile, monkeypatch):
    monkeypatch.setattr("qlora_lib.data.examples.DEV", 2)
    data = prepare(profile, small_tokenizer())
    pairs = [format_gsm8k(e) for e in profile.examples("train")]
    assert data.train == [encode_example(small_tokenizer(), *pair) for pair in pairs]
    assert len(data.train) == 28 and len(data.dev) == 2 and data.readable == 28
    text = str(data)
    assert "the problems of profile smollm2 (GSM8K); calculator notes stripped; 2 held out" in text
    assert "0 equal one of 1 test questions" in text and "28 examples" in text
    kept = prepare(profile, small_tokenizer(), notes=True)
    assert kept.report()["calculator_notes"] == "kept"
    assert kept.count.tokens > data.count.tokens


def test_too_few_problems_to_hold_some_out(profile, monkeypatch):
    few = {split: profile.examples(split)[:9] for split in ("train", "test")}
    monkeypatch.setattr("qlora_lib.runs.profiles.load_gsm8k", lambda split, folder: few[split])
    data = prepare(profile, small_tokenizer())
    assert data.dev == [] and len(data.train) == 9


def test_dev_is_held_out_with_all_versions_of_its_problems(profile, tmp_path):
    rows = [metamath(i) for i in range(20)] + [metamath(90, original=3), metamath(91, original=3)]
    write(tmp_path / "meta.json", rows)
    data = prepare(profile, small_tokenizer(), tmp_path / "meta.json")
    assert len(data.dev) == 2 and data.dev_versions == 1 and len(data.train) == 19
    assert "1 other versions of their problems left out" in str(data)
    assert data.report()["dev_versions_left_out"] == 1
    write(tmp_path / "few.jsonl", rows[:9])
    assert prepare(profile, small_tokenizer(), tmp_path / "few.jsonl").dev == []
    (tmp_path / "own").mkdir()
    write(tmp_path / "own" / "train.jsonl", rows)
    write(tmp_path / "own" / "dev.jsonl", rows[:3])
    data = prepare(profile, small_tokenizer(), tmp_path / "own")
    assert (len(data.train), len(data.dev), data.dev_versions) == (22, 3, 0)


def test_test_questions_are_left_out_unless_told(profile, tmp_path):
    rows = [metamath(i) for i in range(6)]
    rows[1]["query"] = TEST.upper()
    rows[2]["original_question"] = TEST
    rows[3]["query"] = f"Rephrase and solve: {TEST}"
    rows[4]["response"] = "Ava has 3 red and 4 green apples in a basket and eats none. #### 7"
    write(tmp_path / "meta.json", rows)
    data = prepare(profile, small_tokenizer(), tmp_path / "meta.json")
    overlap = {"equal": 2, "contain": 1, "share": 1, "ngram": 13, "left_out": 4}
    assert data.report()["test_overlap"] == overlap and len(data.train) == 2
    kept = prepare(profile, small_tokenizer(), tmp_path / "meta.json", keep_overlap=True)
    assert kept.report()["test_overlap"] == overlap | {"left_out": 0} and len(kept.train) == 6
    write(tmp_path / "meta.json", rows[1:3])
    with pytest.raises(ValueError, match="no example is left to train on; 2 overlap"):
        prepare(profile, small_tokenizer(), tmp_path / "meta.json")


def test_kept_overlap_needs_no_test_set(profile, tmp_path):
    write(tmp_path / "meta.json", [metamath(i) for i in range(6)])
    (tmp_path / "problems" / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="test.jsonl"):
        prepare(profile, small_tokenizer(), tmp_path / "meta.json")
    kept = prepare(profile, small_tokenizer(), tmp_path / "meta.json", keep_overlap=True)
    assert len(kept.train) == 6 and kept.overlap.questions == 0
    assert "0 equal one of 0 test questions" in str(kept)


def test_training_sets_by_name(profile, monkeypatch):
    rows = {"metamathqa": [metamath(i) for i in range(3)], "mathinstruct": [{"query": 3}]}
    monkeypatch.setattr(training_data, "load_training_set", rows.get)
    data = prepare(profile, small_tokenizer(), "metamathqa")
    assert data.source == "metamathqa (MetaMathQA)" and len(data.train) == 3
    with pytest.raises(ValueError, match="mathinstruct, row 1 has the fields"):
        prepare(profile, small_tokenizer(), "mathinstruct")


class Rows:
    """What a split of a dataset is: rows one by one, but columns for a slice or a name."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, key):
        if isinstance(key, int):
            return self.rows[key]
        return {name: [row[name] for row in self.rows][key] for name in self.rows[0]}


def test_rows_are_read_and_what_only_holds_them_is_refused(profile):
    rows, tokenizer = [metamath(i) for i in range(3)], small_tokenizer()
    for source, name in ((Rows(rows), "Rows"), (rows, "list"), (iter(rows), "list_iterator")):
        data = prepare(profile, tokenizer, source)
        assert data.source == f"a {name} of rows (MetaMathQA)" and len(data.train) == 3
    columns = {"query": ["q", "r"], "response": ["a", "b"]}
    for wrong in (columns, {"train": rows, "test": rows}, list(columns), [("q", "a")]):
        with pytest.raises(ValueError, match="^rows to train on: .*(give a list|expected a dict)"):
            prepare(profile, tokenizer, wrong)
    rows[1].pop("query")
    with pytest.raises(ValueError, match="row 2 has the fields"):
        prepare(profile, tokenizer, rows)


def test_calibration_takes_a_split_of_a_dataset(profile):
    """A slice of one is a dict of columns."""
    rows, tokenizer = profile.examples("train"), small_tokenizer()
    want, got = (profile.calibration(tokenizer, some) for some in (rows, Rows(rows)))
    assert calibration_hash(want) == calibration_hash(got)
    assert calibration_hash(want) == calibration_hash(profile.calibration(tokenizer))


def test_minigsm_shares_phrases_by_design():
    assert load_profile("tiny").ngram is None
    assert load_profile("tiny", problems="gsm8k").ngram == load_profile("smollm2").ngram == 13


def test_counts_are_those_of_the_batches(monkeypatch):
    ids = [[5] * n for n in (4, 9, 12, 6)]
    labels = [[IGNORE] * k + row[k:] for row, k in zip(ids, (1, 2, 8, 0))]
    examples = [Example(*pair) for pair in zip(ids, labels)]
    assert [e.teaches(8) for e in examples] == [True, True, False, True]  # its prompt fills 8
    del examples[2]
    count = count_tokens(examples, 8, left_out=1, batch_size=2)
    assert (count.examples, count.tokens, count.longest) == (3, 4 + 8 + 6, 9)
    assert (count.cut, count.left_out) == (1, 1)
    assert count.supervised == 3 + 6 + 5 and count.padding_labels == 0
    real = training_data.collate

    def wrong(batch):  # as where padding is the end token, and labels are the ids
        made = real(batch)
        return made | {"labels": made["input_ids"]}

    monkeypatch.setattr(training_data, "collate", wrong)
    count = count_tokens(examples, 8, left_out=1, batch_size=2)
    assert count.padding_labels == 8 - 4
