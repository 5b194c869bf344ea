"""A contract that what is served is what was measured: questions, and what the model said to them.

contract.json, in an exported folder, holds the template, the stop tokens, the hash of each file of
weights, and of each golden question the prompt, its token ids, the greedy completion, and the log
probabilities of the likeliest first tokens; with an adapter, also those of two faults that servers
have: the base alone, and the adapter's update added twice. verify.py compares a server with it.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..base.files import read_json, read_proved_json, write_proved_json
from ..base.hashes import file_hash
from ..base.stamp import stamp
from ..data.examples import write_chat
from ..data.tokens import encode_prompt
from ..generation.generate import Decoding, generator
from ..lora.inject import use_adapter
from ..lora.layer import lora_layers

CONTRACT = "contract.json"
GOLDEN = 20  # questions
FIRST = 8  # first tokens of a prompt
MEASURED, MISSING, TWICE = "as measured", "adapter missing", "adapter merged twice"
WEIGHTS = ("*.gguf", "*.safetensors")


def serving_tokenizer(tokenizer, template: str | None):
    """A tokenizer whose chat template asks a user's last message as `template` does, a text with
    one {question}; None: the tokenizer as it is. Servers apply it to what a chat sends them."""
    if template is None:
        return tokenizer
    before, _, after = template.partition("{question}")
    parts = json.dumps(before), "messages[-1]['content']", json.dumps(after)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ " + " + ".join(parts) + " }}"
    return tokenizer


def ask_of(tokenizer, question: str) -> str:
    """The prompt of a question, by the tokenizer's chat template; a bos that the template writes
    is left out, since encode_prompt puts one."""
    text = write_chat(tokenizer, [{"role": "user", "content": question}], ask=True)
    return text.removeprefix(tokenizer.bos_token or "\0")


@torch.inference_mode()
def first_tokens(model, prompts: Sequence[list[int]], count: int = FIRST) -> list[dict[int, float]]:
    """The likeliest next tokens of each prompt of token ids, {id: log probability}."""
    device, found = model.get_input_embeddings().weight.device, []
    for ids in prompts:
        logits = model(torch.tensor([ids], device=device)).logits[0, -1].float()
        best = logits.log_softmax(-1).topk(count)
        found.append(dict(zip(best.indices.tolist(), best.values.tolist())))
    return found


def adapter_faults(model, prompts: Sequence[list[int]]) -> dict[str, list[dict[int, float]]]:
    """First tokens as the base alone has them, and with the active adapter's update twice; {} for a
    model without one. To be asked before the adapter is merged."""
    layers = [m for m in lora_layers(model).values() if m.active and m.merged is None]
    if not layers:
        return {}
    with use_adapter(model, None):
        found = {MISSING: first_tokens(model, prompts)}
    factors = [layer.lora_B[layer.active].data for layer in layers]
    try:
        for b in factors:
            b.mul_(2)  # and back: exact
        found[TWICE] = first_tokens(model, prompts)
    finally:
        for b in factors:
            b.div_(2)
    return found


def make_contract(model, tokenizer, questions: Sequence[str], decoding: Decoding,
                  faults: dict | None = None) -> dict:  # fmt: skip
    """What a server of this model must answer. tokenizer: a serving_tokenizer. faults: what
    adapter_faults gave, where the adapter is merged by now; None: they are asked."""
    prompts = [ask_of(tokenizer, question) for question in questions]
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    first = {MEASURED: first_tokens(model, encoded)}
    first |= adapter_faults(model, encoded) if faults is None else faults
    said = generator(model, tokenizer, decoding)(prompts)
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return {
        "template": tokenizer.chat_template,
        "bos": tokenizer.bos_token,
        "stop_tokens": {tokenizer.decode([i]): i for i in sorted(ends)},
        "stop": list(decoding.stop),
        "max_new_tokens": decoding.max_new_tokens,
        "stamp": stamp(),
        "golden": [
            {"question": q, "prompt": p, "ids": ids, "completion": str(text),
             "finished": text.finished, "first": {name: _listed(tokenizer, rows[i])
                                                  for name, rows in first.items()}}
            for i, (q, p, ids, text) in enumerate(zip(questions, prompts, encoded, said))
        ],
    }  # fmt: skip


def _listed(tokenizer, tokens: dict[int, float]) -> list:
    """[id, text, log probability] of each token."""
    return [[i, tokenizer.decode([i]), round(p, 5)] for i, p in tokens.items()]


def write_contract(contract: dict, folder: Path) -> None:
    """Write contract.json, with the hashes of the weights that lie in `folder` by now."""
    files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    hashes = {path.name: file_hash(path) for path in files}
    write_proved_json(folder / CONTRACT, contract | {"files": hashes})


def read_contract(folder: Path) -> dict:
    """What write_contract wrote. Raises FileNotFoundError for none, ValueError for one that is
    damaged or was changed."""
    path = Path(folder) / CONTRACT
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; `python -m qlora_lib export` writes one")
    if "sha256" not in read_json(path):  # one that proves itself is as it was written
        raise ValueError(f"{path} is no contract that `export` wrote; export again")
    return read_proved_json(path)
