"""Loading: folders, GGUF files, what is refused, and what an error tells to do."""

import json
import shlex
import shutil

import pytest
import torch

from qlora_lib.base.folders import write_hashes
from qlora_lib.base.hashes import weights_id
from qlora_lib.models import gguf_folder
from qlora_lib.models.gguf_files import gguf_file
from qlora_lib.models.load import is_whole, load_model, local_folder
from tests.support.gguf_file import write_gguf
from tests.support.small_models import small_model, small_tokenizer

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    small_model().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_a_folder_is_read_in_the_compute_dtype(folder):
    model, tokenizer = load_model(str(folder), "cpu", "fp32")
    assert not model.training and torch.equal(logits(model), logits(small_model()))
    assert tokenizer.pad_token_id == 0
    model, _ = load_model(folder, "cpu", "bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def run_command(error) -> None:
    """Run the `python -c` command that an error ends with, in this process."""
    python, option, code = shlex.split(str(error.value).splitlines()[-1])
    assert (python, option) == ("python", "-c")
    exec(code, {})


def test_pickled_weights_are_refused_and_the_command_converts_them(folder):
    """transformers would read them by itself."""
    state = small_model().state_dict()
    state.pop("lm_head.weight")  # tied
    for name, path in (("pytorch_model.bin", folder), ("model.pth", folder / "model.pth")):
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / name)
        with pytest.raises(ValueError, match="is a pickle.*not read here") as error:
            load_model(path, "cpu", "fp32")
        assert f"{folder / name} is a pickle" in str(error.value)
        run_command(error)
        (folder / name).unlink()
        assert torch.equal(logits(load_model(folder, "cpu", "fp32")[0]), logits(small_model()))


def test_meta_s_own_layout_is_told_what_to_do(folder):
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    (folder / "params.json").write_text("{}")
    (folder / "consolidated.00.pth").write_bytes(b"")
    for read in (load_model, local_folder):
        with pytest.raises(ValueError, match="Meta's own layout: take .*-hf.*, or convert it"):
            read(str(folder))


def test_what_is_streamed_is_a_folder_of_safetensors(folder, tmp_path):
    assert local_folder(str(folder)) == folder and not is_whole(str(folder))
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is a pickle(?s:.*)python -c .*save_pretrained"):
        local_folder(str(folder))
    (folder / "small.gguf").touch()
    assert is_whole(str(folder)) and is_whole(str(folder / "small.gguf"))
    with pytest.raises(FileNotFoundError, match="nothing holds no model"):
        local_folder(str(tmp_path / "nothing"))


def test_weights_that_do_not_fit_are_value_errors(folder, caplog):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ValueError, match="tensors of other shapes than its config.json says"):
        load_model(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is truncated or corrupt"):
        load_model(folder)


def test_safetensors_are_taken_even_beside_pickled_ones(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert torch.equal(logits(load_model(folder, "cpu", "fp32")[0]), logits(small_model()))


def test_what_is_no_dense_model_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    def refused(message, kind=ValueError):
        with pytest.raises(kind, match=message):
            load_model(folder, "cpu", "fp32")

    state = load_file(folder / "model.safetensors")
    lost = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    refused("lacks 1 of the model's tensors, such as model.layers.1.mlp.up_proj.weight")
    save_file({**state, "model.layers.1.mlp.up_proj.weight": lost}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    for quantized in ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}):
        (folder / "config.json").write_text(json.dumps(config | quantized))
        if quantized:
            refused(r"quantized already \(gptq\).*import_gptq")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    refused("names no end token")
    (folder / "config.json").unlink()
    refused("holds no model; name a folder with config.json", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    folder = tmp_path / "empty"
    refused("empty holds no model", FileNotFoundError)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("You are trying to access a gated repo.\nMake sure", "after a request.*hf auth login"),
        ("We couldn't connect to 'the hub' to load the files", "can't be reached"),
        ("x/y is not a local folder and is not a valid model identifier", "no such folder here"),
        ("x/y does not appear to have a file named model.safetensors", "has no safetensors"),
        ("Something else.\nMore", r"Something else\. A local"),
    ],
)
def test_errors_of_the_hub_are_explained(monkeypatch, text, reason):
    from transformers.configuration_utils import PreTrainedConfig

    def fail(path):
        raise OSError(text)

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", fail)
    with pytest.raises(FileNotFoundError, match=f"x/y could not be loaded: .*?{reason}") as error:
        load_model("x/y", "cpu", "fp32")
    assert "A local folder or a GGUF file does instead: MODEL=, --model" in str(error.value)


@pytest.mark.parametrize(
    "error, reason",
    [
        ("GatedRepoError", "after a request.*hf auth login"),
        ("RepositoryNotFoundError", "no such folder here"),
        ("LocalEntryNotFoundError", "can't be reached"),
    ],
)
def test_what_transformers_makes_of_the_hub_s_errors_is_understood(monkeypatch, error, reason):
    """Raised where it asks the hub, so that the words which are looked for are its own."""
    from huggingface_hub import errors
    from transformers.utils import hub

    kind = getattr(errors, error)

    def fail(*args, **kwargs):
        raise kind.__new__(kind, "refused")  # its __init__ wants the hub's answer

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match=f"x/y could not be loaded: .*?{reason}"):
        load_model("x/y", "cpu", "fp32")


def test_a_folder_without_weights_is_said_to_have_no_safetensors(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="could not be loaded: it has no safetensors"):
        load_model(folder, "cpu", "fp32")


def test_only_safetensors_are_asked_of_the_hub(monkeypatch, made):
    from transformers import AutoModelForCausalLM

    asked = {}
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.update(k) or real(*a, **k)
    )
    load_model(made, "cpu", "fp32")
    assert asked["use_safetensors"] is True


@pytest.mark.parametrize("value, dtype", [("nan", "fp32"), ("inf", "fp32"), ("1e6", "fp16")])
def test_weights_that_are_not_finite_when_they_are_computed_with_are_named(value, dtype, folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["model.layers.1.input_layernorm.weight"][3] = float(value)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="model: model.layers.1.input_layernorm.weight holds NaN"):
        load_model(folder, "cpu", dtype)


def test_a_dense_folder_with_hashes_is_compared(folder):
    write_hashes(folder)
    load_model(folder, "cpu", "fp32")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{name} is not as it was written"):
            load_model(folder, "cpu", "fp32")
        (folder / name).write_bytes(before)


# --- GGUF ----------------------------------------------------------------------------------


def test_a_gguf_file_gives_the_model_and_its_tokenizer(tmp_path):
    pytest.importorskip("accelerate")
    file = tmp_path / "small.gguf"
    write_gguf(file)
    for path in (file, tmp_path):  # the file, and the folder that holds only it
        assert gguf_file(path) == file
    model, tokenizer = load_model(tmp_path, "cpu", "fp32")
    torch.testing.assert_close(logits(model), logits(small_model()), rtol=1e-4, atol=1e-4)
    special = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    assert special == (0, 1, 2)
    text = "Ava has 12 apples.\n"
    assert tokenizer.encode(text, add_special_tokens=False) == small_tokenizer().encode(text)
    model.save_pretrained(tmp_path / "saved")  # an ordinary dense model
    tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved", "cpu", "fp32")[0]), logits(model))
    assert weights_id(file) == weights_id(tmp_path) != str(file)
    write_gguf(file, without="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match="lacks 1 of the model's tensors, such as model.layers.1"):
        load_model(file, "cpu", "fp32")
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="small.gguf could not be read.*damaged"):
        load_model(file, "cpu", "fp32")


def test_which_gguf_file(tmp_path, monkeypatch):
    assert gguf_file("a/hub-id") is None and gguf_file(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="there is no file .*missing.gguf"):
        gguf_file(tmp_path / "missing.gguf")
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(gguf_folder, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf accelerate"):
        load_model(tmp_path)
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"several GGUF files \(a.gguf, b.gguf\)"):
        gguf_file(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert gguf_file(tmp_path) is None
