"""Problems, prompts and token ids: one template with one home.

Training, calibration and evaluation all format with `format_gsm8k` and encode with
`encode_prompt`, so a model is asked exactly as it was taught. Entries are dicts with
`question` and `answer`, as in GSM8K (Cobbe et al. 2021, arXiv 2110.14168): the answer
holds calculator notes like `<<48/2=24>>` and ends in a line `#### N`.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from .results import ROOT

Pair = tuple[str, str]  # prompt, target
Encoded = tuple[list[int], list[int]]  # input_ids, labels

DATA = ROOT / "data"  # the bundled files
PROMPT = "Question: {question}\nAnswer:\n"
IGNORE = -100  # a label that cross-entropy leaves out

# A minus counts as a sign only where no number, name or bracket precedes it: 10-3 is not -3.
NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-\u2212\u2013])?\$?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
_MAX_DIGITS = 60  # longer numbers are noise, and slow to convert
_NOTE = re.compile(r"<<[^<>]*>>")


def to_number(text: str) -> Fraction | None:
    """Exact value of what `NUMBER` matched, such as "-$1,234.50"; None when it is too long."""
    if len(text) > _MAX_DIGITS:
        return None
    text = text.replace("\u2212", "-").replace("\u2013", "-")
    return Fraction(text.replace(",", "").replace("$", ""))


class GoldError(ValueError):
    """A gold answer that is no number."""


def gold_answer(entry: dict[str, str]) -> Fraction:
    """The number after `####` in entry["answer"].

    Raises GoldError (a ValueError) when there is no `####`, or something else than one
    number after it.
    """
    _, mark, tail = _field(entry, "answer").rpartition("####")
    match = NUMBER.fullmatch(tail.strip())
    value = to_number(match.group()) if mark and match else None
    if value is None:
        raise GoldError(
            f"the gold answer {entry['answer'][-60:]!r} does not end in `#### N`; "
            "mend the entry or leave it out of the data"
        )
    return value


def format_gsm8k(entry: dict[str, str], notes: bool = False) -> tuple[str, str]:
    """(prompt, target) of an entry; the target's calculator notes go unless `notes`.

    The prompt ends in a newline, where byte-level and SentencePiece tokenizers both
    split, so that encoding prompt and target apart equals encoding them together.
    Raises ValueError for an entry without a question or with an unparsable answer.
    """
    gold_answer(entry)
    answer = entry["answer"] if notes else _NOTE.sub("", entry["answer"])
    return PROMPT.format(question=_field(entry, "question").strip()), answer.strip()


def _field(entry: dict[str, str], name: str) -> str:
    if not isinstance(entry.get(name), str) or not entry[name].strip():
        raise ValueError(f"an entry needs a non-empty text `{name}`, got {entry!r:.120}")
    check_text(entry[name])
    return entry[name]


def check_text(text: str) -> None:
    """Raises ValueError for half a surrogate pair, which JSON can write and tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"a text holds half a surrogate pair, {half!r}; mend it") from error


def check_tokens(model, ids: Iterable[int]) -> None:
    """Raises ValueError for a token id that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if (largest := max(ids, default=0)) >= rows:
        raise ValueError(
            f"token id {largest}, but the model has embeddings of {rows} tokens: the tokenizer is "
            "another model's, or tokens were added to it (model.resize_token_embeddings)"
        )


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """(where, row) for each row of a JSONL file or of a JSON list; where: "FILE, line 3".

    Raises FileNotFoundError, or ValueError naming the line that is not a JSON object.
    """
    name = short_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {name}; expected a file with a JSON object a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            found = [(f"{name}, entry {i}", row) for i, row in enumerate(json.loads(text), 1)]
        else:
            found = []
            # Not splitlines(): a JSON text may hold characters like U+2028 that it would split at.
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    found.append((f"{name}, line {number}", _json(line, f"{name}, line {number}")))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}); convert it") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not found:
        raise ValueError(f"{name} holds no entries")
    for where, row in found:
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a JSON object: {str(row):.80}")
    return found


def _json(line: str, where: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSONL file; errors as read_rows."""
    return [row for _, row in read_rows(path)]


def short_path(path: Path) -> str:
    """The path as seen from the working directory or, for what is not below it, from the
    repository's root; a path outside both stays whole."""
    for folder in (Path.cwd(), ROOT):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(path)


def weights_id(model: str) -> str:
    """A hash of a local folder's or file's weights; a hub id stands for itself."""
    path = Path(model)
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
    files = [path] if path.is_file() else files
    if not files:
        return model
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """[bos] + ids of the prompt; no bos for a tokenizer that has none, nor a second one where the
    prompt begins with it, as those that chat templates write do."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    return ids if ids[:1] == bos else bos + ids


def encode_example(
    tokenizer, prompt: str, target: str, max_length: int
) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of [bos] + prompt + target + [eos], built by hand.

    Labels are -100 on the prompt and the ids themselves on target and eos: the model
    must learn to stop, so the one real eos is supervised. What exceeds `max_length` is
    cut from the end, and then there is no eos. Raises ValueError when the prompt leaves
    no room for a single target token.
    """
    start = encode_prompt(tokenizer, prompt)
    if len(start) >= max_length:
        raise ValueError(
            f"a prompt of {len(start)} tokens fills the context of {max_length}: "
            f"{prompt[:60]!r}...; raise max_length or shorten the prompt"
        )
    end = tokenizer.encode(target, add_special_tokens=False) + [tokenizer.eos_token_id]
    input_ids = (start + end)[:max_length]
    labels = ([IGNORE] * len(start) + end)[:max_length]
    return input_ids, labels


def encode(tokenizer, example: Pair | Encoded, max_length: int) -> Encoded:
    """(input_ids, labels) of a training example, a (prompt, target) pair or encoded before.

    What exceeds `max_length` is cut from the end. Raises ValueError when nothing supervised
    is left.
    """
    if isinstance(example[0], str):
        return encode_example(tokenizer, *example, max_length)
    input_ids, labels = (ids[:max_length] for ids in example)
    if all(label == IGNORE for label in labels):
        raise ValueError(
            f"the first {max_length} tokens of an example of {len(example[0])} hold nothing to "
            "learn; raise max_length or shorten the prompt"
        )
    return input_ids, labels


def pad(sequences: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """int64 (batch, longest), filled up with `value` on one side."""
    width = max(map(len, sequences))
    fills = [[value] * (width - len(s)) for s in sequences]
    rows = [[*s, *f] if side == "right" else [*f, *s] for s, f in zip(sequences, fills)]
    return torch.tensor(rows)


def collate(batch: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, int64 (batch, seq), padded on the right.

    Padding has label -100 and mask 0 whatever its id: where pad is eos, the real eos
    stays supervised and the padding does not.
    """
    inputs, labels = zip(*batch)
    return {
        "input_ids": pad(inputs, pad_id),
        "attention_mask": pad([[1] * len(ids) for ids in inputs], 0),
        "labels": pad(labels, IGNORE),
    }


def pad_id(tokenizer) -> int:
    """The padding id: eos where the tokenizer has no pad token (Llama-2)."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def calibration_batches(
    tokenizer,
    examples: Iterable[Pair | Encoded],
    n: int = 128,
    max_length: int = 512,
    batch_size: int = 16,
) -> list[dict[str, Tensor]]:
    """The first `n` examples, as `encode` takes them, as batches for `quantize_model`.

    Each batch has input_ids and attention_mask, int64 (batch, seq). Examples of equal
    length share a batch, to keep padding small. Raises ValueError for no examples.
    """
    pairs = list(examples)[:n]
    if not pairs:
        raise ValueError("calibration needs at least one example; got none")
    encoded = [encode(tokenizer, example, max_length) for example in pairs]
    encoded.sort(key=lambda example: len(example[0]))
    batches = []
    for i in range(0, len(encoded), batch_size):
        batch = collate(encoded[i : i + batch_size], pad_id(tokenizer))
        batches.append({k: batch[k] for k in ("input_ids", "attention_mask")})
    return batches


def parse_gold(gold: object) -> Fraction:
    """A gold answer as a number: an answer text with `####`, a numeral, or a number.

    Raises GoldError (a ValueError) for anything else, NaN and infinities included.
    """
    if isinstance(gold, str):
        if "####" in gold:
            return gold_answer({"answer": gold})
        match = NUMBER.fullmatch(gold.strip())
        value = to_number(match.group()) if match else None
        if value is not None:
            return value
    elif isinstance(gold, (int, Fraction)) or isinstance(gold, float) and math.isfinite(gold):
        return Fraction(gold)
    raise GoldError(f"a gold answer must be a number or end in `#### N`, got {gold!r:.80}")
