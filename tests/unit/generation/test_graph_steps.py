"""Steps that can be captured answer as `generate` does, and do nothing that a capture forbids.

A stand-in captures: it gives back the step, which Python then calls. No CUDA graph is made here.
"""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig

from qlora_lib.generation import graph_steps
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.generation.graph_steps import WARM, WORTH, Graphs, Steps, can_be_captured
from qlora_lib.lora.inject import inject_lora
from tests.support.lora_models import base_of, trained
from tests.support.small_models import PAIRS, small_model, small_tokenizer

PROMPTS = [prompt for prompt, _ in PAIRS[:6]]  # of different lengths
NEW = WORTH + 8


class Repeated:
    """Stands in for a capture: the step itself, and how often it was called."""

    def __init__(self):
        self.captures, self.calls = 0, 0

    def __call__(self, step):
        self.captures += 1

        def replay():
            self.calls += 1
            step()

        return replay


def both(model, decoding, adapters=None):
    """Answers from `generate`, answers by captured steps, and the stand-in."""
    tokenizer, capture = small_tokenizer(), Repeated()
    plain, by_steps = (generator(model, tokenizer, decoding) for _ in range(2))
    by_steps.graphs = Graphs(capture)
    return plain(PROMPTS, adapters), by_steps(PROMPTS, adapters), capture


def check_same(want, got):
    flat = [[a for group in answers for a in (group if isinstance(group, list) else [group])]
            for answers in (want, got)]  # fmt: skip
    for a, b in zip(*flat, strict=True):
        assert (a, a.tokens, a.finished) == (b, b.tokens, b.finished)


@pytest.mark.parametrize("kind", ["dense", "grid4", "nf4", "g_idx", "grid8"])
def test_the_same_tokens_greedily(kind):
    decoding = Decoding(max_new_tokens=NEW, batch_size=4, stop=("4",))
    want, got, capture = both(base_of(kind), decoding)
    check_same(want, got)
    assert len({a.tokens for a in want} | {len(a) for a in want}) > 2
    assert capture.captures == 2  # one a batch
    # The prompt's pass makes a token; a call is compared with the step, and undone.
    assert 0 < capture.calls <= 2 * (NEW - 1 - WARM + 1)


@pytest.mark.parametrize("top_p, temperature", [(1.0, 1.0), (0.8, 1.0), (0.9, 0.7)])
def test_the_same_draws(top_p, temperature):
    decoding = Decoding(temperature, top_p, samples=2, max_new_tokens=NEW, batch_size=4, stop=())
    want, got, _ = both(small_model(), decoding)
    check_same(want, got)
    assert len({a for group in want for a in group}) > 6


def test_rows_end_at_their_own_tokens_and_steps_end_with_the_last(monkeypatch):
    monkeypatch.setattr(graph_steps, "LOOK", 4)
    model, tokenizer = small_model(), small_tokenizer()
    said = generator(model, tokenizer, Decoding(max_new_tokens=12, stop=()))(PROMPTS)
    common = {i for text in said for i in tokenizer.encode(text, add_special_tokens=False)}
    model.generation_config.eos_token_id = sorted(common)[::3]
    want, got, capture = both(model, Decoding(max_new_tokens=2 * NEW, stop=()))
    check_same(want, got)
    tokens = [a.tokens for a in want]
    assert len(set(tokens)) > 2 and max(tokens) < NEW
    assert capture.calls < max(tokens) + 4  # a look every four


def test_each_row_has_its_adapter():
    model = base_of("grid4")
    for name, seed in (("a", 1), ("b", 2)):
        inject_lora(model, ("q_proj", "v_proj", "down_proj"), rank=2, adapter=name)
        trained(model, name, seed=seed, std=0.3)
    want, got, _ = both(model, Decoding(max_new_tokens=NEW, stop=()), ["b", None, "a"] * 2)
    check_same(want, got)


def test_few_tokens_and_packed_caches_are_left_to_generate():
    for how in ({"max_new_tokens": WORTH - 1}, {"max_new_tokens": NEW, "cache_bits": 4}):
        want, got, capture = both(small_model(), Decoding(**how))
        check_same(want, got)
        assert capture.captures == 0


def test_models_with_other_work_at_each_step_are_left_to_generate(monkeypatch):
    model = small_model()
    assert can_be_captured(model)
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    assert not can_be_captured(model)


def test_a_capture_that_fails_is_told_once_and_the_answers_are_the_same():
    def refused(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    decoding = Decoding(max_new_tokens=NEW, batch_size=3, stop=())
    ask = generator(small_model(), small_tokenizer(), decoding)
    want, ask.graphs = ask(PROMPTS), Graphs(refused)
    with pytest.warns(UserWarning, match="not permitted when stream is capturing.*from Python"):
        check_same(want, ask(PROMPTS))
    with warnings.catch_warnings(action="error"):
        check_same(want, ask(PROMPTS))
    assert ask.graphs.capture is None


@pytest.mark.parametrize("fault", ["an old address", "nothing done", "a token too many"])
def test_a_graph_that_does_something_else_is_found_and_not_used(fault):
    def wrong(step):
        steps = step.__self__
        known = steps.token.clone()  # memory that the capture saw, and nobody writes any more

        def replay():
            if fault == "an old address":
                steps.token.copy_(known + 1)
            if fault != "nothing done":
                step()
            if fault == "a token too many":
                step()

        return replay

    ask = generator(small_model(), small_tokenizer(), Decoding(max_new_tokens=NEW, stop=()))
    want, ask.graphs = ask(PROMPTS), Graphs(wrong)
    with pytest.warns(UserWarning, match="replayed, it chooses other tokens.*from Python"):
        check_same(want, ask(PROMPTS))
    assert ask.graphs.capture is None


def test_on_a_cpu_nothing_is_captured():
    assert generator(small_model(), small_tokenizer()).graphs.capture is None


def begun(model, **how) -> Steps:
    settings = GenerationConfig(max_new_tokens=9, eos_token_id=[2, 5], pad_token_id=0, **how)
    ids = torch.full((3, 5), 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return Steps(model, ids, mask, settings)


def held(steps: Steps) -> list[tuple]:
    """(holder, name, tensor) of all that a step may change."""
    return [(holder, name, t) for holder in (steps, *steps.cache.layers)
            for name, t in vars(holder).items() if isinstance(t, torch.Tensor)]  # fmt: skip


@torch.inference_mode()
def test_nothing_moves_between_steps():
    steps = begun(small_model())
    before = [(name, t.data_ptr(), t.shape) for _, name, t in held(steps)]
    for _ in range(4):
        steps.step()
    assert [(name, t.data_ptr(), t.shape) for _, name, t in held(steps)] == before
    assert {"token", "position", "at", "mask", "keys", "values"} <= {name for name, *_ in before}
    assert int(steps.at) == 5 + 1 + 4  # the prompt, its token, and four more


class OnDeviceAlone(TorchDispatchMode):
    """Fails where numbers are looked at from Python, or tensors of the host take part."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        looks = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_unique2", "multinomial")
        assert func.overloadpacket.__name__ not in looks, func
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, result)):
            assert not isinstance(t, torch.Tensor) or t.device.type == "meta", func
        return result


@pytest.mark.parametrize("kind", ["dense", "grid4", "nf4", "g_idx"])
@pytest.mark.parametrize("how", [{}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}])
def test_a_step_does_not_wait_for_the_host(kind, how, monkeypatch):
    """On the meta device no tensor has numbers: whatever asks for one fails."""
    model = base_of(kind)
    with torch.inference_mode():
        steps = begun(model, **how)  # the prompt's pass may wait: it is not captured
        model.to("meta")
        for holder, name, t in held(steps):
            setattr(holder, name, t.to("meta"))
        for layer in steps.cache.layers:
            layer.device = torch.device("meta")
        # Autocast does not know this device.
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
        monkeypatch.setattr(torch, "autocast", lambda *args, **given: nullcontext())
        steps.step()  # as before a capture: tables are made once a device
        with OnDeviceAlone():
            steps.step()
