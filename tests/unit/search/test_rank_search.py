"""The search: what is trained, how the choice is made, and that a killed search goes on."""

import json

import pytest
import torch

from qlora_lib.evaluation.tasks import Task
from qlora_lib.lora.inject import trainable_parameters
from qlora_lib.lora.layer import lora_layers
from qlora_lib.models.quantize import quantize_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.search import rank_search as module
from qlora_lib.search.rank_search import (
    Candidate,
    Search,
    Trial,
    choose,
    difference,
    find_optimal_rank,
    prepare,
    rank_search,
)
from qlora_lib.train.config import TrainConfig
from qlora_lib.train.finetune import validation_loss
from tests.support.small_models import PAIRS, small_model, small_tokenizer

TASK = Task("toy", lambda said, target: said == target, 2)
CONFIG = TrainConfig(max_steps=4, batch_size=8, lr=5e-3, max_length=128, compute_dtype="fp32",
                     progress=False)
TRAIN, DEV = PAIRS[:16], PAIRS[16:]


def names(model):
    return {name.split(".")[-3] for name in trainable_parameters(model)}


@pytest.mark.parametrize("places, trained", [
    ("all", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ("mlp", {"gate_proj", "up_proj", "down_proj"}),
])
def test_lora_trains_where_it_is_told(places, trained):
    model = small_model()
    assert prepare(model, Trial(rank=2, target_modules=places)) == sum(
        2 * (layer.in_features + layer.out_features) for layer in lora_layers(model).values())
    assert names(model) == trained


def test_alpha_is_the_trial_s_or_twice_the_rank_and_stands_in_the_name():
    for trial, alpha in ((Trial(rank=4), 8), (Trial(rank=4, alpha=64), 64)):
        model = small_model()
        prepare(model, trial)
        assert {c.alpha for layer in lora_layers(model).values()
                for c in layer.configs.values()} == {alpha}
    assert [str(Trial(rank=4)), str(Trial(rank=4, alpha=64, lr=0.1))] == [
        "lora all r=4 seed=0", "lora all r=4 alpha=64 lr=0.1 seed=0"]


def test_full_trains_everything_or_the_embeddings():
    model = small_model()
    assert prepare(model, Trial("full", None)) == sum(p.numel() for p in model.parameters())
    model = small_model()
    embedding = model.get_input_embeddings().weight
    assert prepare(model, Trial("full", None, "embeddings")) == embedding.numel()
    assert set(trainable_parameters(model)) == {"model.embed_tokens.weight"}


def test_wrong_trials():
    with pytest.raises(ValueError, match="rank=0: expected a whole number of at least 1"):
        Trial(rank=0)
    with pytest.raises(ValueError, match="method='dora'"):
        Trial("dora")
    with pytest.raises(ValueError, match="alpha=8 is LoRA's"):
        Trial("full", None, alpha=8)
    for rank in (2.5, True, None):
        with pytest.raises(ValueError, match="rank=.*: expected a whole number"):
            Trial(rank=rank)
    with pytest.raises(ValueError, match="embeddings are trained whole"):
        Trial(target_modules="embeddings")
    with pytest.raises(ValueError, match="steps=9 and epochs=2; give one"):
        Trial(steps=9, epochs=2)
    model = small_model()
    quantize_model(model, None, QuantSpec(4, 32), "rtn")
    with pytest.raises(ValueError, match="quantized weights can't be trained"):
        prepare(model, Trial("full", None))


def candidate(rank, right):
    return Candidate(rank, "all", 100 * rank, 1.0, right, (0.0,), 1.0)


def test_the_smallest_that_does_not_lose_is_optimal():
    best = candidate(8, "1" * 95 + "0" * 5)
    close = candidate(2, "1" * 93 + "0" * 7)  # 2 questions fewer: p = 0.5
    lost = candidate(1, "1" * 80 + "0" * 20)  # 15 fewer, none more: p = 2^-14
    larger = candidate(16, "1" * 95 + "0" * 5)  # as good: not smaller
    assert choose([larger, best, close, lost]) == (best, close)
    gap = difference(lost, best)
    low, high = gap.interval
    assert gap.difference == pytest.approx(-0.15) and gap.p == 2 * 0.5**15
    assert low < gap.difference < high < 0
    assert choose([lost]) == (lost, lost)
    with pytest.raises(ValueError, match="no candidates"):
        choose([])


def test_it_trains_each_rank_and_seed_and_leaves_the_model_alone(tmp_path):
    model, path = small_model(), tmp_path / "search.json"
    before = {n: p.clone() for n, p in model.state_dict().items()}
    found = find_optimal_rank(model, small_tokenizer(), TASK, TRAIN, DEV, (1, 4), seeds=(0, 1),
                              config=CONFIG, path=path, hopeless=None)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert [c.rank for c in found.candidates] == [1, 4] and found.stopped == []
    assert all(len(c.right) == 2 * len(DEV) and len(c.by_seed) == 2 for c in found.candidates)
    assert found.candidates[1].parameters == 4 * found.candidates[0].parameters
    assert found.optimal.rank == 1  # nobody has anything right after four steps
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 4 and {row["steps"] for row in rows.values()} == {4}
    losses = {row["dev_loss"] for row in rows.values()}
    assert len(losses) == 4, "ranks and seeds differ"
    assert "optimal" in str(found) and "best" in str(found)
    again = rank_search(rows.values())
    assert (again.candidates, again.optimal) == (found.candidates, found.optimal)


def test_a_killed_search_goes_on_and_takes_nothing_of_another(tmp_path, monkeypatch):
    args = small_model(), small_tokenizer(), TASK, TRAIN, DEV
    path, trained, real = tmp_path / "search.json", [], module.finetune

    def counted(*a, **k):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(1)
        return real(*a, **k)

    monkeypatch.setattr(module, "finetune", counted)
    ask = dict(ranks=(1, 2, 4), seeds=(0,), config=CONFIG, path=path, hopeless=None)
    with pytest.raises(KeyboardInterrupt):
        find_optimal_rank(*args, **ask)
    kept = json.loads(path.read_text())["rows"]
    assert len(kept) == 2
    monkeypatch.setattr(module, "finetune", real)
    found = find_optimal_rank(*args, **ask)
    rows = json.loads(path.read_text())["rows"]
    assert len(found.candidates) == 3 and {k: rows[k] for k in kept} == kept
    with pytest.raises(ValueError, match="trials of another task, model, data or settings"):
        Search(args[0], args[1], TASK, TRAIN[1:], DEV, CONFIG, path)
    with pytest.raises(ValueError, match="another task, model"):
        Search(small_model(seed=1), args[1], TASK, TRAIN, DEV, CONFIG, path)


def test_hopeless_ranks_get_no_full_training(monkeypatch):
    """Rank 1 is told to have a little over four times the lowest loss, rank 2 a little under after the first steps."""
    real, full = module.Search.run, []

    def run(self, trial, ask=True):
        row = dict(real(self, trial, ask))
        if not ask:
            assert trial.steps == 1
            row["dev_loss"] = {1: 5.3, 2: 5.1, 4: 1.3}[trial.rank]
        else:
            full.append(trial.rank)
        return row

    monkeypatch.setattr(module.Search, "run", run)
    found = find_optimal_rank(small_model(), small_tokenizer(), TASK, TRAIN, DEV, (1, 2, 4),
                              seeds=(0,), config=CONFIG)
    assert full == [2, 4] and [c.rank for c in found.stopped] == [1]
    assert "stopped early, dev loss 5.300" in str(found) and found.optimal.rank == 2


def test_what_a_search_needs():
    args = small_model(), small_tokenizer(), TASK, TRAIN, DEV
    with pytest.raises(ValueError, match="at least one rank"):
        find_optimal_rank(*args, ranks=())
    with pytest.raises(ValueError, match="rank=0: expected"):
        find_optimal_rank(*args, ranks=(0, 2), config=CONFIG)
    with pytest.raises(ValueError, match="needs config.max_steps"):
        find_optimal_rank(*args)
    with pytest.raises(ValueError, match="16 train and 0 dev pairs"):
        Search(*args[:4], [])


def test_a_trial_of_few_examples_is_a_search_of_these_alone():
    args, trial = (small_model(), small_tokenizer(), TASK), Trial(rank=2, epochs=3, examples=9)
    model, row = Search(*args, TRAIN, DEV, CONFIG).train_one(trial)
    alone = Search(*args, TRAIN[:9], DEV, CONFIG).run(Trial(rank=2, epochs=3), ask=False)
    assert row["steps"] == alone["steps"] == 6  # 3 epochs of 2 steps, not max_steps
    assert row["dev_loss"] == alone["dev_loss"] and "train_loss" not in alone
    assert row["train_loss"] == validation_loss(model, args[1], TRAIN[:9], CONFIG)
    assert row["trial"]["examples"] == 9


@pytest.mark.parametrize("n", [0, -1, 17])
def test_a_trial_cant_have_more_examples_than_there_are_or_none(n):
    search = Search(small_model(), small_tokenizer(), TASK, TRAIN, DEV, CONFIG)
    with pytest.raises(ValueError, match=f"examples={n}; the search has 16 train pairs"):
        search.run(Trial(rank=2, examples=n))
    assert search.rows == {}


def test_a_trials_own_settings_replace_the_searchs():
    trial = Trial("full", None, lr=1e-3, epochs=2, seed=3)
    config = trial.config(TrainConfig(lr=1.0, batch_size=4))
    assert (config.lr, config.epochs, config.seed, config.batch_size) == (1e-3, 2, 3, 4)
    assert str(trial) == "full all lr=0.001 epochs=2 seed=3"
    counted = Trial(rank=2, epochs=2, examples=1000)
    assert counted.config(TrainConfig(max_steps=60)) == TrainConfig(epochs=2)
    assert Trial(steps=5).config(TrainConfig(max_steps=60)).max_steps == 5
    assert str(counted) == "lora all r=2 epochs=2 examples=1000 seed=0"


def test_a_stored_search_proves_itself(tmp_path):
    args = small_model(), small_tokenizer(), TASK, TRAIN, DEV, CONFIG, tmp_path / "search.json"
    first = Search(*args).run(Trial(rank=1), ask=False)
    whole = args[-1].read_bytes()
    for at in range(0, len(whole), len(whole) // 30):
        args[-1].write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="search.json"):
            Search(*args)
    stored = json.loads(whole)
    for name in ("format", "sha256"):  # as older versions wrote it
        del stored[name]
    args[-1].write_text(json.dumps(stored))
    assert Search(*args).run(Trial(rank=1), ask=False) == first
    args[-1].write_text(json.dumps(stored | {"rows": []}))
    with pytest.raises(ValueError, match="search.json holds no trials"):
        Search(*args)
