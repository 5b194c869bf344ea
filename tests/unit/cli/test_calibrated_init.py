"""`finetune --init svd | qera | cloq`: trained, resumed, streamed, asked again; and refused."""

import json
from pathlib import Path

import pytest
import torch

from qlora_lib.base.files import read_tensors
from qlora_lib.lora.files import ADAPTER
from qlora_lib.lora.layer import lora_layers
from qlora_lib.lora.targets import find_linears
from qlora_lib.models.calibrated_init import inject_calibrated
from qlora_lib.models.checkpoint import load_quantized
from qlora_lib.models.merge_hessians import input_hessians
from qlora_lib.quant.gptq import GPTQOptions
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.recipe import Recipe
from qlora_lib.runs.finetuner import Finetuner
from qlora_lib.runs.profiles import load_profile
from qlora_lib.train.config import TrainConfig
from tests.support.cli_place import COMMON, FAST, place, run  # noqa: F401
from tests.support.small_models import PAIRS, small_model, small_tokenizer
from tests.support.tensors import relative


def adapter(folder="checkpoints/tiny"):
    return read_tensors(Path(folder) / "adapter" / ADAPTER)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("argv", [
    ["--method", "gptq", "--bits", "2", "--init", "cloq", "--best"],
    ["--method", "nf4", "--init", "qera", "--rslora"],
    ["--method", "rtn", "--bits", "3", "--init", "svd"],
])  # fmt: skip
def test_an_adapter_that_starts_from_what_rounding_lost(place, capsys, argv):
    assert run("finetune", *FAST, *argv, "--targets", "attention") == 0
    out = capsys.readouterr().out
    assert f"starts from what rounding lost ({argv[argv.index('--init') + 1]})" in out
    assert "on 4 layers" in out
    said = json.loads((place / "checkpoints/tiny/run.json").read_text())
    assert said["lora"]["init"] == argv[argv.index("--init") + 1]
    assert run("evaluate", *COMMON, "--limit", "2", "--max-new-tokens", "2") == 0
    assert "adapter on 4 layers" in capsys.readouterr().out
    assert run("finetune", *FAST, *argv, "--targets", "attention", "--resume") == 0
    assert "is there, with these settings" in capsys.readouterr().out  # the plain base serves
    assert run("finetune", *FAST, *argv[: argv.index("--init")], "--resume", "--targets",
               "attention", *argv[argv.index("--init") + 2 :]) == 2  # fmt: skip
    assert "init of adapter 'default' was" in capsys.readouterr().err


def test_streamed_it_is_the_same(place, capsys):
    argv = [*FAST, "--bits", "2", "--init", "cloq"]
    assert run("finetune", *argv, "--folder", "whole") == 0
    assert run("finetune", *argv, "--folder", "streamed", "--stream") == 0
    assert "streaming model with gptq" in capsys.readouterr().out
    assert same(adapter("whole"), adapter("streamed"))


def test_a_killed_run_goes_on_to_the_same_bits(place):
    def tuner(folder):
        profile = load_profile("tiny", model="model", data="data")
        recipe = Recipe.of(QuantSpec(2, 16), options=GPTQOptions(damp_percent=None))
        return Finetuner(profile.plan(recipe), folder=folder, rank=4, init="cloq")

    config = TrainConfig(max_steps=4, batch_size=4, save_every=1, lr=1e-2)
    whole = tuner("whole")
    assert all(layer.lora_B["default"].any() for layer in lora_layers(whole.model).values())
    whole.fit(PAIRS, [], config)

    def die(metrics):
        if metrics["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner("killed").fit(PAIRS, [], config, die)
    again = tuner("killed")
    history = again.fit(PAIRS, [], TrainConfig(**vars(config) | {"resume": True, "folder": "killed/training"}))
    assert history.resumed_from == 2
    for tuned in (whole, again):
        tuned.save()
    assert same(adapter("whole"), adapter("killed"))


def test_beside_a_base_that_matches_the_dense_model_the_adapter_does(place):
    profile = load_profile("tiny", model="model", data="data")
    plan = profile.plan(Recipe.of(QuantSpec(2, 16), options=GPTQOptions(match_dense=True)))
    found = lora_layers(Finetuner(plan, folder="run", rank=4, alpha=8, init="cloq").model)
    model, tokenizer = load_quantized("run/base", "cpu", "fp32")
    dense, shown = profile.load()[0], profile.calibration(tokenizer)
    hessians = input_hessians(model, find_linears(model, "all"), shown, dense=dense)
    inject_calibrated(model, dense, hessians, rank=4, alpha=8)
    for path, layer in lora_layers(model).items():
        assert relative(found[path].delta("default"), layer.delta("default")) < 1e-4


@pytest.mark.parametrize("argv, message", [
    (["--method", "none", "--init", "cloq"], "a dense base has lost nothing"),
    (["--init", "qera", "--stream", "--match-dense"], "leave one of the two out"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_before_the_work(place, capsys, argv, message):
    assert run("finetune", *FAST, *argv) == 2
    out, err = capsys.readouterr()
    assert message in err and "quantizing" not in out


def test_modules_without_calibration_or_dense_weights_are_refused():
    with pytest.raises(ValueError, match="nothing says on which texts"):
        Finetuner(small_model(), small_tokenizer(), init="cloq")
    tuner = Finetuner(small_model(), small_tokenizer(), init="svd", rank=4, spec=QuantSpec(2, 16))
    assert len(tuner.layers) == 14
    for layer in lora_layers(tuner.model).values():
        assert layer.lora_B["default"].any()
    packed = Finetuner(small_model(), small_tokenizer(), rank=4).model
    with pytest.raises(ValueError, match="needs its dense weights too"):
        Finetuner(packed, small_tokenizer(), init="svd")
