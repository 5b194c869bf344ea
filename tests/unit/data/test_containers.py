"""Every door that takes many of something reads a list, a Dataset and the like, and refuses what
would give letters or column names instead."""

from functools import partial

import pandas
import pytest
from datasets import Dataset, DatasetDict

from qlora_lib.data.calibration import calibration_batches
from qlora_lib.data.examples import read_examples
from qlora_lib.data.sources import load_minigsm
from qlora_lib.evaluation.evaluate import evaluate, few_shot
from qlora_lib.evaluation.tasks import score
from qlora_lib.evaluation.verifier import Verifier, train_verifier
from qlora_lib.evaluation.votes import likelihood
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.lora.inject import inject_lora
from qlora_lib.train.config import TrainConfig
from qlora_lib.train.finetune import finetune, validation_loss
from tests.support.small_models import small_model, small_tokenizer

ROWS = load_minigsm("train")[:4]
COLUMNS = {name: [row[name] for row in ROWS] for name in ("question", "answer")}
PROMPTS = COLUMNS["question"]


def silent(prompts):
    return [""] * len(prompts)


def trained(rows):
    model = small_model()
    inject_lora(model, ("q_proj",), rank=2)
    config = TrainConfig(max_steps=1, batch_size=4, compute_dtype="fp32")
    return finetune(model, small_tokenizer(), rows, config).steps[0]["loss"]


def calibrated(rows):
    return [b["input_ids"].tolist() for b in calibration_batches(small_tokenizer(), rows, n=3)]


DOORS = {
    "read_examples": lambda rows: read_examples(rows, small_tokenizer()),
    "calibration": calibrated,
    "finetune": trained,
    "validation_loss": lambda rows: validation_loss(
        small_model(), small_tokenizer(), rows, TrainConfig(compute_dtype="fp32")
    ),
    "evaluate": lambda rows: evaluate(silent, rows).info["problems_hash"],
    "few_shot": lambda rows: few_shot(rows, 2)(ROWS[3]),
}
each_door = pytest.mark.parametrize("door", DOORS)


@each_door
def test_a_dataset_is_read_as_its_list_of_rows(door):
    assert DOORS[door](Dataset.from_list(ROWS)) == DOORS[door](ROWS)


WRONG = {
    "a dict of columns": COLUMNS,
    "a DatasetDict": DatasetDict(train=Dataset.from_list(ROWS)),
    "a DataFrame": pandas.DataFrame(ROWS),
    "one row": ROWS[0],
    "one number": 3,
}


@each_door
@pytest.mark.parametrize("wrong", WRONG)
def test_other_containers_are_refused_with_what_to_pass(door, wrong):
    with pytest.raises(ValueError, match="give a list|expected a list"):
        DOORS[door](WRONG[wrong])


def ask():
    return generator(small_model(), small_tokenizer(), Decoding(max_new_tokens=3))


def verifier():
    return Verifier(small_model(), small_tokenizer(), rank=2)


ASKED = {
    "generate": lambda prompts: ask()(prompts),
    "check": lambda prompts: ask().check(prompts),
    "likelihood": lambda prompts: likelihood(small_model(), small_tokenizer())(prompts, PROMPTS),
    "likelihood, said": lambda said: likelihood(small_model(), small_tokenizer())(PROMPTS, said),
    "verifier": lambda prompts: verifier()(prompts, PROMPTS),
    "train_verifier": lambda prompts: train_verifier(
        verifier(), prompts, PROMPTS, [True, False] * 2, TrainConfig(max_steps=1, batch_size=2)
    )[0]["loss"],
}


@pytest.mark.parametrize("door", ASKED)
def test_texts_come_in_a_list_and_a_text_is_none(door):
    assert ASKED[door](Dataset.from_dict(COLUMNS)["question"]) == ASKED[door](PROMPTS)
    for wrong in (PROMPTS[0][:4], {"question": PROMPTS} | dict.fromkeys("abc"), ROWS, [*range(4)]):
        with pytest.raises(ValueError, match="give one as|give a list|expected a str"):
            ASKED[door](wrong)


def test_a_path_is_calibrated_on_as_its_rows(tmp_path):
    Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")
    assert calibrated(str(tmp_path / "rows.jsonl")) == calibrated(ROWS)


def test_pairs_of_a_task_come_in_a_list():
    with pytest.raises(ValueError, match="pairs: expected a list, got 'ab'"):
        score(silent, None, "ab")
    with pytest.raises(ValueError, match="pairs: got a dict of .'a'"):
        score(silent, None, {"a": "b"})


def test_as_many_completions_as_prompts():
    for judge in (likelihood(small_model(), small_tokenizer()), partial(verifier())):
        with pytest.raises(ValueError, match="got 4 prompts and 3 completions"):
            judge(PROMPTS, PROMPTS[:3])
