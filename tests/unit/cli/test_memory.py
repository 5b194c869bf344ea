"""`python -m qlora_lib memory`: the ledger, by command line, and without any weights."""

import pytest
from transformers import LlamaConfig
from transformers.configuration_utils import PreTrainedConfig

from qlora_lib import NF4Spec, QuantSpec, memory_ledger
from qlora_lib.__main__ import main
from qlora_lib.train.loss import CHUNK


@pytest.fixture
def no_network(monkeypatch):
    """The hub cannot be reached, and is not waited for."""

    def refuse(name, *_, **__):
        raise OSError(f"couldn't connect to load {name}")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", refuse)


def printed(capsys, *argv: str) -> str:
    assert main(["memory", *argv]) == 0
    return capsys.readouterr().out


def test_it_prints_the_ledger_of_each_method(capsys):
    out = printed(capsys, "--profile", "tiny", "--compute-dtype", "fp32")
    assert [line.split(",")[0] for line in out.splitlines() if line[0] != " "] == [
        "full", "lora", "qlora"
    ]  # fmt: skip
    assert out.count("at the peak") == 3 and "NF4Spec" in out


def test_llama2_7b_needs_neither_weights_nor_a_network(capsys, no_network):
    out = printed(
        capsys, "--profile", "llama2-7b", "--method", "qlora", "--compute-dtype", "bf16",
        "--gradient-checkpointing", "--batch-size", "4", "--rank", "8", "--bits", "3",
        "--group-size", "128", "--optimizer", "adam8bit",
    )  # fmt: skip
    ledger = memory_ledger(
        LlamaConfig(), "qlora", 4, 512, 8, spec=QuantSpec(3, 128), checkpointing=True,
        compute_dtype="bf16", optimizer="adam8bit", logit_tokens=CHUNK,
    )  # fmt: skip
    assert ledger.parameters == 6_738_415_616  # the model card's 7B
    assert out.endswith(f"{ledger}\n")
    default = printed(capsys, "--profile", "llama2-7b", "--method", "qlora")
    assert str(NF4Spec()) in default


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--bits", "5"], "bits"),
        (["--group-size", "7", "--bits", "4", "--method", "qlora"], "group_size"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, message):
    assert main(["memory", *argv]) == 2
    assert message in capsys.readouterr().err


def test_another_model_without_a_config_is_refused(capsys, no_network):
    assert main(["memory", "--model", "no/such-model-here"]) == 2
    assert "no config.json" in capsys.readouterr().err
