"""A tokenizer as llama.cpp reads it from a GGUF file: byte-level BPE, or SentencePiece's kind.

llama.cpp splits text by code of its own, which the file only names, and it merges SentencePiece's
pieces by score where transformers merges by the rank of a pair. What it would tokenize otherwise
is refused by name.
"""

import json

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
# What llama.cpp calls a way to split text before byte-level BPE, by what tokenizer.json says of it
SPLITS = {
    "gpt-2": [("ByteLevel", True)],
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "llama-bpe": [("Split", LLAMA3), ("ByteLevel", False)],
    "qwen2": [("Split", LLAMA3.replace("{1,3}", "")), ("ByteLevel", False)],
}


def add_vocabulary(writer, tokenizer, size: int) -> None:
    """Write a tokenizer into a GGUFWriter, padded to the model's `size` tokens. Raises ValueError,
    by name, for kinds and settings that llama.cpp has not."""
    from gguf import TokenType

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json, which GGUF is made of")
    said = json.loads(backend.to_str())
    if said["model"]["type"] != "BPE":
        raise ValueError(f"a {said['model']['type']} tokenizer can't be written as GGUF here, "
                         "only BPE, byte-level or SentencePiece's")  # fmt: skip
    if len(tokenizer) > size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {size}")
    texts = [f"[PAD{i}]" for i in range(size)]
    kinds = [TokenType.UNUSED] * size
    for text, i in tokenizer.get_vocab().items():
        texts[i], kinds[i] = text, TokenType.NORMAL
    for token in said["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        kinds[token["id"]] = kind
    merges = [m if isinstance(m, list) else m.split(" ") for m in said["model"]["merges"]]
    if said["model"].get("byte_fallback"):
        places = {text: i for i, text in enumerate(texts)}
        for text in (f"<0x{byte:02X}>" for byte in range(256)):
            if text not in places:
                raise ValueError(f"the tokenizer has no piece {text}, by which llama.cpp spells "
                                 "what it has no piece for")  # fmt: skip
            kinds[places[text]] = TokenType.BYTE
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = TokenType.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(_space_first(said))
        writer.add_token_scores(_scores(texts, merges))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(said))
        writer.add_add_space_prefix(False)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_bos_token(tokenizer.bos_token_id is not None)  # as encode_prompt puts it
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _split_name(said: dict) -> str:
    """llama.cpp's name for how a byte-level BPE splits text."""
    before = said["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    found = []
    for step in steps:
        kind = step.get("type")
        value = {"ByteLevel": step.get("use_regex"), "Digits": step.get("individual_digits"),
                 "Split": (step.get("pattern") or {}).get("Regex")}.get(kind)  # fmt: skip
        found.append((kind, value))
    name = next((name for name, split in SPLITS.items() if split == found), None)
    normal = said["normalizer"] in (None, {"type": "NFC"})
    if name is None or not normal or steps[-1].get("add_prefix_space"):
        raise ValueError(f"llama.cpp knows no such tokenizer: {found}, normalizer "
                         f"{said['normalizer']}, add_prefix_space "
                         f"{steps[-1].get('add_prefix_space')}; known: {', '.join(SPLITS)}")
    return name


def _space_first(said: dict) -> bool:
    """Whether SentencePiece puts a space before a text."""
    if before := said["pre_tokenizer"]:
        if before.get("type") == "Metaspace":
            return before.get("prepend_scheme") != "never"
    return "Prepend" in json.dumps(said["normalizer"])


def _scores(texts: list[str], merges: list[list[str]]) -> list[float]:
    """A score for each piece: the earlier it is merged, the higher. Equal to merging by rank where
    every pair that makes a piece is a merge, and pieces have runs of ranks; else ValueError."""
    ranks, pairs = {}, {tuple(pair) for pair in merges}
    for rank, (a, b) in enumerate(merges):
        ranks.setdefault(a + b, rank)
    known = set(texts)
    for text in ranks:
        for i in range(1, len(text)):
            pair = text[:i], text[i:]
            if known.issuperset(pair) and pair not in pairs:
                raise ValueError(f"the piece {text!r} is not made of {pair}, which llama.cpp would "
                                 "merge too: it reads SentencePiece's own merges alone")
    return [-float(ranks.get(text, len(merges))) for text in texts]
