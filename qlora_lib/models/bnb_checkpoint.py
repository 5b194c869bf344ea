"""Reading 4-bit checkpoints that bitsandbytes wrote through transformers' save_pretrained.

Each quantized layer holds, in bitsandbytes 0.43 to 0.50:
    weight               uint8 (ceil(out * in / 2), 1), the first weight in the high nibble
    weight.absmax        fp32 (blocks,), or uint8 (blocks,) codes under double quantization
    weight.quant_map     fp32 (16,), the levels
    weight.nested_absmax, weight.nested_quant_map   fp32 (blocks / 256,), (256,)
    weight.quant_state.bitsandbytes__nf4            uint8, the bytes of a JSON text
These are the tensors of an NF4Tensor: nothing is converted, and no bitsandbytes is needed.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..base.files import parse_json, read_json
from ..base.folders import check_folder
from ..lora.layer import named
from ..quant.nf4 import NESTED_BLOCK, NF4Spec, NF4Tensor, dynamic_map, nf4_levels
from .packed_model import load_packed
from .stored_weights import read_weights

CONFIG_KEYS = {  # those of the last two lines change nothing of what is read
    "quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit",
    "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight", "llm_int8_skip_modules", "llm_int8_threshold",
}  # fmt: skip
STATE = ".quant_state.bitsandbytes__nf4"
STATE_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
INSTEAD = "load the dense model and quantize it with NF4Spec"


def load_bnb_4bit(folder: Path | str, device=None, compute_dtype: str = "auto"):
    """Read an NF4 checkpoint of bitsandbytes, with or without double quantization, into
    QuantizedLinear layers: (model in eval mode, tokenizer, or None when the folder has none).

    What was left dense takes the compute dtype. Raises FileNotFoundError for missing files and
    ValueError, naming the file or tensor, for what is not NF4 (fp4, LLM.int8), unknown settings,
    and tensors that are missing or do not fit each other or the model.
    """
    folder = Path(folder)
    check_folder(folder)
    _check_config(folder / "config.json")
    state = read_weights(folder)
    paths = [n.removesuffix(f".weight{STATE}") for n in state if n.endswith(f".weight{STATE}")]
    if not paths:
        raise ValueError(f"{folder} holds no tensor .weight{STATE}; is it a 4-bit checkpoint of a "
                         "bitsandbytes of 0.43 or later?")  # fmt: skip

    def make(path: str, tensors: dict[str, Tensor], shape: torch.Size) -> NF4Tensor:
        with named(f"{folder}: {path}.weight"):
            return _nf4_tensor({n.removeprefix("weight"): t for n, t in tensors.items()}, shape)

    return load_packed(folder, state, paths, make, device, compute_dtype)


def _check_config(path: Path) -> None:
    """Raise ValueError, by name, for whatever is not a 4-bit NF4 checkpoint of bitsandbytes."""
    config = read_json(path).get("quantization_config")
    config = config if isinstance(config, dict) else {}
    method = config.get("quant_method")
    if method != "bitsandbytes":
        raise ValueError(f"{path}: quant_method={method!r}, not 'bitsandbytes'; read it with "
                         "load_quantized (ours), import_gptq (GPTQ) or load_model (dense)")
    if config.get("load_in_8bit") or not config.get("load_in_4bit"):
        raise ValueError(f"{path}: LLM.int8 (load_in_8bit) is not supported; {INSTEAD}")
    kind = config.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    if kind != "nf4":
        raise ValueError(f"{path}: bnb_4bit_quant_type={kind!r} is not supported; {INSTEAD}")
    if unknown := {k: v for k, v in config.items() if k not in CONFIG_KEYS and v}:
        raise ValueError(f"{path}: settings {unknown} are not known here; {INSTEAD}")


def _nf4_tensor(tensors: dict[str, Tensor], shape: torch.Size) -> NF4Tensor:
    """Return a weight from its tensors, by what follows ".weight"."""
    state = _quant_state(tensors.pop(STATE))
    nested = NESTED_KEYS <= state.keys()
    known = STATE_KEYS | NESTED_KEYS if nested else STATE_KEYS
    if state.keys() != known:
        wrong = sorted(state.keys() ^ known)
        raise ValueError(f"{STATE}: {wrong} missing or not known; {INSTEAD}")
    if state["quant_type"] != "nf4" or state["shape"] != list(shape):
        raise ValueError(f"it is {state['quant_type']!r:.80} of shape {state['shape']!r:.80}, the "
                         f"model has {tuple(shape)} there; is config.json of these weights?")
    if nested and not isinstance(state["nested_offset"], (int, float)):
        raise ValueError(f"{STATE}: nested_offset={state['nested_offset']!r:.80} is no number")
    if (inner := state.get("nested_blocksize", NESTED_BLOCK)) != NESTED_BLOCK:
        raise ValueError(f"nested_blocksize={inner} is not {NESTED_BLOCK}; {INSTEAD}")
    tables = {".quant_map": nf4_levels(), ".nested_quant_map": dynamic_map()}
    parts = {"", ".absmax", ".quant_map"}
    parts |= {".nested_absmax", ".nested_quant_map"} if nested else set()
    if tensors.keys() != parts:
        wrong = [name or "weight" for name in sorted(tensors.keys() ^ parts)]
        raise ValueError(f"{wrong} missing or not expected")
    tensors = {name: t.contiguous().flatten() for name, t in tensors.items()}
    # Tables of constants; devices differ in the last bit of fp32 at most.
    for name in parts & tables.keys():
        t, ours = tensors[name], tables[name]
        if t.shape != ours.shape or not torch.allclose(t.float(), ours, rtol=1e-6, atol=0):
            raise ValueError(f"{name} holds other levels than NF4 has here; {INSTEAD}")
    quantized = NF4Tensor(
        codes=tensors[""].view(torch.uint8),  # they may be held in another dtype, as under FSDP
        absmax=tensors[".absmax"],
        nested_absmax=tensors.get(".nested_absmax"),
        offset=torch.tensor(state["nested_offset"], dtype=torch.float32) if nested else None,
        shape=shape,
        spec=NF4Spec(state["blocksize"], nested),
    )
    quantized.check()
    return quantized


def _quant_state(packed: Tensor) -> dict:
    """Return the JSON object whose bytes a quant_state tensor holds."""
    try:
        return dict(parse_json(bytes(packed.flatten().tolist()).decode()))
    except (ValueError, TypeError) as error:  # Unicode and JSON errors are ValueErrors
        raise ValueError(f"{STATE} holds no JSON object ({error}); save it again") from None
