"""What adapters do at work, measured: `python -m experiments.adapters [PART ...]`.

tasks           four adapters on one 4-bit GPTQ base, each asked every task
learning-rates  full fine-tuning against LoRA, other places than all linears, more steps or alpha
ranks           ranks 1 to 32, two seeds: dev accuracy over parameters
epochs          few examples often against many once, two seeds: dev accuracy, both losses
mixing          weighted sums of two adapters, and what both tasks make of them
methods         full, LoRA, QLoRA on the same data: parameters, bytes, memory, speed, accuracy
federated       adapters of four shards averaged, against one trained on all of it

Each row is stored in data/results/tiny-adapters-PART.json as soon as it is measured, and measured
again only with --force. `tasks` keeps its adapters under data/tiny-adapters; the one for word
problems is data/tiny-adapter. Greedy, exact match by each task's rule; the searches
(learning-rates, ranks, epochs) look at one task's dev split, the other parts report test once.

On the CPU a dense layer is faster than a packed one, so where nothing but answers matters the base
is dequantized: the same weights, computed otherwise.
"""

import copy
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from experiments.adapter_table import adapter_table
from experiments.measured_step import AllocationMeter
from experiments.table import command_line
from experiments.toy.tasks import load_task
from qlora_lib.base.endings import ending
from qlora_lib.base.files import read_entry, write_proved_json
from qlora_lib.base.paths import DATA, short_path
from qlora_lib.base.stamp import stamp
from qlora_lib.base.statistics import wilson
from qlora_lib.data.tokens import collate, encode_example, pad_id
from qlora_lib.evaluation.tasks import Score, score
from qlora_lib.generation.generate import generator
from qlora_lib.lora.combine import combine_adapters
from qlora_lib.lora.files import ADAPTER, load_adapter, save_adapter
from qlora_lib.lora.inject import (
    delete_adapter,
    inject_lora,
    trainable_parameters,
    use_adapter,
)
from qlora_lib.models.quantize import dequantize_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.profiles import load_profile
from qlora_lib.search.rank_search import Search, Trial, find_optimal_rank
from qlora_lib.train.config import TrainConfig
from qlora_lib.train.finetune import finetune
from qlora_lib.train.loss import loss_sum
from qlora_lib.train.step import training_mode

RESULTS, ADAPTERS = DATA / "results", DATA / "tiny-adapters"
BASE, SEED = QuantSpec(bits=4, group_size=64), 0

# The searches; methods and federated take their task and settings.
SEARCHED = "classification"
# Short, so that settings differ in what they reach.
SHORT = TrainConfig(max_steps=60, batch_size=8, lr=3e-3, max_length=160, compute_dtype="fp32")
RANKS = (1, 2, 4, 8, 16, 32)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# {examples: epochs}; the last of each takes about 512 steps of 8. The task has 12 sentence
# patterns, of which the first 8 examples hold 6, and the first 64 all.
EPOCHS = {8: (8, 32, 64, 128, 512), 64: (1, 2, 4, 8, 16, 32, 64), 256: (1, 2, 4, 8, 16),
          1000: (1, 2, 4)}  # fmt: skip

# Four adapters on one base, and their mixtures.
CONFIG = TrainConfig(batch_size=16, max_length=160, compute_dtype="fp32")
# Steps and learning rate of the three adapters that are trained here
STEPS = {"sentiment": (80, 3e-3), "translation": (300, 3e-3), "code": (150, 1e-2)}
RANK = 4
FOUR = ("word_problems", *STEPS)
ASKED = 200  # test questions for each cell of the matrix
SHARDS = 4
WEIGHTS = (0.0, 0.5, 0.75, 1.0)  # of each adapter in a mixture
MIXED = ("sentiment", "translation")


def results_of(part: str, folder: Path = RESULTS) -> Path:
    """The file of a part's rows."""
    return folder / f"tiny-adapters-{part}.json"


def stored(part: str, folder: Path = RESULTS) -> dict[str, dict]:
    """The recorded rows of a part, by name. Raises FileNotFoundError where there are none."""
    path = results_of(part, folder)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {short_path(path)}; `make experiments` records it")
    return read_entry(path, "rows")


def read_epochs(folder: Path = RESULTS) -> dict[int, dict[int, dict]]:
    """The recorded `epochs`, {examples: {epochs: row}}, both rising, seeds taken together.

    A row: steps, n, correct, interval, right (a verdict a question, seed after seed), by_seed
    (accuracies), and the means of seconds, dev_loss and train_loss. Raises FileNotFoundError.
    """
    found: dict[tuple[int, int], list[dict]] = {}
    for row in stored("epochs", folder).values():
        trial = row["trial"]
        found.setdefault((trial["examples"], trial["epochs"]), []).append(row)
    table: dict[int, dict[int, dict]] = {}
    for (examples, count), rows in sorted(found.items()):
        right = "".join(row["right"] for row in rows)
        means = {key: sum(row[key] for row in rows) / len(rows)
                 for key in ("seconds", "dev_loss", "train_loss")}  # fmt: skip
        table.setdefault(examples, {})[count] = means | {
            "steps": rows[0]["steps"], "n": len(right), "correct": right.count("1"),
            "interval": wilson(right.count("1"), len(right)), "right": right,
            "by_seed": tuple(row["accuracy"] for row in rows),
        }  # fmt: skip
    return table


def best_rate(method: str, folder: Path = RESULTS) -> float:
    """The learning rate of "full" or "lora" with the highest dev accuracy in the stored search; of
    equals the one with the lowest dev loss."""
    rows = [row for row in stored("learning-rates", folder).values()
            if row["trial"]["method"] == method and row["trial"]["lr"]]  # fmt: skip
    return max(rows, key=lambda row: (row["accuracy"], -row["dev_loss"]))["trial"]["lr"]


def adapter_folder(task: str, folder: Path = ADAPTERS) -> Path:
    """The folder of the adapter of one of FOUR."""
    return DATA / "tiny-adapter" if task == "word_problems" else folder / task


def _kept(folder: Path) -> Path:
    """The folder of the adapters: in data/, or beside the results of a trial."""
    return ADAPTERS if folder == RESULTS else folder / "adapters"


def load_four(model, folder: Path = ADAPTERS) -> None:
    """Put the four adapters on a model whose base is the tiny one, each under its task's name."""
    for task in FOUR:
        load_adapter(model, adapter_folder(task, folder), task)


@cache
def base(packed: bool = False, quantized: bool = True):
    """(model, tokenizer): the tiny model in 4-bit GPTQ, packed or as dense weights, or as it was.

    Each is made once; `fresh_base` gives a copy.
    """
    if quantized and not packed:
        model, tokenizer = fresh_base(packed=True)
        dequantize_model(model)
        return model, tokenizer
    return load_profile("tiny").load(quantize=BASE if quantized else None)


def fresh_base(packed: bool = False, quantized: bool = True):
    """A copy of `base`, to change."""
    model, tokenizer = base(packed, quantized)
    return copy.deepcopy(model), tokenizer


def ask(model, tokenizer, task: str, split: str = "test", n: int = ASKED) -> Score:
    """How many of n questions of a task the model answers rightly, greedily."""
    task = load_task(task)
    return score(generator(model, tokenizer, task.decoding()), task, task.pairs(split, n))


def train(model, tokenizer, pairs, config: TrainConfig, rank: int = RANK) -> dict:
    """Inject an adapter into the model and train it; returns how the training went."""
    torch.manual_seed(SEED)
    inject_lora(model, "all", rank=rank, alpha=2 * rank)
    began = time.process_time()
    history = finetune(model, tokenizer, pairs, config)
    return {
        "parameters": history.trained_parameters, "rank": rank, "steps": len(history.steps),
        "lr": config.lr, "batch_size": config.batch_size,
        "cpu_seconds": round(time.process_time() - began, 1),
        "losses": [round(loss, 4) for loss in history.losses],
    }  # fmt: skip


class Table:
    """Rows by name in data/results/tiny-adapters-PART.json, each stored when it is made."""

    def __init__(self, part: str, folder: Path, force: bool = False, **about):
        self.path, self.about = results_of(part, folder), about
        found = self.path.is_file() and not force
        self.rows = read_entry(self.path, "rows") if found else {}

    def row(self, name: str, make: Callable[[], dict]) -> dict:
        """The row of this name; make() measures it where there is none."""
        if name not in self.rows:
            self.rows[name] = made = make()
            write_proved_json(self.path, {**self.about, "rows": self.rows, "stamp": stamp(SEED)})
            said = {k: v for k, v in made.items() if k not in ("right", "losses")}
            print(f"{name}: {json.dumps(said)}"[:200], flush=True)
        return self.rows[name]


def tasks(folder: Path, force: bool) -> None:
    table = Table("tasks", folder, force, base="4-bit GPTQ, group 64", rank=RANK)
    for task, (steps, lr) in STEPS.items():
        def make(task=task, config=replace(CONFIG, max_steps=steps, lr=lr)) -> dict:
            model, tokenizer = fresh_base()
            made = train(model, tokenizer, load_task(task).pairs("train"), config)
            place = adapter_folder(task, _kept(folder))
            shutil.rmtree(place, ignore_errors=True)
            save_adapter(model, place, dtype=torch.bfloat16)
            return made | {"dev": ask(model, tokenizer, task, "dev").row()}

        table.row(f"train {task}", make)
    model, tokenizer = fresh_base(packed=True)
    load_four(model, _kept(folder))
    sizes = {row.name or "base": {"parameters": row.parameters, "nbytes": row.nbytes}
             for row in adapter_table(model)}  # fmt: skip
    files = {task: (adapter_folder(task, _kept(folder)) / ADAPTER).stat().st_size for task in FOUR}
    table.row("bytes", lambda: {"memory": sizes, "files": files})
    dequantize_model(model)
    for adapter in (None, *FOUR):
        for task in FOUR:
            def make(adapter=adapter, task=task) -> dict:
                with use_adapter(model, adapter):
                    return ask(model, tokenizer, task).row()

            table.row(f"{adapter or 'base'} on {task}", make)


def searched(folder: Path, part: str, force: bool = False):
    """(arguments, path): model, tokenizer, task, train and dev pairs, as Search and
    find_optimal_rank take them first, and the file of the trials."""
    path, task = results_of(part, folder), load_task(SEARCHED)
    if force:
        path.unlink(missing_ok=True)
    return (*base(quantized=False), task, task.pairs("train"), task.pairs("dev")), path


def learning_rates(folder: Path, force: bool) -> None:
    args, path = searched(folder, "learning-rates", force)
    search = Search(*args, SHORT, path)
    trials = [Trial(m, r, lr=lr) for m, r in (("full", None), ("lora", 8)) for lr in RATES]
    trials += [Trial(rank=8, target_modules=place) for place in ("attention", "mlp")]
    trials += [Trial("full", None, "embeddings")]
    trials += [Trial(rank=rank, steps=4 * SHORT.max_steps) for rank in (1, 4, 32)]
    trials += [Trial(rank=rank, alpha=2 * RANKS[-1]) for rank in (1, 4, 8)]  # that of rank 32
    for trial in trials:
        print(trial, search.run(trial)["accuracy"], flush=True)


def ranks(folder: Path, force: bool) -> None:
    args, path = searched(folder, "ranks", force)
    search = Search(*args, SHORT, path)
    for rank in RANKS:  # what the rule of early stopping would look at; here nobody is stopped
        search.run(Trial(rank=rank, steps=SHORT.max_steps // 4), ask=False)
    print(find_optimal_rank(*args, RANKS, config=SHORT, path=path, hopeless=None))


def epochs(folder: Path, force: bool) -> None:
    args, path = searched(folder, "epochs", force)
    search = Search(*args, SHORT, path)
    for seed in (0, 1):
        for examples, counts in EPOCHS.items():
            for count in counts:
                trial = Trial(rank=8, epochs=count, examples=examples, seed=seed)
                print(trial, search.run(trial)["accuracy"], flush=True)


def mixing(folder: Path, force: bool) -> None:
    table = Table("mixing", folder, force, tasks=MIXED, how="cat")
    model, tokenizer = fresh_base()
    for task in MIXED:
        load_adapter(model, adapter_folder(task, _kept(folder)), task)
    for a in WEIGHTS:
        for b in WEIGHTS:
            def make(a=a, b=b) -> dict:
                combine_adapters(model, dict(zip(MIXED, (a, b))), "mixed")
                with use_adapter(model, "mixed"):
                    made = {task: ask(model, tokenizer, task, n=100).row() for task in MIXED}
                delete_adapter(model, "mixed")
                return made

            table.row(f"{a:g} {b:g}", make)


def step_memory(model, batch: dict[str, torch.Tensor]) -> int:
    """Bytes at the peak of AdamW steps in fp32 beyond the weights: gradients, moments,
    activations and what is made on the way. Trains the model: copy it before."""
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-5)
    with training_mode(model, False), AllocationMeter() as meter:
        for _ in range(2):  # the first makes the moments, the second has all at once
            optimizer.zero_grad(set_to_none=True)
            loss_sum(model, batch, torch.float32).backward()
            optimizer.step()
    return meter.peak


def methods(folder: Path, force: bool, rank: int = 8) -> None:
    table = Table("methods", folder, force, task=SEARCHED, steps=SHORT.max_steps, rank=rank)
    pairs = load_task(SEARCHED).pairs("train")
    for method in ("full", "lora", "qlora"):
        def make(method=method) -> dict:
            lr = best_rate("full" if method == "full" else "lora", folder)
            model, tokenizer = fresh_base(packed=True, quantized=method == "qlora")
            torch.manual_seed(SEED)
            if method == "full":
                model.requires_grad_(True)
            else:
                inject_lora(model, "all", rank=rank, alpha=2 * rank)
            trained = trainable_parameters(model).values()
            weights = sum({t.data_ptr(): t.nbytes for t in
                           [*model.parameters(), *model.buffers()]}.values())  # fmt: skip
            encoded = [encode_example(tokenizer, *pair, SHORT.max_length)
                       for pair in pairs[: SHORT.batch_size]]  # fmt: skip
            memory = step_memory(copy.deepcopy(model), collate(encoded, pad_id(tokenizer)))
            config = replace(SHORT, lr=lr)
            began = time.process_time()
            history = finetune(model, tokenizer, pairs, config)
            seconds = time.process_time() - began
            return {
                "trained_parameters": sum(p.numel() for p in trained),
                "result_bytes": 2 * sum(p.numel() for p in trained),  # bf16
                "weight_bytes": weights, "peak_bytes": weights + memory, "lr": lr,
                "tokens_per_cpu_second": sum(s["tokens"] for s in history.steps) / seconds,
                "losses": [round(loss, 4) for loss in history.losses],
            } | ask(model, tokenizer, SEARCHED, n=500).row()  # fmt: skip

        table.row(method, make)


def federated(folder: Path, force: bool, examples: int = 1000) -> None:
    table = Table("federated", folder, force, task=SEARCHED, shards=SHARDS, examples=examples)
    pairs = load_task(SEARCHED).pairs("train", examples)
    size = examples // SHARDS
    model, tokenizer = fresh_base()
    steps = SHORT.max_steps
    with_all = {"all, a client's steps": steps, "all, the clients' steps": SHARDS * steps}
    for name, count in with_all.items():
        def make(count=count) -> dict:
            own, _ = fresh_base()
            made = train(own, tokenizer, pairs, replace(SHORT, max_steps=count))
            return made | ask(own, tokenizer, SEARCHED).row()

        table.row(name, make)
    place = folder / ".federated"  # the clients' adapters, until they are averaged
    for i in range(SHARDS):
        def make(i=i) -> dict:
            own, _ = fresh_base()
            made = train(own, tokenizer, pairs[i * size : (i + 1) * size], SHORT)
            save_adapter(own, place / str(i))
            return made | ask(own, tokenizer, SEARCHED).row()

        table.row(f"shard {i}", make)
    if all(how in table.rows for how in ("cat", "svd", "linear")):
        return
    for i in range(SHARDS):
        load_adapter(model, place / str(i), str(i))
    for how in ("cat", "svd", "linear"):
        def make(how=how) -> dict:
            combine_adapters(model, {str(i): 1 / SHARDS for i in range(SHARDS)}, how, how)
            (row,) = [row for row in adapter_table(model) if row.name == how]
            with use_adapter(model, how):
                made = ask(model, tokenizer, SEARCHED).row()
            return made | {"parameters": row.parameters, "rank": row.ranks[0]}

        table.row(how, make)
    shutil.rmtree(place)


PARTS = {"tasks": tasks, "learning-rates": learning_rates, "ranks": ranks, "epochs": epochs,
         "mixing": mixing, "methods": methods, "federated": federated}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULTS, "--force")
    known = ", ".join(PARTS)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {known}; all without")
    args = parser.parse_args(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; expected some of {known}")
    for part in args.parts or PARTS:
        PARTS[part](args.out, args.force)
        print(f"{part}: stored in {short_path(args.out)}")


if __name__ == "__main__":
    sys.exit(ending(main))
