"""AdapterServer: requests for different adapters, answered in batches over one base model.

An in-process server on asyncio: requests wait in a bounded queue, the next batch takes the oldest
of them, and its rows use an adapter each. All that takes time (tokenizing, generating, laying out
the weights) runs in one worker thread: the event loop goes on accepting, and no two batches meet
in the model.

Not handled: sampling, stopping a batch that runs, joining one that has begun (continuous
batching), and HTTP. For these serve the same folders with vLLM (docs/REAL_MODELS.md).
"""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from ..base.ranges import ABOVE_ZERO, COUNT, ZERO_ON
from ..generation.generate import Completion, Decoding, generator
from ..lora.layer import adapter_names

LATENCIES = 10_000  # answered requests that the percentiles are taken over: the last ones


class ServerFull(RuntimeError):
    """The queue holds as many requests as it may; try again later."""


class ServerStopped(RuntimeError):
    """The server is not running: use it within `async with server:`."""


class RequestTimeout(TimeoutError):
    """A request was not answered in time; its place in the queue is free again."""


@dataclass(eq=False)
class _Request:
    prompt: str
    task: str | None
    answer: asyncio.Future  # done as soon as nobody waits for it any more
    arrived: float  # by the event loop's clock


class AdapterServer:
    """Answers prompts with the adapters of one model, in batches that mix them, within
    `async with AdapterServer(model, tokenizer) as server: await server.generate(...)`.

    model: its adapters must stay as they are while the server runs. decoding: greedy, one sample;
    its batch_size is the most rows of a batch. max_wait_ms: how long the oldest request may wait
    for others to fill its batch. max_queue: requests that may wait; one more is ServerFull.
    max_characters: of a prompt, since tokenizing takes time too. timeout_s: from arrival to
    answer, then RequestTimeout. drain_s: how long leaving the block goes on answering what is
    queued; the rest, and all of it after an exception in the block, is ServerStopped. The batch
    that runs is waited for, even where the leaving is cancelled: afterwards nothing uses the
    model. None as timeout_s or drain_s: no limit. Raises ValueError for sampling and limits out
    of range.
    """

    def __init__(self, model, tokenizer, decoding: Decoding = Decoding(max_new_tokens=128),
                 max_wait_ms: float = 5.0, max_queue: int = 256, max_characters: int = 100_000,
                 timeout_s: float | None = 60.0, drain_s: float | None = 30.0):
        if decoding.temperature > 0 or decoding.samples > 1:
            raise ValueError(f"{decoding} samples: an answer would depend on the batch it falls "
                             "into; serve with temperature=0 and samples=1")  # fmt: skip
        COUNT.check("max_queue", max_queue)
        COUNT.check("max_characters", max_characters)
        ZERO_ON.check("max_wait_ms", max_wait_ms)
        if timeout_s is not None:
            ABOVE_ZERO.check("timeout_s", timeout_s)
        if drain_s is not None:
            ZERO_ON.check("drain_s", drain_s)
        self.decoding, self.max_wait = decoding, max_wait_ms / 1000
        self.max_queue, self.max_characters = max_queue, max_characters
        self.timeout_s, self.drain_s = timeout_s, drain_s
        self._adapters = adapter_names(model)  # once: each time would walk all modules
        self._generator = generator(model, tokenizer, decoding)
        self._answer_batch = self._generator  # prompts, tasks -> Completions
        self._waiting: deque[_Request] = deque()
        names = "requests refused answered failed timed_out cancelled under_way batches rows tokens"
        self._counts = dict.fromkeys(names.split(), 0)
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._changed = asyncio.Event()  # something arrived, or the server is to stop
        self._serving: asyncio.Task | None = None
        self._stopping = False  # nothing more is accepted
        self._halted = False  # nothing more is generated

    async def __aenter__(self) -> "AdapterServer":
        if self._serving is not None:
            raise ServerStopped("the server runs already, or has stopped; make another one")
        self._loop = asyncio.get_running_loop()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="adapter server")
        self._serving = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, error, *_) -> None:
        self._stopping = True
        self._changed.set()
        cancelled, left = None, self.drain_s if error is None else 0
        while not self._serving.done():
            try:
                await asyncio.wait([self._serving], timeout=left)  # cancelled, it leaves the task
            except asyncio.CancelledError as now:
                cancelled = now
            if not self._serving.done():  # time is up: only the batch that runs is waited for
                self._halted, left = True, None
                self._give_up(self._waiting)
                self._waiting.clear()
        self._worker.shutdown()
        if cancelled:
            raise cancelled
        self._serving.result()  # raises what ended it, if anything did

    async def generate(self, prompt: str, task: str | None = None) -> Completion:
        """The completion of a prompt with the adapter `task` (None: the base model alone).
        Cancelling the awaiting task gives its place up. Raises ValueError for an unknown adapter
        or a prompt that doesn't fit, ServerFull, RequestTimeout, ServerStopped, and what generating
        raised, for this request alone."""
        if self._serving is None or self._stopping or self._serving.done():
            raise ServerStopped("the server is not running: use it within `async with server:`")
        request = _Request(prompt, task, self._loop.create_future(), self._loop.time())
        self._counts["requests"] += 1
        self._counts["under_way"] += 1
        end = "failed"  # unless it ends otherwise
        try:
            self._check(prompt, task)
            if (waiting := len(self._waiting)) >= self.max_queue:
                end = "refused"
                raise ServerFull(f"{waiting} requests wait already, max_queue={self.max_queue}")
            self._waiting.append(request)
            self._changed.set()
            async with asyncio.timeout(self.timeout_s) as clock:
                completion = await request.answer
            self._counts["tokens"] += completion.tokens
            self._latencies.append(self._loop.time() - request.arrived)
            end = "answered"
            return completion
        except TimeoutError:
            if not clock.expired():
                raise  # the model's own
            end = "timed_out"
            raise RequestTimeout(f"no answer within timeout_s={self.timeout_s}") from None
        except (asyncio.CancelledError, GeneratorExit):
            end = "cancelled"
            raise
        finally:
            request.answer.cancel()  # unless it is done
            if request in self._waiting:
                self._waiting.remove(request)
            self._counts["under_way"] -= 1
            self._counts[end] += 1

    def _check(self, prompt: str, task: str | None) -> None:
        """Raise ValueError for what can be refused at once; the tokens are checked later."""
        if task is not None and task not in self._adapters:
            raise ValueError(f"no adapter {task!r:.80}; the model has {self._adapters}")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt={prompt!r:.40} must be a string")
        if len(prompt) > self.max_characters:
            raise ValueError(f"a prompt of {len(prompt):,} characters is too long: "
                             f"max_characters={self.max_characters:,}")  # fmt: skip

    def metrics(self) -> dict:
        """Counts since the start (rows: of all batches; tokens: generated, of answered requests),
        and the latency in seconds from arrival to answer. At every moment requests = answered +
        failed + refused + timed_out + cancelled + under_way."""
        found, counts = sorted(self._latencies), self._counts
        return counts | {
            "waiting": len(self._waiting),
            "rows_a_batch": counts["rows"] / counts["batches"] if counts["batches"] else 0.0,
            "latency_p50": _percentile(found, 0.50),
            "latency_p95": _percentile(found, 0.95),
            "latency_max": found[-1] if found else None,
        }

    async def _serve(self) -> None:
        """Answer batch after batch, until the server is stopped and nothing waits."""
        batch: list[_Request] = []
        layout = ExitStack()  # of the weights, as decoding is fastest: once, not at each batch
        try:
            await self._in_worker(layout.enter_context, self._generator.layout())
            while await self._filled():
                rows = min(len(self._waiting), self.decoding.batch_size)
                batch = [self._waiting.popleft() for _ in range(rows)]
                batch = [r for r in batch if not r.answer.done()]  # given up just now
                if batch:
                    self._counts["batches"] += 1
                    self._counts["rows"] += len(batch)
                    await self._in_worker(self._answer, batch)
        finally:  # halted, cancelled, or a defect: nobody may wait for ever
            self._give_up([*batch, *self._waiting])
            await self._in_worker(layout.close)  # after what still runs there

    async def _filled(self) -> bool:
        """Wait until a batch is full, or its oldest request has waited enough; False when the
        server is to stop and nothing waits."""
        while not self._stopping and len(self._waiting) < self.decoding.batch_size:
            self._changed.clear()
            due = self._waiting[0].arrived + self.max_wait if self._waiting else None
            try:
                async with asyncio.timeout_at(due):
                    await self._changed.wait()
            except TimeoutError:
                break
        return bool(self._waiting) or not self._stopping

    def _in_worker(self, work, *arguments) -> asyncio.Future:
        return self._loop.run_in_executor(self._worker, work, *arguments)

    def _give_up(self, requests: Sequence[_Request]) -> None:
        for request in requests:
            _settle(request, ServerStopped("the server stopped before it answered"))

    # --- in the worker thread ---

    def _answer(self, batch: list[_Request]) -> None:
        """Refuse the prompts whose tokens don't fit, which must not cost the others, and generate
        what is left."""
        fitting = []
        for request in batch:
            try:
                self._generator.check([request.prompt])
                fitting.append(request)
            except BaseException as error:
                self._hand_out(request, error)
        self._ask(fitting)

    def _ask(self, batch: list[_Request]) -> None:
        """Generate and hand out. A batch that fails is asked again by halves, until the request at
        fault is alone; what nobody waits for any more is left out."""
        batch = [r for r in batch if not r.answer.done()]
        if not batch or self._halted:
            return
        try:
            said = list(self._answer_batch([r.prompt for r in batch], [r.task for r in batch]))
        except BaseException as error:  # a SystemExit too: whoever asked has to hear of it
            said = [error] if len(batch) == 1 else None
        if said is None:  # not above, where the error would keep the failed batch's tensors
            half = len(batch) // 2
            self._ask(batch[:half])
            self._ask(batch[half:])
            return
        if len(said) != len(batch):  # whose they are can't be known
            text = f"{len(said)} answers to {len(batch)} prompts: a defect of the generator"
            said = [RuntimeError(text) for _ in batch]
        for request, outcome in zip(batch, said):
            self._hand_out(request, outcome)

    def _hand_out(self, request: _Request, outcome: Completion | BaseException) -> None:
        self._loop.call_soon_threadsafe(_settle, request, outcome)


def _settle(request: _Request, outcome: Completion | BaseException) -> None:
    """Give a request its answer, or its error, if it still waits."""
    if request.answer.done():
        return
    if not isinstance(outcome, BaseException):
        request.answer.set_result(outcome)
        return
    if not isinstance(outcome, Exception) or isinstance(outcome, StopIteration):
        # These would end the event loop, a task or a generator instead of telling who asked.
        wrapped = RuntimeError(f"generating raised {outcome!r}")
        wrapped.__cause__ = outcome
        outcome = wrapped
    request.answer.set_exception(outcome)


def _percentile(found: Sequence[float], part: float) -> float | None:
    """The nearest rank's value among sorted ones; None for none."""
    # Less a billionth: 0.95 * n may come out just above the whole number that it is.
    return found[max(0, math.ceil(part * len(found) - 1e-9) - 1)] if found else None
