"""Rows of your own files, or of published sets, as training examples in tokens.

A file has one format, told by its fields:

    text                      all of it is learned
    prompt, completion        the completion is learned, after the prompt exactly as it stands
    messages                  a chat, with `tools` or without, as the tokenizer's template writes
                              it; the assistant's turns are learned, but those with "weight": 0
    question, answer          GSM8K's, asked with the one template (gsm8k.PROMPT)
    query, response           MetaMathQA's, likewise; original_question tells rephrasings
    instruction, output       MathInstruct's, likewise, without the programs (source PoT)

The end token is learned too. A field whose content would be lost, such as Alpaca's `input`, is
refused (rows.LOST); a warning names others that are not read.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..base.ranges import Range
from .gsm8k import PROMPT, format_gsm8k
from .rows import check_lost, listed, read_rows, text_of
from .tokens import IGNORE, Example, encode_after, encode_example, encode_prompt

FORMATS = {
    "text": ("text",),
    "prompt and completion": ("prompt", "completion"),
    "chat": ("messages",),
    "GSM8K": ("question", "answer"),
    "MetaMathQA": ("query", "response"),
    "MathInstruct": ("instruction", "output"),
}
MATH = ("GSM8K", "MetaMathQA", "MathInstruct")  # their second field ends in an answer
READ = {"chat": ("tools",), "MetaMathQA": ("original_question", "type"),
        "MathInstruct": ("source",)}  # fields that a format may have  # fmt: skip
ROLES = ("system", "user", "assistant", "tool")
DEV = 256  # examples that are held out at most


def hold_out(examples: Sequence, at_least: int = 0) -> tuple[Sequence, Sequence]:
    """Return (train, dev) of examples without a dev set: dev is the last tenth, at most DEV."""
    examples = listed(examples, "examples")
    Range(0, len(examples), whole=True).check("at_least", at_least)
    kept = len(examples) - max(at_least, min(DEV, len(examples) // 10))
    return examples[:kept], examples[kept:]


def read_examples(source: str | Path | Iterable, tokenizer) -> list[Example]:
    """Return whatever training and calibration take as Examples, not cut.

    source: a file of rows; or a list or Dataset, all of one kind: Examples, (prompt, target) or
    (input_ids, labels) pairs, texts, or rows. Raises ValueError, naming the row or line.
    """
    if isinstance(source, (str, Path)):
        return make_examples(read_rows(Path(source)), tokenizer)[1]
    source = listed(source, "examples")
    if not source:
        raise ValueError("there are no examples; give at least one")
    kinds = [_kind(example) for example in source]
    for i, kind in enumerate(kinds):
        if kind is None or kind != kinds[0]:
            raise ValueError(f"example {i + 1} is {kind or type(source[i]).__name__}, the first "
                             f"{kinds[0] or 'unknown'}; expected all of one kind: texts, rows with "
                             "fields, (prompt, completion) or (input_ids, labels)")  # fmt: skip
    if kinds[0] == "encoded":
        examples = [e if isinstance(e, Example) else Example(*e) for e in source]
        for i, (ids, labels) in enumerate(examples, 1):
            _check_ids(i, ids, labels)
        return examples
    if kinds[0] == "a pair of texts":
        return [encode_example(tokenizer, *pair) for pair in source]
    rows = [{"text": row} if isinstance(row, str) else row for row in source]
    return make_examples([(f"example {i}", row) for i, row in enumerate(rows, 1)], tokenizer)[1]


def _check_ids(number: int, ids: list[int], labels: list[int]) -> None:
    """Raise ValueError unless both are token ids, as many; a label may be IGNORE."""
    whole = ids and len(ids) == len(labels) and {type(i) for i in (*ids, *labels)} == {int}
    known = [*ids, *(label for label in labels if label != IGNORE)] if whole else []
    if not known or min(known) < 0 or max(known) >= 2**31:
        raise ValueError(f"example {number} should be token ids and as many labels (ids, or "
                         f"{IGNORE}), got {ids!r:.60} and {labels!r:.60}")  # fmt: skip


def _kind(example) -> str | None:
    for kind, name in ((Example, "encoded"), (str, "a text"), (dict, "a row")):
        if isinstance(example, kind):
            return name
    if isinstance(example, (tuple, list)) and len(example) == 2:
        for kind, name in ((str, "a pair of texts"), (list, "encoded")):
            if all(isinstance(part, kind) for part in example):
                return name
    return None


def make_examples(
    rows: Sequence[tuple[str, dict]], tokenizer, notes: bool = False
) -> tuple[str, list[Example]]:
    """Return (name of the format, examples, not cut) of rows as read_rows gives them; notes: with
    GSM8K's. Raises ValueError, naming the row, for unknown or mixed formats, fields that are empty
    or would be lost, chats that can't be written, and no rows."""
    if not rows:
        raise ValueError("there are no rows to make examples of")
    name, examples, unread = _format_of(*rows[0]), [], set()
    for where, row in rows:
        if _format_of(where, row) != name:
            raise ValueError(f"{where} has the format {_format_of(where, row)!r}, but the file "
                             f"began with {name!r}; give one format a file")  # fmt: skip
        # A number, such as an id, says nothing; False does.
        says = (bool, str, list, dict)
        unread |= {f for f, v in row.items() if v is False or v and isinstance(v, says)}
        if name == "MathInstruct" and "/PoT/" in str(row.get("source")):
            continue
        try:
            check_lost(row, *READ.get(name, ()))
            if name == "chat":
                examples.append(chat_example(row["messages"], tokenizer, row.get("tools")))
            else:
                examples.append(_example(name, row, tokenizer, notes))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not examples:
        raise ValueError(f"{rows[0][0]} and what follows: no row is left to train on")
    if unread := sorted(unread - {*FORMATS[name], *READ.get(name, ())}):
        warnings.warn(f"{rows[0][0]} and what follows: not read: {', '.join(unread)}", stacklevel=2)
    return name, examples


def _format_of(where: str, row: dict) -> str:
    found = [name for name, fields in FORMATS.items() if set(fields) <= row.keys()]
    if len(found) != 1:
        known = "; ".join(" + ".join(fields) for fields in FORMATS.values())
        raise ValueError(f"{where} has the fields {sorted(row)}; expected those of one format: "
                         f"{known}")  # fmt: skip
    return found[0]


def _example(name: str, row: dict, tokenizer, notes: bool) -> Example:
    texts = tuple(text_of(row, field) for field in FORMATS[name])
    if name == "text":
        pair = ("", texts[0])
    elif name == "prompt and completion":
        pair = texts
    elif name == "GSM8K":
        pair = format_gsm8k(row, notes)
    else:
        pair = (PROMPT.format(question=texts[0].strip()), texts[1].strip())
    problem, original = "\n".join(texts), row.get("original_question")
    if isinstance(original, str) and original.strip():
        problem, texts = original, (*texts, original)
    return replace(encode_example(tokenizer, *pair), texts=texts, problem=problem)


def chat_example(messages, tokenizer, tools: list | None = None) -> Example:
    """Return a chat, written by the tokenizer's template, its assistant's turns supervised.

    Each is supervised from the end of what the template writes to ask for it to its own end token,
    unless its "weight" is 0. Raises ValueError for other messages than expected, and a template
    that is missing, can't write them, leaves a field out, or writes a turn otherwise once others
    follow.
    """
    _check_messages(messages)
    _check_written(messages, tokenizer, tools)
    ids, labels, done = [], [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = write_chat(tokenizer, messages[:i], True, tools)
        answered = write_chat(tokenizer, messages[: i + 1], False, tools)
        if not (asked.startswith(done) and answered.startswith(asked)):
            before = write_chat(tokenizer, messages[:i], False, tools)
            if asked.startswith(done) and before and answered.startswith(before):
                raise ValueError("the chat template asks for an answer with "
                                 f"{asked[len(before) :]!r}, and writes the answer without it, as "
                                 "those of models that think first do; write the row as prompt, up "
                                 "to there, and completion, the thinking included")  # fmt: skip
            raise ValueError(f"the chat template writes the first {i + 1} messages otherwise once "
                             "others follow; give each answer a chat of its own")  # fmt: skip
        # What is asked begins with bos, which most templates write.
        rest = asked[len(done) :]
        given = encode_after(tokenizer, done, rest) if done else encode_prompt(tokenizer, rest)
        said = encode_after(tokenizer, asked, answered[len(asked) :])
        if i == len(messages) - 1 and tokenizer.eos_token_id not in said:
            said = said + [tokenizer.eos_token_id]  # the template writes none
        learned = [IGNORE] * len(said) if message.get("weight") == 0 else said
        ids, labels = ids + given + said, labels + [IGNORE] * len(given) + learned
        done = answered
    if set(labels) == {IGNORE}:
        raise ValueError("no turn of the assistant is learned: all have the weight 0")
    texts = tuple(m.get("content") or "" for m in messages if m["role"] != "system")
    return Example(ids, labels, texts, "\n".join(texts))


def write_chat(tokenizer, messages: list[dict], ask=False, tools: list | None = None) -> str:
    """Return a chat as the tokenizer's template writes it; ask: up to where the assistant begins.
    Raises ValueError for a tokenizer without a template and for messages that it refuses."""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; take an instruct model, or write the "
                         "chat as prompt and completion")  # fmt: skip
    try:
        how = {"tokenize": False, "add_generation_prompt": ask}
        return tokenizer.apply_chat_template(messages, tools=tools or None, **how)
    except Exception as error:  # what a template raises is its own affair
        raise ValueError(f"the tokenizer's chat template refuses it: {error}") from error


def _check_messages(messages) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` should be a list of messages, got {messages!r:.80}")
    for message in messages:
        if not isinstance(message, dict) or str(message.get("role")) not in ROLES:
            raise ValueError(f"a message needs a role ({', '.join(ROLES)}), got {message!r:.80}")
        if message.get("content") or not message.get("tool_calls"):
            text_of(message, "content")
        learned = (None, 0, 1) if message["role"] == "assistant" else (None, 0)
        if message.get("weight") not in learned:
            raise ValueError("a turn of the assistant is learned (weight 1) or not (0), got "
                             f"{message!r:.80}")  # fmt: skip
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"a chat should end with the assistant's turn, not {messages[-1]!r:.80}")


def _check_written(messages: list[dict], tokenizer, tools: list | None) -> None:
    """Raise ValueError for tools, or a field of messages, of which the template writes nothing."""
    less = {"`tools`": (messages, None)} if tools else {}  # what may be lost: the chat without it
    fields = {field for message in messages for field, value in message.items() if value}
    for field in fields - {"role", "content", "weight"}:
        rest = [{k: v for k, v in message.items() if k != field} for message in messages]
        less[f"`{field}` of a message"] = (rest, tools)
    for what, (rest, other_tools) in sorted(less.items()):
        try:
            without = write_chat(tokenizer, rest, tools=other_tools)
        except ValueError:  # the template can't do without it
            continue
        if without == write_chat(tokenizer, messages, tools=tools):
            raise ValueError(f"{what} would be lost: the chat template writes nothing of it")
