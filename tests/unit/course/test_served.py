"""The servers of notebook 10: what a fault changes, and that both verifiers name it."""

import copy

import pytest
import torch

from course.nb10.exercises import find_cause
from course.nb10.served import Served, plain
from qlora_lib.data.gsm8k import PROMPT
from qlora_lib.generation.generate import Decoding
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.layer import lora_layers
from qlora_lib.serving.contract import make_contract, serving_tokenizer
from qlora_lib.serving.verify import compare_with
from tests.support.small_models import small_model, small_tokenizer

TOKENIZER = serving_tokenizer(small_tokenizer(), PROMPT)
BARE = serving_tokenizer(small_tokenizer(), "{question}")
QUESTIONS = [f"{i} + {3 * i}?" for i in range(6)]


def with_adapter(times: float):
    model = small_model()
    torch.manual_seed(1)
    inject_lora(model, "all", rank=4, alpha=8)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].data.normal_(0, 0.1).mul_(times)
    return model


@pytest.fixture(scope="module")
def contract():
    return make_contract(with_adapter(1), TOKENIZER, QUESTIONS, Decoding(max_new_tokens=6))


@pytest.mark.parametrize("times, tokenizer, how, cause", [
    (1, TOKENIZER, {}, ""),
    (1, TOKENIZER, {"bos": 2}, "bos twice"),
    (1, BARE, {}, "template lost or changed"),
    (0, TOKENIZER, {}, "adapter missing"),
    (2, TOKENIZER, {}, "adapter merged twice"),
])  # fmt: skip
def test_both_verifiers_name_the_cause(contract, times, tokenizer, how, cause):
    server = Served(with_adapter(times), tokenizer, contract, **how)
    assert list(compare_with(contract, server).found) == [cause] * bool(cause)
    assert find_cause(plain(contract), server.seen(contract), 1) == cause


def test_without_its_end_token_an_answer_goes_on(contract):
    model = with_adapter(1)
    (ended,) = Served(model, TOKENIZER, contract).complete(["Hi"])
    end = max(ended.first, key=ended.first.get)  # the first token that it says
    changed, tokenizer = copy.deepcopy(model), copy.deepcopy(TOKENIZER)
    changed.generation_config.eos_token_id = end
    stops = Served(changed, tokenizer, contract).complete(["Hi"])[0]
    goes_on = Served(changed, tokenizer, contract, stops=False).complete(["Hi"])[0]
    assert stops.finished and stops.text == "" and goes_on.text == ended.text
    assert changed.generation_config.eos_token_id == end and tokenizer.eos_token == "</s>"


def test_a_prompt_is_asked_once(contract):
    server = Served(with_adapter(1), TOKENIZER, contract)
    first = server.complete(["Hi", "Ho", "Hi"])
    server.model = None  # nothing is asked of it any more
    assert server.complete(["Ho", "Hi"]) == [first[1], first[0]] and first[0] is first[2]


def test_the_ids_are_those_that_the_model_is_given(contract):
    prompts = [golden["prompt"] for golden in contract["golden"]]
    ids = [golden["ids"] for golden in contract["golden"]]
    assert Served(with_adapter(1), TOKENIZER, contract).ids(prompts) == ids
    twice = Served(with_adapter(1), TOKENIZER, contract, bos=2)
    assert twice.ids(prompts) == [[1, *row] for row in ids]
    answers = twice.complete(prompts)
    assert [answer.prompt_tokens for answer in answers] == [len(row) + 1 for row in ids]
