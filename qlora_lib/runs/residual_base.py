"""The base of a fine-tuning run whose adapter starts from it: LoftQ and PiSSA."""

from pathlib import Path


def residual_base(profile, args, targets: str | tuple[str, ...], lora: dict):
    """(model, tokenizer, paths of the adapted layers), the dense model taken apart.

    With a method, targets become quantized residuals, the other linears are quantized as
    always, and the base is saved to args.folder/base: the adapter fits no other. Raises
    ValueError for inits that do not go with the method.
    """
    from ..base import processes
    from ..base.files import check_place, write_json_atomic
    from ..base.hashes import weights_id
    from ..base.paths import short_path
    from ..lora.fingerprint import residual_fingerprint
    from ..lora.inject import inject_lora
    from ..lora.layer import lora_layers
    from ..lora.targets import find_linears
    from ..models.checkpoint import QUANTIZATION, save_quantized
    from ..models.quantize import quantize_model
    from ..quant.grid import QuantSpec
    from ..quant.nf4 import NF4Spec

    init, method = args.init, args.method
    if method == "gptq":
        raise ValueError(
            f"--init {init} quantizes W - B A by itself, and GPTQ's codes are made by calibration, "
            "for the whole W and its inputs; give --method nf4 or rtn"
        )
    if method == "none" and init == "loftq":
        raise ValueError(
            "--init loftq mends what quantization breaks, and --method none quantizes nothing; "
            "give --method nf4 or rtn (or --init pissa, which takes a dense base too)"
        )
    if method != "none":
        check_place(args.folder / "base", QUANTIZATION)
    model, tokenizer = profile.load(device=args.device, compute_dtype=args.compute_dtype)
    if method == "none":
        return model, tokenizer, inject_lora(model, targets, **lora)
    spec = NF4Spec() if method == "nf4" else QuantSpec(args.bits, args.group_size or None)
    print(f"base: {short_path(Path(profile.model))} taken apart by {init}, quantized with {method}")
    layers = inject_lora(model, targets, spec=spec, **lora)
    last = {path: path.rpartition(".")[2] for path in find_linears(model, "all")}
    others = tuple(sorted(set(last.values()) - {last[path] for path in layers}))
    if others:
        quantize_model(model, None, spec, method, target_modules=others)
    if processes.world() > 1:  # each has made it; adapters are copied, this must be the same
        processes.agree("the residual base", residual_fingerprint(lora_layers(model)))
    if not processes.first():
        return model, tokenizer, layers
    save_quantized(model, tokenizer, args.folder / "base")
    how = {"init": init, "rank": lora["rank"], "targets": targets}
    recipe = {"method": method, "spec": str(spec), "weights": weights_id(profile.model)} | how
    write_json_atomic(args.folder / "base" / "recipe.json", recipe)
    return model, tokenizer, layers
