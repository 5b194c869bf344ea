"""Servers on this machine: what they may be, and what they may answer."""

import itertools
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from qlora_lib.serving import engines
from qlora_lib.serving.engines import URL, llama_cpp

CONTRACT = {"stop": ["Question:"], "max_new_tokens": 4, "golden": [{"ids": [1]}]}
MODELS = {"data": [{"id": "base"}, {"id": "adapter"}]}
OLD = {"choices": [{"text": "42", "finish_reason": "stop", "logprobs": {
    "top_logprobs": [{" 4": -0.1, "\n": -2}]}}], "usage": {"prompt_tokens": 3}}  # fmt: skip
NEW = {"choices": [{"message": {"content": "42"}, "finish_reason": "length", "logprobs": {
    "content": [{"top_logprobs": [{"id": 7, "token": " 4", "logprob": -0.1}]}]}}]}  # fmt: skip


@contextmanager
def server(answers):
    """A server on loopback; answers: {path: what it says, or a function of the handler}. Yields
    (address, the bodies that it was sent)."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        over = threading.Event()  # the test is done

        def log_message(self, *args):
            pass

        def do_GET(self):
            size = int(self.headers.get("Content-Length") or 0)
            asked.append(json.loads(self.rfile.read(size) or "null"))
            said = answers.get(self.path, b"")
            if callable(said):
                return said(self)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", asked
    finally:
        Handler.over.set()
        http.shutdown()
        http.server_close()


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_openai_s_two_forms_are_read(end):
    paths = {"/v1/models": MODELS, "/v1/completions": OLD, "/v1/chat/completions": NEW}
    with server(paths) as (address, asked):
        engine = URL(address + end, CONTRACT)
        (text,), (chat,) = engine.complete(["Q"]), engine.chat(["Q"])
    assert (text.text, text.finished, text.prompt_tokens) == ("42", True, 3)
    assert text.first == {"4": -0.1, "": -2.0}
    assert (chat.text, chat.finished, chat.prompt_tokens) == ("42", False, None)
    assert chat.first == {7: -0.1}
    sent = {"model": "adapter", "temperature": 0, "stop": ["Question:"], "max_tokens": 4}
    assert asked[1] == {"prompt": "Q", "logprobs": 20} | sent
    assert asked[2]["messages"] == [{"role": "user", "content": "Q"}]


@pytest.mark.parametrize("url", [
    "http://example.com", "https://127.0.0.1:1", "http://10.0.0.1:80", "file:///etc/passwd", "",
    "http://user@127.0.0.1:1", "http://127.0.0.1:99999", "http://[::2]:80", "127.0.0.1:80",
    "http://127.0.0.1.example.com", "http://0.0.0.0:80", "http://",
])  # fmt: skip
def test_addresses_of_other_machines_are_refused(url, monkeypatch):
    from ipaddress import ip_address

    def lookup(host, port):  # without asking a resolver
        if not isinstance(port, int) or port > 65535:
            raise OSError("no such port")
        try:
            return [(0, 0, 0, "", (str(ip_address(host)), port))]
        except ValueError:
            return [(0, 0, 0, "", ("93.184.216.34", port))]

    monkeypatch.setattr(engines, "getaddrinfo", lookup)
    monkeypatch.setattr(URL, "_send", lambda *args: pytest.fail("it was asked"))
    with pytest.raises(ValueError, match="expected http:// and an address of this machine"):
        URL(url, CONTRACT)


def redirect(handler):
    handler.send_response(302)
    handler.send_header("Location", "http://127.0.0.1:1/v1/models")
    handler.end_headers()


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" " * 2**16)
    except OSError:
        pass


@pytest.mark.parametrize("models, what", [
    (redirect, "answered with status 302"),
    (endless, "over 4,194,304 bytes, or took over 0.5 s"),
    (lambda handler: handler.over.wait(), "could not be asked .*is the server running"),
    (b"[1]", "expected an object"),
    (b"{", "answered no JSON .Expecting"),
    (b"\xff\xfe", "answered no JSON"),
    (b"", "answered with status 404"),
    ({"data": []}, "lists no model"),
    ({"data": 3}, "lists no model"),
])  # fmt: skip
def test_what_a_server_may_not_answer(models, what):
    with server({"/v1/models": models}) as (address, _):
        with pytest.raises(ValueError, match=what):
            URL(address, CONTRACT, seconds=0.5)


def test_an_answer_that_comes_too_slowly(monkeypatch):
    """By a clock that goes on a second at each look: no single read waits for long."""
    clock = itertools.count()
    monkeypatch.setattr(engines, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with server({"/v1/models": MODELS}) as (address, _):
        assert URL(address, CONTRACT, seconds=5).model == "adapter"
        with pytest.raises(ValueError, match="or took over 0.5 s"):
            URL(address, CONTRACT, seconds=0.5)


@pytest.mark.parametrize("said", [
    {}, {"choices": []}, {"choices": [{}]}, {"choices": [{"text": 3}]}, {"choices": 5},
    {"choices": [{"text": "", "logprobs": {"top_logprobs": [3]}}]},
    {"choices": [{"text": "", "logprobs": {"content": [{"top_logprobs": [{"id": 1}]}]}}]},
], ids=str)  # fmt: skip
def test_other_forms_are_refused(said):
    with server({"/v1/models": MODELS, "/v1/completions": said}) as (address, _):
        with pytest.raises(ValueError, match="in another form than OpenAI's"):
            URL(address, CONTRACT).complete(["Q"])


def test_no_server(tmp_path):
    with pytest.raises(ValueError, match="could not be asked .ConnectionRefusedError"):
        URL("http://127.0.0.1:1", CONTRACT)


def test_llama_cpp_that_is_not_there_or_reads_no_gguf(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="python -m pip install xllamacpp"):
        llama_cpp(tmp_path, CONTRACT).__enter__()
    monkeypatch.setattr(engines, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="holds no base.gguf, and llama.cpp reads GGUF alone"):
        llama_cpp(tmp_path, CONTRACT).__enter__()
