"""The packed cache of keys and values: what it stores, returns and weighs, and in `generate`."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache

from qlora_lib.evaluation.evaluate import evaluate
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.generation.kv_cache import (
    CacheSpec,
    PackedCache,
    PackedStates,
    cache_bytes,
)
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.train.memory import decoding_ledger
from tests.support.small_models import PAIRS, small_model, small_tokenizer
from tests.support.tensors import normal, relative

STATES = (2, 3, 64, 16)  # batch, heads, tokens, head_dim


@pytest.mark.parametrize("by", ["channel", "token"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_stored_states_are_within_half_a_step_of_their_group(bits, by):
    x = normal(*STATES) + 5 * normal(16, seed=1)  # channels with an offset, as keys have
    spec = CacheSpec(bits, group_size=32)
    packed = PackedStates.of(x, spec, by)
    back = packed.dequantize(torch.float32)
    assert back.shape == x.shape
    # 1% of a step: scale and lowest value are rounded to fp16
    axis, size = (2, 32) if by == "channel" else (3, 16)
    groups = x.unflatten(axis, (-1, size))
    step = (groups.amax(axis + 1) - groups.amin(axis + 1)) / (2**bits - 1)
    error = (back - x).unflatten(axis, (-1, size)).abs().amax(axis + 1)
    slack = 5 * 2**-11 * groups.abs().amax(axis + 1) / step
    assert (error / step).max() < 0.51 + slack.max()
    assert packed.codes.nbytes * 8 == x.numel() * bits


@pytest.mark.parametrize("head", [5, 6, 10])
@pytest.mark.parametrize("by", ["channel", "token"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_heads_that_fill_no_whole_bytes(bits, by, head):
    x, spec = normal(2, 3, 32, head), CacheSpec(bits, group_size=24 if by == "token" else 16)
    packed = PackedStates.of(x, spec, by)
    axis, size = (2, 16) if by == "channel" else (3, math.gcd(24, head))
    groups = x.unflatten(axis, (-1, size))
    step = (groups.amax(axis + 1) - groups.amin(axis + 1)) / (2**bits - 1)
    twice = packed.append(packed).dequantize(torch.float32)
    assert twice.shape == (2, 3, 64, head) and torch.equal(twice[:, :, :32], twice[:, :, 32:])
    error = (twice[:, :, :32] - x).unflatten(axis, (-1, size)).abs().amax(axis + 1)
    assert (error <= 0.51 * step + 2**-9).all()


def test_a_constant_group_and_a_large_offset_come_back():
    x = torch.full((1, 1, 32, 8), 3.0)
    assert torch.equal(PackedStates.of(x, CacheSpec(), "channel").dequantize(torch.float32), x)
    with pytest.raises(ValueError, match="NaN, Inf or beyond"):
        PackedStates.of(x * 1e5, CacheSpec(), "token")


def test_keys_with_large_channels_are_better_by_channel():
    """KIVI's observation, and its counterpart: without such channels there is no difference."""
    x, large = normal(1, 2, 128, 64), torch.ones(64)
    large[::16] = 20

    def errors(states):
        """Of the ordinary channels, by channel and by token."""
        for by in ("channel", "token"):
            back = PackedStates.of(states, CacheSpec(4), by).dequantize(torch.float32)
            yield relative(back[..., large == 1], states[..., large == 1])

    by_channel, by_token = errors(x * large)
    assert by_channel < 0.1 < 5 * by_channel < by_token
    by_channel, by_token = errors(x)
    assert 0.9 < by_channel / by_token < 1.1


@pytest.mark.parametrize(
    "spec", [CacheSpec(8, 16, 8), CacheSpec(4, 8, 0), CacheSpec(4, 16, 20, "token")], ids=str
)
def test_a_cache_returns_old_tokens_rounded_and_new_ones_as_they_came(spec):
    keys, values = normal(1, 2, 70, 16), normal(1, 2, 70, 16, seed=1)
    cache, plain = PackedCache(spec), DynamicCache()
    at = 0
    for new in (33, 1, 1, 12, 1, 22):
        part = (keys[:, :, at : at + new], values[:, :, at : at + new])
        before = spec.stored_tokens(at)
        got = cache.update(*part, 0)
        want = plain.update(*part, 0)
        at += new
        for mine, true in zip(got, want):
            assert mine.shape == true.shape
            assert torch.equal(mine[:, :, before:], true[:, :, before:])
            assert before == 0 or 0 < relative(mine[:, :, :before], true[:, :, :before]) < 0.2
        layer = cache.layers[0]
        assert cache.get_seq_length() == at == plain.get_seq_length()
        assert layer.stored == spec.stored_tokens(at) and layer.keys.shape[2] == at - layer.stored
    once = PackedCache(spec)
    once.update(keys, values, 0)
    assert len(layer.old) == 2
    for a, b in zip(once.layers[0].old, layer.old, strict=True):  # whatever the steps: the same
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("tokens", [20, 33, 200])
def test_predicted_bytes_are_those_that_a_model_s_cache_holds(bits, tokens):
    model = small_model()
    for spec in (CacheSpec(bits), CacheSpec(bits, 8, 16, "token", "channel"), None):
        cache = PackedCache(spec) if spec else DynamicCache()
        ids = torch.ones(2, tokens, dtype=torch.long)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        held = (
            cache.nbytes if spec else sum(la.keys.nbytes + la.values.nbytes for la in cache.layers)
        )
        assert held == cache_bytes(model.config, tokens, spec, batch=2, size=4)


def test_the_cache_of_llama_2_7b_at_4k():
    config = LlamaConfig()  # 32 layers, 32 heads of 128
    assert cache_bytes(config, 4096) == 2 * 32 * 32 * 128 * 2 * 4096 == 2_147_483_648
    # All but the newest 32: 4 bits, and 4 bytes a group of 32: 5 bits a number instead of 16.
    old, recent = 4096 - 32, 32
    numbers = 2 * 32 * 32 * 128  # of a token
    assert cache_bytes(config, 4096, CacheSpec(4)) == numbers * (old * 5 // 8 + recent * 2)


def test_the_ledger_of_decoding_llama_2_7b():
    config = LlamaConfig()
    bf16 = decoding_ledger(config, 4096)
    assert bf16 == {"weights": 2 * 6_738_415_616, "packed weights": 0, "scales": 0,
                    "cache": 2_147_483_648}  # fmt: skip
    int4 = decoding_ledger(config, 4096, 2, QuantSpec(4, 128), CacheSpec(4))
    linears = 6_476_005_376
    assert int4["weights"] == bf16["weights"] - 2 * linears
    assert int4["packed weights"] == linears // 2 and int4["scales"] == linears // 128 * 3
    assert int4["cache"] == 2 * cache_bytes(config, 4096, CacheSpec(4))
    with pytest.raises(ValueError, match="compute_dtype='int8' must be one of"):
        decoding_ledger(config, 4096, compute_dtype="int8")


def decode(model, ids, cache, steps=40):
    """Logits of greedy steps, with a cache: (batch, steps, vocab)."""
    logits = []
    with torch.no_grad():
        for _ in range(steps):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:]
            logits.append(out)
            ids = out.argmax(-1)
    return torch.cat(logits, 1)


def test_fewer_bits_change_the_logits_more():
    model, ids = small_model(), torch.randint(3, 300, (1, 100), generator=torch.manual_seed(0))
    want = decode(model, ids, DynamicCache(), steps=1)
    of_prompt = decode(model, ids, PackedCache(CacheSpec(2)), 1)
    assert torch.equal(of_prompt, want)  # a prompt attends to itself exactly
    parts = ids[:, :-1], ids[:, -1:]
    errors = []
    for bits in (8, 4, 2):
        cache = PackedCache(CacheSpec(bits, 8, 8))
        decode(model, parts[0], cache, 1)
        errors.append(relative(decode(model, parts[1], cache, 1), want))
    assert 0 < errors[0] < errors[1] < errors[2] and errors[0] < 0.02


def test_generate_with_a_packed_cache_padding_samples_and_beams():
    model, tokenizer = small_model(), small_tokenizer()
    prompts = [p for p, _ in PAIRS[:6]]
    plain = generator(model, tokenizer, Decoding(max_new_tokens=20, batch_size=4))(prompts)
    packed = generator(model, tokenizer, Decoding(max_new_tokens=20, batch_size=4, cache_bits=8))
    same = [a[:8] == b[:8] for a, b in zip(plain, packed(prompts))]
    assert sum(same) >= 5  # random weights: a close call may fall the other way
    two = Decoding(1.0, samples=2, max_new_tokens=40, cache_bits=4)
    assert all(len(row) == 2 for row in generator(model, tokenizer, two)(prompts[:2]))
    ids = torch.randint(3, 300, (2, 60), generator=torch.manual_seed(0))
    beams = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=PackedCache(CacheSpec(8)),
        max_new_tokens=6, num_beams=3, do_sample=False,
    )  # fmt: skip
    assert beams.shape[0] == 2 and torch.equal(beams[:, :60], ids)


def test_reordering_moves_what_is_stored_too():
    keys = normal(3, 2, 50, 16)
    cache = PackedCache(CacheSpec(8, 16, 8))
    cache.reorder_cache(torch.tensor([0]))  # empty: nothing to do
    cache.update(keys, keys, 0)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 0, 2]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    new = torch.zeros(2, 2, 1, 16)
    got, _ = cache.update(new, new, 0)
    assert relative(got[:, :, :50], keys[[2, 1]]) < 0.01
    with pytest.raises(NotImplementedError, match="without an assistant"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0 and not cache.layers[0].stored


@pytest.mark.parametrize("bad", [dict(bits=3), dict(bits=5), dict(group_size=12), dict(recent=-1),
                                 dict(keys="head")])  # fmt: skip
def test_other_specs_are_refused(bad):
    with pytest.raises(ValueError, match="expected|choose one of"):
        CacheSpec(**bad)


def test_decoding_takes_8_or_4_bits_and_evaluations_tell_them_apart(tmp_path):
    with pytest.raises(ValueError, match="cache_bits=5 must be 8, 4, or None"):
        Decoding(cache_bits=5)
    model, tokenizer = small_model(), small_tokenizer()
    problems = [{"question": "1 + 1?", "answer": "1+1\n#### 2"}]

    def run(bits):
        generate = generator(model, tokenizer, Decoding(max_new_tokens=4, cache_bits=bits))
        return evaluate(generate, problems, tmp_path, canaries=False)

    assert "cache_bits" not in run(None).info["decoding"]  # as in reports from before
    with pytest.raises(ValueError, match="holds answers of other settings"):
        run(8)


def test_the_command_line_takes_cache_bits():
    from qlora_lib.__main__ import parser
    from qlora_lib.cli.common import open_options
    from qlora_lib.cli.evaluate import evaluation_name, make_decoding

    args = parser().parse_args(["evaluate", "--cache-bits", "4"])
    assert make_decoding(open_options(args), args).cache_bits == 4
    assert evaluation_name(args) == "eval-cache4bit"
    assert evaluation_name(parser().parse_args(["evaluate"])) == "eval"
