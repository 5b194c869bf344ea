"""Training examples from rows of every format, chats above all."""

import copy
import json

import pytest

from qlora_lib.data.examples import FORMATS, hold_out, make_examples, read_examples, write_chat
from qlora_lib.data.gsm8k import PROMPT
from qlora_lib.data.tokens import IGNORE, Example, encode_example, encode_prompt
from qlora_lib.evaluation.extraction import extract_answer
from tests.support.small_models import small_tokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": "And 2 more?"},
    {"role": "assistant", "content": "44."},
]
GSM8K = {"question": " 1 + 1? ", "answer": "1+1=<<1+1=2>>2\n#### 2"}
METAMATH = {
    "type": "GSM_Rephrased",
    "query": "What is twice 21?",
    "original_question": "What is 21 + 21?",
    "response": "Twice 21 is 42.\n#### 42\nThe answer is: 42",
}
INSTRUCT = {
    "source": "data/CoT/gsm_train.json",
    "instruction": "3 + 4?",
    "output": "3+4=7\nThe answer is 7",
}


def tokenizer(template=CHATML):
    made = copy.deepcopy(small_tokenizer())
    made.chat_template = template
    return made


def examples(*rows, template=CHATML, **kwargs):
    named = [(f"line {i}", row) for i, row in enumerate(rows, 1)]
    return make_examples(named, tokenizer(template), **kwargs)


def supervised(example) -> str:
    return tokenizer().decode([label for label in example.labels if label != IGNORE])


def whole(example) -> str:
    return tokenizer().decode(example.input_ids)


@pytest.mark.parametrize(
    "row, name, everything, learned",
    [
        ({"text": "Once upon a time."}, "text", "<s>Once upon a time.</s>", None),
        ({"prompt": "Say: ", "completion": "hi"}, "prompt and completion", "<s>Say: hi</s>", "hi"),
        (GSM8K, "GSM8K", "<s>Question: 1 + 1?\nAnswer:\n1+1=2\n#### 2</s>", "1+1=2\n#### 2"),
        (METAMATH, "MetaMathQA", None, METAMATH["response"]),
        (INSTRUCT, "MathInstruct", "<s>Question: 3 + 4?\nAnswer:\n" + INSTRUCT["output"] + "</s>",
         INSTRUCT["output"]),
    ],
)  # fmt: skip
def test_each_format_is_told_by_its_fields(row, name, everything, learned):
    found, (example,) = examples(row | {"id": 3})
    assert found == name
    everything = everything or f"<s>{PROMPT.format(question=row['query'])}{learned}</s>"
    assert whole(example) == everything
    assert supervised(example) == (everything[3:] if learned is None else f"{learned}</s>")
    if name in ("GSM8K", "MetaMathQA", "MathInstruct"):
        assert extract_answer(example.texts[1]) == {"GSM8K": 2, "MetaMathQA": 42}.get(name, 7)


def test_notes_are_kept_on_demand():
    assert supervised(examples(GSM8K, notes=True)[1][0]) == GSM8K["answer"] + "</s>"


def test_rephrasings_are_of_one_problem():
    _, found = examples(METAMATH, METAMATH | {"query": "21 and 21 are?", "original_question": None})
    assert found[0].problem == METAMATH["original_question"] in found[0].texts
    assert found[1].problem == f"21 and 21 are?\n{METAMATH['response']}"


def test_programs_are_left_out():
    program = INSTRUCT | {"source": "data/PoT/gsm_gpt4.json", "output": "print(3 + 4)"}
    assert [e.texts[1] for e in examples(program, INSTRUCT)[1]] == [INSTRUCT["output"]]
    with pytest.raises(ValueError, match="no row is left"):
        examples(program)


def test_a_chat_supervises_the_turns_of_the_assistant_and_their_end_tokens():
    name, (example,) = examples({"messages": CHAT})
    assert name == "chat"
    want = tokenizer().apply_chat_template(CHAT, tokenize=False)
    assert whole(example) == want and want.count("<s>") == 1  # the template's bos, no other
    assert supervised(example) == "It is 42.</s>\n44.</s>\n"
    assert example.texts == ("What is 12 + 30?", "It is 42.", "And 2 more?", "44.")
    ids, labels = example
    asked = tokenizer().apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]
    assert ids[: len(asked)] == asked and labels[: len(asked)] == [IGNORE] * len(asked)
    assert labels[len(asked)] != IGNORE  # as when the model is asked, from the first token on


def test_a_template_without_an_end_token_gets_one():
    plain = CHATML.replace("{{ eos_token }}", "")
    _, (example,) = examples({"messages": CHAT}, template=plain)
    assert supervised(example) == "It is 42.\n44.\n</s>"


@pytest.mark.parametrize("template", [CHATML, CHATML.replace("{{ bos_token }}", "")])
def test_a_chat_is_learned_as_it_is_asked(template):
    _, (example,) = examples({"messages": CHAT[:3]}, template=template)
    ids, labels = example
    asked = encode_prompt(tokenizer(template), write_chat(tokenizer(template), CHAT[:2], ask=True))
    assert ids[: len(asked)] == asked and ids.count(tokenizer().bos_token_id) == 1
    assert labels[: len(asked)] == [IGNORE] * len(asked) and labels[len(asked)] != IGNORE


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.",
          "parameters": {"type": "object", "properties": {}}}}]  # fmt: skip
WITH_TOOLS = "{% for t in tools or [] %}[{{ t.function.name }}]\n{% endfor %}" + CHATML
THINKS_FIRST = CHATML.replace("<|assistant|>\n{% endif", "<|assistant|>\n<think>\n{% endif")
NAMED = CHATML.replace("{{ m.role }}", "{{ m.name or m.role }}")


def test_tools_are_written_by_the_template():
    _, (example,) = examples({"messages": CHAT, "tools": TOOLS}, template=WITH_TOOLS)
    assert whole(example).startswith("<s>[add]\n<s><|system|>")
    assert supervised(example) == "It is 42.</s>\n44.</s>\n"
    for empty in (None, []):
        assert examples({"messages": CHAT, "tools": empty})[1] == examples({"messages": CHAT})[1]


def test_a_call_of_a_tool_and_its_answer_are_turns():
    called = CHATML.replace("{{ m.content }}", "{{ m.content or m.tool_calls[0].function.name }}")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    chat = [CHAT[1], call, {"role": "tool", "content": "42"}, CHAT[2]]
    _, (example,) = examples({"messages": chat, "tools": TOOLS},
                             template="{% for t in tools or [] %}!{% endfor %}" + called)  # fmt: skip
    assert supervised(example) == "add</s>\nIt is 42.</s>\n" and "<|tool|>\n42" in whole(example)


@pytest.mark.parametrize("weights, learned", [
    ((0, 1), "44.</s>\n"), ((1, 0), "It is 42.</s>\n"), ((None, 1), "It is 42.</s>\n44.</s>\n"),
])  # fmt: skip
def test_a_turn_of_weight_0_is_read_but_not_learned(weights, learned):
    chat = [dict(m) for m in CHAT]
    chat[2]["weight"], chat[4]["weight"] = weights
    _, (example,) = examples({"messages": chat})
    assert supervised(example) == learned
    assert example.input_ids == examples({"messages": CHAT})[1][0].input_ids


def test_a_name_that_the_template_writes_is_kept():
    chat = [CHAT[1] | {"name": "Ava"}, CHAT[2] | {"name": None}]
    _, (example,) = examples({"messages": chat}, template=NAMED)
    assert whole(example).startswith("<s><|Ava|>")


def test_fields_that_are_not_read_are_said_once():
    extra = {"topic": "sums", "level": 3, "label": False, "empty": ""}
    with pytest.warns(UserWarning, match="line 1 and what follows: not read: label, topic$") as said:
        examples(GSM8K | extra, GSM8K | extra)
    assert len(said) == 1


def test_no_field_of_the_known_formats_is_said_to_be_unread(recwarn):
    for row in (GSM8K, METAMATH, INSTRUCT, {"text": "a", "id": 3}, {"messages": CHAT}):
        examples(row)
    assert not recwarn


@pytest.mark.parametrize("template, opened", [
    (THINKS_FIRST, r"'<\|assistant\|>\\n<think>\\n'"),
    (CHATML.replace("{{ m.content }}", "{{ m.content.strip() }}").replace(
        "<|assistant|>\n{% endif", "<|assistant|>\n\n{% endif"), r"'<\|assistant\|>\\n\\n'"),
])  # fmt: skip
@pytest.mark.parametrize("turns", [3, 5])
def test_a_template_that_opens_what_the_chat_lacks_is_explained(template, opened, turns):
    with pytest.raises(ValueError, match=f"asks for an answer with {opened}, and writes the answer "
                       "without it.*write the row as prompt, up to there, and completion"):  # fmt: skip
        examples({"messages": CHAT[:turns]}, template=template)


def bad_chat(*messages, **change):
    return {"messages": [*messages] if messages else [CHAT[1] | change, CHAT[2]]}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "q"}, r"fields \['question'\]; expected those of one format: text; prompt"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "expected those of one format"),
        ({"text": "  "}, "`text` should be a text that is not empty, got '  '"),
        ({"prompt": "a", "completion": ""}, "`completion` should be"),
        ({"text": "a \ud83d b"}, "half a surrogate pair, .*ud83d"),
        ({"question": "a \ud83d b", "answer": "#### 1"}, "half a surrogate pair"),
        ({"prompt": 3, "completion": "c"}, "`prompt` should be .* got 3"),
        ({"question": "q", "answer": "no number"}, "#### N"),
        ({"instruction": "Translate", "input": "Good morning", "output": "Bonjour"},
         "`input` 'Good morning' would be lost.*write the row as prompt and completion"),
        ({"messages": []}, "list of messages, got"),
        ({"messages": "hello"}, "list of messages, got 'hello'"),
        (bad_chat(content=""), "`content` should be a text that is not empty"),
        (bad_chat(content="", tool_calls=None), "`content` should be a text that is not empty"),
        (bad_chat(content=[{"type": "image"}]), "`content` should be a text"),
        (bad_chat(content="a \udc00"), "half a surrogate pair"),
        (bad_chat(role="human"), "a role .system, user, assistant."),
        (bad_chat("hello"), "got 'hello'"),
        (bad_chat(CHAT[1]), "end with the assistant's turn"),
        ({"messages": CHAT, "tools": TOOLS}, "`tools` would be lost: the chat template writes"),
        (bad_chat(name="Ava"), "`name` of a message would be lost"),
        ({"messages": CHAT, "system": "Be brief."}, "`system` 'Be brief.' would be lost"),
        ({"messages": [CHAT[1], CHAT[2] | {"weight": 0}]}, "no turn of the assistant is learned"),
        ({"messages": [CHAT[1], CHAT[2] | {"weight": 0.5}]}, "learned .weight 1. or not .0., got"),
        (bad_chat(weight=1), "learned .weight 1. or not .0., got"),
        ({"prompt": "p", "completion": "c", "system": "Be brief."}, "`system` .* would be lost"),
        ({"prompt": "p", "completion": "c", "tools": TOOLS}, "`tools` .* would be lost"),
        (GSM8K | {"context": "Eggs cost 2."}, "`context` 'Eggs cost 2.' would be lost"),
        (METAMATH | {"history": [["a", "b"]]}, "`history` .* would be lost"),
        ({"text": "t", "images": ["a.png"]}, "`images` .* would be lost"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match=f"line 1.*{message}"):
        examples(row)


def test_an_empty_input_is_none():
    name, (example,) = examples({"instruction": "Say hi", "input": "", "output": "hi"})
    assert name == "MathInstruct" and example.texts[1] == "hi"
    with pytest.raises(ValueError, match="there are no rows"):
        examples()


def test_formats_are_not_mixed():
    with pytest.raises(ValueError, match="line 2 has the format 'text', but the file began with"):
        examples(GSM8K, {"text": "a"})
    assert len(FORMATS) == 6


def test_templates_that_cannot_write_a_chat():
    chat = {"messages": CHAT}
    for template, message in (
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
        ("{{ messages | length }}" + CHATML, "otherwise once others follow"),
    ):
        with pytest.raises(ValueError, match=f"line 1: .*{message}"):
            examples(chat, template=template)


# --- The door ------------------------------------------------------------------------------


def test_examples_of_every_kind(tmp_path):
    pairs = [("a\n", "b"), ("c\n", "d")]
    encoded = [encode_example(small_tokenizer(), *pair) for pair in pairs]
    rows = [{"prompt": p, "completion": c} for p, c in pairs]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lists = [list(example) for example in encoded]
    for source in (pairs, rows, encoded, lists, file, str(file), iter(pairs)):
        assert read_examples(source, small_tokenizer()) == encoded
    assert read_examples(encoded, None)[0] is encoded[0]  # made once
    assert [whole(e) for e in read_examples(["a", "b"], small_tokenizer())] == [
        "<s>a</s>", "<s>b</s>"]
    assert read_examples([([1, 2], [-100, 2])], None) == [Example([1, 2], [-100, 2])]


@pytest.mark.parametrize("source, message", [
    ([], "there are no examples"),
    ([("a", "b"), "c"], "example 2 is a text, the first a pair of texts"),
    ([{"text": "a"}, {"prompt": "a", "completion": "b"}], "example 2 has the format"),
    ([{"text": "a"}, {"txt": "a"}], r"example 2 has the fields \['txt'\]"),
    ([("a", "b", "c")], "example 1 is tuple, the first unknown"),
    ([3], "example 1 is int"),
    ([{"text": " "}], "`text` should be a text that is not empty"),
])
def test_wrong_examples_are_named(source, message):
    with pytest.raises(ValueError, match=message):
        read_examples(source, small_tokenizer())


def test_a_broken_line_is_named(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 3 is not JSON"):
        read_examples(file, small_tokenizer())
    with pytest.raises(FileNotFoundError, match="there is no .*none.jsonl"):
        read_examples(tmp_path / "none.jsonl", small_tokenizer())


@pytest.mark.parametrize("n, at_least, dev", [(9, 0, 0), (9, 1, 1), (10, 1, 1), (99, 0, 9),
                                              (2570, 0, 256)])
def test_the_last_tenth_is_held_out_up_to_a_limit(n, at_least, dev):
    items = list(range(n))
    assert hold_out(items, at_least) == (items[: n - dev], items[n - dev :])


@pytest.mark.parametrize("ids, labels", [
    ([1, 2], [1]), ([-1], [-1]), ([], []), (["a"], ["b"]), ([1.5], [1]), ([True], [1]), ([1], [-5]), ([2**70], [1]),
])  # fmt: skip
def test_encoded_examples_are_token_ids_and_labels(ids, labels):
    with pytest.raises(ValueError, match="example 2 should be token ids"):
        read_examples([([1, 2], [IGNORE, 2]), (ids, labels)], small_tokenizer())
