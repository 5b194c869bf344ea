"""From prompts to completions: greedy decoding or sampling, in batches padded on the left.

A stop string does not end the decoding: what follows it is cut.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..base.devices import dtype_name
from ..base.paths import short_path
from ..base.progress import Progress
from ..base.ranges import ANY_SEED, COUNT, SHARE, ZERO_ON, check_fields
from ..data.rows import check_text, listed
from ..data.tokens import PAD, by_length, encode_prompt, pad
from ..layers.linear import decoding_layout, held_dense
from ..lora.inject import use_adapter
from ..lora.layer import check_names
from ..models.batches import check_tokens
from ..models.fingerprint import fingerprint
from .graph_steps import Graphs, cuda_graph

FEW = 8  # rows that leave a batch together, at least


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
        check_fields(self, temperature=ZERO_ON, top_p=SHARE, samples=COUNT, seed=ANY_SEED,
                     max_new_tokens=COUNT, batch_size=COUNT)  # fmt: skip
        for stop in listed(self.stop, "stop", str):
            check_text(stop)
            if not stop:  # it would end every completion at once
                raise ValueError(f"stop={self.stop!r:.80}: expected texts that are not empty")
        if self.cache_bits not in (None, 8, 4) or isinstance(self.cache_bits, float):
            raise ValueError(f"cache_bits={self.cache_bits!r} must be 8, 4, or None for 16 or 32")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples={self.samples} would be equal; set a temperature above 0")


class Completion(str):
    """The generated text. `tokens`: how many were generated; `finished`: it was not cut by the
    limit of new tokens."""

    def __new__(cls, text: str, tokens: int, finished: bool):
        self = super().__new__(cls, text)
        self.tokens, self.finished = tokens, finished
        return self


class Generator:
    """A function from prompts to their completions, in order, with what a report says of it."""

    def __init__(self, ask: Callable[[Sequence[str]], list], info: dict | None = None):
        if not callable(ask):
            raise ValueError(f"expected a function from prompts to completions, got {ask!r:.60}")
        self.ask, self.info = ask, dict(info or {})  # info: such as model and decoding

    @classmethod
    def of(cls, ask: Callable) -> "Generator":
        """Return `ask` as a Generator, unless it is one."""
        return ask if isinstance(ask, Generator) else cls(ask)

    def __call__(self, prompts: Sequence[str]) -> list:
        """Return a completion, or a list of samples, for each prompt; ValueError if the function
        gave anything else."""
        said = self.ask(prompts)
        found = () if isinstance(said, str) or not isinstance(said, Sequence) else said
        groups = [each if isinstance(each, list) and each else [each] for each in found]
        texts = [all(isinstance(text, str) for text in group) for group in groups]
        if len(texts) != len(prompts) or not all(texts):
            raise ValueError(f"{len(prompts)} prompts gave {said!r:.80}; expected as many texts, "
                             "or lists of samples")  # fmt: skip
        return said

    def check(self, prompts: Sequence[str]) -> None:
        """Raise what asking these prompts would raise, where that is known before."""

    def fingerprint(self) -> str | None:
        """Return a hash of the weights that answer; None where they are not known."""


class ModelGenerator(Generator):
    """Asks a model; see `generator`."""

    def __init__(self, model, tokenizer, decoding: Decoding):
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding
        weight = model.get_input_embeddings().weight
        self.dtype = weight.dtype
        self.graphs = Graphs(cuda_graph if weight.is_cuda else None)
        self.info = {
            "model": short_path(Path(model.config._name_or_path)),
            "revision": getattr(model.config, "_commit_hash", None),
            "compute_dtype": dtype_name(self.dtype),
            # Left out where it is not used: reports from before there was one stay comparable.
            "decoding": {k: v for k, v in asdict(decoding).items() if k != "cache_bits" or v},
        }

    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def check(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of the prompts; ValueError for one that check_prompt refuses."""
        encoded = []
        for prompt in listed(prompts, "prompts", str):
            encoded.append(encode_prompt(self.tokenizer, prompt))
            check_prompt(self.model, self.decoding, prompt, encoded[-1])
        return encoded

    def layout(self):
        """Return a context in which decoding is fastest; whoever asks often holds it meanwhile."""
        gpu = self.model.get_input_embeddings().weight.is_cuda
        fast = self.dtype == torch.bfloat16 or self.dtype == torch.float16 and gpu
        return (decoding_layout if fast else held_dense)(self.model)

    def __call__(self, prompts: Sequence[str], adapters: Sequence[str | None] | None = None):
        model, decoding, prompts = self.model, self.decoding, listed(prompts, "prompts", str)
        if adapters is not None:
            adapters = listed(adapters, "adapters", (str, type(None)))
            if len(adapters) != len(prompts):
                raise ValueError(f"adapters={adapters!r:.80} for {len(prompts)} prompts: expected "
                                 "a list with a name, or None, for each prompt")  # fmt: skip
            check_names(model, *adapters)
        encoded = self.check(prompts)
        results: list = [None] * len(prompts)
        progress, done = Progress("answering", len(prompts), "prompts"), 0
        was_training = model.training
        model.eval()
        try:
            with self.layout():
                for chosen in by_length(encoded, decoding.batch_size, longest_first=True):
                    names = None
                    if adapters is not None:  # rows of one adapter together: no copies of them
                        chosen.sort(key=lambda i: adapters[i] or "")
                        names = [adapters[i] for i in chosen for _ in range(decoding.samples)]
                    batch = self._answer([encoded[i] for i in chosen], names)
                    for i, said in zip(chosen, batch):
                        results[i] = said if decoding.samples > 1 else said[0]
                    done += len(chosen)
                    progress(done)
        finally:
            model.train(was_training)
        return results

    @torch.inference_mode()
    def _answer(self, encoded: list[list[int]], names: list | None) -> list[list[Completion]]:
        """Return `samples` Completions for each of the encoded prompts; names: an adapter a row."""
        from transformers import GenerationConfig

        model, decoding = self.model, self.decoding
        device = model.get_input_embeddings().weight.device
        input_ids = pad(encoded, PAD, side="left").to(device)  # (batch, width)
        mask = pad([[1] * len(ids) for ids in encoded], 0, side="left").to(device)
        chat = model.generation_config.eos_token_id  # chat models have several
        chat = chat if isinstance(chat, list) else [chat]
        ends = {self.tokenizer.eos_token_id, *chat} - {None}
        sampling = decoding.temperature > 0
        how = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        settings = GenerationConfig(
            **(how if sampling else {}),
            do_sample=sampling,
            num_return_sequences=decoding.samples,
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=min(ends, default=PAD),  # fills rows that have ended: the model has it
            use_cache=True,
            return_dict_in_generate=True,
        )
        # A checkpoint's own generation settings (Llama-2's temperature 0.6, Qwen2's repetition
        # penalty) would fill in what `settings` leaves open; they are set aside meanwhile.
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            with torch.random.fork_rng(enabled=sampling), torch.autocast(
                device.type, self.dtype, enabled=self.dtype != torch.float32
            ):
                if sampling:
                    torch.manual_seed(decoding.seed)
                output = self._new_tokens(input_ids, mask, settings, names)
        finally:
            model.generation_config = own
        rows = [_complete(self.tokenizer, ids, ends, decoding) for ids in output]
        return [rows[i : i + decoding.samples] for i in range(0, len(rows), decoding.samples)]

    def _new_tokens(self, input_ids, mask, settings, names) -> list[list[int]]:
        """The new ids of each row. On a GPU by `graph_steps`. Else rows that have ended leave the
        batch, a quarter of it at a time; where tokens are drawn they stay, since a draw depends on
        the rows beside it."""
        from transformers import StoppingCriteriaList

        cache = _cache(self.model, self.decoding.cache_bits)
        plain = cache is not None and not self.decoding.cache_bits
        if plain and self.graphs.serve(self.model, settings.max_new_tokens):
            with use_adapter(self.model, names) if names else nullcontext():
                return self.graphs.new_tokens(self.model, input_ids, mask, settings)
        rows = len(input_ids) * settings.num_return_sequences
        new, going = [[] for _ in range(rows)], list(range(rows))  # going: rows of this batch
        leaving = cache is not None and not settings.do_sample
        while going:
            ended = torch.zeros(len(going), dtype=torch.bool, device=input_ids.device)

            def enough(ids, scores):
                """Whether enough rows have ended to go on without them."""
                ended.logical_or_(torch.isin(ids[:, -1], ends))
                return torch.full_like(ended, leaving and ended.sum() >= max(FEW, len(ended) // 4))

            ends = torch.tensor(settings.eos_token_id, device=input_ids.device)
            with use_adapter(self.model, names) if names else nullcontext():
                output = self.model.generate(
                    input_ids=input_ids, attention_mask=mask, generation_config=settings,
                    past_key_values=cache, stopping_criteria=StoppingCriteriaList([enough]),
                )  # sequences: (batch * samples, width + new)
            written = output.sequences[:, input_ids.shape[1] :]
            for row, ids in zip(going, written.tolist()):
                new[row] += ids
            settings.max_new_tokens -= written.shape[1]
            left = (~ended).nonzero().flatten()
            if not leaving or settings.max_new_tokens == 0 or len(left) == 0:
                return new
            cache.batch_select_indices(left)
            input_ids = output.sequences[left]
            mask = torch.cat([mask, torch.ones_like(written)], 1)[left]
            going = [going[i] for i in left.tolist()]
            names = names and [names[i] for i in left.tolist()]
        return new


def generator(model, tokenizer, decoding: Decoding = Decoding()) -> ModelGenerator:
    """Return a function from a list of prompts to a list of Completions in the same order, or of
    lists of `samples` Completions where there are several.

    Called with (prompts, adapters) it gives each prompt an adapter, by name (None: the base).
    Raises ValueError for other things, for what check_prompt refuses, and for unknown adapters.
    """
    if not isinstance(decoding, Decoding) or not hasattr(model, "generate") or tokenizer is None:
        kinds = ", ".join(type(given).__name__ for given in (model, tokenizer, decoding))
        raise ValueError(f"expected a model that generates, its tokenizer, a Decoding; got {kinds}")
    return ModelGenerator(model, tokenizer, decoding)


def check_prompt(model, decoding: Decoding, prompt: str, ids: Sequence[int]) -> None:
    """Raise ValueError where a prompt, with its token ids, and max_new_tokens exceed the context,
    and for a token that the model does not have."""
    check_tokens(model, ids)
    context = getattr(model.config, "max_position_embeddings", None) or 2**31
    if len(ids) + decoding.max_new_tokens > context:
        raise ValueError(f"a prompt of {len(ids)} tokens and "
                         f"max_new_tokens={decoding.max_new_tokens} exceed the context of "
                         f"{context}: {prompt[:60]!r}...; shorten the prompt, or lower the limit")


def _complete(tokenizer, new: list[int], ends: set[int], decoding: Decoding) -> Completion:
    """Return the text, cut at the end token by index, then at the first stop string."""
    end = next((i for i, token in enumerate(new) if token in ends), None)
    text = tokenizer.decode(new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cut = min((text.find(s) for s in decoding.stop if s in text), default=None)
    tokens = len(new) if end is None else end + 1
    return Completion(text[:cut], tokens, finished=end is not None or cut is not None)


def _cache(model, bits: int | None):
    """An empty cache of which rows can be dropped; None for models with windows or own states."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    from .kv_cache import CacheSpec, PackedCache

    if bits:
        return PackedCache(CacheSpec(bits))
    if not model._supports_default_dynamic_cache() or model.config.is_encoder_decoder:
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return cache if {type(layer) for layer in cache.layers} == {DynamicLayer} else None
