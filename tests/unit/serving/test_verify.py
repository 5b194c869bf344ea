"""Faults of serving, each made, found and named; llama.cpp makes them in tests/interop."""

import copy
from dataclasses import replace

import pytest
import torch

from qlora_lib.base.folders import write_hashes
from qlora_lib.data.gsm8k import PROMPT
from qlora_lib.formats.gptq_checkpoint import export_gptq
from qlora_lib.generation.generate import Decoding
from qlora_lib.lora.files import save_adapter
from qlora_lib.lora.inject import delete_adapter, inject_lora, set_adapter
from qlora_lib.lora.layer import lora_layers
from qlora_lib.lora.merge import merge_lora
from qlora_lib.models.quantize import quantize_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.serving.contract import CONTRACT, MEASURED, make_contract, read_contract
from qlora_lib.serving.contract import adapter_faults, ask_of, serving_tokenizer, write_contract
from qlora_lib.serving.engines import Local, open_local
from qlora_lib.serving.verify import REMEDIES, changed_file, compare_with
from tests.support.small_models import small_model, small_tokenizer

QUESTIONS = [f"{i} + {3 * i}?" for i in range(6)]
SHORT = Decoding(max_new_tokens=6)
TOKENIZER = serving_tokenizer(small_tokenizer(), PROMPT)


def served_model():
    model = small_model()
    quantize_model(model, None, QuantSpec(4, 32, symmetric=True), "rtn")
    torch.manual_seed(1)
    inject_lora(model, "all", rank=4, alpha=8)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].data.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def contract():
    return make_contract(served_model(), TOKENIZER, QUESTIONS, SHORT)


class StandIn(Local):
    """An engine in this process that takes token ids, and changes what it is asked or says."""

    takes_ids = True

    def __init__(self, contract, model=None, tokenizer=TOKENIZER, ask=None, say=None):
        super().__init__(model or served_model(), tokenizer, contract)
        self.change, self.say = ask or (lambda prompt: prompt), say or (lambda answer: answer)

    def complete(self, prompts):
        if not isinstance(prompts[0], str):  # ids of the right tokenizer
            own = Local(self.model, TOKENIZER, {"stop": [], "max_new_tokens": 6})
            texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in prompts]
            return [self.say(answer) for answer in own.complete(texts)]
        return [self.say(a) for a in super().complete([self.change(p) for p in prompts])]


def causes(contract, *given, **how) -> list[str]:
    verdict = compare_with(contract, StandIn(contract, *given, **how))
    assert verdict.ok == (not verdict.found) and set(verdict.found) <= set(REMEDIES)
    assert all(f"{cause}: " in str(verdict) for cause in verdict.found)
    return list(verdict.found)


def test_nothing_is_found_where_all_is_right(contract):
    verdict = compare_with(contract, StandIn(contract))
    assert verdict.ok and verdict.equal == 6 and verdict.distance[MEASURED] < 1e-4
    assert str(verdict).endswith("as measured") and "6 of 6 completions" in str(verdict)


def test_bos_twice(contract):
    def more(answer):
        return replace(answer, prompt_tokens=answer.prompt_tokens + 1)

    assert causes(contract, say=more) == ["bos twice"]


def test_bos_missing(contract):
    def less(answer):
        return replace(answer, prompt_tokens=answer.prompt_tokens - 1)

    assert causes(contract, say=less) == ["bos missing"]


def test_a_template_that_is_lost_or_another(contract):
    for template in ("{question}", "Q: {question}\nA:"):
        other = serving_tokenizer(small_tokenizer(), template)
        assert causes(contract, tokenizer=other) == ["template lost or changed"]


def test_a_template_that_writes_bos(contract):
    class Twice(StandIn):
        def chat(self, questions):
            return [replace(a, prompt_tokens=a.prompt_tokens + 1) for a in super().chat(questions)]

    assert list(compare_with(contract, Twice(contract)).found) == ["bos twice"]


def test_a_server_that_puts_prompts_into_its_template_too(contract):
    class Ollama(StandIn):
        def complete(self, prompts):
            return super().complete([PROMPT.format(question=prompt) for prompt in prompts])

        def chat(self, questions):
            return super().complete([ask_of(TOKENIZER, question) for question in questions])

    assert compare_with(contract, Ollama(contract)).ok


def test_an_end_token_that_does_not_stop(contract):
    ended = copy.deepcopy(contract)
    for golden in ended["golden"]:
        golden["finished"] = True

    def goes_on(answer):
        return replace(answer, text=answer.text + " and", finished=False)

    assert causes(ended, say=goes_on) == ["eos is not a stop token"]
    assert causes(ended, say=lambda a: replace(a, finished=None, text=a.text + "x")) == [
        "eos is not a stop token"]  # fmt: skip
    assert causes(ended, say=lambda a: replace(a, finished=True)) == []


def other_base():
    model = small_model(seed=5)
    model.model.norm.weight.data.mul_(3)
    return model


def test_another_base(contract):
    assert causes(contract, other_base()) == ["wrong base"]


def test_an_adapter_that_is_missing(contract):
    model = served_model()
    set_adapter(model, None)
    assert causes(contract, model) == ["adapter missing"]


def test_an_adapter_that_is_merged_twice(contract):
    model = served_model()
    for layer in lora_layers(model).values():
        layer.lora_B["default"].data.mul_(2)
    assert causes(contract, model) == ["adapter merged twice"]


def test_weights_that_were_rounded_again(contract):
    model = served_model()
    merge_lora(model, "dense", unload=True)
    quantize_model(model, None, QuantSpec(4, 32), "rtn")
    assert causes(contract, model) == ["rounding"]


def test_texts_that_part_later_are_rounding_too(contract):
    assert causes(contract, say=lambda a: replace(a, text="other")) == ["rounding"]


def test_another_tokenizer(contract):
    def spelled(prompt):
        return prompt.replace("+", "-")  # as many tokens

    found = causes(contract, ask=spelled)
    assert found[0] == "wrong tokenizer"
    longer = lambda prompt: prompt.replace("?", " ? ? ?")  # noqa: E731
    assert causes(contract, ask=longer) == ["wrong tokenizer"]


def test_an_engine_without_log_probabilities_or_counts(contract):
    def silent(answer):
        return replace(answer, first=None, prompt_tokens=None, finished=None, tokens=None)

    assert causes(contract, say=silent) == []
    found = causes(contract, other_base(), say=silent)
    assert found == ["wrong base"]


def test_log_probabilities_by_text(contract):
    def by_text(answer):
        texts = {TOKENIZER.decode([i]).strip(): p for i, p in reversed(answer.first.items())}
        return replace(answer, first=texts)

    assert causes(contract, say=by_text) == []
    assert causes(contract, other_base(), say=by_text) == ["wrong base"]


# --- the contract itself ------------------------------------------------------------------------


def test_the_faults_are_measured_before_a_merge_and_leave_the_model_as_it_was():
    model = served_model()
    before = [layer.lora_B["default"].clone() for layer in lora_layers(model).values()]
    ids = [[1, 5, 6]]
    faults = adapter_faults(model, ids)
    after = [layer.lora_B["default"] for layer in lora_layers(model).values()]
    assert all(map(torch.equal, before, after)) and len(faults) == 2
    merge_lora(model, "rtn", unload=True)
    assert adapter_faults(model, ids) == {}
    kept = make_contract(model, TOKENIZER, QUESTIONS[:1], SHORT, faults)
    assert set(kept["golden"][0]["first"]) == {MEASURED, *faults}


def test_a_template_of_the_tokenizer_s_own():
    assert serving_tokenizer(small_tokenizer(), None) is small_tokenizer()
    assert ask_of(TOKENIZER, 'a "b" \\ {{ c }}') == PROMPT.format(question='a "b" \\ {{ c }}')
    own = copy.deepcopy(small_tokenizer())
    own.chat_template = "<s>{{ messages[0]['content'] }}!"
    assert ask_of(own, "Hi") == "Hi!"  # encode_prompt puts the bos


def export(folder, contract):
    model = served_model()
    save_adapter(model, folder.with_name("adapter"))
    delete_adapter(model, "default")
    write = lambda place: write_contract(contract, place)  # noqa: E731
    export_gptq(model, folder, tokenizer=TOKENIZER, beside=write)
    return folder


def test_a_gptq_checkpoint_and_the_adapter_beside_it(contract, tmp_path):
    folder = export(tmp_path / "m", contract)
    assert changed_file(folder) is None
    right = open_local(folder, contract, "cpu", tmp_path / "adapter")
    assert compare_with(contract, right).ok
    alone = compare_with(contract, open_local(folder, contract, "cpu"))
    assert list(alone.found) == ["adapter missing"]


def test_a_file_that_was_changed(contract, tmp_path):
    folder = export(tmp_path / "m", contract)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "model.safetensors is not as it was written" in changed_file(folder)
    write_hashes(folder)  # as if it had been saved so: the contract knows better
    assert changed_file(folder) == "model.safetensors is not the file that was measured"


def test_a_contract_that_is_none(contract, tmp_path):
    with pytest.raises(FileNotFoundError, match="no .*contract.json; `python -m qlora_lib export`"):
        read_contract(tmp_path)
    (tmp_path / CONTRACT).write_text("{}")
    with pytest.raises(ValueError, match="is no contract that `export` wrote"):
        read_contract(tmp_path)
    write_contract(contract, tmp_path)
    text = (tmp_path / CONTRACT).read_text().replace("<s>", "<S>")
    (tmp_path / CONTRACT).write_text(text)
    with pytest.raises(ValueError, match="changed or is damaged"):
        read_contract(tmp_path)
