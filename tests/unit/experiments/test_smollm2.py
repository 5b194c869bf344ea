"""The experiments with SmolLM2, run on the bundled model."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from experiments import smollm2 as experiments
from qlora_lib.data.calibration import calibration_batches
from qlora_lib.runs.profiles import load_profile


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wikitext")
    for name in ("test", "valid"):
        text = " ".join(f"Ann has {n} apples and {2 * n} pears." for n in range(400))
        (folder / f"{name}.txt").write_text(text)
    profile = load_profile("tiny")
    return (*profile.load(), profile, folder)


def test_gptq_sees_as_many_tokens_of_each_text_and_none_of_the_test(setting, monkeypatch):
    _, tokenizer, profile, folder = setting
    monkeypatch.setattr(experiments, "CALIBRATION", 1024)
    windows, *problems = experiments.calibration(tokenizer, profile, folder)
    assert windows["input_ids"].shape == (2, 512)
    seen = sum(int(b["attention_mask"].sum()) for b in problems)
    assert 1024 - 256 < seen <= 1024
    train = [experiments.format_gsm8k(e) for e in profile.examples("train")[: len(problems) * 16]]
    first = calibration_batches(tokenizer, train[: sum(len(b["input_ids"]) for b in problems)])
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(problems, first))


def test_other_calibration_texts_share_nothing_with_the_first(setting, monkeypatch):
    _, tokenizer, profile, folder = setting
    monkeypatch.setattr(experiments, "CALIBRATION", 1024)
    texts = [experiments.calibration(tokenizer, profile, folder, text) for text in range(3)]
    ids = experiments.text_ids(tokenizer, folder / "valid.txt", 3 * 1024)
    assert torch.equal(torch.cat([first["input_ids"].flatten() for first, *_ in texts]), ids)
    seen = [
        {tuple(row[mask.bool()].tolist()) for b in problems
         for row, mask in zip(b["input_ids"], b["attention_mask"])}
        for _, *problems in texts
    ]  # fmt: skip
    assert all(len(s) > 3 for s in seen)
    assert not (seen[0] & seen[1] or seen[1] & seen[2] or seen[0] & seen[2])


@pytest.mark.long
def test_a_row_measures_a_copy_and_fewer_bits_cost_more(setting, monkeypatch):
    model, tokenizer, profile, folder = setting
    for name, value in (("WIKITEXT", 600), ("CALIBRATION", 512), ("SOLUTIONS", 2), ("WINDOW", 200)):
        monkeypatch.setattr(experiments, name, value)
    before, dense = {name: t.clone() for name, t in model.state_dict().items()}, {}
    for name in ("fp32", "rtn_2bit_row", "gptq_4bit_64"):
        how = experiments.WIDTHS[name]
        if name.startswith("gptq"):  # a search for its ranges would take as long as all else
            how = how[0], replace(how[1], clip_search=False), how[2]
        dense[name] = experiments.width(model, tokenizer, profile, folder, how)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    full, two, four = (dense[n]["gsm8k_solutions"] for n in dense)
    assert math.isfinite(two) and two > 1.2 * full and abs(four / full - 1) < 0.1
    assert dense["gptq_4bit_64"]["bits_per_weight"] == 4 + 24 / 64
    assert dense["fp32"]["wikitext2_tokens"] == 597  # the first of each window is given


def test_a_row_is_calibrated_on_its_own_text_with_its_own_options(setting, monkeypatch):
    model, tokenizer, profile, folder = setting
    monkeypatch.setattr(experiments, "CALIBRATION", 512)
    monkeypatch.setattr(experiments, "perplexities", lambda *args: {})
    asked = []

    def listen(model, batches, spec, method, options):  # GPTQ itself would take seconds
        asked.append((batches, method, options))
        return [SimpleNamespace(bytes_after=2, shape=(4, 2), seconds=0.0)]

    monkeypatch.setattr(experiments, "quantize_model", listen)
    rows = [
        experiments.width(model, tokenizer, profile, folder, experiments.WIDTHS[name])
        for name in ("gptq_2bit_64", "gptq_2bit_64_text1", "refit_2bit_64")
    ]
    for (batches, method, options), text, refit in zip(asked, (0, 1, 0), (False, False, True)):
        want = experiments.calibration(tokenizer, profile, folder, text)
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, want))
        assert method == "gptq" and options.refit_scales == refit
    assert rows[2]["refit_scales"] and "refit_scales" not in rows[0]


def test_the_sample_of_the_test_is_fixed():
    profile = load_profile("tiny")
    first, second = (experiments.sample_of_test(profile) for _ in range(2))
    assert first == second and len({e["question"] for e in first}) == experiments.ASKED
