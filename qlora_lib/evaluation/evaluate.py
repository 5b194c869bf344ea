"""Exact match on word problems: ask, score, report, and go on after a kill. The model sees the
prompt only, and every question counts in the denominator."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from operator import truediv
from pathlib import Path

from ..base import processes
from ..base.files import parse_json, read_proved_json, read_text, whole_file, write_proved_json
from ..base.hashes import changes, content_hash, file_hash
from ..base.lock import held
from ..base.paths import short_path
from ..base.progress import Progress
from ..base.ranges import COUNT
from ..base.statistics import wilson
from ..data.gsm8k import format_gsm8k, parse_gold
from ..data.rows import listed
from ..generation.generate import Generator
from .canaries import run_canaries
from .extraction import MODES, equals, extract_answer

CHUNK = 128  # questions that are asked at a time, and kept together, unless told
Entry = dict[str, str]
Prompt = Callable[[Entry], tuple[str, str]]  # an entry to (prompt, target)
# What decides the completions (not date, machine, threads): a folder holds those of one such set.
OWN, ANSWERS, REPORT = "settings.json", "predictions.jsonl", "report.json"
PROOF = "proof"  # of a line of predictions.jsonl: the hash of all else in it, and of its place
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

    @classmethod
    def score(cls, completion: str, gold: str, **facts) -> "Prediction":
        """Return the prediction with the verdicts on its completion; gold: as str(Fraction)."""
        answers = {f"{mode}_answer": extract_answer(completion, mode) for mode in MODES}
        right = {mode: equals(answers[f"{mode}_answer"], Fraction(gold)) for mode in MODES}
        said = {name: None if answer is None else str(answer) for name, answer in answers.items()}
        return cls(completion=completion, gold=gold, **facts, **said, **right)

    @classmethod
    def read(cls, row: dict) -> "Prediction":
        """Return the prediction in a row, its verdicts made anew. Raises ValueError for another
        row than `row()` gives, now or in older versions."""
        verdicts = {*MODES, *(f"{mode}_answer" for mode in MODES)}
        facts = {name: value for name, value in row.items() if name not in verdicts}
        wrong = [f.name for f in fields(cls) if f.name in facts
                 and not isinstance(facts[f.name], _TYPES[f.name])]  # fmt: skip
        if wrong:
            raise ValueError(f"{wrong[0]} is {facts[wrong[0]]!r:.60}")
        try:
            return cls.score(**facts)
        except (TypeError, ZeroDivisionError) as error:  # missing or unknown names
            raise ValueError(str(error)) from None

    def row(self) -> dict:
        """Return the fields, as JSON takes them, without samples and scores that are None."""
        optional = ("samples", "scores")
        return {k: v for k, v in vars(self).items() if k not in optional or v is not None}


_TYPES = {"question": str, "prompt": str, "completion": str, "gold": str, "tokens": int,
          "finished": bool, "seconds": (int, float), "samples": list, "scores": list}  # fmt: skip


def _line(place: int, prediction: Prediction) -> str:
    """Return a line of predictions.jsonl, which proves itself and its place."""
    row = prediction.row()
    # ASCII: a completion may hold half a surrogate pair, which UTF-8 cannot write.
    return json.dumps(row | {PROOF: content_hash([place, row])[:16]}) + "\n"


def _read_lines(path: Path, lines: Sequence[str], proved: bool) -> list[Prediction]:
    """Return the predictions in the first lines of a file, in order. proved: each must prove itself
    (those of older versions do not). Raises ValueError, naming the line, for one that was changed,
    or is out of order."""
    found = []
    for place, line in enumerate(lines):
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError(f"it is {line:.60}")
            proof = row.pop(PROOF, None)
            if proof != content_hash([place, row])[:16] and (proved or proof is not None):
                raise ValueError("it was changed, is damaged, or is at another place than it was")
            found.append(Prediction.read(row))
        except ValueError as error:
            raise ValueError(f"{short_path(path)}, line {place + 1}: {error}; get the file again, "
                             "or evaluate anew (--restart)") from None  # fmt: skip
    return found


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
        """Return the finished report that `evaluate` stored, its verdicts made anew from the
        completions. Raises FileNotFoundError without one, ValueError for files that are damaged,
        were changed, or do not belong together."""
        path, answers = Path(folder) / REPORT, Path(folder) / ANSWERS
        if not path.is_file():
            raise FileNotFoundError(f"there is no {short_path(path)}; an evaluation writes it when "
                                    "it is finished")  # fmt: skip
        saved = read_proved_json(path)
        if not answers.is_file() or file_hash(answers) != saved.get(ANSWERS, file_hash(answers)):
            raise ValueError(f"{short_path(answers)} is not what {REPORT} was made of: it is "
                             "missing, was changed, or is damaged; get both again")  # fmt: skip
        lines = read_text(answers).strip("\n").split("\n")
        found = cls.count(_read_lines(answers, lines, proved=False), saved.get("info"))
        if saved.get("n") != found.n or not isinstance(found.info, dict):
            raise ValueError(f"{short_path(path)} is about {saved.get('n')} questions, and "
                             f"{ANSWERS} holds {found.n}; evaluate anew")  # fmt: skip
        # Those of older versions do not say the seconds of each answer.
        return replace(found, seconds=saved.get("seconds", found.seconds))

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

    Raises, before anything is generated, ValueError for no problems, a chunk below 1, a prompt that
    `generate.check` refuses, a folder that another process uses, damaged answers, and those of
    other settings, which `restart` replaces; GoldError for an unparsable gold; CanaryError where
    `canaries` fail.
    """
    problems = listed(problems, "problems", dict)
    if not problems:
        raise ValueError("there are no problems to evaluate on")
    generate = Generator.of(generate)
    if chunk is None:  # a rest would be a smaller batch, in every chunk
        batch = generate.info.get("decoding", {}).get("batch_size", 1)
        chunk = batch * max(1, CHUNK // batch)
    COUNT.check("chunk", chunk)
    golds = [parse_gold(entry.get("answer")) for entry in problems]
    asked = [prompt(entry) for entry in problems]
    if odd := [pair for pair in asked if not isinstance(pair, (tuple, list)) or len(pair) != 2]:
        raise ValueError(f"prompt gave {odd[0]!r:.80}, expected (prompt, target)")
    prompts = [text for text, _ in asked]
    if canaries:
        run_canaries(evaluate, problems, prompt)
    generate.check(prompts)  # a question that can't be asked is found before the first is
    info = generate.info | {
        "problems_hash": questions_hash((e["question"], g) for e, g in zip(problems, golds)),
        "prompts_hash": content_hash(prompts),
        "chunk": chunk,
        "vote": vote and getattr(vote, "__name__", str(vote)),
    }
    if report_folder is not None:
        # Hashing a model reads all of it: worth it only where answers are kept.
        info["weights"] = generate.fingerprint()
        for name in SETTINGS:
            processes.agree(name, info.get(name))

    def ask(start: int) -> list[Prediction]:
        asked = prompts[start : start + chunk]
        began = time.perf_counter()
        completions = generate(asked)
        seconds = (time.perf_counter() - began) / len(asked)
        return [
            _score(problems[i]["question"], prompts[i], said, golds[i], vote, seconds)
            for i, said in enumerate(completions, start)
        ]

    with nullcontext() if report_folder is None else held(report_folder):
        folder, done = None, []
        if report_folder is not None:
            path = Path(report_folder)
            asked = [(e["question"], p, str(g)) for e, p, g in zip(problems, prompts, golds)]
            rows = processes.on_first(lambda: _open_folder(path, info, asked, restart))
            done = [Prediction(**row) for row in rows]
            folder = path if processes.first() else None  # where to write
        progress = Progress("evaluating", len(problems), "questions", len(done))
        starts = range(len(done), len(problems), chunk)
        for i in range(0, len(starts), processes.world()):
            own = processes.share(starts[i : i + processes.world()])  # a chunk, or none at the end
            rows = [prediction.row() for prediction in ask(own[0])] if own else []
            new = [Prediction(**row) for part in processes.gather(rows) for row in part]
            if folder:
                with open(folder / ANSWERS, "a", encoding="utf-8") as stream:
                    stream.writelines(_line(n, p) for n, p in enumerate(new, len(done)))
            done += new
            speed = sum(p.tokens for p in new) / max(sum(p.seconds for p in new), 1e-9)
            progress(len(done), f"{sum(p.strict for p in done)} right, {speed:,.0f} tokens/s")
            for prediction in new if callback else ():
                callback(prediction)
        report = EvalReport.count(done, info)
        if folder:
            answers = {ANSWERS: file_hash(folder / ANSWERS)}
            write_proved_json(folder / REPORT, report.summary() | answers)
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
    scored = vote and all(hasattr(s, "score") for s in samples)
    return Prediction.score(
        str(completion),
        str(gold),
        question=question,
        prompt=prompt,
        tokens=sum(getattr(s, "tokens", 0) for s in samples),
        finished=all(getattr(s, "finished", True) for s in samples),
        seconds=seconds,
        samples=[str(s) for s in samples] if vote else None,
        scores=[s.score for s in samples] if scored else None,
    )


def _open_folder(
    folder: Path, info: dict, asked: Sequence[tuple[str, str, str]], restart: bool
) -> list[dict]:
    """Return the rows of predictions.jsonl in whole chunks; writes settings.json, or compares.
    asked: (question, prompt, gold) of each problem."""
    own, answers = folder / OWN, folder / ANSWERS
    settings = json.loads(json.dumps({name: info.get(name) for name in SETTINGS}))  # no tuples
    if restart:
        for path in (folder / REPORT, answers, own):
            path.unlink(missing_ok=True)
    remedy = "name another folder, or replace them with restart=True (--restart)"
    if not own.is_file():
        if answers.is_file():
            raise ValueError(f"{short_path(answers)} is there without settings.json, which says "
                             f"what made it; {remedy}")  # fmt: skip
        write_proved_json(own, settings | {PROOF: True})
        return []
    before = read_proved_json(own)
    proved = before.pop(PROOF, False)
    if changed := changes(before, settings):
        raise ValueError(f"{short_path(folder)} holds answers of other settings ({changed}); "
                         f"{remedy}")  # fmt: skip
    text = read_text(answers) if answers.is_file() else ""
    whole = text.split("\n")[:-1]  # a kill may have torn the last
    if len(whole) < len(asked):  # sampling and rounding depend on which questions are together
        whole = whole[: len(whole) // settings["chunk"] * settings["chunk"]]
    found = _read_lines(answers, whole, proved)
    said = [(p.question, p.prompt, p.gold) for p in found]
    if said != list(asked[: len(said)]):
        odd = next((i for i, (a, b) in enumerate(zip(said, asked)) if a != b), len(asked))
        raise ValueError(f"{short_path(answers)}, line {odd + 1} does not answer the question that "
                         f"is asked there; {remedy}")  # fmt: skip
    if (kept := "".join(f"{line}\n" for line in whole)) != text:
        with whole_file(answers) as part:
            part.write_text(kept, encoding="utf-8")
    return [prediction.row() for prediction in found]
