"""The bundled model in a web page: the same tokens and logits as here, and controls that change
what it says."""
import copy

import pytest
import torch

from course.tools import page_model, pages
from course.tools.normal_form import notebooks
from qlora_lib import Decoding, QuantizedLinear, generator
from qlora_lib.data.gsm8k import PROMPT
from qlora_lib.data.tokens import encode_prompt
from qlora_lib.evaluation.extraction import extract_answer
from qlora_lib.lora.files import load_adapter
from qlora_lib.lora.layer import lora_layers
from qlora_lib.models.checkpoint import load_quantized
from qlora_lib.quant.grid import QuantSpec, quantize_rtn

TEXTS = [PROMPT.format(question=entry["question"]) for entry in page_model.problems(20)]
STRANGE = ["", "  two  spaces\n\nlines ", "don't we'll I'M", "12,345.67 and ½ of ３",
           "naïve café – “x”", "日本語 🙂", "a\tb\r\nc", "x" * 50, "<s> </s>"]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    out = tmp_path_factory.mktemp("ask") / "html"
    pages.build(out, notebooks(["13"]), [], ask=True)
    return (out / "ask.html").as_uri()


@pytest.fixture
def asking(address, tab):
    tab.goto(address)
    answered(tab)
    return tab


def answered(tab):
    """Wait for the verdict; returns the answer."""
    tab.wait_for_function("document.getElementById('verdict').textContent !== '...'")
    return tab.locator("#answer").inner_text()


@pytest.fixture(scope="module")
def ours():
    """The model that the page has: its adapter as fp16 factors of the singular triplets."""
    model, tokenizer = load_quantized(page_model.BASE, "cpu", "fp32")
    load_adapter(model, page_model.ADAPTER)
    for layer in lora_layers(model).values():
        b, a = page_model.adapter_factors(layer)
        layer.lora_A[layer.active].data = a.float()
        layer.lora_B[layer.active].data = b.float() / layer.configs[layer.active].scaling
    return model, tokenizer


def with_settings(model, bits, group, rank):
    """A copy whose adapters keep their first `rank` triplets, its weights rounded once more."""
    model = copy.deepcopy(model)
    for layer in lora_layers(model).values():
        layer.lora_B[layer.active].data[:, rank:] = 0
        if bits < 4:
            spec = QuantSpec(bits, group, clip_search=False)
            layer.base = QuantizedLinear(quantize_rtn(layer.base.dequantize(), spec))
    return model


def test_the_same_tokens(asking, ours):
    for text in [*TEXTS, *STRANGE]:
        want = [i for i in encode_prompt(ours[1], text)]
        if not {0, 1, 2} & set(want[1:]):  # special tokens that a text spells are the tokenizer's
            assert asking.evaluate("text => [1, ...encode(text)]", text) == want, text


@pytest.mark.parametrize("bits, group, rank, prompts", [
    (4, 64, 16, 20), (4, 64, 0, 3), (4, 64, 3, 3), (3, 32, 16, 3), (2, 128, 16, 3), (3, 256, 1, 3)])
@torch.inference_mode()
def test_the_same_logits(asking, ours, bits, group, rank, prompts):
    """To 1e-3, as logits reach 20: sums are in double precision there, in single here."""
    model, tokenizer = with_settings(ours[0], bits, group, rank), ours[1]
    for text in TEXTS[:prompts]:
        want = model(torch.tensor([encode_prompt(tokenizer, text)])).logits[0]
        got = asking.evaluate("([text, ...how]) => logits(text, ...how)", [text, bits, group, rank])
        assert (torch.tensor(got) - want).abs().max() < 1e-3


def test_the_answers_are_those_of_the_course(asking, ours):
    """The stored adapter, in bf16 and not by triplets, answers the page's problems alike."""
    model, tokenizer = load_quantized(page_model.BASE, "cpu", "fp32")
    load_adapter(model, page_model.ADAPTER)
    shown = page_model.problems()
    said = generator(model, tokenizer, Decoding(max_new_tokens=160))(
        [PROMPT.format(question=entry["question"]) for entry in shown])
    for index, (entry, want) in enumerate(zip(shown, said)):
        asking.locator("#problem").select_option(index=index)
        assert answered(asking).strip() == want.strip()
        right = str(extract_answer(want)) == entry["gold"]
        assert asking.locator("#verdict").inner_text().startswith("✓" if right else "✗")
    assert asking.raised == []


def test_controls_and_questions_change_what_is_said(asking):
    first = answered(asking)
    rank = asking.locator("#rank")
    rank.press("Home")
    without = answered(asking)
    assert without != first and asking.locator("#rank + output").inner_text() == "0"
    rank.press("End")
    assert answered(asking) == first
    assert asking.locator("#group").is_disabled()
    asking.locator("#bits").press("Home")
    assert answered(asking) != first and asking.locator("#group").is_enabled()
    assert "2.38 bits a weight" in asking.locator("#setting").inner_text()  # 2 + (16 + 8) / 64
    asking.locator("#bits").press("End")
    answered(asking)
    asking.locator("#question").fill("Ben has 3 cups of 4 pens <b>each</b>. How many pens has he?")
    asking.locator("#rank").focus()
    answered(asking)
    assert asking.locator("#verdict").inner_text() == ""
    asking.locator("#answer span").first.focus()
    shares = asking.locator("#likely tr td:nth-child(2)").all_inner_texts()
    assert len(shares) == 5 and 0 < sum(float(p[:-1]) for p in shares) <= 100.1
    assert {a for a in asking.asked if not a.startswith("data:")} == {asking.url}
