"""From prompts to completions: greedy decoding or sampling, batched, new tokens only.

Prompts are encoded as in training (`data.encode_prompt`) and padded on the left, so that
every row's last token is its prompt's. Not handled: stopping early at a stop string
(text after it is generated, then cut)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..base.devices import dtype_name
from ..base.paths import short_path
from ..data.tokens import encode_prompt, pad, pad_id
from ..layers.linear import decoding_layout
from ..lora.inject import use_adapter
from ..lora.layer import check_names
from ..models.fingerprint import fingerprint
from ..models.batches import check_tokens

Generate = Callable[..., list]  # prompts (and adapters) to completions, in the same order


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sampling only: the smallest set of tokens with this probability
    samples: int = 1  # completions a prompt; more than one needs temperature > 0
    seed: int = 0  # of the sampling
    max_new_tokens: int = 320  # GSM8K's longest solutions, without notes, fit
    batch_size: int = 32  # prompts at a time
    stop: tuple[str, ...] = ("Question:",)  # a completion ends before the first of these
    cache_bits: int | None = None  # 8 or 4: of old keys and values; None: as they came

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature}, top_p={self.top_p}: expected "
                "temperature >= 0 and 0 < top_p <= 1"
            )
        if min(self.samples, self.max_new_tokens, self.batch_size) < 1:
            raise ValueError("samples, max_new_tokens and batch_size must be at least 1")
        if self.cache_bits not in (None, 8, 4):
            raise ValueError(f"cache_bits={self.cache_bits!r} must be 8, 4, or None for 16 or 32")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} at temperature 0 would all be equal; "
                "set a temperature above 0"
            )


class Completion(str):
    """The generated text. `tokens`: how many were generated; `finished`: it ended by
    itself, with an end token or a stop string, not by the limit of new tokens."""

    tokens: int
    finished: bool

    def __new__(cls, text: str, tokens: int, finished: bool):
        self = super().__new__(cls, text)
        self.tokens, self.finished = tokens, finished
        return self


def generator(model, tokenizer, decoding: Decoding = Decoding()) -> Generate:
    """A function from a list of prompts to a list of Completions in the same order.

    With samples > 1 it returns a list of `samples` Completions for each prompt. Its
    attributes `info` and `fingerprint()` say what a report should; `check(prompts)` raises what
    asking these would. Prompts are batched by length and padded on the left.
    `generate(prompts, adapters)` gives each prompt an adapter of its own, by name (None: the
    base), in batches that mix them. Raises ValueError for what check_prompt refuses, for unknown
    adapters, and unless there is one a prompt.
    """
    dtype = model.get_input_embeddings().weight.dtype

    def check(prompts: Sequence[str]) -> list[list[int]]:
        encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, encoded):
            check_prompt(model, decoding, prompt, ids)
        return encoded

    def generate(prompts: Sequence[str], adapters: Sequence[str | None] | None = None) -> list:
        if adapters is not None:
            if isinstance(adapters, str) or len(adapters) != len(prompts):
                raise ValueError(
                    f"adapters={adapters!r:.80} for {len(prompts)} prompts: expected a list with "
                    "a name, or None, for each prompt"
                )
            check_names(model, *adapters)
        encoded = check(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
        results: list = [None] * len(prompts)
        was_training = model.training
        model.eval()
        try:
            with decoding_layout(model) if dtype == torch.bfloat16 else nullcontext():
                for start in range(0, len(order), decoding.batch_size):
                    chosen = order[start : start + decoding.batch_size]
                    names = nullcontext()
                    if adapters is not None:  # rows of one adapter together: no copies of them
                        chosen.sort(key=lambda i: adapters[i] or "")
                        rows = [adapters[i] for i in chosen for _ in range(decoding.samples)]
                        names = use_adapter(model, rows)
                    with names:
                        ids = [encoded[i] for i in chosen]
                        batch = _generate_batch(model, tokenizer, decoding, ids)
                    for i, completions in zip(chosen, batch):
                        results[i] = completions if decoding.samples > 1 else completions[0]
        finally:
            model.train(was_training)
        return results

    generate.info = {
        "model": short_path(Path(model.config._name_or_path)),
        "revision": getattr(model.config, "_commit_hash", None),
        "compute_dtype": dtype_name(dtype),
        # Left out where it is not used: reports from before there was one stay comparable.
        "decoding": {k: v for k, v in asdict(decoding).items() if k != "cache_bits" or v},
    }
    generate.fingerprint = lambda: fingerprint(model)
    generate.check = check
    return generate


def check_prompt(model, decoding: Decoding, prompt: str, ids: Sequence[int]) -> None:
    """Raises ValueError where a prompt (its tokens: ids) and max_new_tokens exceed the context, or
    where the model does not have one of its tokens."""
    check_tokens(model, ids)
    context = getattr(model.config, "max_position_embeddings", None) or 2**31
    if len(ids) + decoding.max_new_tokens > context:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and max_new_tokens={decoding.max_new_tokens} exceed "
            f"the context of {context}: {prompt[:60]!r}...; shorten the prompt, or lower "
            "max_new_tokens"
        )


@torch.inference_mode()
def _generate_batch(model, tokenizer, decoding: Decoding, encoded: list[list[int]]) -> list[list]:
    """`samples` Completions for each of the encoded prompts."""
    from transformers import GenerationConfig

    device = model.get_input_embeddings().weight.device
    input_ids = pad(encoded, pad_id(tokenizer), side="left").to(device)  # (batch, width)
    mask = pad([[1] * len(ids) for ids in encoded], 0, side="left").to(device)
    width = input_ids.shape[1]
    ends = _end_ids(model, tokenizer)
    sampling = decoding.temperature > 0
    settings = GenerationConfig(
        do_sample=sampling,
        temperature=decoding.temperature if sampling else None,
        top_p=decoding.top_p if sampling else None,
        top_k=0 if sampling else None,
        num_return_sequences=decoding.samples,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad_id(tokenizer),
        use_cache=True,
    )
    cache = {}
    if decoding.cache_bits:
        from .kv_cache import CacheSpec, PackedCache

        cache["past_key_values"] = PackedCache(CacheSpec(decoding.cache_bits))
    # A checkpoint's own generation settings (Llama-2's temperature 0.6, Qwen2's repetition
    # penalty) would fill in what `settings` leaves open; they are set aside meanwhile.
    own, model.generation_config = model.generation_config, GenerationConfig()
    dtype = model.get_input_embeddings().weight.dtype
    try:
        with torch.random.fork_rng(enabled=sampling), torch.autocast(
            device.type, dtype, enabled=dtype != torch.float32
        ):
            if sampling:
                torch.manual_seed(decoding.seed)
            output = model.generate(
                input_ids=input_ids, attention_mask=mask, generation_config=settings, **cache
            )  # (batch * samples, width + new)
    finally:
        model.generation_config = own
    rows = [_complete(tokenizer, ids, ends, decoding) for ids in output[:, width:].tolist()]
    return [rows[i : i + decoding.samples] for i in range(0, len(rows), decoding.samples)]


def _end_ids(model, tokenizer) -> list[int]:
    """The tokenizer's eos and the model's own, of which chat models have several."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({i for i in [tokenizer.eos_token_id, *own] if i is not None})


def _complete(tokenizer, new: list[int], ends: list[int], decoding: Decoding) -> Completion:
    """Cut at the end token by index, then at the first stop string."""
    end = next((i for i, token in enumerate(new) if token in ends), None)
    text = tokenizer.decode(
        new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    cut = min((text.find(s) for s in decoding.stop if s in text), default=None)
    tokens = len(new) if end is None else end + 1
    return Completion(text[:cut], tokens, finished=end is not None or cut is not None)
