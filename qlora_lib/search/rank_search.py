"""Searching by training: which rank is enough, where an adapter belongs, which learning rate.

A trial trains a copy of the model on train and is scored on dev, never on test. Each finished
trial is stored at once, and a search that was killed goes on where it stopped.

"Optimal" is the candidate with the fewest trained parameters that does not lose to the best one.
It loses if McNemar's exact test on the same dev questions, all seeds together, gives p < 0.05.
Seeds share their questions, so p is somewhat too small, which favors more parameters.

Candidates whose dev loss after a quarter of the steps is more than 4 times the lowest get no full
training: a guess, which stops late learners too. And at one learning rate and alpha = 2 rank small
ranks learn later: under Adam an update sums over `rank` numbers that each move by about the rate.
"""

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..base.files import read_proved_json, write_proved_json
from ..base.hashes import content_hash
from ..base.paths import short_path
from ..base.ranges import ABOVE_ZERO, ANY_SEED, COUNT, check_fields
from ..base.stamp import stamp
from ..base.statistics import wilson
from ..data.examples import read_examples
from ..data.tokens import Pair
from ..evaluation.comparison import Comparison, compare_verdicts
from ..evaluation.tasks import Task, score
from ..generation.generate import generator
from ..layers.blocks import linears_in_blocks
from ..lora.inject import inject_lora, trainable_parameters
from ..lora.targets import linear_layers
from ..models.fingerprint import fingerprint
from ..models.quantize import quantized_layers
from ..train.config import TrainConfig
from ..train.finetune import finetune, validation_loss

LEVEL = 0.05  # of McNemar's test


@dataclass(frozen=True)
class Trial:
    """One training: what is trained, and how. None: as the search's TrainConfig says; of `steps`
    and `epochs` either replaces both."""

    method: str = "lora"  # or "full": every weight ("all"), or the "embeddings" alone
    rank: int | None = 8
    target_modules: str | tuple[str, ...] = "all"  # "attention", "mlp", or names
    lr: float | None = None
    steps: int | None = None
    epochs: int | None = None
    seed: int = 0
    examples: int | None = None  # so many of the search's first pairs; None: all
    alpha: float | None = None  # None: 2 rank

    def __post_init__(self):
        if self.method not in ("lora", "full"):
            raise ValueError(f"method={self.method!r}; expected 'lora' or 'full'")
        if self.method == "lora":
            COUNT.check("rank", self.rank)
        check_fields(self, lr=ABOVE_ZERO, steps=COUNT, epochs=COUNT,
                     alpha=ABOVE_ZERO, seed=ANY_SEED)  # fmt: skip
        if self.method == "full" and self.alpha is not None:
            raise ValueError(f"alpha={self.alpha} is LoRA's; method='full' has none")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs}; give one of them")
        if self.method == "full" and self.target_modules not in ("all", "embeddings"):
            raise ValueError(f"method='full' trains 'all' or 'embeddings': {self.target_modules!r}")
        if self.method == "lora" and self.target_modules == "embeddings":
            raise ValueError("embeddings are trained whole: Trial('full', None, 'embeddings')")

    def config(self, base: TrainConfig) -> TrainConfig:
        """The search's settings with this trial's."""
        if self.epochs is not None:
            base = replace(base, max_steps=None)  # which would win over epochs
        own = {"lr": self.lr, "max_steps": self.steps, "epochs": self.epochs, "seed": self.seed}
        return replace(base, **{name: value for name, value in own.items() if value is not None})

    def __str__(self) -> str:
        words = [self.method, _word(self.target_modules)]
        words += [f"r={self.rank}"] if self.method == "lora" else []
        for name in ("alpha", "lr", "steps", "epochs", "examples"):
            if getattr(self, name) is not None:
                words.append(f"{name}={getattr(self, name):g}")
        return " ".join([*words, f"seed={self.seed}"])


def _word(targets: str | tuple[str, ...]) -> str:
    return targets if isinstance(targets, str) else "+".join(targets)


def prepare(model, trial: Trial) -> int:
    """Set up the model, in place, for a trial; returns the number of parameters to train. Raises
    ValueError for "full" on a quantized model, and what inject_lora raises."""
    places = trial.target_modules
    if trial.method == "full":
        if quantized_layers(model) and places != "embeddings":
            raise ValueError("quantized weights can't be trained; method='lora' trains beside them")
        model.requires_grad_(False)
        (model if places == "all" else model.get_input_embeddings()).requires_grad_(True)
    else:
        torch.manual_seed(trial.seed)
        if places == "mlp":  # the blocks' linears outside of attention
            linears = linear_layers(model)
            every, attention = (linears_in_blocks(model, linears, w) for w in ("all", "attention"))
            places = {path.rpartition(".")[2] for path in every if path not in attention}
        alpha = 2 * trial.rank if trial.alpha is None else trial.alpha
        inject_lora(model, places, rank=trial.rank, alpha=alpha)
    return sum(p.numel() for p in trainable_parameters(model).values())


class Search:
    """Trials of one model on one task, stored in `path` (None: kept in memory alone)."""

    def __init__(self, model, tokenizer, task: Task, train: Sequence[Pair], dev: Sequence[Pair],
                 config: TrainConfig = TrainConfig(), path: str | Path | None = None):  # fmt: skip
        if not train or not dev:
            raise ValueError(f"got {len(train)} train and {len(dev)} dev pairs; both are needed")
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.train, self.dev = (read_examples(pairs, tokenizer) for pairs in (train, dev))
        self.questions, self.config = list(dev), config
        self.path = None if path is None else Path(path)
        self.identity = content_hash([
            task.name, list(train), list(dev), fingerprint(model),
            {k: str(v) for k, v in asdict(config).items()},
        ])  # fmt: skip
        self.rows: dict[str, dict] = {}
        if self.path and self.path.is_file():
            stored = read_proved_json(self.path)
            if not isinstance(stored.get("rows"), dict):
                raise ValueError(f"{short_path(self.path)} holds no trials; name another file")
            if stored.get("identity") != self.identity:
                raise ValueError(f"{short_path(self.path)} holds trials of another task, model, "
                                 "data or settings; name another file, or delete it")  # fmt: skip
            self.rows = stored["rows"]

    def run(self, trial: Trial, ask: bool = True) -> dict:
        """The row of a trial, stored or made now; without `ask` it has the losses alone."""
        name = str(trial) if ask else f"{trial}, loss only"
        if name not in self.rows:
            model, row = self.train_one(trial)
            if ask:
                generate = generator(model, self.tokenizer, self.task.decoding())
                row |= score(generate, self.task, self.questions).row()
            self.rows[name] = row
            if self.path:
                write_proved_json(self.path, {
                    "identity": self.identity, "task": self.task.name, "rows": self.rows,
                    "stamp": stamp(self.config.seed),
                })  # fmt: skip
        return self.rows[name]

    def train_one(self, trial: Trial):
        """(a trained copy of the model, the trial's facts); ValueError for too many examples."""
        n = len(self.train) if trial.examples is None else trial.examples
        if not 1 <= n <= len(self.train):
            raise ValueError(f"examples={n}; the search has {len(self.train)} train pairs")
        examples, model = self.train[:n], copy.deepcopy(self.model)
        parameters, config = prepare(model, trial), trial.config(self.config)
        began = time.perf_counter()
        history = finetune(model, self.tokenizer, examples, config)
        seconds = time.perf_counter() - began
        row = {
            "trial": asdict(trial),
            "parameters": parameters,
            "steps": len(history.steps),
            "seconds": round(seconds, 2),
            "tokens_per_second": round(sum(s["tokens"] for s in history.steps) / seconds, 1),
            "dev_loss": validation_loss(model, self.tokenizer, self.dev, config),
        }
        if trial.examples is not None:
            row["train_loss"] = validation_loss(model, self.tokenizer, examples, config)
        return model, row


@dataclass(frozen=True)
class Candidate:
    """A rank on its targets: dev verdicts of all seeds, one after the other, and the cost."""

    rank: int
    target_modules: str | tuple[str, ...]
    parameters: int
    seconds: float  # of training, all seeds
    right: str  # a 1 or 0 a question, seed after seed; empty: stopped early
    by_seed: tuple[float, ...]  # accuracies
    dev_loss: float  # mean over seeds; of one stopped early, when it was stopped

    @property
    def accuracy(self) -> float:
        return self.right.count("1") / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right.count("1"), len(self.right))


@dataclass
class RankSearch:
    """What find_optimal_rank found: candidates by rising parameters, the best, the optimal."""

    candidates: list[Candidate]
    best: Candidate
    optimal: Candidate
    stopped: list[Candidate]

    def __str__(self) -> str:
        lines = [f"{'rank':>5} {'on':<10}{'parameters':>11}{'seconds':>9}   dev accuracy [95%]"
                 "      minus the best [95%], p"]  # fmt: skip
        for c in sorted([*self.candidates, *self.stopped], key=lambda c: c.parameters):
            line = f"{c.rank:>5} {_word(c.target_modules):<10}{c.parameters:>11,}{c.seconds:>9.1f}"
            if not c.right:
                lines.append(f"{line}   stopped early, dev loss {c.dev_loss:.3f}")
                continue
            gap = difference(c, self.best)
            low, high = c.interval
            line += f"   {100 * c.accuracy:5.1f} [{100 * low:5.1f}, {100 * high:5.1f}]"
            low, high = gap.interval
            line += f"   {100 * gap.difference:+5.1f} [{100 * low:+5.1f}, {100 * high:+5.1f}]"
            mark = " best" * (c is self.best) + " optimal" * (c is self.optimal)
            lines.append(f"{line} {gap.p:8.1e}{mark}")
        return "\n".join(lines)


def difference(a: Candidate, b: Candidate) -> Comparison:
    """Two candidates compared on the same questions, a minus b."""
    return compare_verdicts(*([right == "1" for right in c.right] for c in (a, b)))


def choose(candidates: Iterable[Candidate]) -> tuple[Candidate, Candidate]:
    """(best, optimal): the most accurate, of equals the smallest, and the one with the fewest
    parameters that does not lose to it. Raises ValueError for none."""
    order = sorted(candidates, key=lambda c: c.parameters)
    if not order:
        raise ValueError("there are no candidates to choose from")
    best = max(order, key=lambda c: c.accuracy)  # of equals the first
    return best, next(c for c in order if difference(c, best).p >= LEVEL)


def find_optimal_rank(
    model, tokenizer, task: Task, train: Sequence[Pair], dev: Sequence[Pair],
    ranks: Sequence[int] = (1, 2, 4, 8, 16, 32), target_modules: Sequence = ("all",),
    seeds: Sequence[int] = (0, 1), config: TrainConfig = TrainConfig(),
    path: str | Path | None = None, hopeless: float | None = 4.0, rung: float = 0.25,
) -> RankSearch:  # fmt: skip
    """Train adapters of these ranks on these targets, and choose on dev (see above).

    model: dense or quantized, left as it is. target_modules: some of "all", "attention", "mlp"
    and tuples of names. Candidates whose dev loss after rung * config.max_steps exceeds `hopeless`
    times the lowest are stopped; None: none is. Raises ValueError for no ranks or seeds, a rank
    below 1, and a stored search of other data.
    """
    if not ranks or not seeds or not target_modules:
        raise ValueError("give at least one rank, one seed and one set of target modules")
    if hopeless is not None and config.max_steps is None:
        raise ValueError("stopping early needs config.max_steps; or give hopeless=None")
    search = Search(model, tokenizer, task, train, dev, config, path)
    grid = [Trial(rank=r, target_modules=t, seed=seeds[0]) for t in target_modules for r in ranks]
    rows = []
    if hopeless is not None and len(grid) > 1:
        first = max(1, round(rung * config.max_steps))
        rows = [search.run(replace(trial, steps=first), ask=False) for trial in grid]
        limit = hopeless * min(row["dev_loss"] for row in rows)
        grid = [trial for trial, row in zip(grid, rows) if row["dev_loss"] <= limit]
    return rank_search(rows + [search.run(replace(t, seed=s)) for t in grid for s in seeds])


def rank_search(rows: Iterable[dict]) -> RankSearch:
    """Choose among rows of LoRA trials; a setting with dev losses alone was stopped early."""
    settings: dict[tuple, list[dict]] = {}
    for row in rows:
        where = row["trial"]["target_modules"]
        where = where if isinstance(where, str) else tuple(where)
        settings.setdefault((row["trial"]["rank"], where), []).append(row)
    candidates = []
    for (rank, where), own in settings.items():
        whole = [row for row in own if "right" in row]
        seeds = whole or own
        candidates.append(Candidate(
            rank=rank,
            target_modules=where,
            parameters=seeds[0]["parameters"],
            seconds=sum(row["seconds"] for row in seeds),
            right="".join(row["right"] for row in whole),
            by_seed=tuple(row["accuracy"] for row in whole),
            dev_loss=sum(row["dev_loss"] for row in seeds) / len(seeds),
        ))  # fmt: skip
    candidates.sort(key=lambda c: c.parameters)
    found = [c for c in candidates if c.right]
    return RankSearch(found, *choose(found), [c for c in candidates if not c.right])
