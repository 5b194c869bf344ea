"""Loading a model from the hub, a folder of safetensors or a GGUF file, never from pickle.

It comes out dense, but for a 4-bit checkpoint of bitsandbytes and a folder of export_gguf, whose
layers stay packed.
"""

import shlex
from pathlib import Path

import torch

from ..base.devices import dtype_name, resolve_device, resolve_dtype
from ..base.finite import check_finite
from ..base.folders import check_folder
from ..base.paths import short_path
from .conv1d import linear_from_conv1d
from .gguf_files import gguf_file, load_gguf
from .gguf_folder import is_gguf_folder, load_gguf_folder
from .quantize import stored_tensors
from .settings import plain_errors, read_config, read_tokenizer
from .stored_weights import stored_shapes, weight_map

PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth")
# What transformers writes into its errors, in lower case, and what it means
REASONS = {
    "gated repo": "its hub page gives access after a request: make one, then `hf auth login`",
    "couldn't connect": "the hub can't be reached, and the files are not in its cache",
    "not a valid model identifier": "there is no such folder here, and no such model on the hub",
    ".safetensors": "it has no safetensors, and pickled weights are not read",
}


def load_model(path: str | Path, device=None, compute_dtype: str = "auto"):
    """Load a causal language model and its tokenizer: (model in eval mode, tokenizer).

    path: a hub id, a folder with config.json, tokenizer and safetensors, a GGUF file or a
    folder with one. Weights are loaded in the compute dtype; Conv1D layers become nn.Linear; a
    4-bit checkpoint of bitsandbytes gives NF4 layers, a folder of export_gguf grids. Raises
    FileNotFoundError where no weights can be had, ValueError for weights that are pickled,
    truncated, incomplete, NaN or Inf, or quantized otherwise, for a model that needs code of its
    own, and for a tokenizer without an end token.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # in a notebook it would be a widget that stays
    device = resolve_device(device)
    dtype = resolve_dtype(compute_dtype, device)
    if is_gguf_folder(path):  # of export_gguf; its layers stay packed
        model, tokenizer = load_gguf_folder(path, device, dtype_name(dtype))
        model.config._name_or_path = str(path)
    elif gguf := gguf_file(path):
        model, tokenizer = load_gguf(gguf, dtype)
    else:
        if _is_folder(str(path)):
            check_folder(path)
        model, tokenizer = _from_safetensors(str(path), dtype, device)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} names no end token: set eos_token in its config")
    linear_from_conv1d(model)
    check_finite(stored_tensors(model), path)
    return model.to(device).eval(), tokenizer


def _from_safetensors(path: str, dtype: torch.dtype, device: torch.device):
    from transformers import AutoModelForCausalLM

    try:
        config = read_config(path)
        method = _quant_method(config)
        if method == "bitsandbytes":
            from .bnb_checkpoint import load_bnb_4bit  # which most models do without

            model, tokenizer = load_bnb_4bit(local_folder(path), device, dtype_name(dtype))
            model.config._name_or_path = path
            if tokenizer is None:
                raise FileNotFoundError("there is no tokenizer_config.json")
            return model, tokenizer
        if method is not None:
            raise ValueError(f"{path} is quantized already ({method}); name the dense model, or "
                             "read this one with import_gptq or import_compressed")  # fmt: skip
        tokenizer = read_tokenizer(path)
        if Path(path).is_dir():
            _check_weights(Path(path), config)
        with plain_errors(path):
            model, found = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
                trust_remote_code=False,
            )  # fmt: skip
    except OSError as error:
        raise _explained(path, error) from error
    if missing := sorted(found["missing_keys"]):  # transformers would fill them at random
        raise ValueError(f"{path} lacks {len(missing)} of the model's tensors, such as "
                         f"{missing[0]} (load_quantized reads what save_quantized wrote)")
    return model, tokenizer


def _check_weights(path: Path, config) -> None:
    """Raise ValueError for names of files that lead out of a folder, which transformers would
    follow, and for tensors of other shapes than the config says, before it makes room for those."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), plain_errors(f"the config of {path}"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    needed = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    files = {path / name for name in weight_map(path).values()}
    for name, shape in stored_shapes(files).items():
        if needed.get(name, shape) != shape:
            raise ValueError(f"{path} holds tensors of other shapes than its config.json says: "
                             f"{name} {shape}, not {needed[name]}; get both again")  # fmt: skip


def _explained(path: str, error: Exception) -> FileNotFoundError:
    first = str(error).strip().splitlines()[0].rstrip(".")
    reason = next((why for sign, why in REASONS.items() if sign in str(error).lower()), first)
    return FileNotFoundError(
        f"{path} could not be loaded: {reason}. A local folder or a GGUF file does instead: "
        "MODEL=, --model (LLaMA-2-7B also as NousResearch/Llama-2-7b-hf, ungated)"
    )


def is_whole(name: str) -> bool:
    """Whether a model can't be streamed block by block: a GGUF file, or one of bitsandbytes."""
    if is_gguf_folder(name) or gguf_file(name):
        return True
    try:
        return _quant_method(read_config(name)) == "bitsandbytes"
    except (OSError, ValueError):  # what is wrong with it, loading says better
        return False


def _quant_method(config) -> str | None:
    """Return what the weights were quantized with, or None for dense ones."""
    described = getattr(config, "quantization_config", None)
    if described is None:
        return None
    described = described if isinstance(described, dict) else vars(described)
    return str(described.get("quant_method", "in a way that its config.json does not name"))


def local_folder(name: str) -> Path:
    """Return a model's folder of safetensors; a hub id is downloaded into the hub's cache. Raises
    FileNotFoundError and ValueError as load_model does."""
    if _is_folder(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds, all with one remedy
        raise _explained(name, error) from error


def _is_folder(name: str) -> bool:
    """Return whether `name` is a folder here, and no hub id. Raises ValueError for pickled weights
    alone, FileNotFoundError for no model."""
    path, pickled = Path(name), []
    if path.is_file():
        pickled = [path] if any(path.match(pattern) for pattern in (*PICKLED, "*.bin")) else []
    elif path.is_dir() and not list(path.glob("*.safetensors")):
        pickled = sorted(file for pattern in PICKLED for file in path.glob(pattern))
    if pickled:
        raise ValueError(f"{pickled[0]} is a pickle, which can run any code when it is read, so it "
                         f"is not read here. {_conversion(pickled[0])}")  # fmt: skip
    is_folder = path.is_absolute() or name.startswith(".") or path.exists()
    if is_folder and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{short_path(path)} holds no model; name a folder with "
                                "config.json and safetensors, a GGUF file, or a model on the hub")
    return is_folder


def _conversion(file: Path) -> str:
    """Return what makes safetensors of a pickle, for who trusts its source."""
    folder = file.parent
    if (folder / "params.json").is_file():
        return (
            "It is in Meta's own layout: take the model in transformers' (on the hub its name ends "
            "in -hf), or convert it with convert_llama_weights_to_hf.py of transformers' repository"
        )
    if file.match("pytorch_model*.bin") and (folder / "config.json").is_file():
        code = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained({str(folder)!r})"
        )
    else:
        code = (
            "import torch; from safetensors.torch import save_file; "
            f"w = torch.load({str(file)!r}, map_location='cpu', weights_only=True); "
            "save_file({n: t.clone().contiguous() for n, t in w.items()}, "
            f"{str(folder / 'model.safetensors')!r}, {{'format': 'pt'}})"
        )
    how = "If you trust its source, convert it once, then name the folder:"
    return f"{how}\npython -c {shlex.quote(code)}"
