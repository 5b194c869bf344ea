"""docs/RESULTS.md is what the records make of it, and a record that contradicts it is refused."""

import json
import shutil

import pytest

from experiments import results_page
from experiments.page import records as records_of_page
from experiments.page.tiny import merging_without_loss
from experiments.results_page import PAGE, main, page
from qlora_lib.evaluation.evaluate import evaluate
from qlora_lib.evaluation.result_row import result_row, write_row
from qlora_lib.generation.generate import Generator


def test_the_page_is_what_the_records_make_of_it():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m experiments.results_page"


@pytest.fixture
def records(tmp_path, monkeypatch):
    """A copy of the records, and a function that changes one of them."""
    shutil.copytree(records_of_page.RESULTS, tmp_path / "results")
    monkeypatch.setattr(records_of_page, "RESULTS", tmp_path / "results")

    def change(name, edit):
        path = tmp_path / "results" / f"{name}.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        edit(record)
        path.write_text(json.dumps(record), encoding="utf-8")

    return change


def test_another_record_makes_another_page(records, tmp_path, monkeypatch):
    records("smollm2-perplexity", lambda rows: rows["gptq_2bit_64"].update(wikitext2=100.0))
    monkeypatch.setattr(results_page, "ROOT", tmp_path)
    main(tmp_path / "page.md")
    made = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| 2 | 2,696.12 | 4,677,502.69 | 100.00 | 9,780.55 |" in made
    assert "| 100.00 to 108.10 |" in made


def test_counts_and_intervals_are_those_of_the_verdicts(records):
    def flip(rows):
        rows["base"]["right"] = "1" + rows["base"]["right"][1:]

    records("smollm2-gsm8k", flip)
    with pytest.raises(ValueError, match="smollm2-gsm8k, base: its verdicts give .200, 5, "):
        page()


def test_every_record_with_verdicts_is_looked_at(records):
    def fewer(record):
        record["rows"]["code on code"]["correct"] -= 1

    records("tiny-adapters-tasks", fewer)
    with pytest.raises(ValueError, match="tiny-adapters-tasks, rows, code on code"):
        page()


def test_a_claim_that_the_records_do_not_bear_is_not_made(records):
    def worse(record):
        record["rows"][3]["errors"]["ours, best"] *= 2

    records("gptq-quality", worse)
    with pytest.raises(ValueError, match="do not bear this out any more: .*below that of the best"):
        page()


@pytest.mark.parametrize("kind, way, key, value, said", [
    ("on_grid", "exact", "logit_error", 1e-7, "merge to the bit"),
    ("on_grid", "exact", "dev_loss", 0.7, "learn less"),
    ("group_wise", "whole zero-points", "dev_loss", 0.7, "LoRA's by GPTQ ends with the lowest"),
])
def test_merges_that_lose_nothing_are_called_what_they_are(kind, way, key, value, said, records):
    def change(rows):
        for row in rows.values():
            if (row["kind"], row["bits"]) == (kind, 2):
                row["merged"][way][key] = value

    records("tiny-exact-merges", change)
    with pytest.raises(ValueError, match=f"do not bear this out any more: .*{said}"):
        merging_without_loss()


def test_a_contributed_row_is_shown_and_its_verdicts_are_counted(records, tmp_path):
    model = Generator(lambda prompts: ["#### 1"] * len(prompts), {"model": "theirs"})
    model.info["decoding"] = {"temperature": 0}
    model.fingerprint = lambda: "hash"
    problems = [{"question": f"{i}?", "answer": f"#### {i % 2}"} for i in range(40)]
    evaluate(model, problems, tmp_path / "eval", canaries=False)
    row = result_row(tmp_path / "eval")
    row["stamp"] |= {"device": "cpu", "torch": "2", "seed": 0, "date": "today", "command": "x"}
    write_row(tmp_path / "results" / "contributed-theirs.json", row)
    line = "| theirs | the base alone | 16 | None, 40 | 50.0 [35.2, 64.8] | `{}`"
    assert line.format(row["protocol_hash"]) in page()
    write_row(tmp_path / "results" / "contributed-theirs.json", row | {"n": 41})
    with pytest.raises(ValueError, match="contributed-theirs"):
        page()
