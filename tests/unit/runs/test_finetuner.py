"""Finetuner: each method trains what it says, keeps the best, and gives back what it saved."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from qlora_lib.lora.files import save_adapter
from qlora_lib.lora.inject import inject_lora, set_adapter, trainable_parameters
from qlora_lib.lora.merge import merge_lora
from qlora_lib.models.conv1d import linear_from_conv1d
from qlora_lib.models.quantize import quantize_model, quantized_layers
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.nf4 import NF4Spec
from qlora_lib.runs.finetuner import Finetuner
from qlora_lib.runs.run_folder import read_run
from qlora_lib.train.config import TrainConfig
from tests.support.small_models import PAIRS, small_model, small_tokenizer

CONFIG = TrainConfig(epochs=2, batch_size=8, lr=5e-3, max_length=128, compute_dtype="fp32",
                     progress=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    small_model().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def tuner(base, method, folder=None, **options):
    options = ({} if method == "full" else {"rank": 4}) | options
    return Finetuner(base, method=method, folder=folder, compute_dtype="fp32", **options)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_method_learns_and_what_it_saved_answers_the_same(base, tmp_path, method):
    mine, seen = tuner(base, method, tmp_path / "run"), []
    history = mine.fit(PAIRS, config=CONFIG, callback=[seen.append, lambda metrics: None])
    assert seen == history.steps and len(history.dev) == 2
    assert history.losses[-1] < history.losses[0]
    lines = (tmp_path / "run" / "training" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [s["step"] for s in history.steps]
    assert not (tmp_path / "run" / "trial").exists()
    result = mine.save()
    parts = {"full": {"model"}, "lora": {"adapter"}, "qlora": {"adapter", "base"}}[method]
    assert {p.name for p in result.iterdir()} == parts | {"training", "run.json", ".lock"}
    model, tokenizer = Finetuner.load(tmp_path / "run", compute_dtype="fp32")
    assert bool(quantized_layers(model)) == (method == "qlora") and not model.training
    ids = torch.tensor([tokenizer.encode(PAIRS[3][0])])
    with torch.inference_mode():
        # The order of sums may follow where a tensor lies in memory.
        assert torch.allclose(model(ids).logits, mine.model.eval()(ids).logits, rtol=0, atol=1e-5)
    (said,) = mine.generate([PAIRS[3][0]], max_new_tokens=4)
    assert said.tokens <= 4


def with_a_head_of_its_own():
    """A model whose config ties the head, although an adapter was merged into it."""
    model = small_model()
    inject_lora(model, ("lm_head",), rank=4)
    for p in trainable_parameters(model).values():
        torch.nn.init.normal_(p, std=0.1)
    merge_lora(model, unload=True)
    return model


def with_flags_that_do_not_go_together():
    """As many published models have them, and as save_pretrained refuses them."""
    model = small_model()
    model.generation_config = GenerationConfig(temperature=0.9, top_p=0.6, eos_token_id=[2, 5])
    return model


def with_conv1d():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(small_tokenizer()), n_embd=64, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config)
    linear_from_conv1d(model)
    return model


@pytest.mark.parametrize(
    "make", [with_a_head_of_its_own, with_flags_that_do_not_go_together, with_conv1d]
)
def test_a_model_that_was_trained_whole_is_read_as_it_is(make, tmp_path):
    mine = Finetuner(make(), small_tokenizer(), "full", tmp_path)
    mine.fit(PAIRS, [], replace(CONFIG, max_steps=1))
    mine.save()
    own_head = mine.model.lm_head.weight is not mine.model.get_input_embeddings().weight
    said = json.loads((tmp_path / "model" / "config.json").read_text())
    assert said["dtype"] == "float32" and said.get("tie_word_embeddings", True) != own_head
    model, tokenizer = Finetuner.load(tmp_path, compute_dtype="fp32")
    ids = torch.tensor([tokenizer.encode(PAIRS[3][0])])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, mine.model.eval()(ids).logits)
    assert model.generation_config.eos_token_id == mine.model.generation_config.eos_token_id


def test_full_fine_tuning_keeps_fp32_weights(base, tmp_path):
    """Whatever the compute dtype: in bf16, steps as small as these would be rounded away."""
    tuners = [Finetuner(base, method="full", folder=tmp_path, compute_dtype="bf16"),
              Finetuner(small_model().bfloat16(), small_tokenizer(), "full")]  # fmt: skip
    for mine in tuners:
        before = {n: p.detach().clone() for n, p in mine.model.named_parameters()}
        mine.fit(PAIRS, [], replace(CONFIG, lr=1e-5, compute_dtype="bf16"))
        assert mine.history.compute_dtype == "bf16"
        moved = sum(int((p != before[n]).sum()) for n, p in mine.model.named_parameters())
        assert moved > 0.95 * sum(p.numel() for p in before.values())
        assert {p.dtype for p in mine.model.parameters()} == {torch.float32}
    model, _ = Finetuner.load(tuners[0].save(), compute_dtype="fp32")
    trained = dict(tuners[0].model.named_parameters())
    assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters())


def test_what_trains_is_what_the_method_says(base):
    full, lora, qlora = (tuner(base, method) for method in ("full", "lora", "qlora"))
    every = sum(p.numel() for p in full.model.parameters())
    assert sum(p.numel() for p in trainable_parameters(full.model).values()) == every
    for one in (lora, qlora):
        assert all("lora_" in name for name in trainable_parameters(one.model))
    assert {str(q.spec) for q in
            (layer.quantized for layer in quantized_layers(qlora.model).values())} == {str(NF4Spec())}


def test_the_parameters_of_the_lowest_dev_loss_are_kept(base):
    """Dev contradicts train: what helps both comes first, then the contradiction is learned."""
    mine, states = tuner(base, "lora"), []

    def remember(metrics):
        if "dev_loss" in metrics:
            trained = trainable_parameters(mine.model)
            states.append({n: p.detach().clone() for n, p in trained.items()})

    train, dev = ([(p, digit) for p, _ in PAIRS] for digit in "12")
    history = mine.fit(train, dev, replace(CONFIG, epochs=6, lr=0.03), remember)
    losses = [loss for _, loss in history.dev]
    best = losses.index(min(losses))
    assert best < len(losses) - 1, f"the last is the best, nothing is shown: {losses}"
    for name, p in trainable_parameters(mine.model).items():
        assert torch.equal(p, states[best][name])


def test_a_folder_that_cannot_be_written_stops_the_run_before_its_first_step(base, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="Not a directory"):
        tuner(base, "lora", tmp_path / "file" / "run")
    mine, steps = tuner(base, "lora", tmp_path / "run"), []
    (tmp_path / "run" / "trial").write_text("in the way by now")
    with pytest.raises(ValueError, match="can't hold the result .*; name another folder"):
        mine.fit(PAIRS, config=CONFIG, callback=steps.append)
    assert steps == []


def test_a_trial_that_reads_back_too_little_stops_the_run(base, tmp_path, monkeypatch):
    mine = tuner(base, "lora", tmp_path)
    monkeypatch.setattr(mine, "_write", lambda folder: folder.mkdir())
    with pytest.raises(ValueError, match="only 0 were read back"):
        mine.fit(PAIRS, config=CONFIG)


def test_a_module_that_is_handed_over(base):
    model, tokenizer = small_model(), small_tokenizer()
    with pytest.raises(ValueError, match="needs its tokenizer"):
        Finetuner(model)
    mine = Finetuner(model, tokenizer, "qlora", rank=2)
    assert mine.model is model and quantized_layers(model)
    for method in ("full", "lora"):
        with pytest.raises(ValueError, match="the model is quantized"):
            Finetuner(model, tokenizer, method)


@pytest.mark.parametrize("default", ["other", None])
def test_beside_another_adapter_the_new_one_is_trained_and_used(default, tmp_path):
    """Whatever the model's default was: the tuner's adapter is it now, and after loading."""
    ids = torch.tensor([small_tokenizer().encode(PAIRS[3][0])])

    def two():
        model = small_model()
        inject_lora(model, rank=2, adapter="other")
        set_adapter(model, default)
        return model

    mine = Finetuner(two(), small_tokenizer(), "lora", tmp_path, adapter="new", rank=4)
    history = mine.fit(PAIRS, config=CONFIG)
    assert history.losses[-1] < history.losses[0]
    mine.save()
    model, _ = Finetuner.load(tmp_path, two(), small_tokenizer())
    with torch.inference_mode():
        got, want = model(ids).logits, mine.model.eval()(ids).logits
        assert torch.allclose(got, want, rtol=0, atol=1e-5)
        assert not torch.allclose(got, small_model()(ids).logits, rtol=0, atol=1e-2)


def test_the_result_of_a_module_loads_on_that_module_alone(tmp_path):
    mine = Finetuner(small_model(), small_tokenizer(), "lora", tmp_path, rank=2)
    mine.save()
    with pytest.raises(ValueError, match="handed over as a module; give model="):
        Finetuner.load(tmp_path)
    model, _ = Finetuner.load(tmp_path, small_model(), small_tokenizer())
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        Finetuner.load(tmp_path, model, small_tokenizer())


def test_a_dense_base_is_quantized_as_the_tuner_did(tmp_path):
    tokenizer = small_tokenizer()
    mine = Finetuner(small_model(), tokenizer, "qlora", tmp_path, rank=2)
    mine.save()
    model, _ = Finetuner.load(tmp_path, small_model(), tokenizer)
    ids = torch.tensor([tokenizer.encode(PAIRS[3][0])])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, mine.model.eval()(ids).logits)
    base = small_model()
    quantize_model(base, None, NF4Spec(), "nf4", target_modules="all")
    specs = [layer.spec for layer in quantized_layers(base).values()]
    model, _ = Finetuner.load(tmp_path, base, tokenizer)  # quantized already: taken as it is
    assert [layer.spec for layer in quantized_layers(model).values()] == specs
    other = Finetuner(model, tokenizer, "qlora", tmp_path / "other", adapter="b", rank=2)
    other.save()
    with pytest.raises(ValueError, match="was trained on a quantized base; give that one"):
        Finetuner.load(tmp_path / "other", small_model(), tokenizer)


def test_a_result_of_the_layout_before_is_read(tmp_path):
    """result/finetuner.json with the adapter beside it, as this class wrote it once."""
    mine = Finetuner(small_model(), small_tokenizer(), "qlora", rank=2, spec=QuantSpec(4, 32))
    save_adapter(mine.model, tmp_path / "result" / "adapter")
    said = {"method": "qlora", "model": None, "adapter": "default",
            "spec": {"QuantSpec": {"bits": 4, "group_size": 32, "symmetric": False,
                                   "clip_search": True}}}
    (tmp_path / "result" / "finetuner.json").write_text(json.dumps(said))
    model, _ = Finetuner.load(tmp_path, small_model(), small_tokenizer())
    ids = torch.tensor([small_tokenizer().encode(PAIRS[3][0])])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, mine.model.eval()(ids).logits)


@pytest.mark.parametrize("spec", [NF4Spec(), QuantSpec(2, 32)])
def test_loftq_takes_a_module_apart_with_the_spec_that_is_given(tmp_path, spec):
    mine = Finetuner(small_model(), small_tokenizer(), "qlora", tmp_path, spec, rank=2,
                     init="loftq")  # fmt: skip
    assert {layer.spec for layer in quantized_layers(mine.model).values()} == {spec}
    mine.save()
    model, _ = Finetuner.load(tmp_path)
    ids = torch.tensor([small_tokenizer().encode(PAIRS[3][0])])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, mine.model.eval()(ids).logits)


def test_an_adapter_is_loaded_on_its_own_base_only(base, tmp_path):
    tuner(base, "qlora", tmp_path / "run").save()
    tuner(base, "qlora", tmp_path / "run", spec=QuantSpec(8, 32))  # makes the base anew
    with pytest.raises(ValueError, match="trained on another base .*method was 'nf4', is 'rtn'"):
        Finetuner.load(tmp_path / "run", compute_dtype="fp32")


def test_without_a_dev_set_the_last_parameters_stay(base):
    mine, states = tuner(base, "lora"), []
    mine.fit(PAIRS, [], CONFIG, lambda metrics: states.append(
        {n: p.detach().clone() for n, p in trainable_parameters(mine.model).items()}))
    assert mine.history.dev == []
    for name, p in trainable_parameters(mine.model).items():
        assert torch.equal(p, states[-1][name])


def test_a_relative_base_is_found_from_elsewhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    tuner(base.name, "lora", tmp_path / "run").save()
    monkeypatch.chdir(tmp_path)
    assert Finetuner.load(tmp_path / "run", compute_dtype="fp32")


def test_a_rank_a_layer_takes_one_alpha():
    rank = {"model.layers.0.self_attn.q_proj": 2}
    mine = Finetuner(small_model(), small_tokenizer(), "lora", rank=rank, alpha=4)
    assert len(trainable_parameters(mine.model)) == 2
    with pytest.raises(ValueError, match="a rank a layer needs one alpha"):
        Finetuner(small_model(), small_tokenizer(), "lora", rank=rank)


@pytest.mark.parametrize("wrong, message", [
    ({"method": "dora"}, "method='dora'; expected one of full, lora, qlora"),
    ({"method": "full", "rank": 4}, "'rank'.* are LoRA's"),
    ({"method": "lora", "rank": 0}, "rank=0: expected a whole number of at least 1"),
    ({"method": "lora", "rank": 2.5}, "rank=2.5: expected a whole number"),
    ({"method": "lora", "alpha": float("nan")}, "alpha=nan: expected a number above 0"),
    ({"method": "lora", "spec": NF4Spec()}, "spec=NF4Spec.* lora has none"),
    ({"method": "full", "spec": NF4Spec()}, "spec=NF4Spec.* full has none"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        Finetuner(small_model(), small_tokenizer(), **wrong)


def test_run_json_and_the_adapter_belong_together(base, tmp_path):
    folder = tmp_path / "run"
    mine = tuner(base, "lora", folder)
    mine.save()
    said = (folder / "run.json").read_bytes()
    for at in range(0, len(said), len(said) // 40):
        (folder / "run.json").write_bytes(said[:at] + bytes([said[at] ^ 4]) + said[at + 1 :])
        with pytest.raises(ValueError, match="run.json"):
            read_run(folder)
    (folder / "run.json").write_bytes(said)
    assert read_run(folder)["trained"] == "lora"
    trainable_parameters(mine.model)["model.layers.0.mlp.up_proj.lora_B.default"].data += 1
    save_adapter(mine.model, folder / "adapter")  # and died before run.json
    with pytest.raises(ValueError, match="run.json are of two runs.*--resume"):
        Finetuner.load(folder, compute_dtype="fp32")


@pytest.mark.parametrize("change", [
    {"path": "../../else"}, {"path": 3}, {"adapter": ["a"]}, {"trained": "half"}, {"method": None},
])  # fmt: skip
def test_a_run_json_of_somebody_else_names_nothing_outside_its_folder(base, tmp_path, change):
    tuner(base, "lora", tmp_path).save()
    said = json.loads((tmp_path / "run.json").read_text()) | change
    said = {k: v for k, v in said.items() if k not in ("format", "sha256") and v is not None}
    (tmp_path / "run.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="run.json names no adapter or model of this folder"):
        read_run(tmp_path)


def test_what_was_trained_is_named_when_its_base_is_replaced(base, tmp_path, capsys):
    tuner(base, "qlora", tmp_path).save()
    assert "note:" not in capsys.readouterr().out
    tuner(base, "qlora", tmp_path, spec=QuantSpec(8, 32))
    assert "note: what was trained in" in capsys.readouterr().out


def test_one_example_needs_a_dev_set(base):
    with pytest.raises(ValueError, match="can't be split; give a dev set"):
        tuner(base, "lora").fit(PAIRS[:1], config=CONFIG)
