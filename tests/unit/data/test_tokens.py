"""Texts to ids, labels and batches."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib import (
    Decoding,
    QuantSpec,
    TrainConfig,
    evaluate,
    finetune,
    generator,
    inject_lora,
    quantize_model,
    validation_loss,
)
from qlora_lib.data import tokens as data
from qlora_lib.data.calibration import calibration_batches
from qlora_lib.data.examples import chat_example, read_examples
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.evaluation.evaluate import few_shot
from qlora_lib.evaluation.verifier import Verifier
from qlora_lib.evaluation.votes import likelihood
from tests.support.sentencepiece_like import sentencepiece
from tests.support.small_models import PAIRS, small_model, small_tokenizer
from tests.support.tensors import PROPERTY

ENTRY = {
    "question": "Ava has 1,000 apples and sells half.",
    "answer": "She sells 1000/2=<<1000/2=500>>500 apples.\n#### 500",
}


def test_prompt_and_target_encode_apart_as_together():
    tokenizer, (prompt, target) = small_tokenizer(), format_gsm8k(ENTRY)
    together = tokenizer.encode(prompt + target, add_special_tokens=False)
    ids, _ = data.encode_example(tokenizer, prompt, target, 512)
    assert ids == [1, *together, 2]


def test_only_target_and_one_real_eos_are_supervised():
    tokenizer, (prompt, target) = small_tokenizer(), format_gsm8k(ENTRY)
    ids, labels = data.encode_example(tokenizer, prompt, target, 512)
    start = len(data.encode_prompt(tokenizer, prompt))
    assert labels[:start] == [data.IGNORE] * start and labels[start:] == ids[start:]
    assert tokenizer.decode(labels[start:-1]) == target
    assert labels.count(tokenizer.eos_token_id) == 1 and labels[-1] == tokenizer.eos_token_id


def test_there_is_one_bos():
    encoded = [data.encode_prompt(small_tokenizer(), text) for text in ("<s>Ava", "Ava", "")]
    assert encoded[0] == encoded[1] and encoded[2] == [1]
    assert encoded[0].count(small_tokenizer().bos_token_id) == 1


def test_padding_is_masked_even_where_pad_is_eos():
    eos = small_tokenizer().eos_token_id
    examples = [data.encode_example(small_tokenizer(), *pair, 256) for pair in PAIRS[:8]]
    batch = data.collate(examples, pad_id=eos)
    width = max(len(ids) for ids, _ in examples)
    assert batch["input_ids"].shape == batch["labels"].shape == (8, width)
    assert (batch["labels"] == eos).sum(1).tolist() == [1] * 8
    assert batch["attention_mask"].sum(1).tolist() == [len(ids) for ids, _ in examples]
    assert (batch["labels"][batch["attention_mask"] == 0] == data.IGNORE).all()
    assert all(row[0] == 1 for row in batch["attention_mask"].tolist())  # padded on the right


def test_too_long_examples_are_cut_and_full_prompts_refused():
    tokenizer = small_tokenizer()
    prompt, target = format_gsm8k(ENTRY)
    start = len(data.encode_prompt(tokenizer, prompt))
    ids, labels = data.encode_example(tokenizer, prompt, target, start + 1)
    assert len(ids) == start + 1 and labels[-1] != data.IGNORE
    with pytest.raises(ValueError, match="fills the context"):
        data.encode_example(tokenizer, prompt, target, start)


def test_tokenizer_without_bos_or_pad():
    bare = SimpleNamespace(
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=9,
        encode=lambda text, add_special_tokens: [ord(c) for c in text],
    )
    ids, labels = data.encode_example(bare, "ab", "c", 10)
    assert (ids, labels) == ([97, 98, 99, 9], [-100, -100, 99, 9])
    assert data.pad_id(bare) == 9


def test_pad_sides():
    assert data.pad([[1], [2, 3]], 0).tolist() == [[1, 0], [2, 3]]
    assert data.pad([[1], [2, 3]], 0, side="left").tolist() == [[0, 1], [2, 3]]
    assert data.pad([[1]], 0).dtype == torch.int64


def test_an_example_is_cut_as_if_it_had_been_encoded_so():
    pair = PAIRS[3]
    whole = data.encode_example(small_tokenizer(), *pair)
    start = whole.labels.count(data.IGNORE)
    for length in (start + 1, 512):
        assert whole.cut(length) == data.encode_example(small_tokenizer(), *pair, length)
        assert len(whole.cut(length).labels) == min(length, len(whole.labels))
    with pytest.raises(ValueError, match=f"first {start} tokens .* nothing to learn"):
        whole.cut(start)
    assert whole.teaches(start + 1) and not whole.teaches(start)


KINDS = {
    "byte-level": small_tokenizer,
    **{kind: partial(sentencepiece, kind) for kind in ("llama2", "metaspace", "bare")},
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_a_target_has_the_tokens_that_it_has_in_the_whole_text(kind):
    """Encoded by itself, a text gets a space in front of it from SentencePiece."""
    tokenizer, (prompt, target) = KINDS[kind](), format_gsm8k(ENTRY)
    ids, labels = data.encode_example(tokenizer, prompt, target)
    whole = tokenizer.encode(prompt + target, add_special_tokens=False)
    assert ids == [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]
    asked = data.encode_prompt(tokenizer, prompt)
    assert ids[: len(asked)] == asked and labels[: len(asked)] == [data.IGNORE] * len(asked)
    apart = tokenizer.encode(target, add_special_tokens=False)
    assert (apart == ids[len(asked) : -1]) == (kind in ("byte-level", "bare"))


TEXTS = st.text(alphabet="Aa b3+=.,:\n", max_size=12)


@each_kind
@PROPERTY
@given(prompt=TEXTS, target=TEXTS)
def test_training_sees_a_prompt_as_it_is_asked_and_loses_no_letter(kind, prompt, target):
    tokenizer = KINDS[kind]()
    ids, labels = data.encode_example(tokenizer, prompt, target)
    asked = data.encode_prompt(tokenizer, prompt)
    assert ids[: len(asked)] == asked and labels[len(asked) :] == ids[len(asked) :]
    assert labels.count(tokenizer.eos_token_id) == 1 and ids.count(tokenizer.bos_token_id) == 1
    letters = tokenizer.decode(ids, skip_special_tokens=True)
    assert letters.replace(" ", "") == (prompt + target).replace(" ", "")


@each_kind
def test_solved_problems_before_a_question_have_the_tokens_of_training(kind):
    tokenizer = KINDS[kind]()
    (shown, _), (prompt, target) = few_shot([ENTRY], 1)(ENTRY), format_gsm8k(ENTRY)
    trained = data.encode_example(tokenizer, prompt, target).input_ids[:-1]
    assert data.encode_prompt(tokenizer, shown)[: len(trained)] == trained


@each_kind
def test_a_border_within_a_token_leaves_the_prompt_as_it_is_asked(kind):
    """A text is cut after each letter: where that tears a token, prompt and target keep theirs."""
    tokenizer, torn = KINDS[kind](), 0
    text = "Question: Ava has 3 eggs and buys 12 more"
    together = tokenizer.encode(text, add_special_tokens=False)
    for cut in range(1, len(text)):
        ids, _ = data.encode_example(tokenizer, text[:cut], text[cut:])
        asked = data.encode_prompt(tokenizer, text[:cut])
        assert ids[: len(asked)] == asked
        torn += ids[1:-1] != together
        said = "".join(tokenizer.convert_ids_to_tokens(ids[len(asked) : -1]))
        assert said.replace("\u2581", " ").replace("\u0120", " ") == text[cut:]
    assert torn > 5


@each_kind
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_chat_has_the_tokens_of_its_text(kind, turns):
    tokenizer = copy.deepcopy(KINDS[kind]())
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + '\n' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    messages = [{"role": role, "content": f"{role[0]}{i} has {i} eggs"}
                for i in range(turns) for role in ("user", "assistant")]  # fmt: skip
    example = chat_example(messages, tokenizer)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert example.input_ids[:-1] == tokenizer.encode(text, add_special_tokens=False)
    learned = [i for i, label in zip(*example) if label != data.IGNORE]
    assert learned.count(tokenizer.eos_token_id) == 1
    said = tokenizer.decode(learned, skip_special_tokens=True).replace(" ", "")
    assert said == "".join(f"a{i}has{i}eggs\n" for i in range(turns))


@each_kind
def test_a_bos_or_eos_that_a_text_writes_is_not_doubled(kind):
    tokenizer = KINDS[kind]()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain, written = read_examples(["hi Ava", "<s>hi Ava</s>"], tokenizer)
    for example in (plain, written, read_examples([("hi\n", "Ava</s>")], tokenizer)[0]):
        assert example.input_ids.count(bos) == example.input_ids.count(eos) == 1
        assert example.input_ids[0] == bos and example.labels[0] == data.IGNORE
        assert example.labels[-1] == eos


def test_a_pad_token_that_the_model_does_not_have_is_never_shown_to_it():
    """As when one was added to the tokenizer and not to the model: padding is masked anyway."""
    tokenizer, model = copy.deepcopy(small_tokenizer()), small_model()
    prompts, said = zip(*PAIRS[:6])
    config = TrainConfig(max_steps=2, batch_size=6, compute_dtype="fp32")

    def doors(tokenizer):
        ask = generator(model, tokenizer, Decoding(max_new_tokens=6, batch_size=6))
        sample = generator(model, tokenizer, Decoding(1.0, samples=2, max_new_tokens=6))
        yield ask(prompts)
        yield sample(prompts)
        yield evaluate(ask, [{"question": p, "answer": "#### 1"} for p in prompts]).info["model"]
        yield likelihood(model, tokenizer)(prompts, said)
        yield Verifier(small_model(), tokenizer, rank=2)(prompts, said)
        yield validation_loss(model, tokenizer, PAIRS[:6], config)
        yield [b["input_ids"].tolist() for b in data_batches(tokenizer)]
        adapted = small_model()
        torch.manual_seed(0)
        inject_lora(adapted, ("q_proj",), rank=2)
        yield [step["loss"] for step in finetune(adapted, tokenizer, PAIRS[:6], config).steps]
        yield quantize_model(small_model(), data_batches(tokenizer), QuantSpec(4, 16))[0].output_error

    def data_batches(tokenizer):
        return calibration_batches(tokenizer, PAIRS, 6, batch_size=3)

    usual = list(doors(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "<unknown pad>"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    assert list(doors(tokenizer)) == usual


def test_a_prompt_is_tokenized_once():
    tokenizer, seen = small_tokenizer(), []
    encode = tokenizer.encode
    tokenizer.encode = lambda text, **how: seen.append(text) or encode(text, **how)
    prompt, target = PAIRS[0]
    data.encode_example(tokenizer, prompt, target)
    assert seen == [prompt, prompt + target]
