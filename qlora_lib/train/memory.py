"""The memory of fine-tuning, predicted part by part: full, LoRA or QLoRA; and of decoding text.

Weights, scales, adapters, gradients and optimizer are exact: shapes are those of the model
itself, built on the meta device, bytes those of the layout in which they are stored.
Activations are what autograd saves in transformers' Llama blocks (Mistral's and Qwen2's are
like them) with SDPA attention and no padding; for other architectures they are an estimate.
Not handled: several GPUs, paged optimizers, what an allocator loses to fragments, the CUDA
context (some 0.5 GB).
"""

import json
import math
from dataclasses import dataclass
from functools import cache

import torch

from ..base.devices import DTYPES, dtype_name
from ..generation.kv_cache import CacheSpec, cache_bytes, head_dim
from ..lora.targets import ALL_LINEAR, find_linears
from ..quant.grid import SCALE_DTYPE, QuantSpec
from ..quant.nf4 import NESTED_BLOCK, NF4Spec
from .adam8bit import OPTIMIZERS, SMALLEST
from .measure import Measurement, available_memory, measure_step

METHODS = ("full", "lora", "qlora")
LIKE_LLAMA = ("llama", "mistral", "qwen2")  # blocks whose activations are counted, not estimated
PARTS = ("weights", "packed weights", "scales", "adapters", "gradients", "optimizer",
         "activations", "logits", "dequantized layer")  # fmt: skip


@dataclass(frozen=True)
class MemoryLedger:
    """Bytes by part, in the order of PARTS. Parts that are not needed are 0.

    `total` is their sum, `peak` what is alive at once: the logits are gone when backward
    dequantizes its first layer or, under checkpointing, recomputes its first block.
    Gradients and activations are taken as alive together, as they are when gradients of
    several batches are accumulated.
    """

    setting: str  # what it was made for, in words
    parameters: int  # of the base model
    trained: int  # parameters that get a gradient
    parts: dict[str, int]
    batch: int
    seq: int
    compute_dtype: str
    checkpointing: bool
    optimizer: str
    recomputed: int  # of the activations, what checkpointing makes again, a block at a time
    logit_tokens: int | None  # whose logits exist at once; None: all

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        in_backward = self.parts["dequantized layer"] + self.recomputed
        return self.total - min(self.parts["logits"], in_backward)

    def measure(self, model, step=None, optimizer=None) -> Measurement:
        """What two training steps of `model` took, beside the prediction; see `measure_step`."""
        return measure_step(self, model, step, optimizer)

    @property
    def bits_per_parameter(self) -> float:
        """Of the stored base: weights, packed weights and scales over all parameters."""
        stored = sum(self.parts[p] for p in ("weights", "packed weights", "scales"))
        return 8 * stored / self.parameters

    def __str__(self) -> str:
        rows = [self.setting]
        rows += [f"  {part:<18}{n / 1e9:9.3f} GB" for part, n in self.parts.items() if n]
        return "\n".join([
            *rows,
            f"  {'total':<18}{self.total / 1e9:9.3f} GB",
            f"  {'at the peak':<18}{self.peak / 1e9:9.3f} GB",
            f"  base {self.bits_per_parameter:.2f} bits a parameter; "
            f"{self.trained:,} of {self.parameters:,} parameters trained",
        ])  # fmt: skip


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
    optimizer: str = "adamw",
    logit_tokens: int | None = None,
) -> MemoryLedger:
    """Predicted peak memory of training the model that `config` describes.

    config: a transformers config, of a decoder whose linears have Llama's names (of several
    modalities, the text's). method: "full" trains every parameter; "lora" adapters of
    `rank` on `targets` over a dense base; "qlora" the same over decoder linears stored as
    `spec` says. batch sequences of seq tokens at a time. compute_dtype: bf16, fp16 or fp32,
    of the dense weights and activations. optimizer: "adamw", or "adam8bit" with moments in
    8 bits. logit_tokens: tokens whose logits exist at once; None: all, and never more.
    Raises ValueError for another method, dtype, optimizer or kind of decoder, and for
    targets that match nothing.
    """
    _check("method", method, METHODS)
    _check("optimizer", optimizer, OPTIMIZERS)
    _check("compute_dtype", compute_dtype, DTYPES)
    config, size = config.get_text_config(), DTYPES[compute_dtype].itemsize
    counts, linears = _model_shapes(config.to_json_string(), type(config))
    parts = dict.fromkeys(PARTS, 0) | _base_bytes(counts, linears, spec, size, method == "qlora")
    if method == "qlora":
        largest = max(map(math.prod, linears.values()))
        parts["dequantized layer"] = _dequantized_bytes(largest, spec, size)
    if method == "full":
        # Mixed precision as in ZeRO (arXiv 1910.02054, section 3.1): gradients in the
        # compute dtype; Adam's two moments in fp32, and an fp32 copy of 16-bit weights.
        trained, targets, copies = sum(counts), ALL_LINEAR, 0
        parts["gradients"] = trained * size
        parts["optimizer"] = moments_bytes(counts, optimizer) + 4 * trained * (size < 4)
    else:
        targets = (targets,) if isinstance(targets, str) else tuple(targets)
        sizes = _adapter_sizes(linears, rank, targets)
        trained = sum(sizes)
        parts["adapters"] = parts["gradients"] = 4 * trained  # fp32 whatever the compute dtype
        parts["optimizer"] = moments_bytes(sizes, optimizer)
        copies = trained * size if size < 4 else 0  # autocast's, of A and B
    tokens = batch * seq
    block, rest = _activations(config, method, rank, targets, checkpointing, size)
    recomputed = tokens * block + copies if checkpointing else 0
    # Rotary cosines and sines first.
    parts["activations"] = 2 * seq * head_dim(config) * size + copies + tokens * (block + rest)
    # Logits, their fp32 copy, and its gradient.
    parts["logits"] = min(tokens, logit_tokens or tokens) * config.vocab_size * (size + 4 + 4)
    words = [
        f"{method}, batch {batch} x {seq} tokens, {compute_dtype}",
        "checkpointing" if checkpointing else "",
        f"rank {rank}" if method != "full" else "",
        str(spec) if method == "qlora" else "",
        "8-bit Adam" if optimizer == "adam8bit" else "",
        f"activations of {config.model_type} estimated" * (config.model_type not in LIKE_LLAMA),
    ]
    how = (batch, seq, compute_dtype, checkpointing, optimizer, recomputed, logit_tokens)
    return MemoryLedger(", ".join(filter(None, words)), sum(counts), trained, parts, *how)


def decoding_ledger(
    config,
    context: int,
    batch: int = 1,
    spec: QuantSpec | NF4Spec | None = None,
    cache: CacheSpec | None = None,
    compute_dtype: str = "bf16",
) -> dict[str, int]:
    """Exact bytes of what decoding keeps, by part: "weights", "packed weights", "scales", and
    the "cache" of keys and values of `batch` sequences of `context` tokens.

    spec: how the decoder linears are stored; None: dense. cache: how old tokens are; None: as
    they came. Not counted: the activations of a step, and a layer's cache while it is
    dequantized. Raises ValueError for another dtype or kind of decoder.
    """
    _check("compute_dtype", compute_dtype, DTYPES)
    config, size = config.get_text_config(), DTYPES[compute_dtype].itemsize
    counts, linears = _model_shapes(config.to_json_string(), type(config))
    stored = _base_bytes(counts, linears, spec, size, spec is not None)
    return stored | {"cache": cache_bytes(config, context, cache, batch, size)}


def fitting_batch(
    model, tokens: int, most: int, cache: CacheSpec | None = None, free: float | None = None
) -> int:
    """Return how many sequences of up to `tokens` tokens, prompt and completion, to decode at once:
    `most`, halved until they fit the free memory of the model's device (at least 1); `most` for
    decoders that the ledger does not know.

    cache: how old tokens are stored, as in decoding_ledger. free: bytes; None: those free now,
    beside the loaded model. Halved, so that a little more or less of them mostly gives the same
    batches, with which alone a killed evaluation goes on.
    """
    config, embedding = model.config.get_text_config(), model.get_input_embeddings().weight
    try:
        ledger = decoding_ledger(config, tokens, 1, None, cache, dtype_name(embedding.dtype))
    except ValueError:
        return most
    size = embedding.element_size()
    # While a block reads the prompt: its norm in fp32, query, key, value, output and the two
    # residuals, SwiGLU, and this layer's cache once more; at the end the logits, also in fp32.
    block = tokens * (config.hidden_size * (4 + 6 * size) + 3 * size * config.intermediate_size)
    layer = cache_bytes(config, tokens, None, 1, size) // config.num_hidden_layers
    sequence = ledger["cache"] + block + layer + config.vocab_size * (size + 4)
    # A dequantized layer, and a tenth for what the allocator loses to fragments.
    free = available_memory(embedding.device) if free is None else free
    room = 0.9 * free - config.hidden_size * config.intermediate_size * (4 + size)
    while most > 1 and most * sequence > room:
        most //= 2
    return most


def _check(name: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")


def _base_bytes(counts, linears, spec, size: int, packed: bool) -> dict[str, int]:
    """Bytes of the stored base by part: all dense, or its linears as `spec` says."""
    shapes = linears.values() if packed else ()
    stored = [packed_bytes(shape, spec) for shape in shapes]
    return {
        "weights": (sum(counts) - sum(map(math.prod, shapes))) * size,
        "packed weights": sum(codes for codes, _ in stored),
        "scales": sum(scales for _, scales in stored),
    }


def _adapter_sizes(linears, rank: int, targets: tuple[str, ...]) -> list[int]:
    """Parameters of A (rank, in) and of B (out, rank) of each linear that is a target."""
    missing = set(targets) - set(map(_last, linears))
    if missing or not targets:
        raise ValueError(f"targets {sorted(missing) or targets} match no decoder linear")
    return [rank * n for path, s in linears.items() if _last(path) in targets for n in s]


def moments_bytes(counts: list[int], optimizer: str) -> int:
    """Bytes of Adam's two moments of tensors of these sizes, in fp32; with "adam8bit" a byte each
    and an fp32 absmax a block, but fp32 in tensors below SMALLEST elements (adam8bit.py)."""
    if optimizer == "adamw":
        return 8 * sum(counts)
    return sum(8 * n if n < SMALLEST else 2 * (n + 4 * math.ceil(n / NESTED_BLOCK)) for n in counts)


def _dequantized_bytes(numbers: int, spec: QuantSpec | NF4Spec, size: int) -> int:
    """Bytes at the peak of dequantizing a layer: its weight in fp32, beside the codes one by one
    (uint8, or int32 for two of NF4), which are gone when fp32 is cast to 16 bits."""
    codes = 2 if isinstance(spec, NF4Spec) else 1
    return numbers * (4 + max(codes, size if size < 4 else 0))


def packed_bytes(shape: tuple[int, int], spec: QuantSpec | NF4Spec) -> tuple[int, int]:
    """Bytes of a quantized weight (out, in): (codes, everything else)."""
    out, n = shape
    if isinstance(spec, NF4Spec):
        blocks = math.ceil(out * n / spec.block_size)
        nested = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4  # uint8, fp32, fp32 offset
        return math.ceil(out * n / 2), nested if spec.double_quant else 4 * blocks
    codes = out * math.ceil(n * spec.bits / 8)
    return codes, out * spec.groups(n) * (SCALE_DTYPE.itemsize + 1)  # scale, zero_point


def _activations(config, method, rank, targets, checkpointing: bool, size: int) -> tuple[int, int]:
    """Bytes a token that autograd keeps from the forward pass, `size` bytes a number: of one
    block, and of all the rest."""
    h, inner, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, head = config.num_attention_heads, head_dim(config)
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
        return block, blocks * size * h + last  # each block's input
    # No gradient flows to frozen embeddings: the first norm keeps nothing.
    return block, (blocks - 1) * block + last - (0 if full else norm)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


@cache
def _model_shapes(config_json: str, kind) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """Size of each parameter (tied ones once), and the shape of each decoder linear by path."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind.from_dict(json.loads(config_json)))
    try:
        linears = find_linears(model, ALL_LINEAR)
    except ValueError as error:
        raise ValueError(
            f"the ledger knows decoders whose linears are named as Llama's, and not "
            f"{model.config.model_type}: {error}"
        ) from None
    shapes = {n: (m.out_features, m.in_features) for n, m in linears.items()}
    return [p.numel() for p in model.parameters()], shapes
