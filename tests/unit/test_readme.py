"""The README's figures are the recorded ones, and its commands exist."""

import json
import re

import pytest

from qlora_lib.results import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDED = json.loads((ROOT / "data/results/tiny-accuracy.json").read_text(encoding="utf-8"))
LABELS = {
    "base": "the base, in GSM8K's format",
    "base_3shot": "the base, three solved examples before the question",
    "base_bare_question": "the base, the bare question",
    "base_statement":
        "the base, the question without its last sentence (its pretraining's wording)",
    "qlora_attention_r16": "QLoRA on a 4-bit GPTQ base, r=16 on q, k, v, o",
    "qlora_all_r32": "QLoRA on a 4-bit GPTQ base, r=32 on all seven linears",
}


def percent(row: dict, mode: str) -> str:
    low, high = row[f"{mode}_interval"]
    return f"{100 * row[mode]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


@pytest.mark.parametrize("name", LABELS)
def test_a_result_is_the_recorded_one(name):
    row = RECORDED[name]
    assert f"| {LABELS[name]} | {percent(row, 'strict')} | {percent(row, 'flexible')} |" in README
    assert f"{row['n']:,} test problems" in README


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z][a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_linked_file_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
