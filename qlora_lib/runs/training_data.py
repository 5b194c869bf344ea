"""What a run trains on: read, encoded, checked against the test set, counted."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..base.paths import short_path
from ..data.examples import MATH, hold_out, make_examples
from ..data.overlap import Overlap, find_overlap, words
from ..data.rows import listed, read_rows
from ..data.sources import TRAINING_SETS, data_file, load_training_set
from ..data.tokens import IGNORE, Example, collate
from ..evaluation.extraction import extract_answer
from ..train.finetune import supervised
from .profiles import Profile


@dataclass
class TokenCount:
    """How many tokens examples have, and what max_length does to them."""

    examples: int
    tokens: int  # after cutting
    longest: int  # before cutting
    cut: int  # examples that max_length cuts
    left_out: int  # examples whose prompt fills max_length
    supervised: int  # labels
    padding_labels: int  # labels on padding, in batches as training makes them; 0, or a bug

    def __str__(self) -> str:
        return (f"{self.examples:,} examples, {self.tokens:,} tokens, the longest "
                f"{self.longest:,}; {self.cut:,} are cut, {self.left_out:,} left out (the prompt "
                f"fills max_length); {self.supervised:,} labels are supervised, "
                f"{self.padding_labels} of them padding")  # fmt: skip


@dataclass
class TrainingData:
    """Examples, not cut, and what was found on the way."""

    source: str
    train: list[Example]
    dev: list[Example]
    dev_versions: int  # examples left out of train for a problem that is in dev
    overlap: Overlap
    left_out: int  # of the overlapping ones
    notes: str  # calculator notes: stripped or kept
    readable: int | None  # train targets with an answer for strict extraction; None: not math
    count: TokenCount

    def __str__(self) -> str:
        said = f"data: {self.source}; calculator notes {self.notes}; "
        said += f"{len(self.dev):,} held out for dev"
        if self.dev_versions:
            said += f", {self.dev_versions:,} other versions of their problems left out"
        said += f"\n  test set: {self.overlap}; {self.left_out} left out\n  train: {self.count}"
        if self.readable is not None:
            said += f"\n  strict extraction finds an answer in {self.readable:,} of the targets"
        return said

    def report(self) -> dict:
        found = {kind: len(getattr(self.overlap, kind)) for kind in ("equal", "contain", "share")}
        return {
            "source": self.source,
            "calculator_notes": self.notes,
            "dev_examples": len(self.dev),
            "dev_versions_left_out": self.dev_versions,
            "test_overlap": found | {"ngram": self.overlap.ngram, "left_out": self.left_out},
            "readable_targets": self.readable,
            "tokens": asdict(self.count),
        }


def prepare(profile: Profile, tokenizer, source: str | Path | Iterable[dict] | None = None,
            max_length: int = 512, notes: bool = False, keep_overlap: bool = False) -> TrainingData:
    """Train and dev examples from a source.

    source: None for the profile's own problems; "metamathqa" or "mathinstruct"; a file, or a
    folder with train.jsonl (and dev.jsonl), in a format of examples.py; or rows themselves. Without
    a dev file the last examples are held out, and other versions of their problems leave train.
    Left out are examples whose prompt fills max_length, and those that overlap with the profile's
    test questions, unless `keep_overlap`, which also does without a test set that can't be read.
    Raises what the readers raise, and ValueError when nothing is left.
    """
    name, form, train, dev = _read(profile, tokenizer, source, notes)
    versions = 0
    if dev is None:
        train, dev = hold_out(train)
        problems = {words(example.problem) for example in dev}
        rest = [example for example in train if words(example.problem) not in problems]
        train, versions = rest, len(train) - len(rest)
    try:
        test = [entry["question"] for entry in profile.examples("test")]
    except FileNotFoundError:
        if not keep_overlap:
            raise
        test = []
    overlap = find_overlap([example.texts for example in train], test, profile.ngram)
    dropped = set() if keep_overlap else overlap.found
    train = [example for i, example in enumerate(train) if i not in dropped]
    readable, whole = None, len(train)
    if form in MATH:
        readable = sum(extract_answer(example.texts[1]) is not None for example in train)
    train, dev = ([e for e in part if e.teaches(max_length)] for part in (train, dev))
    count = count_tokens(train, max_length, whole - len(train))
    if not train:
        raise ValueError(f"{name}: no example is left to train on; {len(dropped)} overlap with the "
                         f"test set, and of {count.left_out} the prompt fills {max_length=}")
    return TrainingData(f"{name} ({form})", train, dev, versions, overlap, len(dropped),
                        "kept" if notes else "stripped", readable, count)  # fmt: skip


def _read(profile: Profile, tokenizer, source, notes: bool):
    """(name, format, train, dev or None where there is no dev file)."""

    def read(rows: list, name: str = "") -> tuple[str, list[Example]]:
        if name:
            rows = [(f"{name} {i}", row) for i, row in enumerate(rows, 1)]
        return make_examples(rows, tokenizer, notes)

    if source is None:
        form, train = read(profile.examples("train"), "train problem")
        dev = profile.examples("dev")
        dev = read(dev, "dev problem")[1] if dev else []
        return f"the problems of profile {profile.name}", form, train, dev
    if not isinstance(source, (str, Path)):
        rows = read(listed(source, "rows to train on", dict), "row")
        return f"a {type(source).__name__} of rows", *rows, None
    if source in TRAINING_SETS:
        return source, *read(load_training_set(source), f"{source}, row"), None
    path, dev = Path(source), None
    form, train = read(read_rows(data_file(path) if path.is_dir() else path))
    if any((path / f"dev.{suffix}").is_file() for suffix in ("jsonl", "json")):
        dev = read(read_rows(data_file(path, "dev")))[1]
    return short_path(path), form, train, dev


def count_tokens(examples: Sequence[Example], max_length: int, left_out: int,
                 batch_size: int = 32) -> TokenCount:  # fmt: skip
    """Counts of what training will see of examples from which `left_out` were taken already."""
    seen = [example.cut(max_length) for example in examples]
    padding = 0
    for start in range(0, len(seen), batch_size):
        batch = collate(seen[start : start + batch_size])
        padding += int(((batch["labels"] != IGNORE) & (batch["attention_mask"] == 0)).sum())
    lengths = [len(example.input_ids) for example in examples]
    tokens, cut = sum(min(n, max_length) for n in lengths), sum(n > max_length for n in lengths)
    longest = max(lengths, default=0)
    return TokenCount(len(examples), tokens, longest, cut, left_out, supervised(seen), padding)
