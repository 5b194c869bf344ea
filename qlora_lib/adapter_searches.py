"""The searches of notebook 07: ranks, learning rates and places, epochs; one task, looked at on dev.

Parts of `python -m qlora_lib.adapter_experiments`, which says what each is and where it is stored;
their other parts take the base, the task and the short settings from here.
"""

import copy
import json
from functools import cache
from pathlib import Path

from .data import DATA, short_path
from .grid import QuantSpec
from .models import dequantize_model
from .profiles import load_profile
from .results import wilson
from .schedule import TrainConfig
from .search import Search, find_optimal_rank
from .tasks import load_task
from .trials import Trial

RESULTS = DATA / "results"
BASE = QuantSpec(bits=4, group_size=64)
SEARCHED = "classification"  # the task of the searches, of methods and of federated
# Of searches, methods and federated: short, so that settings differ in what they reach.
SHORT = TrainConfig(max_steps=60, batch_size=8, lr=3e-3, max_length=160, compute_dtype="fp32")
RANKS = (1, 2, 4, 8, 16, 32)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# {examples: epochs}; the last of each takes about 512 steps of 8. The task has 12 sentence patterns,
# of which the first 8 examples hold 6, and the first 64 all.
EPOCHS = {8: (8, 32, 64, 128, 512), 64: (1, 2, 4, 8, 16, 32, 64), 256: (1, 2, 4, 8, 16),
          1000: (1, 2, 4)}  # fmt: skip


def stored(part: str, folder: Path = RESULTS) -> dict[str, dict]:
    """The recorded rows of a part, by name. Raises FileNotFoundError where there are none."""
    path = folder / f"tiny-adapters-{part}.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {short_path(path)}; `make experiments` records it")
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


@cache
def base(packed: bool = False, quantized: bool = True):
    """(model, tokenizer): the tiny model in 4-bit GPTQ, packed or as dense weights, or as it was.

    Copy before you change it.
    """
    if quantized and not packed:
        model, tokenizer = base(packed=True)
        model = copy.deepcopy(model)
        dequantize_model(model)
        return model, tokenizer
    return load_profile("tiny").load(quantize=BASE if quantized else None)


def searched(folder: Path, part: str, force: bool = False):
    """What a search takes before its own arguments, and the file of its trials."""
    path, task = folder / f"tiny-adapters-{part}.json", load_task(SEARCHED)
    if force:
        path.unlink(missing_ok=True)
    return (*base(quantized=False), task, task.pairs("train"), task.pairs("dev")), path


def ranks(folder: Path, force: bool) -> None:
    args, path = searched(folder, "ranks", force)
    search = Search(*args, SHORT, path)
    for rank in RANKS:  # what the rule of early stopping would look at; here nobody is stopped
        search.run(Trial(rank=rank, steps=SHORT.max_steps // 4), ask=False)
    print(find_optimal_rank(*args, RANKS, config=SHORT, path=path, hopeless=None))


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


def epochs(folder: Path, force: bool) -> None:
    args, path = searched(folder, "epochs", force)
    search = Search(*args, SHORT, path)
    for seed in (0, 1):
        for examples, counts in EPOCHS.items():
            for count in counts:
                trial = Trial(rank=8, epochs=count, examples=examples, seed=seed)
                print(trial, search.run(trial)["accuracy"], flush=True)


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
