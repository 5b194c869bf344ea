"""qlora_lib: GPTQ, NF4, LoRA and QLoRA by hand, in plain PyTorch.

Names are imported when first used: torch is enough for tensors and layers, transformers
is needed for models, datasets and the rest only where they are called.
"""

from importlib import import_module

_HOME = {
    "quant.packing": ["pack", "unpack"],
    "quant.grid": ["QuantSpec", "QuantizedTensor", "quant_matmul", "quantize_rtn"],
    "quant.nf4": ["NF4Spec", "NF4Tensor", "quantize_nf4"],
    "quant.minifloat": ["decode_float", "encode_float", "float_levels", "quantize_fp8"],
    "quant.fp8": ["FP8Spec", "FP8Tensor"],
    "quant.fp4": ["FP4Spec", "FP4Tensor", "quantize_fp4"],
    "quant.hessian": ["Hessian"],
    "quant.gptq": ["GPTQOptions", "gptq_quantize", "output_error"],
    "layers.linear": ["QuantizedLinear", "decoding_layout"],
    "lora.layer": ["lora_layers"],
    "lora.targets": ["find_linears"],
    "lora.inject": ["inject_lora", "set_adapter", "trainable_parameters", "use_adapter"],
    "lora.combine": ["combine_adapters"],
    "lora.merge": ["merge_into_original", "merge_lora", "unmerge_lora"],
    "lora.on_grid": ["inject_on_grid", "merge_on_grid"],
    "lora.files": ["find_adapter", "load_adapter", "save_adapter"],
    "models.merge_hessians": ["input_hessians", "merge_hessians"],
    "models.calibrated_init": ["inject_calibrated"],
    "models.quantize": ["dequantize_model", "quantize_model", "quantized_layers"],
    "models.bnb_checkpoint": ["load_bnb_4bit"],
    "models.checkpoint": ["load_quantized", "save_quantized"],
    "models.stream": ["quantize_checkpoint"],
    "formats.gptq_checkpoint": ["export_gptq", "import_gptq"],
    "formats.compressed_tensors": ["export_compressed", "import_compressed"],
    "formats.gguf_checkpoint": ["export_gguf"],
    "data.gsm8k": ["format_gsm8k"],
    "generation.kv_cache": ["CacheSpec", "PackedCache"],
    "generation.generate": ["Decoding", "generator"],
    "train.memory": ["decoding_ledger", "fitting_batch", "memory_ledger"],
    "train.config": ["TrainConfig"],
    "train.finetune": ["finetune", "validation_loss"],
    "evaluation.evaluate": ["EvalReport", "evaluate"],
    "evaluation.extraction": ["extract_answer", "is_correct"],
    "evaluation.comparison": ["compare", "drop"],
    "evaluation.votes": ["majority"],
    "evaluation.tasks": ["score"],
    "serving.server": ["AdapterServer"],
    "search.rank_search": ["find_optimal_rank"],
    "runs.profiles": ["load_profile"],
    "runs.finetuner": ["Finetuner"],
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
