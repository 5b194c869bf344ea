"""The memory of fine-tuning (full, LoRA or QLoRA) and of decoding, predicted part by part.

All parts are exact, from the shapes of the model on the meta device, but for the activations: what
autograd saves in Llama's blocks (and those like them) with SDPA attention, unpadded; for others an
estimate. Not handled: several GPUs, an allocator's fragments, the CUDA context (some 0.5 GB).
"""

import json
import math
from dataclasses import dataclass
from functools import cache

import torch

from ..base.devices import DTYPES, dtype_name
from ..base.ranges import COUNT
from ..generation.kv_cache import CacheSpec, cache_bytes
from ..lora.targets import ALL_LINEAR, ATTENTION, find_linears
from ..models.settings import head_dim
from ..quant.fp4 import FP4Spec
from ..quant.fp8 import FP8Spec
from ..quant.grid import SCALE_DTYPE, QuantSpec
from ..quant.nf4 import NESTED_BLOCK, NF4Spec
from ..quant.recipe import Spec
from .config import OPTIMIZERS
from .measure import available_memory

METHODS = ("full", "lora", "qlora")
LIKE_LLAMA = ("llama", "mistral", "qwen2")  # blocks whose activations are counted, not estimated
PARTS = ("weights", "packed weights", "scales", "adapters", "gradients", "optimizer",
         "activations", "logits", "dequantized layer")  # fmt: skip


@dataclass(frozen=True)
class MemoryLedger:
    """Bytes by part, in the order of PARTS; those that are not needed are 0.

    `peak` is what is alive at once when gradients are accumulated: the logits are gone when
    backward dequantizes its first layer or, under checkpointing, recomputes its first block.
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

    @property
    def bits_per_parameter(self) -> float:
        """Of the stored base: weights, packed weights and scales over all parameters."""
        stored = sum(self.parts[p] for p in ("weights", "packed weights", "scales"))
        return 8 * stored / self.parameters

    def __str__(self) -> str:
        sizes = self.parts | {"total": self.total, "at the peak": self.peak}
        rows = [f"  {part:<18}{n / 1e9:9.3f} GB" for part, n in sizes.items() if n]
        trained = f"{self.trained:,} of {self.parameters:,} parameters trained"
        base = f"  base {self.bits_per_parameter:.2f} bits a parameter; {trained}"
        return "\n".join([self.setting, *rows, base])


def memory_ledger(config, method: str = "full", batch: int = 1, seq: int = 512, rank: int = 16,
                  targets=ALL_LINEAR, spec: Spec = NF4Spec(),
                  checkpointing: bool = False, compute_dtype: str = "bf16",
                  optimizer: str = "adamw", logit_tokens: int | None = None) -> MemoryLedger:
    """Predicted memory of training the model that `config` describes.

    config: a transformers config, of a decoder whose linears have Llama's names. method: "full"
    trains every parameter, in fp32; "lora" adapters of `rank` on `targets` (names, "all" or
    "attention") over a dense base; "qlora" the same over linears stored as `spec` says. batch:
    sequences of seq tokens at a time. compute_dtype: bf16, fp16 or fp32, of frozen dense weights
    and activations. logit_tokens: whose logits exist at once; None: all. Raises ValueError for
    settings that are not known.
    """
    _check("method", method, METHODS)
    _check("optimizer", optimizer, OPTIMIZERS)
    _check("compute_dtype", compute_dtype, DTYPES)
    for name, count in {"batch": batch, "seq": seq, "rank": rank}.items():
        COUNT.check(name, count)
    config, size = config.get_text_config(), DTYPES[compute_dtype].itemsize
    counts, linears = _model_shapes(config.to_json_string(), type(config))
    stored = spec if method == "qlora" else None
    parts = dict.fromkeys(PARTS, 0) | _base_bytes(counts, linears, stored, size)
    if method == "qlora":
        # A weight in fp32, beside its codes one by one (uint8, or int32 for one of FP8 and for two
        # of NF4 and FP4) or, when these are gone, beside what fp32 is cast to.
        codes = {QuantSpec: 1, FP8Spec: 4}.get(type(spec), 2)
        beside = max(codes, size if size < 4 else 0)
        parts["dequantized layer"] = max(map(math.prod, linears.values())) * (4 + beside)
    # What is trained is fp32 whatever the compute dtype; autocast makes copies in 16 bits.
    if method == "full":
        sizes, targets, wide = counts, ALL_LINEAR, 4
        parts["weights"] = 4 * sum(counts)
        copied = sum(map(math.prod, linears.values())) + config.vocab_size * config.hidden_size
    else:
        if isinstance(targets, str):
            targets = {"all": ALL_LINEAR, "attention": ATTENTION}.get(targets, (targets,))
        targets = tuple(targets)
        names = {path: path.rpartition(".")[2] for path in linears}
        missing = set(targets) - set(names.values())
        if missing or not targets:
            raise ValueError(f"targets {sorted(missing) or targets} match no decoder linear")
        # Of A (rank, in) and B (out, rank)
        sizes = [rank * n for path, s in linears.items() if names[path] in targets for n in s]
        parts["adapters"], copied, wide = 4 * sum(sizes), sum(sizes), size
    trained, copies = sum(sizes), copied * size if size < 4 else 0
    parts["gradients"] = 4 * trained
    parts["optimizer"] = moments_bytes(sizes, optimizer)
    tokens = batch * seq
    block, rest = _activations(config, method, rank, targets, checkpointing, size)
    recomputed = tokens * block if checkpointing else 0
    rotary = 2 * seq * head_dim(config) * wide  # cosines and sines
    parts["activations"] = rotary + copies + tokens * (block + rest)
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


def decoding_ledger(config, context: int, batch: int = 1, spec: Spec | None = None,
                    cache: CacheSpec | None = None, compute_dtype: str = "bf16") -> dict[str, int]:
    """Exact bytes of what decoding keeps, by part: "weights", "packed weights", "scales", and
    the "cache" of keys and values of `batch` sequences of `context` tokens.

    spec: how the decoder linears are stored; None: dense. cache: how old tokens are; None: as
    they came. A step's activations, and a layer's cache while it is dequantized, come on top.
    Raises ValueError for another dtype or kind of decoder.
    """
    _check("compute_dtype", compute_dtype, DTYPES)
    config, size = config.get_text_config(), DTYPES[compute_dtype].itemsize
    counts, linears = _model_shapes(config.to_json_string(), type(config))
    stored = _base_bytes(counts, linears, spec, size)
    return stored | {"cache": cache_bytes(config, context, cache, batch, size)}


def fitting_batch(model, tokens: int, most: int, cache: CacheSpec | None = None,
                  free: float | None = None) -> int:  # fmt: skip
    """How many sequences of up to `tokens` tokens, prompt and completion, to decode at once:
    `most`, halved until they fit beside the model (at least 1); `most` for unknown decoders.

    cache: as in decoding_ledger. free: bytes; None: those of the model's device now. Halving them
    mostly gives the same batches again, with which alone a killed evaluation goes on.
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


def _base_bytes(counts, linears, spec, size: int) -> dict[str, int]:
    """Bytes of the stored base by part: its linears as `spec` says; None: all dense."""
    shapes = linears.values() if spec else ()
    stored = [packed_bytes(shape, spec) for shape in shapes]
    return {
        "weights": (sum(counts) - sum(map(math.prod, shapes))) * size,
        "packed weights": sum(codes for codes, _ in stored),
        "scales": sum(scales for _, scales in stored),
    }


def moments_bytes(counts: list[int], optimizer: str) -> int:
    """Bytes of Adam's two moments of tensors of these sizes."""
    if optimizer == "adamw":
        return 8 * sum(counts)
    from .adam8bit import SMALLEST  # which most runs do without

    return sum(8 * n if n < SMALLEST else 2 * (n + 4 * math.ceil(n / NESTED_BLOCK)) for n in counts)


def packed_bytes(shape: tuple[int, int], spec: Spec) -> tuple[int, int]:
    """Bytes of a quantized weight (out, in): (codes, everything else)."""
    out, n = shape
    if isinstance(spec, NF4Spec):
        blocks = math.ceil(out * n / spec.block_size)
        nested = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4  # uint8, fp32, fp32 offset
        return math.ceil(out * n / 2), nested if spec.double_quant else 4 * blocks
    codes = out * math.ceil(n * spec.bits / 8)
    if isinstance(spec, FP4Spec):
        return codes, out * spec.groups(n) + (4 if spec.format == "nvfp4" else 0)  # scales, an fp32
    if isinstance(spec, FP8Spec):
        return codes, 4 * out
    return codes, out * spec.groups(n) * (SCALE_DTYPE.itemsize + 1)  # scale, zero_point


def _activations(config, method, rank, targets, checkpointing: bool, size: int) -> tuple[int, int]:
    """Bytes a token that autograd keeps, `size` a number: of one block, and of all the rest."""
    h, inner, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, head = config.num_attention_heads, head_dim(config)
    q, kv = head * heads, head * config.num_key_value_heads
    full, targets = method == "full", set(targets)
    # Behind fp32 embeddings, what the blocks add to is fp32, and each product casts it anew.
    mixed = full and size < 4
    # RMSNorm: its input in fp32 and 1 / rms; where its own weight is trained, x / rms too.
    norm = 4 * (h + 1) + 4 * h * full
    # SDPA: query, key, value, output, and an fp32 logsumexp a head.
    block = size * (q + 2 * kv + q) + 4 * heads
    block += size * 3 * inner  # SwiGLU, silu(gate) * up: gate, silu(gate), up
    # A trained product W x or A x keeps its input: one that q, k, v share, and gate, up.
    for inputs in (targets & {"q_proj", "k_proj", "v_proj"}, targets & {"gate_proj", "up_proj"}):
        block += size * h * (len(inputs) if mixed else bool(inputs))
    block += size * inner * ("down_proj" in targets)  # o_proj's input is SDPA's output
    block += 0 if full else size * rank * len(targets)  # B's input, A x
    block += 2 * norm
    last = norm + size * h * full  # the final norm, and the input of a trained head
    if checkpointing:
        return block, blocks * (4 if mixed else size) * h + last  # each block's input
    # No gradient flows to frozen embeddings: the first norm keeps nothing.
    return block, (blocks - 1) * block + last - (0 if full else norm)


@cache
def _model_shapes(config_json: str, kind) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """Size of each parameter (tied ones once), and the shape of each decoder linear by path."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        config = kind.from_dict(json.loads(config_json))
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    try:
        linears = find_linears(model, ALL_LINEAR)
    except ValueError as error:
        raise ValueError("the ledger knows decoders whose linears are named as Llama's, and not "
                         f"{model.config.model_type}: {error}") from None  # fmt: skip
    shapes = {n: (m.out_features, m.in_features) for n, m in linears.items()}
    return [p.numel() for p in model.parameters()], shapes
