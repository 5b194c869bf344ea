"""What answers the golden questions: a server on this machine, llama.cpp in this process, or the
model as this package reads its folder, in transformers' classes.

An engine has complete(prompts) and chat(questions), each giving an Answer an item, and `info`.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from socket import getaddrinfo
from urllib.parse import urlsplit

from ..base.files import parse_json
from ..data.tokens import encode_prompt
from ..formats.compressed_tensors import MARKER, import_compressed
from ..formats.gptq_checkpoint import import_gptq
from ..generation.generate import Decoding, generator
from ..lora.files import ADAPTER_CONFIG, load_adapter
from ..models.gguf_folder import ADAPTER, BASE, is_gguf_folder, load_gguf_folder, read_gguf_adapter
from .contract import ask_of, first_tokens

LARGEST = 2**22  # bytes of a server's answer
SECONDS = 300  # that it may take
SHOWN = 20  # first tokens that a server is asked for


@dataclass
class Answer:
    """What an engine said to one prompt. None: it does not say."""

    text: str
    finished: bool | None = None  # it was not cut by the limit of new tokens
    prompt_tokens: int | None = None
    first: dict | None = None  # log probabilities of first tokens, by id, or by text without spaces
    tokens: int | None = None  # generated


class URL:
    """A server with OpenAI's API (llama.cpp, vLLM, Ollama) at http://127.0.0.1:PORT or another
    address of this machine. Nothing is followed, proxied or read beyond LARGEST and SECONDS."""

    takes_ids = True  # prompts may be token ids

    def __init__(self, url: str, contract: dict, seconds: float = SECONDS):
        self.contract, self.seconds = contract, seconds
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or 80
            local = parts.scheme == "http" and host and not parts.username
            found = [ip_address(info[4][0]) for info in getaddrinfo(host, port)] if local else []
            local = bool(found) and all(address.is_loopback for address in found)
        except (ValueError, OSError):
            local = False
        if not local:
            raise ValueError(f"{url!r:.80}: expected http:// and an address of this machine, such "
                             "as http://127.0.0.1:8000")  # fmt: skip
        self.host, self.port, self.path = host, port, parts.path.rstrip("/").removesuffix("/v1")
        models = self._send("GET", "/v1/models").get("data")
        if not isinstance(models, list) or not models or not isinstance(models[0], dict):
            raise ValueError(f"{url} lists no model under /v1/models")
        # vLLM lists an adapter behind its base
        self.model = str(models[-1].get("id"))
        self.info = f"{url}, model {self.model:.80}"

    def complete(self, prompts: Sequence[str] | Sequence[list[int]]) -> list[Answer]:
        return [self._ask("/v1/completions", {"prompt": p, "logprobs": SHOWN}) for p in prompts]

    def chat(self, questions: Sequence[str]) -> list[Answer]:
        asked = ([{"role": "user", "content": q}] for q in questions)
        return [self._ask("/v1/chat/completions", {"messages": m}) for m in asked]

    def _ask(self, path: str, body: dict) -> Answer:
        body |= {"model": self.model, "temperature": 0, "stop": self.contract["stop"],
                 "max_tokens": self.contract["max_new_tokens"]}  # fmt: skip
        said = self._send("POST", path, body)
        try:
            choice, usage = said["choices"][0], said.get("usage") or {}
            text = choice["text"] if "text" in choice else choice["message"]["content"] or ""
            if not isinstance(text, str):
                raise TypeError("the text is none")
            first = _first(choice.get("logprobs"))
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            counts = [n if isinstance(n, int) else None for n in counts]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} answered in another form than OpenAI's ({error}): "
                             f"{json.dumps(said):.120}") from None  # fmt: skip
        return Answer(text, choice.get("finish_reason") == "stop", counts[0], first, counts[1])

    def _send(self, method: str, path: str, body: dict | None = None) -> dict:
        where = f"http://{self.host}:{self.port}{self.path}{path}"
        until = time.monotonic() + self.seconds
        connection = HTTPConnection(self.host, self.port, timeout=self.seconds)
        try:
            connection.request(method, self.path + path, body and json.dumps(body).encode(),
                               {"Content-Type": "application/json"})  # fmt: skip
            answer, data = connection.getresponse(), b""
            while part := answer.read1(2**16):
                data += part
                if len(data) > LARGEST or time.monotonic() > until:
                    raise ValueError(f"{where}: the answer has over {LARGEST:,} bytes, or took "
                                     f"over {self.seconds} s")  # fmt: skip
        except (OSError, HTTPException) as error:
            raise ValueError(f"{where} could not be asked ({type(error).__name__}: {error}); is "
                             "the server running?") from None  # fmt: skip
        finally:
            connection.close()
        text = data.decode(errors="replace")
        if answer.status != 200:  # a redirect is not followed
            raise ValueError(f"{where} answered with status {answer.status}: {text:.200}")
        try:
            found = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{where} answered no JSON ({error}): {text:.60}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{where} answered {text:.60}, expected an object")
        return found


def _first(logprobs: dict | None) -> dict | None:
    """First tokens of an answer in OpenAI's older form ({text: p}) or its newer (a list)."""
    if not logprobs:
        return None
    if top := logprobs.get("top_logprobs"):
        least_first = sorted(top[0].items(), key=lambda pair: float(pair[1]))
        return {str(text).strip(): float(p) for text, p in least_first}
    top = (logprobs.get("content") or [{}])[0].get("top_logprobs") or []
    return {t.get("id", str(t.get("token")).strip()): float(t["logprob"]) for t in top} or None


@contextmanager
def llama_cpp(
    folder: Path, contract: dict, adapter: bool = True, threads: int = 0
) -> Iterator[URL]:
    """llama.cpp in this process, with the folder's base and, unless it shall not, its adapter.
    threads: 0 for as many as torch takes. Raises ImportError without the package xllamacpp."""
    import torch

    if find_spec("xllamacpp") is None:
        raise ImportError("llama.cpp comes with xllamacpp: python -m pip install xllamacpp")
    if not is_gguf_folder(folder):
        raise ValueError(f"{folder} holds no {BASE}, and llama.cpp reads GGUF alone")
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity, params.warmup = str(folder / BASE), -1, False
    longest = max(len(golden["ids"]) for golden in contract["golden"])
    params.n_ctx, params.n_parallel = longest + contract["max_new_tokens"] + 64, 1
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = threads or torch.get_num_threads()
    if adapter and (folder / ADAPTER).is_file():
        file = str(folder / ADAPTER)
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 1.0)]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ValueError(f"llama.cpp does not read {folder}: {error}") from None
    engine = URL(server.listening_address, contract)
    engine.info = f"llama.cpp (xllamacpp {xllamacpp.__version__})"
    yield engine
    del server


class Local:
    """A model in this process, asked as the course asks."""

    takes_ids = False
    info = "transformers"

    def __init__(self, model, tokenizer, contract: dict):
        self.model, self.tokenizer = model, tokenizer
        stop, limit = tuple(contract["stop"]), contract["max_new_tokens"]
        self.ask = generator(model, tokenizer, Decoding(max_new_tokens=limit, stop=stop))

    def complete(self, prompts: Sequence[str]) -> list[Answer]:
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        first = first_tokens(self.model, encoded, SHOWN)
        said = zip(self.ask(prompts), encoded, first)
        return [Answer(str(t), t.finished, len(ids), p, t.tokens) for t, ids, p in said]

    def chat(self, questions: Sequence[str]) -> list[Answer]:
        return self.complete([ask_of(self.tokenizer, question) for question in questions])


def open_local(folder: Path, contract: dict, device=None, adapter: Path | None = None) -> Local:
    """The model of an exported folder, read by this package into transformers' classes. adapter: a
    folder with one, which a checkpoint has beside it."""
    if is_gguf_folder(folder):
        model, tokenizer = load_gguf_folder(folder, device, "fp32")
        if (folder / ADAPTER).is_file():
            read_gguf_adapter(model, folder / ADAPTER)
    else:
        read = import_compressed if (folder / MARKER).is_file() else import_gptq
        model, tokenizer = read(folder, device, "fp32")
        if adapter or (folder / ADAPTER_CONFIG).is_file():
            load_adapter(model, adapter or folder)
    return Local(model, tokenizer, contract)
