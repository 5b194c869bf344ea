"""Tokenizers as GGUF holds them; tests/interop/test_llama_cpp.py compares the tokens."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qlora_lib.formats.gguf_vocabulary import SPLITS, add_vocabulary
from tests.support.sentencepiece_like import sentencepiece, whole_sentencepiece
from tests.support.small_models import small_tokenizer

gguf = pytest.importorskip("gguf")


class Written(dict):
    """Stands in for a GGUFWriter: what each add_... was given."""

    def __getattr__(self, name):
        return lambda value: self.__setitem__(name.removeprefix("add_"), value)


def written(tokenizer, size=None) -> Written:
    writer = Written()
    add_vocabulary(writer, tokenizer, size or len(tokenizer))
    return writer


def changed(**what) -> PreTrainedTokenizerFast:
    said = json.loads(small_tokenizer().backend_tokenizer.to_str()) | what
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(said)),
                                   bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def test_byte_level_bpe():
    got = written(small_tokenizer(), 310)
    assert (got["tokenizer_model"], got["tokenizer_pre"]) == ("gpt2", "smollm")
    assert len(got["token_list"]) == 310 and got["token_list"][-1] == "[PAD309]"
    assert got["token_types"][:3] == [gguf.TokenType.CONTROL] * 3
    assert got["token_types"][-1] == gguf.TokenType.UNUSED
    assert all(len(merge.split(" ")) == 2 for merge in got["token_merges"])
    ids = [got[f"{name}_token_id"] for name in ("pad", "bos", "eos")]
    assert ids == [0, 1, 2] and got["add_bos_token"] is True and "unk_token_id" not in got
    assert "chat_template" not in got


@pytest.mark.parametrize("name", SPLITS)
def test_how_text_is_split_is_named(name):
    steps = {
        "ByteLevel": lambda regex: {"add_prefix_space": False, "trim_offsets": True,
                                    "use_regex": regex},
        "Digits": lambda single: {"individual_digits": single},
        "Split": lambda pattern: {"pattern": {"Regex": pattern}, "behavior": "Isolated",
                                  "invert": False},
    }  # fmt: skip
    parts = [{"type": kind, **steps[kind](value)} for kind, value in SPLITS[name]]
    both = {"type": "Sequence", "pretokenizers": parts}
    assert written(changed(pre_tokenizer=both))["tokenizer_pre"] == name
    if len(parts) == 1:
        assert written(changed(pre_tokenizer=parts[0]))["tokenizer_pre"] == name


@pytest.mark.parametrize("kind, space", [("llama2", True), ("metaspace", True), ("bare", False)])
def test_sentencepiece(kind, space):
    got = written(whole_sentencepiece(kind))
    assert got["tokenizer_model"] == "llama" and got["add_space_prefix"] is space
    assert got["token_types"].count(gguf.TokenType.BYTE) == 256
    assert got["token_types"][0] == gguf.TokenType.UNKNOWN
    # an early merge has the higher score, and letters the lowest
    scores = dict(zip(got["token_list"], got["token_scores"]))
    assert max(scores.values()) == 0 and scores["a"] == min(scores.values())


@pytest.mark.parametrize("tokenizer, what", [
    (lambda: sentencepiece("llama2"), "no piece <0x00>"),
    (lambda: changed(pre_tokenizer={"type": "Whitespace"}), "knows no such tokenizer.*Whitespace"),
    (lambda: changed(pre_tokenizer=None), "knows no such tokenizer"),
    (lambda: changed(normalizer={"type": "Lowercase"}), "normalizer .*Lowercase"),
    (lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], 0))),
     "a Unigram tokenizer can't be written"),
    (object, "object has no tokenizer.json"),
])  # fmt: skip
def test_what_llama_cpp_would_tokenize_otherwise_is_refused(tokenizer, what):
    with pytest.raises(ValueError, match=what):
        written(tokenizer(), 600)


def test_pieces_that_bpe_makes_of_one_pair_alone_are_refused():
    said = json.loads(whole_sentencepiece("bare").backend_tokenizer.to_str())
    said["model"]["merges"] = said["model"]["merges"][::2]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(said)))
    with pytest.raises(ValueError, match="is not made of .*SentencePiece's own merges alone"):
        written(other)
