"""GSM8K and its harder kin, mini-GSM, MetaMathQA, MathInstruct. All raise FileNotFoundError, saying
what to do, and ValueError for other names."""

from decimal import Decimal
from pathlib import Path

from ..base.paths import BUNDLED, DATA, short_path
from .gsm8k import NUMBERS, GoldError
from .rows import read_jsonl, text_of

NGRAM = 13  # words in a row that no training text shares with a test question (overlap.py)
MINIGSM_SPLITS = ("train", "dev", "test", "test_changed", "test_larger")
# Sets for training: name on the hub. MetaMathQA: Yu et al. 2023 (arXiv 2309.12284);
# MathInstruct: Yue et al. 2023 (arXiv 2309.05653).
TRAINING_SETS = {"metamathqa": "meta-math/MetaMathQA", "mathinstruct": "TIGER-Lab/MathInstruct"}


def load_gsm8k(split: str, folder: str | Path | None = None) -> list[dict[str, str]]:
    """Return GSM8K's "train" (7,473 entries) or "test" (1,319): `folder`/{split}.jsonl when given,
    else data/gsm8k when it is there, else from the Hugging Face hub."""
    if split not in ("train", "test"):
        raise ValueError(f"GSM8K has the splits train and test, not {split!r}")
    if folder is not None or (DATA / "gsm8k").is_dir():
        return read_jsonl(Path(folder or DATA / "gsm8k") / f"{split}.jsonl")
    return _from_hub(
        "openai/gsm8k", split,
        "Put train.jsonl and test.jsonl from github.com/openai/grade-school-math into "
        f"{short_path(DATA / 'gsm8k')}, or name their folder with --data or GSM8K_DIR", "main",
    )  # fmt: skip


def load_gsm_hard(folder: str | Path | None = None) -> list[dict[str, str]]:
    """Return GSM-Hard (Gao et al. 2022, arXiv 2211.10435): GSM8K's test questions, larger numbers;
    `folder`/gsmhardv2.jsonl when given, else from the hub. Its golds are floats, written as the
    shortest decimal that reads back as that float; GoldError for NaN and infinities."""
    if folder is not None:
        rows = read_jsonl(Path(folder) / "gsmhardv2.jsonl")
    else:
        rows = _from_hub(
            "reasoning-machines/gsm-hard", "train", "Put gsmhardv2.jsonl from "
            "github.com/reasoning-machines/pal into a folder, and name it with --data",
        )  # fmt: skip
    return [{"question": text_of(row, "input"), "answer": f"#### {_decimal(row.get('target'))}"}
            for row in rows]  # fmt: skip


def _decimal(target: float) -> str:
    """Return a float in digits, without an exponent and without ".0"."""
    if target not in NUMBERS:
        raise GoldError(f"a gold answer (`target`) must be a number, got {target!r:.60}")
    return format(Decimal(repr(target)), "f").removesuffix(".0")


def load_minigsm(split: str, folder: str | Path | None = None) -> list[dict[str, str]]:
    """Return mini-GSM's "train", "dev" or "test", bundled under data/minigsm, or the test problems
    with other numbers, line by line: "test_changed" or "test_larger"."""
    if split not in MINIGSM_SPLITS:
        raise ValueError("mini-GSM has the splits train, dev and test, test_changed and "
                         f"test_larger, not {split!r}")  # fmt: skip
    path = Path(folder or DATA / "minigsm") / f"{split}.jsonl"
    if folder is None and not path.is_file():
        raise FileNotFoundError(f"there is no {short_path(path)}; mini-GSM {BUNDLED}")
    return read_jsonl(path)


def load_training_set(name: str) -> list[dict[str, str]]:
    """Return the rows of "metamathqa" (395,000) or "mathinstruct", as published: the one JSON file
    in data/NAME when that folder is there, else from the hub."""
    if not isinstance(name, str) or name not in TRAINING_SETS:
        raise ValueError(f"the training sets are {', '.join(TRAINING_SETS)}, not {name!r}")
    if (DATA / name).is_dir():
        return read_jsonl(data_file(DATA / name))
    return _from_hub(
        TRAINING_SETS[name], "train",
        f"Put its JSON file into {short_path(DATA / name)}, or name that file with --data",
    )  # fmt: skip


def data_file(folder: Path, split: str = "train") -> Path:
    """Return `folder`/{split}.jsonl or .json or, for "train", the only such file but dev and test;
    FileNotFoundError, saying what the folder holds."""
    found = sorted([*folder.glob("*.jsonl"), *folder.glob("*.json")])
    named = [folder / f"{split}.{suffix}" for suffix in ("jsonl", "json")]
    if own := [file for file in named if file in found]:
        return own[0]
    to_train = [file for file in found if file.stem not in ("dev", "test")]
    if split == "train" and len(to_train) == 1:
        return to_train[0]
    names = ", ".join(file.name for file in found) or "no JSON file"
    place = short_path(folder)
    raise FileNotFoundError(f"{place} has no {split}.jsonl (it holds {names}); name a file")


def holds_problems(folder: Path) -> bool:
    """Return whether a folder holds test.jsonl with `question`s, or GSM-Hard."""
    test = folder / "test.jsonl"
    if test.is_file():
        return "question" in read_jsonl(test)[0]
    return (folder / "gsmhardv2.jsonl").is_file()


def _from_hub(name: str, split: str, remedy: str, config: str | None = None) -> list[dict]:
    """Return the rows of a split; FileNotFoundError, ending in the remedy, if it can't be read."""
    try:
        from datasets import load_dataset

        return [dict(row) for row in load_dataset(name, config, split=split)]
    except Exception as error:  # the hub client raises many kinds, all with one remedy
        said = f"{type(error).__name__}: {error}"
        raise FileNotFoundError(f"{name} did not load from the hub ({said}). {remedy}") from error
