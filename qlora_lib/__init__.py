"""qlora_lib: GPTQ, NF4, LoRA and QLoRA by hand, in plain PyTorch.

Names are imported when first used: torch is enough for tensors and layers, transformers
is needed for models, datasets and the rest only where they are called.
"""

from importlib import import_module

_HOME = {
    "packing": ["pack", "unpack"],
    "grid": ["QuantSpec", "QuantizedTensor", "quantize_rtn", "quant_matmul"],
    "nf4": ["NF4Spec", "NF4Tensor", "quantize_nf4"],
    "adam8bit": ["Adam8bit"],
    "hessian": ["Hessian"],
    "damping": ["choose_damping"],
    "gptq": ["GPTQOptions", "gptq_quantize", "output_error"],
    "refit": ["refit_scales"],
    "linear": ["QuantizedLinear", "decoding_layout"],
    "lora": [
        "LoRALinear", "adapter_names", "adapter_table", "delete_adapter", "inject_lora",
        "set_adapter", "trainable_parameters", "use_adapter",
    ],
    "compose": ["allocate_ranks", "combine_adapters", "prune_adapter"],
    "variants": ["freeze_scales", "lora_plus_groups", "train_scales"],
    "merge": ["merge_into_original", "merge_lora", "unmerge_lora"],
    "merge_loss": ["merge_hessians", "merge_report"],
    "models": ["dequantize_model", "quantize_model", "quantized_layers"],
    "loading": ["load_model"],
    "checkpoint": ["load_quantized", "save_quantized"],
    "streaming": ["quantize_checkpoint"],
    "bnb_format": ["load_bnb_4bit"],
    "gptq_format": ["export_gptq", "import_gptq"],
    "adapters": ["find_adapter", "load_adapter", "save_adapter"],
    "kv_cache": ["CacheSpec", "PackedCache"],
    "memory": ["MemoryLedger", "decoding_ledger", "memory_ledger"],
    "measure": ["NotEnoughMemory", "check_fits"],
    "data": ["format_gsm8k"],
    "sources": ["load_gsm8k", "load_gsm_hard", "load_minigsm", "load_training_set"],
    "profiles": ["Profile", "load_profile"],
    "schedule": ["TrainConfig"],
    "history": ["History"],
    "train": ["finetune"],
    "serve": ["AdapterServer", "RequestTimeout", "ServerFull", "ServerStopped"],
    "generation": ["Completion", "Decoding", "generator"],
    # Not evaluate.py: a submodule would hide the function of the same name.
    "evaluation": ["EvalReport", "evaluate", "extract_answer", "few_shot", "is_correct"],
    "comparison": ["compare", "drop"],
    "sampling": [
        "best_score", "likelihood", "majority", "pass_at_k", "weighted_vote", "with_scores",
    ],
    "verifier": ["Verifier", "train_verifier"],
    "tasks": ["Score", "Task", "load_task", "score"],
    "finetuner": ["Finetuner"],
    "adapter_log": ["AdapterLog"],
    "search": ["RankSearch", "Search", "find_optimal_rank"],
    "trials": ["Trial"],
    "canaries": ["CanaryError", "run_canaries"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'qlora_lib' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
