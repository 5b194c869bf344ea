"""What a quantized cache of keys and values costs: `python -m experiments.cache`.

tiny      the fine-tuned tiny model: perplexity of mini-GSM's test solutions, exact match on its
          first 500 test problems, with 8, 4 and 2 bits: data/results/tiny-cache.json
smollm2   SmolLM2-135M-Instruct: perplexity of 2,048 tokens of WikiText-2's test text in windows
          of 512, and how often the most likely token stays the same: smollm2-cache.json

A row is stored as soon as it is measured, and not measured again unless with --force. Text is
read STEP tokens at a time. That gives what one by one would: STEP divides group_size and recent,
and codes are made in whole groups, so within a step no token is stored that was not before.
"""

import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from experiments.accuracy import ADAPTER, merged, table_row
from experiments.smollm2 import text_ids
from experiments.table import Table, command_line
from qlora_lib.base.endings import ending
from qlora_lib.base.paths import DATA, given_path, short_path
from qlora_lib.cli.common import check_needs
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.data.tokens import encode_example, pad
from qlora_lib.evaluation.evaluate import evaluate
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.generation.kv_cache import CacheSpec, PackedCache, cache_bytes
from qlora_lib.runs.profiles import Profile, load_profile

RESULTS = DATA / "results"
SEED = 0
STEP = 32
SOLUTIONS = 256  # test problems whose solutions are scored, given their questions
ASKED = 500  # test problems of exact match
WIKITEXT, WINDOW = 2048, 512  # tokens of SmolLM2's text, in windows of so many
SPECS = {
    "as they came": None,
    "8 bits": CacheSpec(8),
    "4 bits": CacheSpec(4),
    "2 bits": CacheSpec(2),
    "4 bits, keys by token": CacheSpec(4, keys="token"),
    "2 bits, keys by token": CacheSpec(2, keys="token"),
    "4 bits, values by channel": CacheSpec(4, values="channel"),
    "2 bits, values by channel": CacheSpec(2, values="channel"),
    "4 bits, none recent": CacheSpec(4, recent=0),
    "2 bits, none recent": CacheSpec(2, recent=0),
    "2 bits, 128 recent": CacheSpec(2, recent=128),
}
SCORES = "int8 scores"  # a row of its own: the cache as it came, q k^T in integers
EXACT_MATCH = (None, 8, 4)  # cache_bits


@torch.inference_mode()
def read(model, ids: Tensor, spec: CacheSpec | None, step: int = STEP) -> tuple[Tensor, Tensor]:
    """Read ids (batch, tokens) `step` at a time, as decoding would, with a cache.

    Returns for each token but the first its negative log-likelihood, fp32 (batch, tokens - 1),
    and the token that was likeliest in its place, int64 (batch, tokens - 1).
    """
    from transformers.cache_utils import DynamicCache

    cache, losses, likeliest = PackedCache(spec) if spec else DynamicCache(), [], []
    after = torch.cat([ids[:, 1:], ids[:, :1]], 1)  # the last one is not used
    for part, targets in zip(ids.split(step, 1), after.split(step, 1)):
        logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none"))
        likeliest.append(logits.argmax(-1))
    return torch.cat(losses, 1)[:, :-1], torch.cat(likeliest, 1)[:, :-1]


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8 bits, a scale a token: int8 of x's shape, and fp32 scale (..., 1)."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1)
    return (x.float() / scale).round_().to(torch.int8), scale


def int8_scores(query: Tensor, key: Tensor) -> Tensor:
    """Attention scores q k^T by integer products, before their division by sqrt(head_dim).

    query (..., new, head_dim), key (..., tokens, head_dim), each rounded to int8 with a scale a
    token; products summed in int32, exactly; one multiplication a score by both scales.
    Returns fp32 (..., new, tokens). (As in SageAttention, arXiv 2410.02367, without smoothing.)
    """
    (q, q_scale), (k, k_scale) = to_int8(query), to_int8(key)
    product = q.int() @ k.int().transpose(-1, -2)  # (..., new, tokens), int32
    return product * q_scale * k_scale.transpose(-1, -2)


def int8_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """transformers' eager attention with `int8_scores` in place of the product of q and k.

    query (batch, heads, new, head_dim), key and value with fewer heads where they are shared.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = int8_scores(query, key) * scaling
    exact = query.float() @ key.float().mT * scaling
    if hasattr(module, "int8_errors"):  # of scores as the softmax sees them
        module.int8_errors.append(float((scores - exact).norm() / exact.norm()))
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def with_int8_scores(model, run):
    """`run()` while the model's attention multiplies q and k in int8; and the mean relative
    error of the scores before the softmax, over layers and calls."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("int8_scores", int8_attention)
    AttentionMaskInterface.register("int8_scores", eager_mask)
    before, errors = model.config._attn_implementation, []
    layers = [layer.self_attn for layer in model.model.layers]
    try:
        model.set_attn_implementation("int8_scores")
        for layer in layers:
            layer.int8_errors = errors
        return run(), sum(errors) / len(errors)
    finally:
        model.set_attn_implementation(before)
        for layer in layers:
            del layer.int8_errors


def perplexities(model, ids: Tensor, scored: Tensor, names, keep) -> None:
    """A row for each of `names`, given to `keep(name, row)` as it is measured.

    ids (batch, tokens); scored: bool (batch, tokens - 1), which predictions count.
    """
    _, first = read(model, ids, None)

    def row(losses: Tensor, likeliest: Tensor, spec: CacheSpec | None) -> dict:
        context, size = ids.shape[1], model.dtype.itemsize
        held = cache_bytes(model.config, context, spec, size=size)
        return {
            "perplexity": math.exp(losses[scored].double().mean()),
            "predicted_tokens": int(scored.sum()),
            "same_token": float((likeliest == first)[scored].double().mean()),
            "context": context,
            "cache_bytes": held,
            "bytes_ratio": held / cache_bytes(model.config, context, size=size),
            "spec": spec and asdict(spec),
        }

    for name in names:
        if name == SCORES:
            (losses, likeliest), error = with_int8_scores(model, lambda: read(model, ids, None))
            keep(name, row(losses, likeliest, None) | {"score_error": error})
        else:
            keep(name, row(*read(model, ids, SPECS[name]), SPECS[name]))


def solutions(tokenizer, profile: Profile, count: int) -> tuple[Tensor, Tensor]:
    """The ids of test problems with their solutions, padded on the right, (count, tokens), and
    which predictions are a solution's."""
    encoded = [encode_example(tokenizer, *format_gsm8k(e), 1024)
               for e in profile.examples("test")[:count]]  # fmt: skip
    ids = pad([ids for ids, _ in encoded], 0)
    return ids, pad([labels for _, labels in encoded], -100)[:, 1:] >= 0


def exact_match(model, tokenizer, profile: Profile, bits: int | None, count: int) -> dict:
    """Greedy answers to the first test problems."""
    decoding = Decoding(
        max_new_tokens=profile.max_new_tokens, batch_size=100, cache_bits=bits
    )
    report = evaluate(
        generator(model, tokenizer, decoding), profile.examples("test")[:count], None, chunk=100
    )
    return table_row(report)


NEEDS = {"wikitext": ("with smollm2", lambda args: args.part == "smollm2")}


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULTS, "--force", "--model")
    parser.add_argument("part", nargs="?", default="tiny", choices=("tiny", "smollm2"))
    parser.add_argument("--wikitext", type=given_path, default=Path("data/wikitext2"),
                        help="folder with WikiText-2's test.txt")  # fmt: skip
    args = parser.parse_args(argv)
    check_needs(args, NEEDS, parser.get_default)
    path = args.out / f"{args.part}-cache.json"
    table = Table(path, SEED, force=args.force)

    def keep(name: str, row: dict) -> None:
        table.keep(name, row)
        print(f"{name}: " + ", ".join(f"{k} {row[k]:.4f}" for k in ("perplexity", "same_token",
              "bytes_ratio", "strict") if k in row), flush=True)  # fmt: skip

    profile = load_profile(args.part, model=args.model)

    if args.part == "tiny":
        model, tokenizer = merged(profile, ADAPTER)
        ids, scored = solutions(tokenizer, profile, SOLUTIONS)
    else:
        model, tokenizer = profile.load(compute_dtype="fp32")
        ids = text_ids(tokenizer, args.wikitext / "test.txt", WIKITEXT).view(-1, WINDOW)
        scored = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    model.eval()
    names = [name for name in (*SPECS, SCORES) if name not in table.rows]
    perplexities(model, ids, scored, names, keep)
    for bits in EXACT_MATCH if args.part == "tiny" else ():
        name = f"exact match, {f'{bits} bits' if bits else 'as they came'}"
        if name not in table.rows:
            keep(name, exact_match(model, tokenizer, profile, bits, ASKED))
    print(f"stored in {short_path(path)}")


if __name__ == "__main__":
    sys.exit(ending(main))
