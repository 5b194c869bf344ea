"""GGUF files of others, read through transformers into an ordinary dense model.

The weights come out in full precision, but they lie on the file's own grid (Q4_1: 16 values in
a block of 32), which can't be finer than what wrote it. Needs the packages gguf and accelerate.
"""

from pathlib import Path

import torch

from .gguf_folder import needs_gguf
from .settings import check_config


def gguf_file(path: Path | str) -> Path | None:
    """Return the GGUF file that `path` names, or that is the only one in the folder `path`; None
    where there is none, or safetensors. Raises FileNotFoundError for a file that is not there,
    ValueError for a folder with several."""
    path = Path(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        return path
    if not path.is_dir() or list(path.glob("*.safetensors")):
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(f.name for f in found)
        raise ValueError(f"{path} holds several GGUF files ({names}); name one of them")
    return found[0] if found else None


def load_gguf(path: Path, dtype: torch.dtype):
    """Load a GGUF file: (model, tokenizer), on the CPU. Raises ImportError, naming the packages to
    install, and ValueError for a damaged file and what transformers does not read."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    needs_gguf(f"{path.name} is a GGUF file, and to read it", "accelerate")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name,
             "trust_remote_code": False}  # fmt: skip
    try:
        check_config(AutoConfig.from_pretrained(**where).to_dict(), "its config")
        tokenizer = AutoTokenizer.from_pretrained(**where)
        where |= {"dtype": dtype, "output_loading_info": True}
        model, found = AutoModelForCausalLM.from_pretrained(**where)
    except Exception as error:  # its reader raises whatever a damaged file leads to
        raise ValueError(f"{path} could not be read ({type(error).__name__}: {error}); is it "
                         "damaged, or of an architecture that transformers lacks?") from error
    if lost := sorted(found["missing_keys"]):
        raise ValueError(f"{path} lacks {len(lost)} of the model's tensors, such as {lost[0]}")
    # transformers takes it for quantized, and would neither save nor move it.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = str(path)
    return model, tokenizer
