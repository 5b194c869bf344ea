"""What a quantized cache costs: how it is measured, on the bundled model, and what is recorded."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig

from experiments import cache as experiments
from experiments.cache import (
    SCORES,
    SPECS,
    int8_attention,
    int8_scores,
    read,
    to_int8,
    with_int8_scores,
)
from experiments.perplexity import perplexity
from qlora_lib.base.paths import DATA
from qlora_lib.generation.kv_cache import CacheSpec, cache_bytes
from tests.support.small_models import small_model
from tests.support.tensors import normal, relative

IDS = torch.randint(3, 300, (2, 120), generator=torch.manual_seed(0))
SMOLLM2 = LlamaConfig(
    num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3
)


@pytest.mark.parametrize(
    "spec", [None, CacheSpec(2), CacheSpec(4, recent=0, keys="token")], ids=str
)
def test_reading_in_steps_is_reading_token_by_token(spec):
    model = small_model()
    stepwise, one_by_one = read(model, IDS, spec), read(model, IDS, spec, step=1)
    assert stepwise[0].shape == (2, 119)
    # Other orders of sums: now and then a code falls to the other side, one step away.
    difference = relative(stepwise[0], one_by_one[0])
    assert difference < 1e-3 and (stepwise[1] == one_by_one[1]).float().mean() > 0.99
    if spec:  # what the cache itself changes is far more
        assert relative(stepwise[0], read(model, IDS, None)[0]) > 20 * difference


def test_without_quantization_it_is_the_model_s_perplexity():
    model = small_model()
    losses, likeliest = read(model, IDS, None)
    want = perplexity(model, IDS.flatten(), window=120)
    assert math.exp(losses.double().mean()) == pytest.approx(want.value, rel=1e-5)
    with torch.no_grad():
        assert torch.equal(likeliest, model(IDS).logits.argmax(-1)[:, :-1])


def test_attention_with_integer_scores_is_near_the_model_s_own_and_is_put_back():
    model = small_model()
    before = model.config._attn_implementation
    want = read(model, IDS, None)[0]
    (losses, _), error = with_int8_scores(model, lambda: read(model, IDS, None))
    assert 0 < error < 0.02 and 0 < relative(losses, want) < 0.05
    assert model.config._attn_implementation == before
    assert not hasattr(model.model.layers[0].self_attn, "int8_errors")
    assert torch.equal(read(model, IDS, None)[0], want)


def test_heads_share_keys_and_the_mask_is_kept():
    q, k, v = normal(1, 4, 5, 16), normal(1, 2, 5, 16, seed=1), normal(1, 2, 5, 16, seed=2)
    mask = torch.full((5, 5), -1e9).triu(1)
    got, weights = int8_attention(torch.nn.Module(), q, k, v, mask, scaling=0.25)
    repeated = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    want = torch.nn.functional.scaled_dot_product_attention(q, *repeated, is_causal=True)
    assert relative(got, want.transpose(1, 2)) < 0.02
    assert weights.triu(1).abs().max() == 0


def test_integer_scores_are_those_of_the_rounded_factors():
    q, k = normal(2, 3, 5, 64), normal(2, 3, 40, 64, seed=1)
    (a, sa), (b, sb) = to_int8(q), to_int8(k)
    assert a.dtype == torch.int8 and (q - a * sa).abs().max() <= sa.max() * 0.5001
    scores = int8_scores(q, k)
    want = (a.double() * sa) @ (b.double() * sb).transpose(-1, -2)
    assert relative(scores.double(), want) < 1e-6  # integers are exact; the scales are fp32
    assert relative(scores, q @ k.transpose(-1, -2)) < 0.02
    assert torch.equal(int8_scores(torch.zeros(1, 64), k[0, 0]), torch.zeros(1, 40))


def test_the_tiny_part_at_a_small_size_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    for name, value in (("SOLUTIONS", 4), ("ASKED", 3), ("EXACT_MATCH", (None, 4))):
        monkeypatch.setattr(experiments, name, value)
    monkeypatch.setattr(experiments, "SPECS", {k: SPECS[k] for k in ("as they came", "2 bits")})
    monkeypatch.setattr(experiments, "merged", lambda profile, adapter: profile.load())
    experiments.main(["tiny", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "tiny-cache.json").read_text())
    assert list(rows) == ["as they came", "2 bits", SCORES, "exact match, as they came",
                          "exact match, 4 bits"]  # fmt: skip
    assert rows["as they came"]["same_token"] == 1 and rows["2 bits"]["perplexity"] > 1
    assert rows["exact match, 4 bits"]["n"] == 3 and rows[SCORES]["score_error"] > 0
    assert rows["exact match, 4 bits"]["info"]["decoding"]["cache_bits"] == 4
    capsys.readouterr()
    experiments.main(["tiny", "--out", str(tmp_path)])
    assert capsys.readouterr().out.startswith("stored in")
    assert json.loads((tmp_path / "tiny-cache.json").read_text()) == rows


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_the_recorded_bytes_are_those_of_today_s_cache(name):
    rows = json.loads((DATA / "results" / f"{name}-cache.json").read_text(encoding="utf-8"))
    config = SMOLLM2 if name == "smollm2" else LlamaConfig.from_pretrained(DATA / "tiny-llama")
    for how, spec in SPECS.items():
        assert rows[how]["cache_bytes"] == cache_bytes(config, rows[how]["context"], spec, size=4)
