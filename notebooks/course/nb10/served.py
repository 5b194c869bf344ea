"""A model as something serves it, in this process, and what it says as plain values.

A server may put bos before a prompt that has one, or not know the end token; weights and template
are those that it is given. What it said to a prompt is kept, so that asking again costs nothing.
"""
import copy
from collections.abc import Sequence

from qlora_lib.data.tokens import encode_prompt
from qlora_lib.serving.contract import MEASURED, ask_of
from qlora_lib.serving.engines import Answer, Local
from qlora_lib.serving.verify import COMPARED


class Served(Local):
    """bos: how many stand before a prompt; stops: whether the end token ends an answer."""

    def __init__(self, model, tokenizer, contract: dict, bos: int = 1, stops: bool = True):
        if not stops:
            model, tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
            tokenizer.eos_token = tokenizer.pad_token
            model.generation_config.eos_token_id = tokenizer.pad_token_id
        super().__init__(model, tokenizer, contract)
        # encode_prompt puts one before a prompt without any
        self.before = (tokenizer.bos_token or "") * bos if bos > 1 else ""
        self.said: dict[str, Answer] = {}

    def complete(self, prompts: Sequence[str]) -> list[Answer]:
        new = [p for p in dict.fromkeys(prompts) if p not in self.said]
        if new:
            answers = super().complete([self.before + p for p in new])
            self.said |= dict(zip(new, answers))
        return [self.said[p] for p in prompts]

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The token ids that the model is given."""
        return [encode_prompt(self.tokenizer, self.before + p) for p in prompts]

    def seen(self, contract: dict) -> dict:
        """What it says to the golden questions: the ids of the prompts ("ids") and of the
        questions in its template ("chat"), first tokens {id: log probability}, texts."""
        golden = contract["golden"]
        prompts = [g["prompt"] for g in golden]
        answers = self.complete(prompts)
        chats = [ask_of(self.tokenizer, g["question"]) for g in golden]
        return {"ids": self.ids(prompts), "first": [a.first for a in answers],
                "texts": [a.text for a in answers], "chat": self.ids(chats)}


def plain(contract: dict) -> dict:
    """What a contract wants, as `seen` says it: for the weights also what faults would say, and
    beside each text whether it had ended."""
    golden = contract["golden"]
    names = golden[0]["first"] if golden else [MEASURED]
    first = {name: [{i: p for i, _, p in g["first"][name][:COMPARED]} for g in golden]
             for name in names}
    return {"ids": [g["ids"] for g in golden], "first": first,
            "texts": [(g["completion"], g["finished"]) for g in golden]}
