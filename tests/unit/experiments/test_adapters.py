"""The recorded experiments of notebook 07: stored row by row, and consistent with themselves."""

import json

import pytest

from experiments.adapter_table import adapter_table
from experiments.adapters import (
    ADAPTERS,
    EPOCHS,
    FOUR,
    RESULTS,
    SHORT,
    STEPS,
    Table,
    adapter_folder,
    load_four,
    main,
    read_epochs,
    step_memory,
    stored,
)
from qlora_lib.base.statistics import wilson
from qlora_lib.data.tokens import collate, encode_example, pad_id
from qlora_lib.lora.inject import inject_lora, trainable_parameters
from qlora_lib.runs.profiles import load_profile
from qlora_lib.search.rank_search import rank_search
from tests.support.small_models import PAIRS, small_model, small_tokenizer


def test_each_row_is_stored_at_once_and_made_once(tmp_path):
    table, made = Table("trial", tmp_path, task="code"), []
    for name in ("a", "b", "a"):
        table.row(name, lambda: made.append(name) or {"n": 1})
        assert set(json.loads(table.path.read_text())["rows"]) == set(made)
    assert made == ["a", "b"]
    again = Table("trial", tmp_path)
    assert again.row("a", lambda: pytest.fail("made again")) == {"n": 1}
    assert Table("trial", tmp_path, force=True).rows == {}
    assert stored("trial", tmp_path) == again.rows
    assert json.loads(table.path.read_text())["task"] == "code"


def test_unknown_parts_and_missing_records(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["rank"])
    assert "no part 'rank'; expected some of tasks, learning-rates" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="make experiments"):
        stored("tasks", tmp_path)


def test_a_steps_memory_holds_gradients_and_moments_and_more_for_a_larger_batch():
    model = small_model()
    inject_lora(model, "all", rank=4)
    trained = sum(p.nbytes for p in trainable_parameters(model).values())
    tokenizer = small_tokenizer()
    encoded = [encode_example(tokenizer, *pair, 128) for pair in PAIRS]
    one, many = (step_memory(model, collate(encoded[:n], pad_id(tokenizer))) for n in (1, 16))
    assert many > 2 * one > 2 * 3 * trained


def test_the_recorded_rank_search_is_read():
    found = rank_search(stored("ranks").values())
    assert sorted(c.rank for c in [*found.candidates, *found.stopped]) == [1, 2, 4, 8, 16, 32]
    assert all(len(c.by_seed) == 2 for c in found.candidates)


def test_the_epochs_are_whole_and_counted_in_steps():
    table = read_epochs()
    assert {n: tuple(rows) for n, rows in table.items()} == EPOCHS
    for examples, rows in table.items():
        for count, row in rows.items():
            assert row["steps"] == count * examples // SHORT.batch_size
            assert row["n"] == 400 and row["right"].count("1") == row["correct"]
            assert row["interval"] == wilson(row["correct"], row["n"])
            assert sum(row["by_seed"]) / 2 == pytest.approx(row["correct"] / row["n"])
        assert 496 <= row["steps"] <= 512  # the last of each
    seeds = [stored("epochs")[f"lora all r=8 epochs=1 examples=64 seed={i}"] for i in (0, 1)]
    for key in ("dev_loss", "train_loss"):
        assert table[64][1][key] == pytest.approx((seeds[0][key] + seeds[1][key]) / 2)


def test_the_bundled_adapters_fit_the_bundled_base_and_are_small():
    model, _ = load_profile("tiny").load()
    load_four(model)
    assert [row.name for row in adapter_table(model)] == [None, *FOUR]
    files = [file for task in STEPS for file in adapter_folder(task).iterdir()]
    assert all(ADAPTERS in file.parents for file in files)
    assert sum(file.stat().st_size for file in files) < 1_500_000
