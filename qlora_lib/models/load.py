"""Loading a model from the hub, a folder of safetensors or a GGUF file, never from pickle.

It comes out dense, but for a 4-bit checkpoint of bitsandbytes, whose layers stay packed.
"""

import shlex
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..base.devices import default_device, dtype_name, resolve_dtype
from ..base.paths import short_path
from .conv1d import linear_from_conv1d
from .gguf_files import gguf_file, load_gguf

PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth")
# What transformers writes into its errors, and what it means
REASONS = {
    "gated repo": "its hub page gives access only after a request: make one there, then "
    "`hf auth login`",
    "couldn't connect": "the hub can't be reached, and the files are not in its cache",
    "not a valid model identifier": "there is no such folder here, and no such public model on "
    "the hub",
    ".safetensors": "it has no safetensors, and pickled weights are not read; for a local folder "
    "with some, the error has the command that converts them",
}


def load_model(path: str | Path, device=None, compute_dtype: str = "auto"):
    """Load a causal language model and its tokenizer: (model in eval mode, tokenizer).

    path: a hub id, a folder with config.json, tokenizer and safetensors, a GGUF file or a
    folder with one. Weights are loaded in the compute dtype; Conv1D layers become nn.Linear.
    A 4-bit checkpoint of bitsandbytes gives a model with NF4 layers (load_bnb_4bit): a base for
    QLoRA at a third of the download. Raises FileNotFoundError, saying what to do, where there are
    no weights, they are gated or the hub can't be reached; ValueError for weights that are
    pickled, truncated, incomplete or quantized otherwise, and for a tokenizer without an end token.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # in a notebook it would be a widget that stays
    device = torch.device(device or default_device())
    dtype = resolve_dtype(compute_dtype, device)
    gguf = gguf_file(path)
    _refuse_pickle(Path(path))
    if gguf:
        model, tokenizer = load_gguf(gguf, dtype)
    else:
        model, tokenizer = _from_safetensors(str(path), dtype, device)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} names no end token: set eos_token in its config")
    linear_from_conv1d(model)
    return model.to(device).eval(), tokenizer


def _from_safetensors(path: str, dtype: torch.dtype, device: torch.device):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    local = Path(path)
    is_folder = local.is_absolute() or path.startswith(".") or local.exists()
    if is_folder and not (local / "config.json").is_file():
        raise FileNotFoundError(
            f"{short_path(local)} holds no model; name a folder with config.json and "
            "safetensors, a GGUF file, or a model on the hub"
        )
    try:
        config = AutoConfig.from_pretrained(path)
        method = _quant_method(config)
        if method == "bitsandbytes":
            from .bnb_checkpoint import load_bnb_4bit  # which most models do without

            model, tokenizer = load_bnb_4bit(local_folder(path), device, dtype_name(dtype))
            model.config._name_or_path = path
            if tokenizer is None:
                raise FileNotFoundError("there is no tokenizer_config.json")
            return model, tokenizer
        if method is None:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model, found = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except SafetensorError as error:
        raise ValueError(
            f"{path}: its weights are truncated or corrupt ({error}); get them again"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{path} holds tensors of other shapes than its config.json says; get both again"
        ) from error
    except OSError as error:
        text = str(error)
        reason = text.strip().splitlines()[0].rstrip(".")
        reason = next((why for sign, why in REASONS.items() if sign in text), reason)
        raise FileNotFoundError(
            f"{path} could not be loaded: {reason}. A local folder or a GGUF file does instead: "
            "MODEL=, --model"
        ) from error
    if method is not None:
        raise ValueError(
            f"{path} is quantized already ({method}); name the dense model, or read this one with "
            "import_gptq if it is GPTQ"
        )
    if found["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(found["missing_keys"])
        raise ValueError(
            f"{path} lacks {len(missing)} of the model's tensors, such as {missing[0]}; a dense "
            "checkpoint was expected (load_quantized reads what save_quantized wrote)"
        )
    return model, tokenizer


def is_quantized(name: str) -> bool:
    """Whether a folder or hub id holds a 4-bit checkpoint of bitsandbytes, by its config.json."""
    from transformers import AutoConfig

    try:
        return _quant_method(AutoConfig.from_pretrained(name)) == "bitsandbytes"
    except (OSError, ValueError):  # what is wrong with it, loading says better
        return False


def _quant_method(config) -> str | None:
    """Return what the weights were quantized with, or None for dense ones."""
    described = getattr(config, "quantization_config", None)
    if described is None:
        return None
    described = described if isinstance(described, dict) else vars(described)
    return str(described.get("quant_method", "in a way that its config.json does not name"))


def local_folder(path: str) -> Path:
    """Return a model's folder; that of a hub id lies in the hub's cache, downloaded if need be.

    Raises ValueError for weights that are only pickled, and FileNotFoundError for what can't be
    had, with the reason.
    """
    _refuse_pickle(Path(path))
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        return Path(snapshot_download(path, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds, all with one remedy
        reason = next((why for sign, why in REASONS.items() if sign in str(error).lower()), error)
        raise FileNotFoundError(
            f"{path} could not be downloaded: {reason}. A local folder does instead: MODEL=, --model"
        ) from error


def _refuse_pickle(path: Path) -> None:
    """Raise ValueError, with the command that converts them, for weights that are only pickled."""
    if path.is_file():
        pickled = [path] if any(path.match(pattern) for pattern in (*PICKLED, "*.bin")) else []
    elif path.is_dir() and not any([*path.glob("*.safetensors"), *path.glob("*.gguf")]):
        pickled = sorted(file for pattern in PICKLED for file in path.glob(pattern))
    else:
        pickled = []
    if not pickled:
        return
    file, folder = pickled[0], pickled[0].parent
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
    raise ValueError(
        f"{file} is a pickle, which can run any code when it is read, so it is not read here. "
        "If you trust its source, convert it once, then name the folder:\n"
        f"python -c {shlex.quote(code)}"
    )
