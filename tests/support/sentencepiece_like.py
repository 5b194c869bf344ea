"""Tokenizers of SentencePiece's kind, with a space before the first word or without: LLaMA-2's and
newer ones."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Question: Ava has 3 eggs and buys 12 more. How many has she?\nAnswer:\nShe has 3+12=15 eggs.",
    "Question: Tom sells 4 of 9 hats.\nAnswer:\nTom keeps 9-4=5 hats.\n#### 5", "user assistant hi",
] * 4  # fmt: skip


@cache
def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """kind: "llama2" (a space is put before any text), "metaspace" (before its first word) or
    "bare" (nowhere). bos is 1, eos 2; there is no pad."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if kind == "llama2":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        scheme = {"metaspace": "first", "bare": "never"}[kind]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=[chr(i) for i in range(32, 127)] + ["\n", "\u2581"],
        max_token_length=8,
    )  # fmt: skip
    # Line by line: a newline is a token of its own, as in LLaMA-2.
    tokenizer.train_from_iterator([line for text in TEXT for line in text.split("\n")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def whole_sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """The same pieces merged as SentencePiece does, by score, which is by their ids: with every
    pair that makes a piece, as transformers writes them of LLaMA-2's own, and a piece a byte."""
    tokenizer = sentencepiece(kind)
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = said["model"]["vocab"]
    vocab |= {f"<0x{i:02X}>": len(vocab) + i for i in range(256)}
    said["model"]["merges"] = [
        [text[:i], text[i:]]
        for text in sorted(vocab, key=vocab.get)
        for i in range(1, len(text))
        if text[:i] in vocab and text[i:] in vocab and text not in ("<unk>", "<s>", "</s>")
    ]
    whole = Tokenizer.from_str(json.dumps(said))
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
