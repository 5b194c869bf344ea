"""Killed before any of its file operations, a command given again ends with the same result."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from qlora_lib.base.files import read_proved_tensors
from qlora_lib.evaluation.evaluate import EvalReport, evaluate
from qlora_lib.evaluation.verifier import Verifier
from qlora_lib.generation.generate import Completion, Generator
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.finetuner import Finetuner
from qlora_lib.train.config import TrainConfig
from tests.support.killed import killed_everywhere
from tests.support.lora_models import IDS
from tests.support.small_models import PAIRS, small_model, small_tokenizer

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
CONFIG = TrainConfig(max_steps=3, batch_size=4, lr=5e-3, max_length=128, compute_dtype="fp32",
                     eval_every=1, save_every=2, progress=False)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def train(base, folder, resume=False, bits=4, lr=5e-3, **lora):
    spec = QuantSpec(bits, 32, clip_search=False)
    tuner = Finetuner(base, folder=folder, spec=spec, compute_dtype="fp32", rank=2, **lora)
    config = replace(CONFIG, lr=lr, resume=resume, folder=folder)
    tuner.fit(PAIRS[:8], PAIRS[8:10], config)
    tuner.save()


def content(folder):
    """What a run computes with, without clocks: bytes of base and adapter, tensors of training."""
    files = [p for part in ("base", "adapter") for p in (folder / part).iterdir()]
    said = {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
    for name in ("last", "best"):
        tensors = read_proved_tensors(folder / "training" / f"{name}.safetensors")[0]
        said |= {f"{name}/{n}": t.numpy().tobytes() for n, t in tensors.items()}
    return said


def answers(folder):
    model, _ = Finetuner.load(folder, compute_dtype="fp32")
    with torch.inference_mode():
        return model(IDS).logits.numpy().tobytes()


STEP = 27  # all of the operations would take minutes; make fuzz kills at others


@pytest.mark.parametrize("first, again", [
    (1, {}), (8, {"bits": 3}), (15, {"lr": 1e-2}), (22, {"resume": True}),
])  # fmt: skip
def test_a_finetune_is_killed_anywhere_in_a_folder_with_a_finished_run(
    base, tmp_path, first, again
):
    """Meanwhile the folder gives the old result, the new one, or says what is wrong."""
    old, folder = tmp_path / "old", tmp_path / "run"
    train(base, old)
    if not again.get("resume"):
        shutil.copytree(old, folder)
    train(base, folder, **again)
    want, known = content(folder), {answers(old), answers(folder)}

    def prepare():
        for left in tmp_path.glob("run*"):
            shutil.rmtree(left)
        if not again.get("resume"):  # what goes on, begins in an empty folder
            shutil.copytree(old, folder)

    count = named = 0  # printed by pytest -s
    for _ in killed_everywhere(prepare, lambda: train(base, folder, **again), first, STEP):
        count += 1
        try:
            assert answers(folder) in known
        except (ValueError, OSError):
            named += 1
        train(base, folder, **again)
        assert content(folder) == want and answers(folder) in known
    print(f"{again}: {count} kills, {named} named until the command was given again")
    assert count > 1


def test_a_verifier_is_killed_anywhere_while_it_is_saved(tmp_path):
    def judge(seed):
        torch.manual_seed(seed)
        verifier = Verifier(small_model(), small_tokenizer(), rank=2)
        for p in verifier.parameters.values():
            p.data = torch.randn(p.shape)
        return verifier

    def scores(verifier):
        return tuple(verifier([p for p, _ in PAIRS[:3]], [t for _, t in PAIRS[:3]]))

    old, new, folder = judge(0), judge(1), tmp_path / "verifier"
    known, count = {scores(old), scores(new)}, 0

    def prepare():
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        old.save(folder)

    for _ in killed_everywhere(prepare, lambda: new.save(folder)):
        count += 1
        assert scores(Verifier.load(small_model(), small_tokenizer(), folder)) in known
        new.save(folder)
        assert scores(Verifier.load(small_model(), small_tokenizer(), folder)) == scores(new)
        assert [p.name for p in tmp_path.iterdir()] == ["verifier"]
    assert count > 5


class Counting(Generator):
    def fingerprint(self):
        return "weights"


def test_an_evaluation_is_killed_anywhere(tmp_path):
    problems = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(10)]

    def ask(restart=False):
        generate = Counting(lambda prompts: [Completion("#### 3", 2, True) for _ in prompts],
                            {"decoding": {}})  # fmt: skip
        return evaluate(generate, problems, tmp_path / "eval", chunk=4, canaries=False,
                        restart=restart)  # fmt: skip

    def clockless(report):
        return [p.row() | {"seconds": 0} for p in report.predictions]

    want = clockless(ask())
    for restart in (False, True):
        count = 0

        def prepare():
            if not restart:
                shutil.rmtree(tmp_path / "eval")

        for _ in killed_everywhere(prepare, lambda: ask(restart)):
            count += 1
            try:
                assert clockless(EvalReport.load(tmp_path / "eval")) == want
            except (ValueError, OSError):
                pass
            assert clockless(ask(restart)) == want
            assert clockless(EvalReport.load(tmp_path / "eval")) == want
            assert json.loads((tmp_path / "eval/report.json").read_text())["n"] == 10
        assert count > 2
