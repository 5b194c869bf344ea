"""What the fuzzers share: values that can be compared, a limit on time, and a count of outcomes."""

import json
import random
import signal
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import pytest
import torch

SECONDS = 20  # that an answer to bad input may take
FEW = 15  # inputs of a table, where --tries is not given


def plain(value):
    """Return a copy of lists, dicts, dataclasses, tensors and modules that == compares by content,
    NaN included."""
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return tuple(value.shape), str(value.dtype), flat.view(torch.uint8).numpy().tobytes()
    if is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return repr(value)


def model_and_tokenizer(loaded):
    """Return all that a (model, tokenizer) computes with, as `plain` gives it."""
    model, tokenizer = loaded
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    for settings in (config, generation):
        settings.pop("_name_or_path", None)
    words = tokenizer and json.loads(tokenizer.backend_tokenizer.to_str())
    return plain([model, config, generation, words, getattr(tokenizer, "special_tokens_map", 0)])


class TooLong(BaseException):
    """What took longer than its deadline; no Exception, so that nothing catches it."""


@contextmanager
def deadline(seconds: int, what: str = "this"):
    """Raise TooLong in the block after so many seconds (never where signals have no alarm)."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_):
        raise TooLong(f"{what} took over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def draw(metafunc, name: str, inputs: list[tuple], red: dict[str, str] = {}) -> None:
    """Make each of a table's inputs a test of its own; without --tries, a few that --seed draws.
    red: why inputs that begin with these are not answered yet as they should be."""
    if name not in metafunc.fixturenames:
        return
    numbers = range(len(inputs))
    if metafunc.config.getoption("tries") is None:
        seed = metafunc.config.getoption("seed")
        numbers = sorted(random.Random(seed).sample(numbers, FEW))
    marks = {n: [pytest.mark.xfail(strict=True, reason=red[inputs[n][0]])]
             for n in numbers if inputs[n][0] in red}  # fmt: skip
    cases = [pytest.param(inputs[n], id=str(n), marks=marks.get(n, [])) for n in numbers]
    metafunc.parametrize(name, cases)


class Tally:
    """Outcomes of a fuzzer's tries, counted by kind; "ok ..." are the wanted ones."""

    def __init__(self, seed: int):
        self.seed, self.counts, self.bad = seed, {}, []

    def add(self, number, kind: str, what: str) -> None:
        """Count try `number`; what: was done and came of it, for the message of a failure."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if not kind.startswith("ok"):
            self.bad.append(f"seed {self.seed}, try {number}, {kind}: {what}")

    def check(self) -> None:
        """Print the counts; AssertionError with the first bad tries where there are any."""
        print(", ".join(f"{n} {kind}" for kind, n in sorted(self.counts.items())))
        if self.bad:
            shown = "\n".join(line[:700] for line in self.bad[:12])
            raise AssertionError(f"{len(self.bad)} bad of {sum(self.counts.values())}\n{shown}")
