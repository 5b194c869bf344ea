"""Several adapters and the choice of one, for calls, threads and recomputed blocks."""

import asyncio
from functools import partial
from threading import Barrier, Thread

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qlora_lib.lora.choice import Rows, keep_choice
from qlora_lib.lora.inject import inject_lora, set_adapter, trainable_parameters, use_adapter
from qlora_lib.lora.layer import LoRAConfig, LoRALinear, adapter_names, lora_layers
from tests.support.lora_models import IDS, base_of, logits, trained
from tests.support.small_models import small_model

# --- several adapters -----------------------------------------------------------------------


def two_adapters(kind="dense"):
    model = base_of(kind)
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
        # transformers 5.23 has renamed it; the old name goes in version 6.
        name = "activation_checkpointing_enable"
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
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


# --- an adapter a row --------------------------------------------------------------------------

# A product of another number of rows may be added up in another order: a few units of fp32's
# last place, in logits of about 10.
ATOL = 1e-4
NAMES = ["b", None, "a", "a", None, "b", "b"]
BATCH = torch.randint(3, 260, (7, 9), generator=torch.Generator().manual_seed(1))


def alone(model, names=NAMES):
    """Each row's logits from a call of its own."""
    rows = []
    for name, ids in zip(names, BATCH):
        with use_adapter(model, name), torch.no_grad():
            rows.append(model(ids[None]).logits[0])
    return torch.stack(rows)


@pytest.mark.parametrize("names", [NAMES, sorted(NAMES, key=str), ["a"] * 7, [None] * 7], ids=str)
@pytest.mark.parametrize("kind", ["dense", "grid4"])
def test_each_row_gets_what_it_gets_alone(kind, names):
    model = two_adapters(kind)
    with use_adapter(model, names), torch.no_grad():
        got = model(BATCH).logits
    assert torch.allclose(got, alone(model, names), atol=ATOL, rtol=0)
    other = alone(model, names[1:] + names[:1])
    assert len(set(names)) == 1 or (got - other).abs().max() > 1  # the tolerance tells them apart


def test_rows_are_grouped_without_copies_where_they_lie_together():
    together = Rows(["a", "a", None, "b"], torch.device("cpu"))
    assert together.groups == [("a", slice(0, 2)), (None, slice(2, 3)), ("b", slice(3, 4))]
    assert together.back is None
    mixed = Rows(["a", "b", "a"], torch.device("cpu"))
    x = torch.arange(3.0)[:, None]
    assert torch.equal(mixed.join([x[rows] for _, rows in mixed.groups]), x)


@pytest.mark.parametrize("rows", [1, 3, 14])
def test_a_batch_of_another_size_is_refused(rows):
    model = two_adapters()
    message = f"was given 7 names, one a row, and the batch has {rows} rows; .*num_return"
    with use_adapter(model, NAMES), pytest.raises(ValueError, match=message):
        model(BATCH.repeat(2, 1)[:rows])


def test_generate_expands_rows_and_the_names_with_them():
    model, ids = two_adapters(), BATCH[:3]
    expanded = dict(max_new_tokens=4, num_beams=1, do_sample=True, num_return_sequences=2, top_k=1)
    names = ["b", "a", None]
    with pytest.raises(ValueError, match="repeat each name k times"), use_adapter(model, names):
        model.generate(ids, **expanded)
    with use_adapter(model, [n for n in names for _ in range(2)]):
        got = model.generate(ids, **expanded)
    for i, name in enumerate(names):
        with use_adapter(model, name):
            want = model.generate(ids[i : i + 1], max_new_tokens=4, do_sample=False)
        assert torch.equal(got[2 * i], want[0]) and torch.equal(got[2 * i + 1], want[0])


@pytest.mark.parametrize("names, message", [
    (["a", "c"], r"no adapter 'c'; the model has \['a', 'b'\]"), ([], "was given no names"),
])  # fmt: skip
def test_bad_lists_of_names_are_refused_before_the_call(names, message):
    with pytest.raises(ValueError, match=message), use_adapter(two_adapters(), names):
        raise AssertionError("not reached")


@pytest.mark.parametrize("how", [None, "transformers", "by hand"])
def test_rows_train_each_its_own_adapter(how):
    """The gradient of a mixed batch is that of each adapter's rows alone, recomputed or not."""
    def loss_of(model, rows):
        return torch.nn.functional.cross_entropy(
            model(BATCH[rows]).logits.flatten(0, 1), BATCH[rows].flatten(), reduction="sum"
        )

    model = checkpointed(how) if how else two_adapters().train()
    for p in (p for n, p in model.named_parameters() if "lora_" in n):
        p.requires_grad_(True)
    with use_adapter(model, NAMES):
        loss = loss_of(model, list(range(7)))
    loss.backward()
    for name in ("a", "b"):
        single = two_adapters()
        for p in (p for n, p in single.named_parameters() if "lora_" in n):
            p.requires_grad_(True)
        with use_adapter(single, name):
            loss_of(single, [i for i, n in enumerate(NAMES) if n == name]).backward()
        want = {n: p.grad for n, p in single.named_parameters() if n.endswith(f".{name}")}
        for n, p in model.named_parameters():
            if n in want:
                assert torch.allclose(p.grad, want[n], rtol=1e-3, atol=1e-4 * want[n].abs().max())


# --- many at once ------------------------------------------------------------------------------


def four():
    """A layer whose adapters answer with their own number, and their names."""
    layer = LoRALinear(torch.nn.Linear(4, 2, bias=False))
    for i, name in enumerate("abcd"):
        layer.add(name, LoRAConfig(rank=1, alpha=1))
        layer.lora_A[name].data.fill_(1)
        layer.lora_B[name].data.fill_(i + 1)
    layer.base.weight.data.zero_()
    return torch.nn.Sequential(layer), "abcd"


@pytest.mark.long
def test_eight_threads_and_four_adapters_never_mix():
    model, names = four()
    x, wrong, start = torch.ones(1, 4), [], Barrier(8)

    @torch.no_grad()
    def work(thread):
        start.wait()
        for i in range(125):  # 8 x 125 = 1,000 requests
            one = names[(thread + i) % 4]
            rows = [names[(thread + i + j) % 4] for j in range(3)]
            with use_adapter(model, one):
                got = model(x)[0, 0]
                with use_adapter(model, rows):
                    mixed = model(x.expand(3, 4))[:, 0]
                again = model(x)[0, 0]
            want = [4.0 * (names.index(n) + 1) for n in (one, *rows, one)]
            if [got.item(), *mixed.tolist(), again.item()] != want:
                wrong.append((thread, i))

    threads = [Thread(target=work, args=(t,)) for t in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_tasks_of_one_event_loop_never_mix():
    model, names = four()
    x = torch.ones(1, 4)

    async def task(i):
        with use_adapter(model, names[i % 4]):
            for _ in range(5):
                await asyncio.sleep(0)  # the others run within our block
                assert model(x)[0, 0].item() == 4.0 * (i % 4 + 1)
        return True

    async def all_of_them():
        return await asyncio.gather(*(task(i) for i in range(40)))

    assert all(asyncio.run(all_of_them()))
