"""GGUF files against llama.cpp itself, and faults of serving planted there, found and named."""

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_lib.base.folders import write_hashes
from qlora_lib.data.gsm8k import PROMPT
from qlora_lib.formats.gguf_checkpoint import export_gguf
from qlora_lib.generation.generate import Decoding
from qlora_lib.lora.files import load_adapter
from qlora_lib.lora.inject import delete_adapter, inject_lora
from qlora_lib.lora.layer import lora_layers
from qlora_lib.lora.merge import merge_lora
from qlora_lib.models.gguf_folder import ADAPTER, BASE
from qlora_lib.models.load import load_model
from qlora_lib.models.quantize import dequantize_model, quantize_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.profiles import load_profile
from qlora_lib.serving.contract import make_contract, read_contract, serving_tokenizer
from qlora_lib.serving.contract import write_contract
from qlora_lib.serving.engines import URL, llama_cpp, open_local
from qlora_lib.serving.verify import compare_with
from tests.support.gguf_models import ARCHITECTURES, random_model
from tests.support.sentencepiece_like import whole_sentencepiece
from tests.support.small_models import small_tokenizer

TEXT = "Question: Ava has 12 apples and buys 30 more. How many apples does she have?"
PROMPTS = [[1, *small_tokenizer().encode(TEXT[: 10 * i])] for i in range(1, 8)]
ASKED = {"golden": [{"ids": [1] * 200}], "max_new_tokens": 1, "stop": []}


def furthest(model, folder) -> float:
    """Largest difference of the log probabilities of the ten likeliest tokens after PROMPTS, but
    for those where llama.cpp shows none: an end token, or a part of a character, is likeliest."""
    with llama_cpp(folder, ASKED, threads=1) as engine:
        answers = engine.complete(PROMPTS)
    found = []
    for ids, answer in zip(PROMPTS, answers):
        assert answer.prompt_tokens == len(ids)
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        found += [abs(p - float(ours[i])) for i, p in list((answer.first or {}).items())[:10]]
    assert len(found) >= 20
    return max(found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dense_models_have_its_log_probabilities(name, tmp_path, record_property):
    model = random_model(name)
    export_gguf(model, tmp_path / "m", small_tokenizer())
    far = furthest(model, tmp_path / "m")
    record_property("difference", far)
    assert far < 0.02  # its cache of keys and values is fp16


@pytest.mark.parametrize("spec", [QuantSpec(4, 32, True), QuantSpec(4, 64), QuantSpec(8, 32, True)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_models_and_their_adapters_too(name, spec, tmp_path, record_property):
    model = random_model(name)
    quantize_model(model, None, spec, "rtn")
    torch.manual_seed(1)
    inject_lora(model, "all", rank=4, alpha=8)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].data.normal_(0, 0.1)
    export_gguf(model, tmp_path / "m", small_tokenizer())
    far = furthest(model, tmp_path / "m")
    record_property("difference", far)
    assert far < 0.25  # it rounds activations to 8 bits in blocks of 32
    delete_adapter(model, "default")
    assert furthest(model, tmp_path / "m") > 2 * far  # and the adapter is seen


TEXTS = ["Question: Tom has 1,234 hats.\nAnswer:\n", "  two  spaces\n\n\nand don't\t$4.50",
         "\u00e9\u4e2d7", "<s>"]  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "llama2", "bare", "llama-bpe", "qwen2"])
def test_texts_become_the_same_tokens(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    model = random_model("llama", vocab_size=len(tokenizer))
    export_gguf(model, tmp_path / "m", tokenizer)
    contract = ASKED | {"golden": [{"ids": [1] * 200}]}
    with llama_cpp(tmp_path / "m", contract, threads=1) as engine:
        for text in TEXTS:
            got = engine._send("POST", "/tokenize", {"content": text, "add_special": True,
                                                     "parse_special": True})  # fmt: skip
            assert got["tokens"] == [1, *tokenizer.encode(text, add_special_tokens=False)], text


def tokenizer_of(kind: str):
    from qlora_lib.formats.gguf_vocabulary import SPLITS

    if kind == "bytes":
        return small_tokenizer()
    if kind not in SPLITS:
        return whole_sentencepiece(kind)
    said = json.loads(small_tokenizer().backend_tokenizer.to_str())
    (_, pattern), _ = SPLITS[kind]
    said["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]}  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(said)),
                                   bos_token="<s>", eos_token="</s>", pad_token="<pad>")


# --- the tiny model as it is served -------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model with the bundled adapter, tokenizer, its folder of GGUF, contract)."""
    profile = load_profile("tiny")
    model, tokenizer = profile.load()
    quantize_model(model, None, QuantSpec(4, 32, symmetric=True), "rtn")
    load_adapter(model, "data/tiny-adapter")
    tokenizer = serving_tokenizer(tokenizer, PROMPT)
    asked = [entry["question"] for entry in profile.examples("test")[:8]]
    contract = make_contract(model, tokenizer, asked, Decoding(max_new_tokens=128))
    folder = tmp_path_factory.mktemp("gguf") / "tiny"
    export_gguf(model, folder, tokenizer, beside=lambda place: write_contract(contract, place))
    return model, tokenizer, folder, read_contract(folder)


def served(tiny, tmp_path, model=None, tokenizer=None, change=None, **how):
    """The verdict on llama.cpp, with a folder in which something is another."""
    right, right_tokenizer, _, contract = tiny
    folder = tmp_path / "served"
    export_gguf(model or right, folder, tokenizer or right_tokenizer, **how)
    if change:
        change(folder)
    with llama_cpp(folder, contract, threads=1) as engine:
        verdict = compare_with(contract, engine)
    print(verdict, verdict.distance)
    return verdict


def test_nothing_is_found_where_all_is_right(tiny, tmp_path):
    verdict = served(tiny, tmp_path)
    assert verdict.ok and verdict.equal == verdict.asked == 8
    assert verdict.distance["as measured"] < 0.1
    assert compare_with(tiny[3], open_local(tiny[2], tiny[3], "cpu")).ok


def test_its_server_is_asked_by_its_address_too(tiny):
    _, _, folder, contract = tiny
    with llama_cpp(folder, contract, threads=1) as engine:
        assert compare_with(contract, URL(f"http://127.0.0.1:{engine.port}/v1", contract)).ok


def test_bos_twice(tiny, tmp_path):
    """A prompt that its client begins with bos, as a template may, and the server again."""
    _, tokenizer, _, contract = tiny
    other = copy.deepcopy(contract)
    other["golden"] = [g | {"prompt": "<s>" + g["prompt"]} for g in other["golden"]]
    with llama_cpp(tiny[2], contract, threads=1) as engine:
        assert list(compare_with(other, engine).found) == ["bos twice"]


def test_a_template_that_is_lost(tiny, tmp_path):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = None
    assert list(served(tiny, tmp_path, tokenizer=tokenizer).found) == ["template lost or changed"]


def test_an_end_token_that_does_not_stop(tiny, tmp_path):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.eos_token = "<pad>"
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    said["added_tokens"][2]["content"] = "<end>"
    said["model"]["vocab"]["<end>"] = said["model"]["vocab"].pop("</s>")
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(said)),
                                      bos_token="<s>", eos_token="<pad>", pad_token="<pad>")
    changed.chat_template = tokenizer.chat_template
    found = served(tiny, tmp_path, tokenizer=changed).found
    assert list(found) == ["eos is not a stop token"]


def test_another_base(tiny, tmp_path):
    other = copy.deepcopy(tiny[0])
    first, second, *rest = other.model.layers
    other.model.layers = torch.nn.ModuleList([second, first, *rest])
    assert list(served(tiny, tmp_path, other).found) == ["wrong base"]


def test_an_adapter_that_is_missing(tiny, tmp_path):
    found = served(tiny, tmp_path, change=lambda folder: (folder / ADAPTER).unlink()).found
    assert list(found) == ["adapter missing"]


def test_an_adapter_that_is_merged_twice(tiny, tmp_path):
    model = copy.deepcopy(tiny[0])
    merge_lora(model, "dense", unload=True)
    again = (tiny[2] / ADAPTER).read_bytes()
    found = served(tiny, tmp_path, model, change=lambda f: (f / ADAPTER).write_bytes(again)).found
    assert list(found) == ["adapter merged twice"]


def test_weights_that_were_rounded_again(tiny, tmp_path):
    model = copy.deepcopy(tiny[0])
    merge_lora(model, "dense", unload=True)
    quantize_model(model, None, QuantSpec(3, 64), "rtn")
    assert list(served(tiny, tmp_path, model).found) == ["rounding"]


def test_another_tokenizer(tiny, tmp_path):
    """Without most of its merges, and with two digits that have changed places."""
    said = json.loads(tiny[1].backend_tokenizer.to_str())
    some, vocab = copy.deepcopy(said), said["model"]["vocab"]
    some["model"]["merges"] = some["model"]["merges"][:20]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    for number, changed in enumerate((some, said)):
        other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(changed)),
                                        bos_token="<s>", eos_token="</s>", pad_token="<pad>")
        other.chat_template = tiny[1].chat_template
        assert "wrong tokenizer" in served(tiny, tmp_path / str(number), tokenizer=other).found


def test_a_file_that_was_changed(tiny, tmp_path, capsys):
    from qlora_lib.__main__ import main

    folder = tmp_path / "m"
    contract = tiny[3]
    export_gguf(tiny[0], folder, tiny[1], beside=lambda place: write_contract(contract, place))
    assert main(["verify", str(folder)]) == 0
    data = bytearray((folder / BASE).read_bytes())
    data[-1] ^= 1
    (folder / BASE).write_bytes(data)
    for _ in range(2):
        assert main(["verify", str(folder)]) == 2
        assert "error: changed file: " in capsys.readouterr().err
        write_hashes(folder)  # as if it had been saved so: the contract knows better


def test_a_file_of_ours_is_read_by_transformers(tmp_path):
    """base.gguf alone, through transformers' own reader: the weights of the packed layers."""
    model = random_model("llama")
    quantize_model(model, None, QuantSpec(4, 32, symmetric=True), "rtn")
    export_gguf(model, tmp_path / "m", small_tokenizer())
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "m", gguf_file=BASE, dtype="float32",
                                                trust_remote_code=False)
    packed, _ = load_model(tmp_path / "m", "cpu", "fp32")
    dequantize_model(packed)
    for (name, ours), theirs in zip(packed.state_dict().items(), read.state_dict().values()):
        assert torch.allclose(ours, theirs, atol=1e-6), name
