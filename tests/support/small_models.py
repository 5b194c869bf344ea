"""A tokenizer and random Llamas small enough for unit tests."""

import copy
import io
import pickle
from functools import cache, wraps

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "Question: Ava has 12 apples and buys 30 more. How many apples does she have?\nAnswer:\n",
    "Ava has 12+30=42 apples.\n#### 42",
]
# (prompt, target), of different lengths
PAIRS = [
    (f"Question: {'Ava counts. ' * (i % 4)}{i} + {i}?\nAnswer:\n", f"{i}+{i}\n#### {2 * i}")
    for i in range(24)
]


@cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; pad 0, bos 1, eos 2, like the bundled one."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


class _Pickler(pickle.Pickler):
    """Pickles a model without its tensors, which are kept as they are, in `tensors`."""

    def __init__(self, file):
        super().__init__(file)
        self.tensors = {}

    def persistent_id(self, held):
        if isinstance(held, torch.Tensor):
            self.tensors[id(held)] = held
            return id(held)


class _Unpickler(pickle.Unpickler):
    """Unpickles what _Pickler has pickled; each tensor is copied, once."""

    def __init__(self, file, tensors):
        super().__init__(file)
        self.tensors, self.copies = tensors, {}

    def persistent_load(self, name):
        return copy.deepcopy(self.tensors[name], self.copies)


def built_once(build):
    """`build`, but that copies are given of what it made for the same arguments before. Random
    numbers go on as if it were built each time. (copy.deepcopy takes three times as long.)"""

    @cache
    def first(*args, **given):
        made, file = build(*args, **given), io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(made)
        return made, file.getvalue(), pickler.tensors, torch.get_rng_state()

    @wraps(build)
    def copied(*args, **given):
        _, pickled, tensors, state = first(*args, **given)
        torch.set_rng_state(state)
        return _Unpickler(io.BytesIO(pickled), tensors).load()

    return copied


@built_once
def small_model(seed: int = 0, layers: int = 2, context: int = 256) -> LlamaForCausalLM:
    """A random Llama, hidden 64, fp32. Weights are large enough for varied completions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(small_tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()
