"""What functions returned, as JSON: for answers of a process that nobody needs to trust.

Reading them back calls nothing of the process that wrote them, as pickle would. A value of a kind
that no exercise asks for arrives as its type's name and how it shows.
"""
import base64
import builtins
import contextlib
import json
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..kit.exercise import Result

DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)}
LARGEST = 2**18  # characters of a value: none that an exercise asks for has a tenth of it
WORDS = 500      # characters of an error


def dumps(results: list[Result]) -> str:
    return json.dumps([[_value(r.value), r.error and _words(r.error), bool(r.wrote),
                        _value(r.changed)] for r in results])


def loads(text: str | bytes) -> list[Result]:
    """The results that `dumps` wrote; some exception for any other text."""
    return [Result(_read(value), error and _error(*error), wrote is True, _read(changed))
            for value, error, wrote, changed in json.loads(text)]


def _value(value: Any) -> Any:
    with contextlib.suppress(Exception):  # it holds itself, or an int of too many digits for JSON
        plain = _plain(value)
        if len(json.dumps(plain)) <= LARGEST:
            return plain
    return _other(value)


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (tuple, list)):
        return ["tuple" if isinstance(value, tuple) else "list", *map(_plain, value)]
    if type(value) is dict:
        return ["dict", *([_plain(k), _plain(v)] for k, v in value.items())]
    if type(value) is Fraction:
        return ["Fraction", value.numerator, value.denominator]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        tensor = torch.as_tensor(value).detach().cpu().resolve_conj().resolve_neg()
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype in DTYPES and tensor.nbytes <= LARGEST:
            numbers = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            kind = "ndarray" if not isinstance(value, torch.Tensor) else \
                "trained Tensor" if value.requires_grad else "Tensor"
            return [kind, dtype, list(tensor.shape), base64.b64encode(numbers.tobytes()).decode()]
    return ["..."] if value is ... else _other(value)


def _other(value: Any) -> list:
    try:
        return ["other", type(value).__name__, f"{value!r:.60}"]
    except Exception:  # whatever its __repr__ does
        return ["other", type(value).__name__, ""]


def _words(error: Exception) -> list[str]:
    try:
        text = error.args[0] if [type(a) for a in error.args] == [str] else str(error)
        return [type(error).__name__, text[:WORDS]]
    except Exception:  # whatever its __str__ does
        return [type(error).__name__, ""]


def _read(plain: Any) -> Any:
    if not isinstance(plain, list):
        if isinstance(plain, dict):
            raise ValueError("got a JSON object, expected a list")
        return plain
    kind, *parts = plain
    if kind in ("tuple", "list"):
        return tuple(map(_read, parts)) if kind == "tuple" else list(map(_read, parts))
    if kind == "dict":
        return {_read(key): _read(value) for key, value in parts}
    if kind in ("Tensor", "trained Tensor", "ndarray"):
        dtype, shape, numbers = parts
        numbers = bytearray(base64.b64decode(numbers, validate=True))
        if dtype == "bool":  # of bytes that are neither 0 nor 1 PyTorch makes what it likes
            numbers = bytearray(map(bool, numbers))
        tensor = torch.frombuffer(numbers, dtype=DTYPES[dtype]) if numbers else \
            torch.empty(0, dtype=DTYPES[dtype])
        if kind == "ndarray":
            return tensor.reshape(shape).numpy()
        return tensor.reshape(shape).requires_grad_(kind != "Tensor")
    if kind == "Fraction":
        return Fraction(*parts)
    if kind == "...":
        return ...
    _, name, shown = plain
    return type(name, (), {"__repr__": lambda self: str(shown)})()


def _error(name: str, text: str) -> Exception:
    """An exception of the builtin type of this name, else of a new type."""
    known = getattr(builtins, name, None)
    if not (isinstance(known, type) and issubclass(known, Exception)):
        known = type(name, (Exception,), {})
    try:
        return known.__new__(known, str(text))
    except TypeError:  # an ExceptionGroup
        return type(name, (Exception,), {})(str(text))
