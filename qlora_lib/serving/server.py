"""AdapterServer: requests for different adapters, answered in batches over one base model.

An in-process server on asyncio: requests wait in a bounded queue, the next batch takes the oldest
of them, and its rows use an adapter each. Generation runs in one worker thread: the event loop
goes on accepting, and no two batches meet in the model.

Not handled: sampling, stopping a batch that runs, joining one that has begun (continuous
batching), and HTTP. For these serve the same folders with vLLM (docs/REAL_MODELS.md).
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ..data.tokens import encode_prompt
from ..generation.generate import Completion, Decoding, check_prompt, generator
from ..lora.layer import check_names

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
    answer: asyncio.Future
    arrived: float = field(default_factory=time.monotonic)


class AdapterServer:
    """Answers prompts with the adapters of one model, in batches that mix them, within
    `async with AdapterServer(model, tokenizer) as server: await server.generate(...)`.

    model: its adapters must stay as they are while the server runs. decoding: greedy, one sample;
    its batch_size is the most rows of a batch. max_wait_ms: how long the oldest request may wait
    for others to fill its batch. max_queue: requests that may wait; one more is ServerFull.
    timeout_s: from arrival to answer, then RequestTimeout; None: no limit. Leaving the block
    answers what is queued, then stops. Raises ValueError for sampling and limits out of range.
    """

    def __init__(self, model, tokenizer, decoding: Decoding = Decoding(max_new_tokens=128),
                 max_wait_ms: float = 5.0, max_queue: int = 256, timeout_s: float | None = 60.0):
        if decoding.temperature > 0 or decoding.samples > 1:
            raise ValueError(f"{decoding} samples: an answer would depend on the batch it falls "
                             "into; serve with temperature=0 and samples=1")  # fmt: skip
        if max_queue < 1 or max_wait_ms < 0 or (timeout_s is not None and timeout_s <= 0):
            raise ValueError(f"{max_queue=}, {max_wait_ms=}, {timeout_s=}: expected max_queue >= 1,"
                             " max_wait_ms >= 0, and timeout_s > 0 or None")  # fmt: skip
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding
        self.max_wait, self.max_queue, self.timeout_s = max_wait_ms / 1000, max_queue, timeout_s
        self._answer_batch = generator(model, tokenizer, decoding)  # prompts, tasks -> Completions
        self._waiting: deque[_Request] = deque()
        names = "requests refused answered failed timed_out cancelled batches rows tokens"
        self._counts = dict.fromkeys(names.split(), 0)
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._loop_task: asyncio.Task | None = None

    async def __aenter__(self) -> "AdapterServer":
        if self._loop_task is not None:
            raise ServerStopped("the server runs already, or has stopped; make another one")
        self._changed = asyncio.Event()  # something arrived, or the server is to stop
        self._stopping = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="adapter server")
        self._loop_task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *error) -> None:
        self._stopping = True
        self._changed.set()
        try:
            await self._loop_task
        finally:
            self._worker.shutdown(wait=False)

    async def generate(self, prompt: str, task: str | None = None) -> Completion:
        """The completion of a prompt with the adapter `task` (None: the base model alone).
        Cancelling the awaiting task gives its place up. Raises ValueError for an unknown adapter
        or a prompt that doesn't fit, ServerFull, RequestTimeout, ServerStopped, and what generating
        raised, for this request alone."""
        if self._loop_task is None or self._stopping or self._loop_task.done():
            raise ServerStopped("the server is not running: use it within `async with server:`")
        self._counts["requests"] += 1
        try:
            check_names(self.model, task)
            if not isinstance(prompt, str):
                raise ValueError(f"prompt={prompt!r:.40} must be a string")
            check_prompt(self.model, self.decoding, prompt, encode_prompt(self.tokenizer, prompt))
        except ValueError:
            self._counts["failed"] += 1
            raise
        if (waiting := len(self._waiting)) >= self.max_queue:
            self._counts["refused"] += 1
            raise ServerFull(f"{waiting} requests wait already, max_queue={self.max_queue}")
        request = _Request(prompt, task, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._changed.set()
        try:
            completion = await asyncio.wait_for(request.answer, self.timeout_s)
        except asyncio.CancelledError:
            self._counts["cancelled"] += 1
            raise
        except Exception as error:
            late = isinstance(error, TimeoutError) and request.answer.cancelled()  # by the clock
            self._counts["timed_out" if late else "failed"] += 1
            if late:
                raise RequestTimeout(f"no answer within timeout_s={self.timeout_s}") from error
            raise
        finally:
            if request in self._waiting:
                self._waiting.remove(request)
        self._counts["answered"] += 1
        self._counts["tokens"] += completion.tokens
        self._latencies.append(time.monotonic() - request.arrived)
        return completion

    def metrics(self) -> dict:
        """Counts since the start (rows: of all batches; tokens: generated, of answered requests),
        and the latency in seconds from arrival to answer. requests = answered + failed + refused
        + timed_out + cancelled + those under way."""
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
        try:
            while True:
                await self._filled()
                rows = min(len(self._waiting), self.decoding.batch_size)
                batch = [self._waiting.popleft() for _ in range(rows)]
                batch = [r for r in batch if not r.answer.done()]  # given up just now
                if batch:
                    await self._run(batch)
                elif self._stopping:
                    return
        finally:  # cancelled, or a defect: nobody may wait for ever
            for request in [*batch, *self._waiting]:
                if not request.answer.done():
                    request.answer.set_exception(ServerStopped("the server stopped"))

    async def _filled(self) -> None:
        """Wait until a batch is full, its oldest request has waited enough, or the server stops."""
        while not self._stopping and len(self._waiting) < self.decoding.batch_size:
            left = None
            if self._waiting:
                left = self._waiting[0].arrived + self.max_wait - time.monotonic()
                if left <= 0:
                    return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                return

    async def _run(self, batch: Sequence[_Request]) -> None:
        self._counts["batches"] += 1
        self._counts["rows"] += len(batch)
        asked, loop = [(r.prompt, r.task) for r in batch], asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(self._worker, self._outcomes, asked)
        for request, outcome in zip(batch, outcomes):
            if request.answer.done():  # timed out or cancelled meanwhile
                continue
            if isinstance(outcome, Exception):
                request.answer.set_exception(outcome)
            else:
                request.answer.set_result(outcome)

    def _outcomes(self, asked: list[tuple[str, str | None]]) -> list[Completion | Exception]:
        """The completion of each request, or its error: a batch that fails is asked again one by
        one, so that only the request at fault fails. Runs in the worker thread."""
        try:
            return self._answer_batch([p for p, _ in asked], [task for _, task in asked])
        except Exception as error:
            if len(asked) == 1:
                return [error]
            return [self._outcomes([one])[0] for one in asked]


def _percentile(found: Sequence[float], part: float) -> float | None:
    """The nearest rank's value among sorted ones; None for none."""
    # Less a billionth: 0.95 * n may come out just above the whole number that it is.
    return found[max(0, math.ceil(part * len(found) - 1e-9) - 1)] if found else None
