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
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from .results import ROOT

DATA = ROOT / "data"  # the bundled files
HUB_NAME = "openai/gsm8k"
GSM_HARD_NAME = "reasoning-machines/gsm-hard"
MINIGSM_SPLITS = ("train", "dev", "test", "test_changed", "test_larger")
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
    return entry[name]


def load_gsm8k(split: str, folder: str | Path | None = None) -> list[dict[str, str]]:
    """GSM8K's "train" (7,473 entries) or "test" (1,319).

    Read from `folder`/{split}.jsonl when given, else from data/gsm8k when it is there,
    else from the Hugging Face hub. Raises FileNotFoundError when none of them can be
    read, ValueError for an unknown split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"GSM8K has the splits train and test, not {split!r}")
    if folder is not None or (DATA / "gsm8k").is_dir():
        return read_jsonl(Path(folder or DATA / "gsm8k") / f"{split}.jsonl")
    try:
        from datasets import load_dataset

        return [dict(entry) for entry in load_dataset(HUB_NAME, "main", split=split)]
    except Exception as error:  # the hub client raises many kinds, all with one remedy
        raise FileNotFoundError(
            f"GSM8K could not be loaded from the hub ({type(error).__name__}: {error}). "
            f"Put train.jsonl and test.jsonl from github.com/openai/grade-school-math into "
            f"{short_path(DATA / 'gsm8k')}, or name their folder with --data or GSM8K_DIR"
        ) from error


def load_gsm_hard(folder: str | Path | None = None) -> list[dict[str, str]]:
    """GSM-Hard (Gao et al. 2022, arXiv 2211.10435): GSM8K's test questions, larger numbers.

    Read from `folder`/gsmhardv2.jsonl when given, else from the Hugging Face hub. Its golds
    are floats, some negative or with many decimals. The answer is the shortest decimal that
    reads back as that float: 14053029.666666666 is compared within 1e-6, 9867630.0 becomes
    the integer 9867630, which is compared exactly. Raises FileNotFoundError when it can't be
    read, GoldError for NaN and infinities.
    """
    if folder is not None:
        rows = read_jsonl(Path(folder) / "gsmhardv2.jsonl")
    else:
        try:
            from datasets import load_dataset

            rows = load_dataset(GSM_HARD_NAME, split="train")
        except Exception as error:  # as in load_gsm8k
            raise FileNotFoundError(
                f"GSM-Hard could not be loaded from the hub ({type(error).__name__}: {error}). "
                "Put gsmhardv2.jsonl from github.com/reasoning-machines/pal into a folder, and "
                "name it with --data"
            ) from error
    return [{"question": row["input"], "answer": f"#### {_decimal(row['target'])}"} for row in rows]


def _decimal(target: float) -> str:
    """A float in digits, without an exponent and without ".0"."""
    if not math.isfinite(target):
        raise GoldError(f"a gold answer must be a number, got {target}")
    text = format(Decimal(repr(target)), "f")
    return text.removesuffix(".0")


def load_minigsm(split: str, folder: str | Path | None = None) -> list[dict[str, str]]:
    """mini-GSM's "train", "dev" or "test", bundled under data/minigsm.

    "test_changed" and "test_larger" are test problems with other numbers, line by line.
    """
    if split not in MINIGSM_SPLITS:
        raise ValueError(
            f"mini-GSM has the splits train, dev and test, and test with other numbers as "
            f"test_changed and test_larger, not {split!r}"
        )
    return read_jsonl(Path(folder or DATA / "minigsm") / f"{split}.jsonl")


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The entries of a JSONL file.

    Raises FileNotFoundError, or ValueError naming the line that is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {short_path(path)}; expected a file with `question` and `answer` a line"
        )
    entries = []
    # Not splitlines(): a JSON text may hold characters like U+2028 that it would split at.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{short_path(path)}, line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{short_path(path)}, line {number} is not a JSON object: {line:.80}")
        entries.append(entry)
    if not entries:
        raise ValueError(f"{short_path(path)} holds no entries")
    return entries


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
    """[bos] + ids of the prompt; no bos for a tokenizer that has none."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer.encode(prompt, add_special_tokens=False)


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
    examples: Iterable[tuple[str, str]],
    n: int = 128,
    max_length: int = 512,
    batch_size: int = 16,
) -> list[dict[str, Tensor]]:
    """The first `n` (prompt, target) pairs as batches for `quantize_model`.

    Each batch has input_ids and attention_mask, int64 (batch, seq). Examples of equal
    length share a batch, to keep padding small. Raises ValueError for no examples.
    """
    pairs = list(examples)[:n]
    if not pairs:
        raise ValueError("calibration needs at least one example; got none")
    encoded = [encode_example(tokenizer, p, t, max_length) for p, t in pairs]
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
