"""Exact match on word problems: ask, score, report, and go on after a kill. The model sees the
prompt only, and every question counts in the denominator."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from operator import truediv
from pathlib import Path

from ..base import processes
from ..base.files import whole_file, write_json_atomic
from ..base.hashes import changes, content_hash
from ..base.paths import short_path
from ..base.progress import Progress
from ..base.statistics import wilson
from ..data.gsm8k import format_gsm8k, parse_gold
from ..data.rows import listed, read_jsonl
from ..generation.generate import Generator
from .canaries import MODES, run_canaries
from .extraction import equals, extract_answer

CHUNK = 128  # questions that are asked at a time, and kept together, unless told
Entry = dict[str, str]
Prompt = Callable[[Entry], tuple[str, str]]  # an entry to (prompt, target)
# What decides the completions (not date, machine, threads): a folder holds those of one such set.
SETTINGS = ("model", "revision", "weights", "adapter", "compute_dtype", "decoding",
            "problems_hash", "prompts_hash", "chunk", "vote", "score")  # fmt: skip


def few_shot(examples: Sequence[Entry], k: int) -> Prompt:
    """Return a prompt function that puts the first `k` examples, solved, before the question."""
    examples = listed(examples, "examples", dict)
    if not 0 <= k <= len(examples):
        raise ValueError(f"k={k} examples asked for, {len(examples)} given")
    shown = "".join(f"{asked}{solved}\n\n" for asked, solved in map(format_gsm8k, examples[:k]))

    def prompt(entry: Entry) -> tuple[str, str]:
        question, target = format_gsm8k(entry)
        return shown + question, target

    return prompt


@dataclass(frozen=True)
class Prediction:
    """What was said to one question, and the verdict; a line of predictions.jsonl."""

    question: str
    prompt: str
    completion: str
    gold: str
    strict_answer: str | None
    flexible_answer: str | None
    strict: bool  # the strict answer is right
    flexible: bool
    tokens: int  # generated, of all samples
    finished: bool  # and not cut by the limit of new tokens, no sample
    seconds: float = 0.0
    samples: list[str] | None = None  # that the vote chose from
    scores: list[float] | None = None  # of the samples

    def __getitem__(self, name: str):
        return getattr(self, name)

    def row(self) -> dict:
        """Return the fields, as JSON takes them, without samples and scores that are None."""
        optional = ("samples", "scores")
        return {k: v for k, v in vars(self).items() if k not in optional or v is not None}


def _of(count: str, function: Callable = truediv) -> property:
    return property(lambda report: function(getattr(report, count), report.n))


@dataclass
class EvalReport:
    """Accuracies over all n questions, and what they were measured with."""

    n: int
    strict_correct: int
    flexible_correct: int
    formatted: int  # completions with a strict answer, right or wrong
    truncated: int  # completions cut by the limit of new tokens
    tokens: int  # generated
    seconds: float  # spent generating, by all processes together
    info: dict = field(default_factory=dict)  # model, compute_dtype, decoding
    predictions: list[Prediction] = field(default_factory=list, repr=False)

    @classmethod
    def count(cls, predictions: list[Prediction], info: dict) -> "EvalReport":
        """Return the report that these predictions make."""
        return cls(
            n=len(predictions),
            strict_correct=sum(p.strict for p in predictions),
            flexible_correct=sum(p.flexible for p in predictions),
            formatted=sum(p.strict_answer is not None for p in predictions),
            truncated=sum(not p.finished for p in predictions),
            tokens=sum(p.tokens for p in predictions),
            seconds=sum(p.seconds for p in predictions),
            info=info,
            predictions=predictions,
        )

    @classmethod
    def load(cls, folder: str | Path) -> "EvalReport":
        """Return the finished report that `evaluate` stored; FileNotFoundError without one."""
        path = Path(folder) / "report.json"
        if not path.is_file():
            raise FileNotFoundError(f"there is no {short_path(path)}; an evaluation writes it when "
                                    "it is finished")  # fmt: skip
        saved = json.loads(path.read_text(encoding="utf-8"))
        report = {f.name: saved[f.name] for f in fields(cls) if f.name != "predictions"}
        rows = read_jsonl(path.with_name("predictions.jsonl"))
        return cls(**report, predictions=[Prediction(**row) for row in rows])

    # Shares of n and their 95% intervals, as fractions
    strict, strict_interval = _of("strict_correct"), _of("strict_correct", wilson)
    flexible, flexible_interval = _of("flexible_correct"), _of("flexible_correct", wilson)
    format_rate, truncation_rate = _of("formatted"), _of("truncated")

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def summary(self) -> dict:
        """Return everything but the predictions, as JSON takes it."""
        values = {k: v for k, v in vars(self).items() if k != "predictions"}
        names = ("strict", "flexible", "strict_interval", "flexible_interval", "format_rate",
                 "truncation_rate", "tokens_per_second")  # fmt: skip
        return values | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        text = f"{self.n} questions    exact match   95% interval\n"
        for mode, right in zip(MODES, (self.strict_correct, self.flexible_correct)):
            low, high = wilson(right, self.n)
            text += f"{mode:<9}{right:>6}/{self.n:<8} {right / self.n:6.1%}   "
            text += f"[{low:.1%}, {high:.1%}]\n"
        dtype = self.info.get("compute_dtype", "unknown")
        text += f"in format {self.format_rate:.1%}, cut short {self.truncation_rate:.1%}, "
        return text + f"{self.tokens_per_second:.0f} tokens/s, compute dtype {dtype}"


def evaluate(
    generate: Callable[[list[str]], list],
    problems: Sequence[Entry],
    report_folder: str | Path | None = None,
    prompt: Prompt = format_gsm8k,
    callback: Callable[[Prediction], None] | None = None,
    chunk: int | None = None,
    vote: Callable[[list], str] | None = None,
    canaries: bool = True,
    restart: bool = False,
) -> EvalReport:
    """Ask every problem once and score the answers.

    generate: a Generator, or any function from prompts to completions (plain strings will do), or
    to lists of samples, of which `vote` makes or picks the one that counts. prompt: entry to
    (prompt, target), of which only the prompt is used. chunk: questions asked at a time; None:
    about 128, in whole batches of `generate`. callback: called with each new prediction.
    report_folder gets settings.json, predictions.jsonl as it grows, and report.json at the end; a
    killed evaluation, called again, goes on behind the chunks that it has. Several processes,
    called alike, take a chunk each.

    Raises, before anything is generated, ValueError for no problems, a prompt that
    `generate.check` refuses, and a folder with answers of other settings, which `restart`
    replaces; GoldError for an unparsable gold; CanaryError where `canaries` fail.
    """
    problems = listed(problems, "problems", dict)
    if not problems:
        raise ValueError("there are no problems to evaluate on")
    generate = Generator.of(generate)
    if chunk is None:  # a rest would be a smaller batch, in every chunk
        batch = generate.info.get("decoding", {}).get("batch_size", 1)
        chunk = batch * max(1, CHUNK // batch)
    golds = [parse_gold(entry.get("answer")) for entry in problems]
    prompts = [prompt(entry)[0] for entry in problems]
    if canaries:
        run_canaries(evaluate, problems, prompt)
    generate.check(prompts)  # a question that can't be asked is found before the first is
    info = generate.info | {
        "problems_hash": questions_hash((e["question"], g) for e, g in zip(problems, golds)),
        "prompts_hash": content_hash(prompts),
        "chunk": chunk,
        "vote": vote and getattr(vote, "__name__", str(vote)),
    }
    folder, done = None, []
    if report_folder is not None:
        # Hashing a model reads all of it: worth it only where answers are kept.
        info["weights"] = generate.fingerprint()
        settings = {name: info.get(name) for name in SETTINGS}
        for name, value in settings.items():
            processes.agree(name, value)
        path = Path(report_folder)
        rows = processes.on_first(lambda: _open_folder(path, settings, len(problems), restart))
        done = [Prediction(**row) for row in rows]
        folder = path if processes.first() else None  # where to write

    def ask(start: int) -> list[Prediction]:
        asked = prompts[start : start + chunk]
        began = time.perf_counter()
        completions = generate(asked)
        seconds = (time.perf_counter() - began) / len(asked)
        if len(completions) != len(asked):
            raise ValueError(f"{len(asked)} prompts gave {len(completions)} completions")
        return [
            _score(problems[i]["question"], prompts[i], said, golds[i], vote, seconds)
            for i, said in enumerate(completions, start)
        ]

    progress = Progress("evaluating", len(problems), "questions", len(done))
    starts = range(len(done), len(problems), chunk)
    for i in range(0, len(starts), processes.world()):
        own = processes.share(starts[i : i + processes.world()])  # one chunk, or none at the end
        asked = [prediction.row() for prediction in ask(own[0])] if own else []
        new = [Prediction(**row) for rows in processes.gather(asked) for row in rows]
        if folder:
            with open(folder / "predictions.jsonl", "a", encoding="utf-8") as stream:
                # ASCII: a completion may hold half a surrogate pair, which UTF-8 cannot write.
                stream.writelines(json.dumps(prediction.row()) + "\n" for prediction in new)
        done += new
        speed = sum(p.tokens for p in new) / max(sum(p.seconds for p in new), 1e-9)
        progress(len(done), f"{sum(p.strict for p in done)} right, {speed:,.0f} tokens/s")
        for prediction in new if callback else ():
            callback(prediction)
    report = EvalReport.count(done, info)
    if folder:
        write_json_atomic(folder / "report.json", report.summary())
    return report


def questions_hash(pairs) -> str:
    """Return the SHA-256 of (question, gold) pairs, in order."""
    return content_hash([[question, str(gold)] for question, gold in pairs])


def _score(
    question: str, prompt: str, said: object, gold: Fraction, vote: Callable | None, seconds: float
) -> Prediction:
    samples = said if isinstance(said, list) else [said]
    if isinstance(said, list) and vote is None:
        raise ValueError(f"{len(said)} samples for one prompt; give `vote`, which makes them one")
    completion = vote(samples) if vote else samples[0]
    strict, flexible = (extract_answer(completion, mode) for mode in MODES)
    scored = vote and all(hasattr(s, "score") for s in samples)
    return Prediction(
        question=question,
        prompt=prompt,
        completion=str(completion),
        gold=str(gold),
        strict_answer=None if strict is None else str(strict),
        flexible_answer=None if flexible is None else str(flexible),
        strict=equals(strict, gold),
        flexible=equals(flexible, gold),
        tokens=sum(getattr(s, "tokens", 0) for s in samples),
        finished=all(getattr(s, "finished", True) for s in samples),
        seconds=seconds,
        samples=[str(s) for s in samples] if vote else None,
        scores=[s.score for s in samples] if scored else None,
    )


def _open_folder(folder: Path, settings: dict, n: int, restart: bool) -> list[dict]:
    """Return the rows of predictions.jsonl in whole chunks; writes settings.json, or compares."""
    own, answers = folder / "settings.json", folder / "predictions.jsonl"
    settings = json.loads(json.dumps(settings))  # tuples to lists, as they are read back
    if restart:
        for path in (folder / "report.json", answers, own):
            path.unlink(missing_ok=True)
    remedy = "name another folder, or replace them with restart=True (--restart)"
    if not own.is_file():
        if answers.is_file():
            raise ValueError(f"{short_path(answers)} is there without settings.json, which says "
                             f"what made it; {remedy}")  # fmt: skip
        write_json_atomic(own, settings)
        return []
    if changed := changes(json.loads(own.read_text(encoding="utf-8")), settings):
        raise ValueError(f"{short_path(folder)} holds answers of other settings ({changed}); "
                         f"{remedy}")  # fmt: skip
    text = answers.read_text(encoding="utf-8") if answers.is_file() else ""
    whole = text.splitlines(keepends=True)[: text.count("\n")]  # a kill may have torn the last
    if len(whole) < n:  # sampling and rounding depend on which questions are asked together
        whole = whole[: len(whole) // settings["chunk"] * settings["chunk"]]
    if "".join(whole) != text:
        with whole_file(answers) as part:
            part.write_text("".join(whole), encoding="utf-8")
    return list(map(json.loads, whole))
