"""Rows that have ended leave the batch, and the others answer as they do alone."""

import pytest

from qlora_lib.generation import generate
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.lora.inject import inject_lora, use_adapter
from qlora_lib.models.quantize import quantize_model, quantized_layers
from qlora_lib.quant.grid import QuantizedTensor, QuantSpec
from tests.support.lora_models import trained
from tests.support.small_models import PAIRS, small_model, small_tokenizer

PROMPTS = [prompt for prompt, _ in PAIRS[:12]]
NEW = 40


def talkative(monkeypatch):
    """A model whose answers end at many different tokens, and the batch sizes it will see."""
    model, tokenizer = small_model(), small_tokenizer()
    monkeypatch.setattr(generate, "FEW", 1)
    plain = generator(model, tokenizer, Decoding(max_new_tokens=NEW, stop=()))(PROMPTS)
    said = {i for text in plain for i in tokenizer.encode(text, add_special_tokens=False)}
    model.generation_config.eos_token_id = sorted(said)[::7]
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return model, tokenizer, seen


@pytest.mark.parametrize("bits", [None, 4])
def test_ended_rows_leave_the_batch_and_the_others_answer_as_alone(monkeypatch, bits):
    model, tokenizer, seen = talkative(monkeypatch)
    decoding = Decoding(max_new_tokens=NEW, batch_size=12, stop=(), cache_bits=bits)
    answers = generator(model, tokenizer, decoding)(PROMPTS)
    sizes, seen[:] = list(seen), []
    assert sizes[0] == 12 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 3
    lengths = [a.tokens for a in answers]
    assert len(sizes) == max(lengths)  # one pass a token, whoever leaves
    monkeypatch.setattr(generate, "FEW", 1000)
    stay = generator(model, tokenizer, decoding)(PROMPTS)
    assert answers == stay and lengths == [a.tokens for a in stay] and set(seen) == {12}
    assert [a.finished for a in answers] == [a.finished for a in stay]


def test_a_row_keeps_its_adapter_when_others_leave(monkeypatch):
    model, tokenizer, seen = talkative(monkeypatch)
    for name, seed in (("a", 1), ("b", 2)):
        inject_lora(model, ("q_proj", "v_proj"), rank=2, adapter=name)
        trained(model, name, seed=seed, std=0.3)
    names = ["b", None, "a"] * 4
    generate_all = generator(
        model, tokenizer, Decoding(max_new_tokens=NEW, batch_size=12, stop=())
    )
    answers = generate_all(PROMPTS, names)
    assert len(set(seen)) > 3
    for prompt, name, answer in zip(PROMPTS, names, answers):
        with use_adapter(model, name):
            assert generate_all([prompt]) == [answer]


def test_sampled_rows_stay(monkeypatch):
    model, tokenizer, seen = talkative(monkeypatch)
    decoding = Decoding(temperature=1.0, samples=2, max_new_tokens=NEW, batch_size=12, stop=())
    generator(model, tokenizer, decoding)(PROMPTS)
    assert set(seen) == {24}


def test_a_long_answer_says_how_many_prompts_are_done(monkeypatch, capsys):
    monkeypatch.setattr("qlora_lib.base.progress.EVERY", 0.0)  # as if a batch took a minute
    generator(small_model(), small_tokenizer(), Decoding(max_new_tokens=2, batch_size=8))(PROMPTS)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(", ")[0] for line in lines] == [
        "answering: 8 of 12 prompts", "answering: 12 of 12 prompts"
    ]  # fmt: skip


def test_a_small_packed_model_is_decoded_once_for_all_tokens_of_all_prompts(monkeypatch):
    model, decoded = small_model(), []
    quantize_model(model, None, QuantSpec(4, 16), "rtn")
    pieces = QuantizedTensor.pieces
    counted = lambda weight, dtype: decoded.append(weight) or pieces(weight, dtype)  # noqa: E731
    monkeypatch.setattr(QuantizedTensor, "pieces", counted)
    ask = generator(model, small_tokenizer(), Decoding(max_new_tokens=3, batch_size=2))
    ask([prompt for prompt, _ in PAIRS[:4]])
    assert len(decoded) == len(quantized_layers(model))
