"""AdapterServer: every answer is the one that the request gets alone, whatever else happens."""

import asyncio
import gc
import itertools
import random
import threading
from collections import Counter

import pytest
import torch

from qlora_lib.generation.generate import Completion, Decoding, generator
from qlora_lib.layers.kernels import tile_rows
from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.inject import delete_adapter, inject_lora, use_adapter
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.serving.server import (
    AdapterServer,
    RequestTimeout,
    ServerFull,
    ServerStopped,
    _percentile,
    _Request,
)
from tests.support.lora_models import base_of, logits, trained
from tests.support.small_models import PAIRS, small_model, small_tokenizer

PROMPTS = [prompt for prompt, _ in PAIRS[:6]]
TASKS = ["a", "b", "c", "d", None]
NAN, INF = float("nan"), float("inf")
LONG = 600_000  # milliseconds: such a batch begins when it is full, never by the clock


def four_adapters(kind="dense"):
    model = base_of(kind)
    for i, name in enumerate("abcd"):
        inject_lora(model, ALL_LINEAR, rank=2 + i, adapter=name)
        trained(model, name, seed=100 * i, std=0.1)
    return model


def alone(model, decoding):
    """The answer of each (prompt, task) in a batch of its own."""
    generate, found = generator(model, small_tokenizer(), decoding), {}
    for task in TASKS:
        with use_adapter(model, task):
            found |= {(p, task): generate([p])[0] for p in PROMPTS}
    return found


class Held:
    """Answers (task, prompt) once it is let go: a model that is as slow as a test wants."""

    def __init__(self):
        self.go, self.begun, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, prompts, tasks):
        self.batches.append(list(zip(prompts, tasks)))
        self.begun.set()
        self.go.wait(20)  # else a failing test would never end
        return [said(p, task) for p, task in self.batches[-1]]


def said(prompt, task):
    return Completion(f"{task}: {prompt}", 3, True)


def balanced(metrics) -> bool:
    ends = "answered failed refused timed_out cancelled under_way".split()
    return metrics["requests"] == sum(metrics[end] for end in ends)


def held_server(batch=1, **given):
    """A server of two adapters' names, whose batches stay in the worker until `held.go` is set."""
    model = small_model()
    for name in ("a", "b"):
        inject_lora(model, ("q_proj",), rank=1, adapter=name)
    decoding = Decoding(max_new_tokens=8, batch_size=batch)
    server = AdapterServer(model, small_tokenizer(), decoding, **{"max_wait_ms": 0} | given)
    server._answer_batch = held = Held()
    return server, held


def finished(coroutine):
    """asyncio.run, but that a request which nobody answers fails the test instead of hanging it."""
    return asyncio.run(asyncio.wait_for(coroutine, 120))


async def begun(held):
    await asyncio.get_running_loop().run_in_executor(None, held.begun.wait)


# --- answers ---------------------------------------------------------------------------------


def test_a_list_of_prompts_names_an_adapter_each():
    """Longest first, then by adapter within a batch: names and completions follow."""
    model, decoding = four_adapters(), Decoding(max_new_tokens=6, batch_size=7)
    want = alone(model, decoding)
    asked = [(p, t) for t in TASKS for p in PROMPTS]
    generate = generator(model, small_tokenizer(), decoding)
    got = generate([p for p, _ in asked], [t for _, t in asked])
    assert got == [want[a] for a in asked]
    assert len({want[PROMPTS[0], t] for t in TASKS}) == 5  # they all say something else


def test_sampled_rows_keep_their_adapter():
    model = four_adapters()
    only_the_best = dict(temperature=1.0, top_p=1e-6)
    decoding = Decoding(**only_the_best, samples=3, max_new_tokens=5, batch_size=4)
    want = alone(model, Decoding(max_new_tokens=5))
    tasks = ["b", None, "a"] * 2
    got = generator(model, small_tokenizer(), decoding)(PROMPTS, tasks)
    assert got == [[want[p, t]] * 3 for p, t in zip(PROMPTS, tasks)]


@pytest.mark.parametrize(
    "names, message",
    [
        (["a"], r"adapters=\['a'\] for 6 prompts: expected a list with a name"),
        ("abcdab", "expected a list"),
        (["a"] * 5 + ["z"], r"no adapter 'z'; the model has \['a', 'b', 'c', 'd'\]"),
    ],
)
def test_bad_names_of_prompts_are_refused(names, message):
    generate = generator(four_adapters(), small_tokenizer(), Decoding(max_new_tokens=2))
    with pytest.raises(ValueError, match=message):
        generate(PROMPTS, names)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_each_of_many_concurrent_answers_is_the_one_it_gets_alone(kind):
    """90 requests for four adapters and the base, while the event loop's own thread uses the
    same model with an adapter of its choice."""
    model, decoding = four_adapters(kind), Decoding(max_new_tokens=5, batch_size=16)
    want = alone(model, decoding)
    with use_adapter(model, "c"):
        c = logits(model)

    async def client(server, i):
        prompt, task = PROMPTS[i % 6], TASKS[(i * 7) % 5]
        return (prompt, task), await server.generate(prompt, task)

    async def all_of_them():
        async with AdapterServer(model, small_tokenizer(), decoding) as server:
            asking = [asyncio.create_task(client(server, i)) for i in range(90)]
            with use_adapter(model, "c"):
                for _ in range(20):
                    await asyncio.sleep(0)
                    assert torch.equal(logits(model), c)
            return [await t for t in asking], server.metrics()

    answers, metrics = finished(all_of_them())
    assert all(completion == want[asked] for asked, completion in answers)
    assert len({asked for asked, _ in answers}) == 30
    assert metrics["requests"] == metrics["answered"] == metrics["rows"] == 90
    assert metrics["failed"] == metrics["waiting"] == 0
    assert 6 <= metrics["batches"] < 90 and metrics["rows_a_batch"] == 90 / metrics["batches"]
    assert metrics["tokens"] == sum(completion.tokens for _, completion in answers)
    assert 0 < metrics["latency_p50"] <= metrics["latency_p95"] <= metrics["latency_max"]


def test_rows_of_different_adapters_share_a_batch_in_order_of_arrival():
    async def run():
        server, held = held_server(batch=3, max_wait_ms=LONG)
        held.go.set()
        async with server:
            tasks = ["a", None, "b", "a", "b", "a"]
            got = await asyncio.gather(*(server.generate(f"{i}", t) for i, t in enumerate(tasks)))
        return held, got

    held, got = finished(run())
    first, second = held.batches
    assert first == [("0", "a"), ("1", None), ("2", "b")]
    assert second == [("3", "a"), ("4", "b"), ("5", "a")]
    assert got == ["a: 0", "None: 1", "b: 2", "a: 3", "b: 4", "a: 5"]


# --- limits ----------------------------------------------------------------------------------


def test_the_event_loop_goes_on_while_a_batch_is_generated_and_a_full_queue_refuses():
    async def run():
        server, held = held_server(max_queue=2)
        async with server:
            first = asyncio.create_task(server.generate("1", "a"))
            await begun(held)  # in the worker, and we are here
            others = [asyncio.create_task(server.generate(p, "b")) for p in "23"]
            await asyncio.sleep(0)
            with pytest.raises(ServerFull, match="2 requests wait already, max_queue=2"):
                await server.generate("4", "a")
            assert not first.done() and server.metrics()["waiting"] == 2
            held.go.set()
            assert await asyncio.gather(first, *others) == ["a: 1", "b: 2", "b: 3"]
            assert await server.generate("5") == "None: 5"
        return server.metrics()

    metrics = finished(run())
    assert (metrics["refused"], metrics["answered"], metrics["batches"]) == (1, 4, 4)


def test_a_request_that_is_late_or_cancelled_frees_its_place_and_the_others_are_answered():
    async def run():
        server, held = held_server(max_queue=2)
        async with server:
            first = asyncio.create_task(server.generate("1", "a"))
            await begun(held)
            late = asyncio.create_task(server.generate("2", "a"))
            gone = asyncio.create_task(server.generate("3", "b"))
            await asyncio.sleep(0)
            gone.cancel()
            server.timeout_s = 0.01  # of those to come
            with pytest.raises(asyncio.CancelledError):
                await gone
            with pytest.raises(RequestTimeout, match="no answer within timeout_s=0.01"):
                await server.generate("4", "b")
            assert server.metrics()["waiting"] == 1
            held.go.set()
            assert await asyncio.gather(first, late) == ["a: 1", "a: 2"]
        return server.metrics(), held.batches

    metrics, batches = finished(run())
    assert batches == [[("1", "a")], [("2", "a")]]  # what nobody waits for is not generated
    assert (metrics["cancelled"], metrics["timed_out"], metrics["answered"]) == (1, 1, 2)


def test_a_request_whose_coroutine_is_closed_counts_as_cancelled():
    async def run():
        server, held = held_server()
        async with server:
            asking = server.generate("1", "a")
            asking.send(None)
            assert server.metrics()["under_way"] == 1
            asking.close()
            assert balanced(server.metrics()) and server.metrics()["waiting"] == 0
            held.go.set()
        return server.metrics(), held.batches

    metrics, batches = finished(run())
    assert metrics["cancelled"] == 1 and metrics["under_way"] == 0 and not batches


def test_a_request_cancelled_while_it_is_generated_leaves_the_batch_alone():
    async def run():
        server, held = held_server(batch=2, max_wait_ms=LONG)
        async with server:
            both = [asyncio.create_task(server.generate(p, "a")) for p in "12"]
            await begun(held)
            both[0].cancel()
            await asyncio.sleep(0)
            held.go.set()
            return await asyncio.gather(*both, return_exceptions=True)

    cancelled, answer = finished(run())
    assert isinstance(cancelled, asyncio.CancelledError) and answer == "a: 2"


# --- failures --------------------------------------------------------------------------------


def test_bad_requests_are_refused_before_they_reach_a_batch():
    async def run():
        server, held = held_server(max_characters=5_000)
        async with server:
            for prompt, task, message in (
                ("1", "z", r"no adapter 'z'; the model has \['a', 'b'\]"),
                ("1", ["a"], "no adapter"),
                ("long " * 300, "a", "exceed the context of 256"),
                (7, "a", "prompt=7 must be a string"),
                ("half a pair: \ud800", "a", "surrogate pair"),
            ):
                with pytest.raises(ValueError, match=message):
                    await server.generate(prompt, task)
            return server.metrics(), held.batches

    metrics, batches = finished(run())
    assert metrics["failed"] == metrics["requests"] == 5 and not batches


def test_prompts_are_tokenized_in_the_worker_and_never_beyond_the_limit_of_characters():
    async def run():
        server, held = held_server(max_characters=40)
        held.go.set()
        seen = []

        def check(prompts):
            seen.append((*prompts, threading.current_thread()))

        server._generator.check = check
        async with server:
            await server.generate("4" * 40, "a")
            with pytest.raises(ValueError, match="50,000,000 characters .* max_characters=40"):
                await server.generate("4" * 50_000_000, "a")
        return seen

    ((prompt, thread),) = finished(run())
    assert prompt == "4" * 40 and thread is not threading.main_thread()


def test_a_prompt_of_too_many_tokens_costs_the_others_nothing():
    async def run():
        server, held = held_server(batch=3, max_wait_ms=LONG)
        held.go.set()
        async with server:
            asked = (server.generate(p, "a") for p in ("1", "long " * 300, "3"))
            return await asyncio.gather(*asked, return_exceptions=True), held.batches

    (one, long, three), batches = finished(run())
    assert (one, three) == ("a: 1", "a: 3") and isinstance(long, ValueError)
    assert batches == [[("1", "a"), ("3", "a")]]


def test_a_request_does_not_walk_over_the_modules():
    async def run():
        server, held = held_server()
        held.go.set()
        async with server:
            await server.generate("0", "a")  # the server has begun
            server._generator.model.named_modules = None  # calling it would fail
            assert await server.generate("1", "a") == "a: 1"
            with pytest.raises(ValueError, match="no adapter 'z'"):
                await server.generate("1", "z")

    finished(run())


def test_a_request_that_fails_does_not_fail_its_batch():
    """An adapter that is deleted while a request for it waits."""
    model, decoding = four_adapters(), Decoding(max_new_tokens=5, batch_size=3)
    want = alone(model, decoding)

    async def run():
        async with AdapterServer(model, small_tokenizer(), decoding, max_wait_ms=LONG) as server:
            first = [asyncio.create_task(server.generate(PROMPTS[0], t)) for t in ("a", "d")]
            await asyncio.sleep(0)
            delete_adapter(model, "d")
            asked = [*first, asyncio.create_task(server.generate(PROMPTS[1], "b"))]
            return await asyncio.gather(*asked, return_exceptions=True), server.metrics()

    (a, d, b), metrics = finished(run())
    assert (a, b) == (want[PROMPTS[0], "a"], want[PROMPTS[1], "b"])
    assert isinstance(d, ValueError) and "no adapter 'd'" in str(d)
    assert (metrics["answered"], metrics["failed"], metrics["batches"]) == (2, 1, 1)


def test_what_generating_raises_is_raised_where_it_was_asked():
    async def run():
        server, _ = held_server()

        def broken(prompts, tasks):
            raise TimeoutError("of the model, not of the clock")

        server._answer_batch = broken
        async with server:
            with pytest.raises(TimeoutError, match="of the model") as error:
                await server.generate("1", "a")
            assert not isinstance(error.value, RequestTimeout)
            return server.metrics()

    assert finished(run())["failed"] == 1


def failing_on(bad, error=ValueError):
    """A generator that raises for a batch with one of these prompts, and what it was asked."""
    asked = []

    def generate(prompts, tasks):
        asked.append(list(prompts))
        if bad & set(prompts):
            raise error(f"one of {bad}")
        return [said(p, task) for p, task in zip(prompts, tasks)]

    return generate, asked


def test_the_request_at_fault_is_found_by_halving():
    async def run():
        server, _ = held_server(batch=16, max_wait_ms=LONG)
        server._answer_batch, asked = failing_on({"5"})
        async with server:
            answers = (server.generate(str(i), "a") for i in range(16))
            return await asyncio.gather(*answers, return_exceptions=True), asked

    answers, asked = finished(run())
    assert isinstance(answers.pop(5), ValueError)
    assert answers == [f"a: {i}" for i in range(16) if i != 5]
    assert len(asked) == 9  # all, and two halves on each of four levels; one by one it would be 17


def test_of_a_failing_batch_only_those_who_still_wait_are_asked_again():
    async def run():
        server, _ = held_server(batch=8, max_wait_ms=LONG)
        loop, begun, go, asked = asyncio.get_running_loop(), asyncio.Event(), threading.Event(), []

        def generate(prompts, tasks):
            asked.append(list(prompts))
            if len(asked) == 1:
                loop.call_soon_threadsafe(begun.set)
                go.wait(20)
                raise ValueError("the first time")
            return [said(p, task) for p, task in zip(prompts, tasks)]

        server._answer_batch = generate
        async with server:
            tasks = [asyncio.create_task(server.generate(str(i))) for i in range(8)]
            await begun.wait()
            for task in tasks[:4] + tasks[5:]:
                task.cancel()
            await asyncio.sleep(0)
            go.set()
            assert await tasks[4] == "None: 4"
        return asked

    asked = finished(run())
    assert asked[1:] == [["4"]]


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration, KeyboardInterrupt,
                                   SystemExit, GeneratorExit, asyncio.CancelledError, MemoryError])
def test_whatever_generating_raises_its_request_hears_of_it_and_the_server_goes_on(error):
    async def run():
        server, _ = held_server(batch=2, max_wait_ms=LONG)
        server._answer_batch, _ = failing_on({"bad"}, error)
        async with server:
            first = (server.generate(p, "a") for p in ("bad", "1"))
            first = await asyncio.gather(*first, return_exceptions=True)
            second = await asyncio.gather(*(server.generate(p, "a") for p in "23"))
        return first, second, server.metrics()

    (bad, one), second, metrics = finished(run())
    assert isinstance(bad, Exception) and "one of" in str(bad)
    assert [one, *second] == ["a: 1", "a: 2", "a: 3"]
    assert (metrics["failed"], metrics["answered"], metrics["cancelled"]) == (1, 3, 0)


@pytest.mark.parametrize("change", [lambda a: a[:-1], lambda a: a[:1], lambda a: a + a[:1],
                                    lambda a: [], lambda a: None])
def test_another_number_of_answers_is_an_error_for_each_request(change):
    async def run():
        server, _ = held_server(batch=3, max_wait_ms=LONG, timeout_s=None)
        server._answer_batch = lambda prompts, tasks: change([said(p, None) for p in prompts])
        async with server:
            asked = (server.generate(p) for p in "123")
            return await asyncio.gather(*asked, return_exceptions=True), server.metrics()

    ends, metrics = finished(run())
    assert all(isinstance(end, Exception) for end in ends)
    assert metrics["failed"] == 3 and balanced(metrics)


# --- start and end ---------------------------------------------------------------------------


def test_the_weights_are_laid_out_once_for_all_batches_and_put_back(monkeypatch):
    """In bf16, where laying out takes longer than a small batch."""
    model = small_model()
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            linear = getattr(block.mlp, name)
            packed = quantize_rtn(linear.weight.detach(), QuantSpec(4, 64))
            setattr(block.mlp, name, QuantizedLinear.from_linear(linear, packed))
    model = model.bfloat16()
    inject_lora(model, ("q_proj",), rank=2, adapter="a")
    decoding = Decoding(max_new_tokens=2, batch_size=2)
    want = generator(model, small_tokenizer(), decoding)(PROMPTS)
    calls, own = [], QuantizedLinear.lay_out

    def lay_out(layer, decoding):
        calls.append((decoding, threading.current_thread() is threading.main_thread()))
        own(layer, decoding)

    monkeypatch.setattr(QuantizedLinear, "lay_out", lay_out)

    async def run():
        async with AdapterServer(model, small_tokenizer(), decoding, max_wait_ms=LONG) as server:
            got = await asyncio.gather(*(server.generate(p) for p in PROMPTS))
            assert server.metrics()["batches"] == 3
            return got

    assert finished(run()) == want
    served = tile_rows() is not None and 128 % tile_rows() == 0
    outs, backs = (calls.count((decoding, False)) for decoding in (True, False))
    assert backs == 4 and outs == 4 if served else outs >= 4  # each layer; none in the event loop
    assert len(calls) == outs + backs
    assert not any(m.laid_out for m in model.modules() if hasattr(m, "laid_out"))


def test_a_server_answers_within_its_block_only_and_what_is_queued_before_it_stops():
    async def run():
        server, held = held_server(batch=8, max_wait_ms=LONG)
        with pytest.raises(ServerStopped, match="within `async with server:`"):
            await server.generate("0", "a")
        async with server:
            with pytest.raises(ServerStopped, match="runs already"):
                await server.__aenter__()
            waiting = [asyncio.create_task(server.generate(p, "a")) for p in "12"]
            await asyncio.sleep(0)
            held.go.set()
        assert await asyncio.gather(*waiting) == ["a: 1", "a: 2"]
        with pytest.raises(ServerStopped):
            await server.generate("3", "a")

    finished(run())


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("how", ["a limit", "an error", "a cancellation"])
def test_leaving_in_a_hurry_waits_for_the_batch_that_runs_and_for_no_other(how):
    """By drain_s, after an exception in the block, and where leaving is itself cancelled, twice."""

    async def run():
        server, held = held_server(drain_s=0 if how == "a limit" else None, timeout_s=None)
        await server.__aenter__()
        asked = [asyncio.create_task(server.generate(p, "a")) for p in "123"]
        await begun(held)
        error = LookupError if how == "an error" else None
        leaving = asyncio.create_task(server.__aexit__(error, None, None))
        for _ in range(2 if how == "a cancellation" else 0):
            await turns(5)
            leaving.cancel()
        for request in asked[1:]:
            with pytest.raises(ServerStopped):
                await request
        assert not leaving.done() and not asked[0].done()  # the model is in use
        held.go.set()
        await asyncio.wait([leaving])
        assert leaving.cancelled() == (how == "a cancellation")
        assert not any(thread.is_alive() for thread in server._worker._threads)
        return await asked[0], held.batches, server.metrics()

    answer, batches, metrics = finished(run())
    assert answer == "a: 1" and batches == [[("1", "a")]]
    assert (metrics["answered"], metrics["failed"]) == (1, 2) and balanced(metrics)


def test_a_server_that_stops_does_not_ask_a_failed_batch_again():
    async def run():
        server, held = held_server(batch=4, drain_s=0, max_wait_ms=LONG, timeout_s=None)

        def generate(prompts, tasks):
            held(prompts, tasks)
            raise ValueError("always")

        server._answer_batch = generate
        await server.__aenter__()
        asked = [asyncio.create_task(server.generate(p, "a")) for p in "1234"]
        await begun(held)
        leaving = asyncio.create_task(server.__aexit__(None, None, None))
        await turns(5)
        held.go.set()
        await leaving
        return await asyncio.gather(*asked, return_exceptions=True), held.batches

    ends, batches = finished(run())
    assert {type(e) for e in ends} == {ServerStopped} and len(batches) == 1


def test_stopping_by_force_leaves_nobody_waiting():
    async def run():
        server, held = held_server(timeout_s=None)
        await server.__aenter__()
        both = [asyncio.create_task(server.generate(p, "a")) for p in "12"]
        await begun(held)
        server._serving.cancel()
        ends = await asyncio.gather(*both, return_exceptions=True)
        held.go.set()
        with pytest.raises(asyncio.CancelledError):
            await server.__aexit__(None, None, None)
        return ends

    assert [type(e) for e in finished(run())] == [ServerStopped, ServerStopped]


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(decoding=Decoding(temperature=0.5)), "serve with temperature=0"),
        *((dict(max_queue=bad), "max_queue") for bad in (0, 2.5, NAN, True, "8", None)),
        *((dict(max_characters=bad), "max_characters") for bad in (0, 1e5, None)),
        *((dict(max_wait_ms=bad), "max_wait_ms") for bad in (-1, NAN, INF, "5", None)),
        *((dict(timeout_s=bad), "timeout_s") for bad in (0, -1, NAN, INF, "5")),
        *((dict(drain_s=bad), "drain_s") for bad in (-1, NAN, INF, "5")),
    ],
)
def test_bad_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        AdapterServer(small_model(), small_tokenizer(), **given)


def test_percentiles_are_those_of_the_nearest_rank():
    found = {n: list(range(1, n + 1)) for n in (1, 2, 20, 100)}
    assert [_percentile(found[n], 0.5) for n in found] == [1, 1, 10, 50]
    assert [_percentile(found[n], 0.95) for n in found] == [1, 2, 19, 95]
    assert all(_percentile(list(range(1, 100 * n + 1)), 0.95) == 95 * n for n in range(1, 30))
    assert _percentile([], 0.5) is None


def test_numbers_of_nothing_are_none():
    server, _ = held_server()
    metrics = server.metrics()
    assert metrics["rows_a_batch"] == 0 and metrics["latency_p95"] is None


# --- a storm ---------------------------------------------------------------------------------


class Faulty:
    """Fails for prompts that say so, and now and then loses an answer."""

    def __init__(self, seed):
        self.random, self.running = random.Random(seed), False

    def __call__(self, prompts, tasks):
        self.running = True
        try:
            for prompt in prompts:
                if prompt.startswith("bad"):
                    raise (ValueError, StopIteration, SystemExit)[len(prompt) % 3](prompt)
            answers = [said(p, task) for p, task in zip(prompts, tasks)]
            return answers[:-1] if self.random.random() < 0.02 else answers
        finally:
            self.running = False


END = {ServerFull: "refused", RequestTimeout: "timed_out", asyncio.CancelledError: "cancelled"}
ENDS = ("answered", "failed", *END.values())


@pytest.mark.parametrize("ending", ["drained", "limited", "error", "cancelled"])
def test_every_one_of_1000_requests_is_accounted_for_and_nothing_is_left(ending):
    """Random cancellations, failures, timeouts and overload, until the server is left somehow: after
    1,000 requests, or more where the machine is so busy that too few of them were answered."""
    rng, ends, inside, loose = random.Random(ending), Counter(), set(), []
    before = set(threading.enumerate())
    faulty = Faulty(ending)

    async def client(server, number):
        prompt = rng.choice(["4"] * 12 + ["bad", "bad ", "bad  ", "long " * 300, "\ud800", 7])
        task = rng.choice(["a", "b", None, "a", "b", None, "a", "z"])
        prompt = f"{prompt}{number}" if prompt == "4" else prompt
        server.timeout_s = rng.choice([60, 60, 60, 60, None, 1e-9, 1e-3])  # of this request
        inside.add(number)
        try:
            assert await server.generate(prompt, task) == f"{task}: {prompt}"
            ends["answered"] += 1
        except BaseException as error:
            ends[END.get(type(error), "failed")] += 1
        finally:
            inside.discard(number)

    def check(server):
        metrics = server.metrics()
        assert balanced(metrics) and metrics["under_way"] == len(inside)
        assert {n: metrics[n] for n in ends} == ends

    async def block(server, clients):
        async with server:
            for number in itertools.count():
                if number >= 1000 and (number == 100_000 or all(ends[end] > 5 for end in ENDS)):
                    break
                clients.append(asyncio.create_task(client(server, number)))
                if rng.random() < 0.5:
                    await turns(rng.choice([1, 1, 2, 5]))
                    check(server)
                if rng.random() < 0.2:
                    rng.choice(clients[-30:]).cancel()
                if rng.random() < 0.05:
                    await asyncio.wait(clients[-15:], return_when=asyncio.FIRST_COMPLETED)
                    check(server)
            await asyncio.sleep(0)  # the last one asks
            if ending == "error":
                raise LookupError

    async def run():
        asyncio.get_running_loop().set_exception_handler(lambda _, about: loose.append(about))
        server, _ = held_server(batch=7, max_queue=30, max_wait_ms=rng.choice([0, 1]),
                                drain_s=0 if ending == "limited" else None)
        server._answer_batch, clients = faulty, []
        leaving = asyncio.create_task(block(server, clients))
        while ending == "cancelled" and not server._stopping:
            await asyncio.sleep(0)
        if ending == "cancelled":
            leaving.cancel()
        await asyncio.wait([leaving])
        assert not faulty.running and set(threading.enumerate()) == before
        if ending in ("drained", "limited"):
            leaving.result()
        else:
            assert leaving.cancelled() or isinstance(leaving.exception(), LookupError)
        await asyncio.wait(clients)
        check(server)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return server.metrics()

    metrics = asyncio.run(run())
    assert metrics["under_way"] == metrics["waiting"] == 0
    assert sum(ends.values()) == metrics["requests"] > 900  # some are cancelled before they ask
    assert all(ends[end] > 5 for end in ENDS)
    gc.collect()
    assert not loose and not any(type(o) is _Request for o in gc.get_objects())
