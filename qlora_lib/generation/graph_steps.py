"""Decoding without Python between tokens: a step on memory that stays where it is, captured once
for a batch as a CUDA graph and then replayed.

A token of LLaMA-2-7B takes 1,283 operations on the GPU, 39 in each block and 35 around them, and
1,731 with adapters on all linears (counted with transformers 5.23). Python launches each in about
ten microseconds or more, and the GPU waits. A CUDA graph launches all at one call. It repeats
them on the same addresses: so keys and values lie in a cache of full length (transformers'
StaticCache), and what changes from token to token (the last token, its position, the mask, where it
is written) is changed in place, by the step itself.

It has never run on a GPU. What the tests show on a CPU: the same tokens as `generate`'s, and a step
that neither moves its memory nor looks at a number, which are what a capture needs.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature

import torch
from torch import Tensor
from torch.nn.functional import pad

WARM = 2  # steps before the capture, in which kernels are compiled and adapters cast; they count
LOOK = 16  # steps between two looks at whether all rows have ended: a look waits for the GPU
WORTH = 32  # new tokens, at least: capturing takes as long as some steps from Python


class Steps:
    """The tokens of a batch, in tensors that a step changes in place.

    input_ids, mask: (rows, width), padded on the left. settings: a GenerationConfig, of which
    max_new_tokens, eos_token_id (a list), pad_token_id, do_sample, temperature and top_p count.
    The prompt is read and a first token chosen at once.
    """

    def __init__(self, model, input_ids: Tensor, mask: Tensor, settings):
        from transformers import StaticCache

        new, device = settings.max_new_tokens, input_ids.device
        self.model, self.settings = model, settings
        self.width = input_ids.shape[1]
        self.cache = StaticCache(model.config, max_cache_len=self.width + new)
        self.sequences = pad(input_ids, (0, new), value=settings.pad_token_id)  # (rows, length)
        self.mask = pad(mask, (0, new))  # (rows, length)
        self.token = input_ids[:, -1:].clone()  # (rows, 1), the last of each row
        self.position = mask.sum(1, keepdim=True)  # (rows, 1), that of the next token
        self.at = torch.full((1,), self.width, device=device)  # where it is written
        self.ended = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
        self.ends = torch.tensor(settings.eos_token_id, dtype=input_ids.dtype, device=device)
        self.warpers = _warpers(settings)
        last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        self._choose(self._logits(input_ids, (mask.cumsum(1) - 1).clamp(min=0), **last))

    def _logits(self, ids: Tensor, positions: Tensor, **more) -> Tensor:
        """(rows, vocabulary) after the last of these tokens, which are added to the cache."""
        output = self.model(input_ids=ids, position_ids=positions, attention_mask=self.mask,
                            past_key_values=self.cache, use_cache=True, **more)  # fmt: skip
        return output.logits[:, -1].float()

    def _choose(self, logits: Tensor) -> None:
        """Choose each row's next token as `generate` does, and write it."""
        for warp in self.warpers:
            logits = warp(None, logits)
        if self.settings.do_sample:
            # torch.multinomial's own way, but that one looks at the numbers: see above.
            p = logits.softmax(-1)
            logits = p / torch.empty_like(p).exponential_(1)
        token = logits.argmax(-1).masked_fill(self.ended, self.settings.pad_token_id)  # (rows,)
        self.token.copy_(token.unsqueeze(1))
        self.ended |= (self.token == self.ends).any(1)
        self.sequences.index_copy_(1, self.at, self.token)
        self.mask.index_fill_(1, self.at, 1)
        self.at += 1

    def step(self) -> None:
        """Read the last token of each row and choose the next one."""
        logits = self._logits(self.token, self.position)
        self.position += 1
        self._choose(logits)

    def run(self, capture: Callable[["Steps"], Callable]) -> list[list[int]]:
        """Return the new ids of each row. capture: gives, for these steps, a function that does
        what `step` does."""
        left, step = self.settings.max_new_tokens - 1, self.step
        for i in range(left):
            if i % LOOK == 0 and bool(self.ended.all()):
                break
            if i == WARM:
                step = capture(self)
            step()
        return self.sequences[:, self.width : int(self.at)].tolist()

    def agrees(self, replay: Callable[[], None]) -> bool:
        """Whether `replay` chooses for each row what `step` does. Both are undone; what they leave
        in the cache, the next step writes again. Where tokens are drawn it is not looked at."""
        if self.settings.do_sample:
            return True
        state = [self.token, self.position, self.at, self.ended, self.mask, self.sequences]
        state += [layer.cumulative_length for layer in self.cache.layers]
        before, after = [t.clone() for t in state], []
        for step in (replay, self.step):
            try:
                step()
                after.append([t.clone() for t in state])
            finally:
                for t, old in zip(state, before):
                    t.copy_(old)
        return all(map(torch.equal, *after))


def _warpers(settings) -> list:
    """What `generate` would do to the logits, where tokens are drawn."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    if not settings.do_sample:
        return []
    hot = [] if settings.temperature == 1 else [TemperatureLogitsWarper(settings.temperature)]
    return hot + ([TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else [])


def can_be_captured(model) -> bool:
    """Whether the model's step is always the same work: transformers says so of a family, and it
    lies on one device. (That its cache keeps all tokens, `generate._cache` says.)"""
    same = getattr(model, "_can_compile_fullgraph", False)
    takes_positions = "position_ids" in signature(model.forward).parameters
    return same and takes_positions and len({p.device for p in model.parameters()}) == 1


@lru_cache
def _stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


@contextmanager
def own_stream(device: torch.device):
    """Within it work goes to a stream of its own, where it can be captured; on a CPU as ever."""
    if device.type != "cuda":
        yield
        return
    aside, here = _stream(device), torch.cuda.current_stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        yield
    here.wait_stream(aside)


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """A function that repeats on the GPU what a call of `step` does, within `own_stream`. `step` is
    not run now; it must have been."""
    graph = torch.cuda.CUDAGraph()
    # The stream of the steps before: what a kernel keeps for its stream (`arrived`) is there. And
    # other threads may use the GPU meanwhile.
    here = torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=here, capture_error_mode="thread_local"):
        step()
    return graph.replay


class Graphs:
    """Decodes batches by steps that are captured, until a capture fails, or the first step that is
    replayed is not what it is from Python: that batch goes on from Python, a warning says so, and
    `capture` is None then.

    capture: a function from a step to one that does the same (`cuda_graph`). None: never.
    """

    def __init__(self, capture: Callable[[Callable], Callable] | None):
        self.capture = capture

    def serve(self, model, new_tokens: int) -> bool:
        """Whether a batch with so many new tokens is decoded this way."""
        return self.capture is not None and new_tokens >= WORTH and can_be_captured(model)

    def new_tokens(self, model, input_ids: Tensor, mask: Tensor, settings) -> list[list[int]]:
        """Return the new ids of each row: as many as settings say, or until all rows have ended.
        Each prompt is answered settings.num_return_sequences times."""
        times = settings.num_return_sequences
        ids, mask = (t.repeat_interleave(times, 0) for t in (input_ids, mask))
        with own_stream(ids.device):
            return Steps(model, ids, mask, settings).run(self._captured)

    def _captured(self, steps: Steps) -> Callable[[], None]:
        try:
            replay = self.capture(steps.step)
            if not steps.agrees(replay):
                raise RuntimeError("replayed, it chooses other tokens")
            return replay
        except Exception as error:  # whatever a model does that a graph does not allow
            self.capture = None
            warnings.warn(f"no CUDA graph of this model's step ({error}): tokens are decoded from "
                          "Python, slower")  # fmt: skip
            return steps.step
