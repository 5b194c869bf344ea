"""The memory of fine-tuning, predicted part by part: full, LoRA or QLoRA.

Weights, scales, adapters, gradients and optimizer are exact: shapes are those of the model
itself, built on the meta device, bytes those of the layout in which they are stored.
Activations are what autograd saves in transformers' Llama blocks with SDPA attention and no
padding; for other architectures they are an estimate. Not handled: several GPUs, 8-bit or
paged optimizers, what an allocator loses to fragments, the CUDA context (some 0.5 GB).
"""

import math
import weakref
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .grid import SCALE_DTYPE, QuantSpec
from .lora import ALL_LINEAR, find_linears
from .models import DTYPES
from .nf4 import NESTED_BLOCK, NF4Spec

METHODS = ("full", "lora", "qlora")
PARTS = ("weights", "packed weights", "scales", "adapters", "gradients", "optimizer",
         "activations", "logits", "dequantized layer")  # fmt: skip


@dataclass(frozen=True)
class MemoryLedger:
    """Bytes by part, in the order of PARTS. Parts that are not needed are 0.

    The parts do not all peak at the same moment, so `total` is an upper bound.
    """

    setting: str  # what it was made for, in words
    parameters: int  # of the base model
    trained: int  # parameters that get a gradient
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def bits_per_parameter(self) -> float:
        """Of the stored base: weights, packed weights and scales over all parameters."""
        stored = sum(self.parts[p] for p in ("weights", "packed weights", "scales"))
        return 8 * stored / self.parameters

    def __str__(self) -> str:
        rows = [self.setting]
        rows += [f"  {part:<18}{n / 1e9:9.3f} GB" for part, n in self.parts.items() if n]
        rows.append(f"  {'total':<18}{self.total / 1e9:9.3f} GB")
        rows.append(
            f"  base {self.bits_per_parameter:.2f} bits a parameter; "
            f"{self.trained:,} of {self.parameters:,} parameters trained"
        )
        return "\n".join(rows)


def memory_ledger(
    config,
    method: str = "full",
    batch: int = 1,
    seq: int = 512,
    rank: int = 16,
    targets=ALL_LINEAR,
    spec: QuantSpec | NF4Spec = NF4Spec(),
    checkpointing: bool = False,
    compute_dtype: str = "bf16",
) -> MemoryLedger:
    """Predicted peak memory of training the model that `config` describes.

    config: a transformers config of the Llama family. method: "full" trains every
    parameter; "lora" adapters of `rank` on `targets` over a dense base; "qlora" the same
    over decoder linears stored as `spec` says. batch sequences of seq tokens at a time.
    compute_dtype: bf16, fp16 or fp32, of the dense weights and activations.
    Raises ValueError for another method or dtype and for targets that match nothing.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    if compute_dtype not in DTYPES:
        raise ValueError(f"compute_dtype={compute_dtype!r} must be one of {', '.join(DTYPES)}")
    size = DTYPES[compute_dtype].itemsize
    parameters, shapes = _model_shapes(config.to_json_string(), type(config))
    linears = {path: s for path, s in shapes.items() if _last(path) in ALL_LINEAR}
    parts = dict.fromkeys(PARTS, 0)
    dense = parameters
    if method == "qlora":
        dense -= sum(math.prod(s) for s in linears.values())
        packed = [packed_bytes(s, spec) for s in linears.values()]
        parts["packed weights"] = sum(codes for codes, _ in packed)
        parts["scales"] = sum(scales for _, scales in packed)
        # Decoded in fp32, then cast: both are alive for a moment.
        largest = max(math.prod(s) for s in linears.values())
        parts["dequantized layer"] = largest * (4 + size * (size < 4))
    parts["weights"] = dense * size
    if method == "full":
        # Mixed precision as in ZeRO (arXiv 1910.02054, section 3.1): gradients in the
        # compute dtype; Adam's two moments in fp32, and an fp32 copy of 16-bit weights.
        trained, targets = parameters, ALL_LINEAR
        parts["gradients"] = parameters * size
        parts["optimizer"] = parameters * (8 + 4 * (size < 4))
    else:
        targets = (targets,) if isinstance(targets, str) else tuple(targets)
        missing = set(targets) - {_last(path) for path in linears}
        if missing or not targets:
            raise ValueError(f"targets {sorted(missing) or targets} match no decoder linear")
        # A (rank, in) and B (out, rank) a layer, in fp32 whatever the compute dtype.
        trained = sum(rank * sum(s) for path, s in linears.items() if _last(path) in targets)
        parts["adapters"] = parts["gradients"] = 4 * trained
        parts["optimizer"] = 8 * trained
    tokens = batch * seq
    # Rotary cosines and sines, and the 16-bit copies of A and B that autocast keeps.
    parts["activations"] = 2 * seq * _head_dim(config) * size
    parts["activations"] += trained * size if method != "full" and size < 4 else 0
    parts["activations"] += tokens * _activations(
        config, method, rank, targets, checkpointing, size
    )
    # Logits, their fp32 copy, and its gradient.
    parts["logits"] = tokens * config.vocab_size * (size + 4 + 4)
    setting = f"{method}, batch {batch} x {seq} tokens, {compute_dtype}"
    setting += ", checkpointing" if checkpointing else ""
    if method != "full":
        setting += f", rank {rank}"
    if method == "qlora":
        setting += f", {spec}"
    return MemoryLedger(setting, parameters, trained, parts)


def packed_bytes(shape: tuple[int, int], spec: QuantSpec | NF4Spec) -> tuple[int, int]:
    """Bytes of a quantized weight (out, in): (codes, everything else)."""
    out, n = shape
    if isinstance(spec, NF4Spec):
        blocks = math.ceil(out * n / spec.block_size)
        nested = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4  # uint8, fp32, fp32 offset
        return math.ceil(out * n / 2), nested if spec.double_quant else 4 * blocks
    codes = out * math.ceil(n * spec.bits / 8)
    return codes, out * spec.groups(n) * (SCALE_DTYPE.itemsize + 1)  # scale, zero_point


def _activations(config, method, rank, targets, checkpointing: bool, size: int) -> int:
    """Bytes a token that autograd keeps from the forward pass, `size` bytes a number."""
    h, inner, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, head = config.num_attention_heads, _head_dim(config)
    q, kv = head * heads, head * config.num_key_value_heads
    full, targets = method == "full", set(targets)
    # RMSNorm: its input in fp32 and 1 / rms; where its own weight is trained, x / rms too.
    norm = 4 * (h + 1) + size * h * full
    # SDPA: query, key, value, output, and an fp32 logsumexp a head.
    block = size * (q + 2 * kv + q) + 4 * heads
    # SwiGLU, silu(gate) * up: gate, silu(gate), up.
    block += size * 3 * inner
    # A trained product W x or A x keeps its input: one that q, k, v share, and gate, up.
    block += size * h * bool(targets & {"q_proj", "k_proj", "v_proj"})
    block += size * h * bool(targets & {"gate_proj", "up_proj"})
    block += size * inner * ("down_proj" in targets)  # o_proj's input is SDPA's output
    block += 0 if full else size * rank * len(targets)  # B's input, A x
    block += 2 * norm
    last = norm + size * h * full  # the final norm, and the input of a trained head
    if checkpointing:
        # Each block's input, and all of the one block that is being computed again.
        return blocks * size * h + block + last
    # No gradient flows to frozen embeddings: the first norm keeps nothing.
    return blocks * block + last - (0 if full else norm)


def _head_dim(config) -> int:
    explicit = getattr(config, "head_dim", None)
    return explicit or config.hidden_size // config.num_attention_heads


def _last(path: str) -> str:
    return path.rpartition(".")[2]


@cache
def _model_shapes(config_json: str, kind) -> tuple[int, dict[str, tuple[int, int]]]:
    """Number of parameters (tied ones once), and the shape of each linear by path."""
    import json

    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind.from_dict(json.loads(config_json)))
    linears = find_linears(model, ALL_LINEAR)
    shapes = {n: (m.out_features, m.in_features) for n, m in linears.items()}
    return sum(p.numel() for p in model.parameters()), shapes


class AllocationMeter(TorchDispatchMode):
    """Bytes of the tensors made within its block: `alive` now, at the `peak`, and in the
    `trace` after each operation.

    What torch.cuda.max_memory_allocated says on a GPU, for any device. What an operation
    allocates and frees inside is not seen.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.trace: list[int] = []
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata in given or storage in self._known:
                continue  # a view, or written in place
            self._known.add(storage)
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        self.trace.append(self.alive)
        return out

    def _free(self, nbytes: int) -> None:
        self.alive -= nbytes


def _tensors(nested) -> list[Tensor]:
    return [x for x in tree_iter(nested) if isinstance(x, Tensor)]
