"""`python -m qlora_lib memory`: what training would take, part by part, without loading it."""

from ..base.ranges import COUNT
from .common import add_command, grid, open_options

ADAPTED = ("with --method lora or qlora", lambda args: args.method != "full")
NEEDS = {
    "bits": ("with --method qlora", lambda args: args.method in (None, "qlora")),
    "group_size": ("with --bits", lambda args: args.bits is not None),
    "rank": ADAPTED,
    "targets": ADAPTED,
}


def add_commands(commands) -> None:
    text = "predict the memory of full fine-tuning, LoRA and QLoRA, without loading the model"
    shared = "profile model device compute-dtype"
    add = add_command(commands, "memory", memory, text, shared, needs=NEEDS)
    add("--method", choices=("full", "lora", "qlora"), help="(default: all three)")
    add("--bits", type=int, help="of QLoRA's base: 2, 3, 4 or 8 (default: NF4)")
    add("--group-size", type=int, help="with --bits: weights that share a scale; 0: a row")
    add("--batch-size", type=COUNT, default=1, help="sequences at a time (default 1)")
    add("--tokens", type=COUNT, default=512, help="of each sequence (default 512)")
    add("--rank", type=COUNT, help="of the adapter (default: the profile's)")
    add("--targets", choices=("all", "attention"), default="all")
    add("--gradient-checkpointing", action="store_true")
    add("--optimizer", choices=("adamw", "adam8bit"), default="adamw")


def memory(args) -> None:
    from ..base.devices import default_device, dtype_name, resolve_dtype
    from ..quant.nf4 import NF4Spec
    from ..train.loss import CHUNK
    from ..train.memory import METHODS, memory_ledger

    opened = open_options(args)
    config = model_config(opened.profile.model)
    spec = grid(args.bits, args.group_size) if args.bits is not None else NF4Spec()
    dtype = dtype_name(resolve_dtype(opened.compute_dtype, opened.device or default_device()))
    size = args.batch_size, args.tokens, args.rank or opened.profile.rank
    how = args.gradient_checkpointing, dtype, args.optimizer, CHUNK
    for method in [args.method] if args.method else METHODS:
        print(memory_ledger(config, method, *size, args.targets, spec, *how))


def model_config(model: str):
    """The config of a model; of LLaMA-2-7B its published shape, where it can't be had. Raises
    FileNotFoundError for any other model without one."""
    from transformers import LlamaConfig

    from ..models.settings import read_config

    try:
        return read_config(model)
    except OSError as error:
        if model != "meta-llama/Llama-2-7b-hf":
            raise FileNotFoundError(f"{model} has no config.json that can be read here: name a "
                                    "model's folder or hub id (a GGUF file has none)") from error
        print("its config can't be had here; taken: the published shape of LLaMA-2-7B")
        return LlamaConfig(max_position_embeddings=4096)  # otherwise the class's defaults
