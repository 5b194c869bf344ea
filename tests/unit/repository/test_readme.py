"""The README's figures are the recorded ones, and its commands exist."""

import json
import re

import pytest

from qlora_lib.base.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDED = json.loads((ROOT / "data/results/tiny-accuracy.json").read_text(encoding="utf-8"))
LABELS = {
    "base": "the base, in GSM8K's format",
    "base_3shot": "the base, three solved examples before the question",
    "base_bare_question": "the base, the bare question",
    "base_statement":
        "the base, the question without its last sentence (its pretraining's wording)",
    "lora_attention_r16": "LoRA on the dense base, r=16 on q, k, v, o",
    "lora_all_r32": "LoRA on the dense base, r=32 on all seven linears",
    "qlora_attention_r16": "QLoRA on a 4-bit GPTQ base, r=16 on q, k, v, o",
    "qlora_all_r8": "QLoRA on a 4-bit GPTQ base, r=8 on all seven linears",
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


@pytest.mark.parametrize("bits", (8, 4, 3, 2))
def test_a_width_is_the_recorded_one(bits):
    rows = [RECORDED[f"merged_{m}_{bits}bit_{g}"] for g in ("row", "64") for m in ("gptq", "rtn")]
    assert f"| {bits} | " + " | ".join(percent(row, "strict") for row in rows) + " |" in README


@pytest.mark.parametrize("bits", (8, 4, 3, 2))
def test_a_perplexity_is_the_recorded_one(bits):
    path = ROOT / "data/results/smollm2-perplexity.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    names = [f"{m}_{bits}bit_{g}" for g in ("row", "64") for m in ("gptq", "rtn")]
    cells = [f"{table[name]['wikitext2']:,.2f}" for name in names]
    assert f"| {bits} | " + " | ".join(cells) + " |" in README
    assert f"in fp32 {table['fp32']['wikitext2']:.2f}" in README


def test_the_spans_over_calibration_texts_are_the_recorded_ones():
    path = ROOT / "data/results/smollm2-perplexity.json"
    table = json.loads(path.read_text(encoding="utf-8"))

    def span(how, bits):
        names = [f"{how}_{bits}bit_64{text}" for text in ("", "_text1", "_text2")]
        found = [table[name]["wikitext2"] for name in names]
        return f"{min(found):.2f} to {max(found):.2f}"

    text = " ".join(README.split())
    assert f"comes to {span('gptq', 2)} at 2 bits and {span('gptq', 3)} at 3; with" in text
    assert f"together to {span('together', 2)} and {span('together', 3)}; with" in text
    assert f"alone to {span('refit', 2)} at 2." in text
    best, matched = (table[f"{name}_2bit_64"]["wikitext2"] for name in ("best", "best_match"))
    assert f"comes to {best:.2f} at 2 bits, and to {matched:.2f} with `match_dense`" in text


def test_the_best_options_lose_less_than_the_best_of_gptqmodel_s():
    """What README and notebook 02 say of them: four layers, three widths, unseen tokens."""
    path = ROOT / "data/results/gptq-quality.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert sorted({row["bits"] for row in rows}) == [2, 3, 4] and len(rows) == 12
    parts, defaults = [], []
    for row in rows:
        peer = [e for name, e in row["errors"].items() if name.startswith("GPTQModel")]
        parts.append(row["errors"]["ours, best"] / min(peer))
        defaults.append(row["errors"]["ours, defaults"] / min(peer))
        assert len(peer) == 12
    assert max(parts) < 1
    text = " ".join(README.split())
    assert f"{100 * (1 - max(parts)):.0f} to {100 * (1 - min(parts)):.0f}% below" in text
    assert f"{100 * (min(defaults) - 1):.0f} to {100 * (max(defaults) - 1):.0f}% above" in text
    chosen = [row["chosen_damping"] for row in rows]
    assert [chosen[i] for i in (0, 3, 6, 9)] == [0.01, 0.1, 0.2, 0.01]


@pytest.mark.parametrize("width", (1024, 4096))
def test_the_solvers_ratios_are_the_recorded_ones(width):
    path = ROOT / "data/results/bench-cpu.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["solver"]
    plain, clip = (
        next(r for r in rows if (r["out"], r["in"], r["clip_search"]) == (width, width, c))
        for c in (False, True)
    )
    pairs = ((plain, "column loop"), (plain, "GPTQModel"), (clip, "GPTQModel"))
    cells = [
        f"{r['seconds'][n]['median'] / r['seconds']['ours']['median']:.1f}" for r, n in pairs
    ]
    assert f"| {width} x {width} | " + " | ".join(cells) + " |" in README
    assert all(abs(d) < 2e-5 for r in rows for d in r.get("objective_over_reference", {}).values())


@pytest.mark.parametrize("label, dtype, tokens, backward, ours", [
    ("bf16, 1 token (`decoding_layout`)", "bfloat16", 1, False, "ours, decoding_layout"),
    ("bf16, 32 tokens (`decoding_layout`)", "bfloat16", 32, False, "ours, decoding_layout"),
    ("bf16, 256 tokens", "bfloat16", 256, False, "ours, 4-bit grid"),
    ("fp32, 1 token", "float32", 1, False, "ours, 4-bit grid"),
    ("fp32, 32 tokens", "float32", 32, False, "ours, 4-bit grid"),
    ("fp32, 256 tokens, with backward", "float32", 256, True, "ours, 4-bit grid"),
])  # fmt: skip
def test_the_layers_ratios_are_the_recorded_ones(label, dtype, tokens, backward, ours):
    path = ROOT / "data/results/bench-layers.json"
    wanted = {"out": 4096, "in": 4096, "dtype": dtype, "tokens": tokens, "backward": backward}
    seconds = next(
        row["seconds"] for row in json.loads(path.read_text(encoding="utf-8"))["layers"]
        if wanted.items() <= row.items()
    )  # fmt: skip
    dense = seconds["F.linear"]["median"]
    cells = [f"{seconds[name]['median'] / dense:.2f}" for name in (ours, "bitsandbytes NF4")]
    assert f"| {label} | " + " | ".join(cells) + " |" in README


def test_the_training_step_is_the_recorded_one():
    path = ROOT / "data/results/bench-step.json"
    step = json.loads(path.read_text(encoding="utf-8"))["step"]
    ours, peft, dense = (step["seconds"][name]["median"] for name in ("ours", "peft", "dense"))
    peaks = ", {:.2f} and {:.2f}".format(*(step["peak_bytes"][n] / 1e9 for n in ("peft", "dense")))
    text = " ".join(README.split())
    assert f"{ours:.2f} s, PEFT over bitsandbytes {peft:.2f} s, with a dense" in text
    assert f"base {dense:.2f} s; the process peaks" in text
    assert f"peaks at {step['peak_bytes']['ours'] / 1e9:.2f}" + peaks + " GB" in text


def test_merges_are_the_recorded_ones():
    path = ROOT / "data/results/tiny-merges.json"
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        error = f"{row['logit_error']:.1e}" if "logit_error" in row else "not comparable"
        assert f"| {error} | {percent(row['measured'], 'strict')} |" in README


def test_gptq_beats_rounding_by_more_than_the_intervals():
    for name in ("3bit_row", "2bit_row", "2bit_64"):
        gptq, rtn = (RECORDED[f"merged_{m}_{name}"]["strict_interval"] for m in ("gptq", "rtn"))
        assert gptq[0] > rtn[1]


def test_fine_tuning_beats_the_best_prompt():
    best = max(RECORDED[name]["flexible"] for name in LABELS if name.startswith("base"))
    assert RECORDED["qlora_all_r32"]["strict"] >= max(0.8, best + 0.6)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z][a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_linked_file_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
