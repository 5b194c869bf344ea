"""What Decoding, CacheSpec and generators refuse."""

import math

import pytest

from qlora_lib.generation.generate import Decoding, Generator, generator
from qlora_lib.generation.kv_cache import CacheSpec, PackedCache, cache_bytes
from tests.support.small_models import small_model, small_tokenizer


@pytest.mark.parametrize("field, values", [
    ("temperature", [math.nan, math.inf, -1, "1", None, True]),
    ("top_p", [math.nan, 0, 1.5, "1", None]),
    ("samples", [0, 1.5, "2", None, math.nan, 10**30]),
    ("seed", [-1, 2**64, 1.5, "a", None]),
    ("max_new_tokens", [0, 1.5, "5", None, math.nan]),
    ("batch_size", [0, -1, 1.5, None]),
    ("stop", [("",), ("a", ""), "Question:", (1,), None, ("\ud800",)]),
    ("cache_bits", [3, "8", 8.5, 8.0]),
])  # fmt: skip
def test_a_field_out_of_range_is_refused_by_name(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{field}|text"):
            Decoding(**({"temperature": 1.0} | {field: value}))


@pytest.mark.parametrize("field, values", [
    ("group_size", [0, 7, "8", None, 8.5, math.nan]), ("recent", [-1, 1.5, None, math.nan]),
    ("keys", ["row", None, ["channel"]]), ("values", [5]),
])  # fmt: skip
def test_a_cache_that_can_not_be(field, values):
    for value in values:
        with pytest.raises(ValueError, match=field):
            CacheSpec(**{field: value})


def test_caches_of_nothing():
    for call in (lambda: PackedCache(None), lambda: cache_bytes(None, 5),
                 lambda: cache_bytes(small_model().config, -1)):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            call()


@pytest.mark.parametrize("said", [None, 5, [], ["a"], ["a", None], [["a"], []], ["a", ["b", 5]], "ab"])
def test_a_function_that_gives_no_completions(said):
    with pytest.raises(ValueError, match="2 prompts gave"):
        Generator(lambda prompts: said)(["1", "2"])


def test_what_is_no_generator_and_no_prompt():
    for wrong in (None, 5, "model"):
        with pytest.raises(ValueError, match="expected a function"):
            Generator.of(wrong)
    for parts in ((None, small_tokenizer()), (small_model(), None), (small_model(), small_tokenizer(), None)):
        with pytest.raises(ValueError, match="expected a model"):
            generator(*parts)
    ask = generator(small_model(), small_tokenizer(), Decoding(max_new_tokens=2))
    for prompts in ("one", None, [1], ["\ud800"], ["a" * 2_000_000], {"a": 1}):
        with pytest.raises(ValueError):
            ask(prompts)
    for adapters in ("default", [5], ["nothing"], [], 5):
        with pytest.raises(ValueError):
            ask(["1 + 1?"], adapters)
