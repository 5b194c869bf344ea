"""Whether a server answers as its contract says, and the likely cause where it does not."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..base.folders import check_folder
from ..base.hashes import file_hash
from .contract import MEASURED, read_contract
from .engines import Answer

# Mean difference of the log probabilities of first tokens. llama.cpp rounds activations to 8 bits,
# which moves them by 0.01 to 0.05; another model moves them by several.
# NEAR: how well one of the adapter's faults must explain them.
CLOSE, NEAR, FAR = 0.1, 0.6, 1.2
COMPARED = 5  # first tokens of a prompt
LEAST = -12.0  # log probabilities below it count as this: their noise means nothing

REMEDIES = {
    "changed file": "export again, or copy the folder again",
    "bos twice": "the server adds bos to a prompt that its template begins with: let one of them",
    "bos missing": "set add_bos_token, in the file or the server",
    "wrong tokenizer": "serve the tokenizer of this folder; in GGUF, tokenizer.ggml.pre names it",
    "template lost or changed": "serve the chat template of this folder (Ollama: its Modelfile)",
    "eos is not a stop token": "name the stop tokens of contract.json to the server",
    "adapter missing": "serve adapter.gguf beside base.gguf (--lora; Ollama: ADAPTER)",
    "adapter merged twice": "the base holds the adapter already: serve it alone",
    "rounding": "its weights were rounded again: serve the file of this folder as it is",
    "wrong base": "the adapter, or the whole file, is of another model: serve this folder's",
}


@dataclass
class Verdict:
    """What a comparison found; it prints itself."""

    asked: int
    equal: int  # completions that are the same text
    distance: dict[str, float] = field(default_factory=dict)  # by what the server may have done
    found: dict[str, str] = field(default_factory=dict)  # cause: what was seen

    @property
    def ok(self) -> bool:
        return not self.found

    def __str__(self) -> str:
        lines = [f"{self.equal} of {self.asked} completions are the same text"]
        if MEASURED in self.distance:
            far = self.distance[MEASURED]
            lines.append(f"log probabilities of first tokens differ by {far:.3f} on average; up to "
                         f"{CLOSE} is the engine's own rounding")  # fmt: skip
        causes = (f"{cause}: {seen}; {REMEDIES[cause]}" for cause, seen in self.found.items())
        return "\n".join([*lines, *(causes if self.found else ["as measured"])])


def changed_file(folder: Path) -> str | None:
    """What check_folder, or the contract's hashes, say of a changed file; None: nothing."""
    try:
        check_folder(folder)
        for name, was in read_contract(folder)["files"].items():
            path = Path(folder) / name
            if not path.is_file() or file_hash(path) != was:
                return f"{name} is not the file that was measured"
    except ValueError as error:
        return str(error)
    return None


def compare_with(contract: dict, engine) -> Verdict:
    """Ask an engine (engines.py) the golden questions, as prompts and as chats."""
    golden = contract["golden"]
    answers = engine.complete([g["prompt"] for g in golden])
    chats = engine.chat([g["question"] for g in golden]) if contract["template"] else []
    if chats and _shift(golden, answers) == "wrong tokenizer" and not _shift(golden, chats):
        answers = chats  # Ollama puts prompts into its template, too
    equal = sum(a.text == g["completion"] for g, a in zip(golden, answers))
    verdict = Verdict(len(golden), equal, distances(golden, answers))
    if shift := _shift(golden, answers):
        verdict.found[shift] = "prompts have " + _counts(golden, answers)
        return verdict
    verdict.found |= _weights(verdict, golden, engine) or _texts(verdict, golden, answers, engine)
    if chats:
        verdict.found |= _template(golden, answers, chats)
    return verdict


def distances(golden: Sequence[dict], answers: Sequence[Answer]) -> dict[str, float]:
    """How far first tokens are from what was measured, and from each of the adapter's faults: the
    mean difference of log probabilities; {} for an engine that gives none."""
    found: dict[str, list[float]] = {}
    for row, answer in zip(golden, answers):
        if not answer.first:
            continue
        by_id = all(isinstance(key, int) for key in answer.first)
        least = max(LEAST, min(answer.first.values()))  # of what it shows
        for name, tokens in row["first"].items():
            ours: dict = {}  # the likeliest of tokens that look alike
            for i, text, p in tokens[:COMPARED]:
                ours.setdefault(i if by_id else text.strip(), p)
            for token, p in ours.items():
                theirs = answer.first.get(token, least)
                found.setdefault(name, []).append(abs(max(theirs, least) - max(p, least)))
    return {name: sum(values) / len(values) for name, values in found.items()}


def _shift(golden, answers) -> str | None:
    """The cause of prompts that have other numbers of tokens."""
    more = {a.prompt_tokens - len(g["ids"]) for g, a in zip(golden, answers)
            if a.prompt_tokens is not None}  # fmt: skip
    if more <= {0}:
        return None
    only = more.pop() if len(more) == 1 else None
    return {1: "bos twice", -1: "bos missing"}.get(only, "wrong tokenizer")


def _counts(golden, answers) -> str:
    pair = next((g, a) for g, a in zip(golden, answers) if a.prompt_tokens != len(g["ids"]))
    return f"{pair[1].prompt_tokens} tokens where {len(pair[0]['ids'])} were measured"


def _weights(verdict: Verdict, golden, engine) -> dict[str, str]:
    """What is wrong with the weights, by how far first tokens are from each possibility."""
    far = verdict.distance
    if not far:
        few = verdict.equal < verdict.asked / 2
        return {"wrong base": "most texts differ, and the server gives no log probabilities, so "
                              "that its cause may be another"} if few else {}  # fmt: skip
    if far[MEASURED] <= CLOSE:
        return {}
    nearest = min(far, key=far.get)
    seen = f"log probabilities of first tokens differ by {far[MEASURED]:.2f}"
    if nearest != MEASURED and far[nearest] < min(NEAR, far[MEASURED] / 2):
        return {nearest: f"{seen}, from a model so served by {far[nearest]:.2f}"}
    if engine.takes_ids:
        again = distances(golden, engine.complete([g["ids"] for g in golden]))
        if again and again[MEASURED] <= CLOSE:
            return {"wrong tokenizer": f"{seen}, and given token ids by {again[MEASURED]:.2f}"}
    return {"rounding" if far[MEASURED] <= FAR else "wrong base": seen}


def _texts(verdict: Verdict, golden, answers, engine) -> dict[str, str]:
    """What is wrong with the texts where first tokens are as measured."""
    ended = [(g, a) for g, a in zip(golden, answers) if g["finished"]]
    over = [a for g, a in ended if a.finished is False or (
        len(a.text) > len(g["completion"]) and a.text.startswith(g["completion"]))]  # fmt: skip
    if ended and len(over) >= len(ended) / 2:
        seen = f"{len(over)} of {len(ended)} completions go on where the measured ones ended"
        return {"eos is not a stop token": seen}
    if verdict.equal >= verdict.asked / 2:
        return {}
    seen = f"{verdict.asked - verdict.equal} of {verdict.asked} texts differ"
    if engine.takes_ids:
        again = engine.complete([g["ids"] for g in golden])
        other = sum(a.text != b.text for a, b in zip(answers, again))
        if other > len(golden) / 2:
            return {"wrong tokenizer": f"{seen}, and {other} of them from those of the measured "
                                       "token ids"}  # fmt: skip
    if verdict.equal > verdict.asked / 10:  # near ties fall otherwise, and texts part for good
        return {}
    return {"rounding": f"{seen}, though first tokens are as measured; or the server samples"}


def _template(golden, answers, chats) -> dict[str, str]:
    """Whether a chat asks otherwise than the prompts do."""
    if _shift(golden, chats) == "bos twice":
        return {"bos twice": "chats have " + _counts(golden, chats)}
    other = sum(a.text.strip() != c.text.strip() for a, c in zip(answers, chats))
    if _shift(golden, chats) or other > len(golden) / 2:
        seen = f"{other} of {len(golden)} chats are answered otherwise than the measured prompts"
        return {"template lost or changed": seen}
    return {}
