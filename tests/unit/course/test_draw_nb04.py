"""Every picture of notebook 04 over the whole grid of its controls."""
import itertools

import pytest
import torch
from transformers import LlamaConfig

from course.kit import SliderPlot
from course.kit import picture as plots
from course.kit.picture import render
from course.nb04 import draw
from qlora_lib.train.memory import PARTS, memory_ledger

pytestmark = pytest.mark.usefixtures("quick_pictures")

CONFIG = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2)


def picture(function, *, size=(6, 3.6), axes=(1, 1), **values):
    return render(function, [values], size=size, axes=axes)


def test_ledger():
    ledgers = {key: memory_ledger(CONFIG, key[0], *key[1:3], checkpointing=key[3]).parts
               for key in itertools.product(("full", "lora", "qlora"), (1, 4), (512, 2048),
                                            (False, True))}
    assert set(PARTS) <= set(plots.PARTS)
    SliderPlot(draw.draw_ledger,
               {"method": ["full", "lora", "qlora"], "batch": [1, 4], "tokens": [512, 2048],
                "checkpointing": [False, True]}, alt="bars", ledgers=ledgers).draw_grid()


def test_step():
    torch.manual_seed(0)
    traces = {key: (torch.rand(50 + i).tolist(), 20 + i) for i, key in enumerate(
        itertools.product(("packed", "dense"), (False, True), (2, 8)))}
    SliderPlot(draw.draw_step, {"weights": ["packed", "dense"], "checkpointing": [False, True],
                                "batch": [2, 8]}, alt="a hill", traces=traces).draw_grid()


def test_tokens():
    row = [("a", "prompt")] * 30 + [("b", "target")] * 10 + [("c", "eos")] + [("p", "pad")] * 9
    rows = [row, row[:-9], [("$x_", "prompt"), ("↵", "target"), ("e", "eos")]]
    SliderPlot(draw.draw_tokens, {"example": [0, 1, 2], "mask": list(draw.MASKS)}, alt="tokens",
               rows=rows).draw_grid()


@pytest.mark.parametrize("mask, wrong", list(zip(draw.MASKS, (0, 9, 1, 30))))
def test_wrong_labels_are_counted(mask, wrong):
    kinds = ["prompt"] * 30 + ["target"] * 10 + ["eos"] + ["pad"] * 9
    assert sum(draw._token_color(kind, mask) == "wrong" for kind in kinds) == wrong


def test_pictures_without_controls():
    assert picture(draw.draw_saved, depths=[1, 2], saved={"linear": [5, 9], "ours": [0, 0]},
                   packed=[1, 2])
    losses = {"gptq": 1.01, "nf4": 1.02, "rtn": 0.99}
    assert picture(draw.draw_bases, axes=(1, 2), bits=dict.fromkeys(losses, 4.4), losses=losses,
                   dense=1.0)
    assert picture(draw.draw_history, losses=[3.0, 2.0, 1.0], dev=[(2, 2.5), (3, 1.5)])
    assert picture(draw.draw_history, losses=[3.0], dev=[])
