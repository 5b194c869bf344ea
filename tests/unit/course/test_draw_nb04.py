"""The pictures of notebook 04: what their controls change, and what they state."""
import itertools

import pytest
import torch
from transformers import LlamaConfig

from course.kit import picture
from course.nb04 import draw
from qlora_lib.train.memory import PARTS, memory_ledger
from tests.support.controls import axes_of, check_controls

pytestmark = pytest.mark.usefixtures("quick_pictures")

CONFIG = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2)


def test_controls_of_ledger():
    ledgers = {key: memory_ledger(CONFIG, key[0], *key[1:3], checkpointing=key[3]).parts
               for key in itertools.product(("full", "lora", "qlora"), (1, 4), (512, 2048),
                                            (False, True))}
    assert set(PARTS) <= set(picture.PARTS)
    check_controls(draw.draw_ledger,
                   {"method": ["full", "lora", "qlora"], "batch": [4, 1], "tokens": [2048, 512],
                    "checkpointing": [False, True]}, ledgers=ledgers)


def test_controls_of_step():
    torch.manual_seed(0)
    traces = {key: (torch.rand(50 + i).tolist(), 20 + i) for i, key in enumerate(
        itertools.product(("packed", "dense"), (False, True), (2, 8)))}
    check_controls(draw.draw_step, {"weights": ["packed", "dense"], "checkpointing": [False, True],
                                    "batch": [2, 8]}, traces=traces)


def test_controls_of_tokens():
    row = [("a", "prompt")] * 30 + [("b", "target")] * 10 + [("c", "eos")] + [("p", "pad")] * 9
    rows = [row, row[:-9], [("$x_", "prompt"), ("↵", "target"), ("e", "eos")]]
    check_controls(draw.draw_tokens, {"example": [0, 1, 2], "mask": list(draw.MASKS)}, rows=rows)


@pytest.mark.parametrize("mask, wrong", list(zip(draw.MASKS, (0, 9, 1, 30))))
def test_wrong_labels_are_counted(mask, wrong):
    row = [("x", kind) for kind in ["prompt"] * 30 + ["target"] * 10 + ["eos"] + ["pad"] * 9]
    ax = axes_of(draw.draw_tokens, example=0, mask=mask, rows=[row])
    said = ax.get_title()
    assert said == (f"{mask}: {wrong} wrong labels" if wrong else "all labels right")


def test_a_history_without_dev_losses_is_drawn():
    ax = axes_of(draw.draw_history, losses=[3.0, 1.0], dev=[])
    assert [line.get_ydata().tolist() for line in ax.lines] == [[3.0, 2.0]]


def test_the_axis_of_a_history_begins_where_it_is_told_to():
    ax = axes_of(draw.draw_history, losses=[1.5, 1.1], dev=[(2, 1.2)], bottom=0.8)
    assert ax.get_ylim()[0] == 0.8


def test_the_ledger_s_column_says_each_part_and_the_total():
    parts = {"weights": 2 * 10**9, "scales": 0, "activations": 150 * 10**9}
    ax = axes_of(draw.draw_ledger, method="lora", batch=1, tokens=512, checkpointing=False,
                 ledgers={("lora", 1, 512, False): parts})
    said = [t.get_text() for t in ax.texts]
    assert said[:4] == ["2.00", "none", "150", "152"]
