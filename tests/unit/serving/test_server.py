"""AdapterServer: every answer is the one that the request gets alone, whatever else happens."""

import asyncio
import threading

import pytest
import torch

from qlora_lib.generation.generate import Completion, Decoding, generator
from qlora_lib.lora.inject import delete_adapter, inject_lora, use_adapter
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.serving.server import (
    AdapterServer,
    RequestTimeout,
    ServerFull,
    ServerStopped,
    _percentile,
)
from tests.support.lora_models import base_of, logits, trained
from tests.support.small_models import PAIRS, small_model, small_tokenizer

PROMPTS = [prompt for prompt, _ in PAIRS[:6]]
TASKS = ["a", "b", "c", "d", None]
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
        return [Completion(f"{task}: {p}", 3, True) for p, task in self.batches[-1]]


def held_server(batch=1, **given):
    """A server of two adapters' names, whose batches stay in the worker until `held.go` is set."""
    model = small_model()
    for name in ("a", "b"):
        inject_lora(model, ("q_proj",), rank=1, adapter=name)
    decoding = Decoding(max_new_tokens=8, batch_size=batch)
    server = AdapterServer(model, small_tokenizer(), decoding, **{"max_wait_ms": 0} | given)
    server._answer_batch = held = Held()
    return server, held


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

    answers, metrics = asyncio.run(all_of_them())
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

    held, got = asyncio.run(run())
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

    metrics = asyncio.run(run())
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

    metrics, batches = asyncio.run(run())
    assert batches == [[("1", "a")], [("2", "a")]]  # what nobody waits for is not generated
    assert (metrics["cancelled"], metrics["timed_out"], metrics["answered"]) == (1, 1, 2)


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

    cancelled, answer = asyncio.run(run())
    assert isinstance(cancelled, asyncio.CancelledError) and answer == "a: 2"


# --- failures --------------------------------------------------------------------------------


def test_bad_requests_are_refused_before_they_reach_a_batch():
    async def run():
        server, held = held_server()
        async with server:
            for prompt, task, message in (
                ("1", "z", r"no adapter 'z'; the model has \['a', 'b'\]"),
                ("long " * 300, "a", "exceed the context of 256"),
                (7, "a", "prompt=7 must be a string"),
            ):
                with pytest.raises(ValueError, match=message):
                    await server.generate(prompt, task)
            return server.metrics(), held.batches

    metrics, batches = asyncio.run(run())
    assert metrics["failed"] == metrics["requests"] == 3 and not batches


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

    (a, d, b), metrics = asyncio.run(run())
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

    assert asyncio.run(run())["failed"] == 1


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

    asyncio.run(run())


def test_stopping_by_force_leaves_nobody_waiting():
    async def run():
        server, held = held_server(timeout_s=None)
        await server.__aenter__()
        both = [asyncio.create_task(server.generate(p, "a")) for p in "12"]
        await begun(held)
        server._loop_task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await server.__aexit__()
        held.go.set()
        return await asyncio.gather(*both, return_exceptions=True)

    assert [type(e) for e in asyncio.run(run())] == [ServerStopped, ServerStopped]


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(decoding=Decoding(temperature=0.5)), "serve with temperature=0"),
        (dict(max_queue=0), "max_queue >= 1"),
        (dict(max_wait_ms=-1), "max_wait_ms >= 0"),
        (dict(timeout_s=0), "timeout_s > 0 or None"),
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
