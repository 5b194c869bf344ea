"""Several adapters and the choice of one, for calls, threads and recomputed blocks."""

from functools import partial
from threading import Thread

import pytest
import torch
from lora_models import IDS, logits, trained
from small_models import small_model
from torch.utils.checkpoint import checkpoint

from qlora_lib.lora import (
    adapter_names,
    inject_lora,
    keep_choice,
    lora_layers,
    set_adapter,
    trainable_parameters,
    use_adapter,
)

# --- several adapters -----------------------------------------------------------------------


def two_adapters():
    model = small_model()
    inject_lora(model, rank=4, adapter="a")
    inject_lora(model, ("q_proj", "up_proj"), rank=2, alpha=8, adapter="b")
    return trained(trained(model, "a", std=0.1), "b", seed=50, std=0.1)


def test_use_adapter_chooses_for_the_calls_inside_it():
    model, base = two_adapters(), logits(small_model())
    assert adapter_names(model) == ["a", "b"]
    with use_adapter(model, None):
        assert torch.equal(logits(model), base)
    with use_adapter(model, "a"):
        a = logits(model)
        with use_adapter(model, "b"):  # layers without "b" (v_proj) give their base alone
            b = logits(model)
        assert torch.equal(logits(model), a)
    assert min((a - base).abs().max(), (b - base).abs().max(), (a - b).abs().max()) > 0.01

    only_b = small_model()
    inject_lora(only_b, ("q_proj", "up_proj"), rank=2, alpha=8, adapter="b")
    for path, layer in lora_layers(only_b).items():
        layer.lora_A["b"].data = lora_layers(model)[path].lora_A["b"]
        layer.lora_B["b"].data = lora_layers(model)[path].lora_B["b"]
    assert torch.equal(logits(only_b), b)


def test_set_adapter_sets_the_default():
    model, base = two_adapters(), logits(small_model())
    for name in ("a", "b", None):
        with use_adapter(model, name):
            want = logits(model)
        set_adapter(model, name)
        assert torch.equal(logits(model), want)
    assert torch.equal(want, base)


def test_unknown_adapters_are_named():
    model = two_adapters()
    for call in (lambda: set_adapter(model, "c"), lambda: use_adapter(model, "c").__enter__()):
        with pytest.raises(ValueError, match=r"no adapter 'c'; the model has \['a', 'b'\]"):
            call()


def test_another_model_keeps_its_own_choice():
    model, other = two_adapters(), trained(two_adapters(), "a", seed=70)
    default = logits(other)
    with use_adapter(other, "b"):
        b = logits(other)
    with use_adapter(model, None):  # a base beside a teacher, say
        assert torch.equal(logits(other), default)
        with use_adapter(other, "b"):
            assert torch.equal(logits(other), b)
            assert torch.equal(logits(model), logits(small_model()))
        assert torch.equal(logits(other), default)


def test_an_error_inside_use_adapter_ends_its_choice():
    model = two_adapters()
    before = logits(model)
    with pytest.raises(KeyError), use_adapter(model, None):
        raise KeyError
    assert torch.equal(logits(model), before)


def test_threads_do_not_see_each_others_choice():
    model, found = two_adapters(), {}
    set_adapter(model, "b")
    with use_adapter(model, "b"):
        default = logits(model)

    def work(name):
        if name == "outside":
            found[name] = logits(model)
        else:
            with use_adapter(model, name):
                found[name] = logits(model)

    with use_adapter(model, None):
        threads = [Thread(target=work, args=(name,)) for name in ("a", "b", "outside")]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        here = logits(model)
    assert torch.equal(here, logits(small_model()))
    assert torch.equal(found["b"], default) and torch.equal(found["outside"], default)
    assert not torch.equal(found["a"], default)


# --- gradient checkpointing --------------------------------------------------------------------


def checkpointed(how: str, reentrant: bool = False):
    model = two_adapters().train()
    if how == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    elif how == "by hand":
        function = keep_choice(partial(checkpoint, use_reentrant=reentrant))
        assert keep_choice(function) is function
        model._set_gradient_checkpointing(True, function)
        if reentrant:  # it gives no gradient to a block whose input needs none
            model.enable_input_require_grads()
    return model


def gradients_after(model, name, backward):
    """Gradients of a loss made within use_adapter(name), with backward run by `backward`."""
    with use_adapter(model, name):
        loss = model(IDS, labels=IDS).loss
    backward(loss)
    grads = {n: p.grad for n, p in trainable_parameters(model).items()}
    return {n: g for n, g in grads.items() if g is not None and g.any()}


def in_another_thread(loss):
    thread = Thread(target=loss.backward)
    thread.start()
    thread.join()


def within(model, loss):
    with use_adapter(model, "a"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["transformers", "by hand"])
@pytest.mark.parametrize("backward", ["here", "in another thread", "with another choice"])
def test_a_recomputed_block_takes_the_adapter_of_its_forward_pass(how, reentrant, backward):
    """After the block has ended, or in autograd's own thread: "b", which is not the default."""
    model = checkpointed(how, reentrant)
    run = {
        "here": lambda loss: loss.backward(),
        "in another thread": in_another_thread,
        "with another choice": lambda loss: within(model, loss),
    }[backward]
    got = gradients_after(model, "b", run)
    want = gradients_after(two_adapters().train(), "b", lambda loss: loss.backward())
    assert got.keys() == want.keys() and all(".b" in n for n in got) and len(got) == 8
    for name, grad in got.items():
        assert torch.equal(grad, want[name]), name
    assert torch.equal(logits(model.eval()), logits(two_adapters()))  # and the default is as before
