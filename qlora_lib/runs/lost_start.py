"""A run whose adapter starts from what rounding lost: what it needs, and the start itself."""

from torch import Tensor, nn

from ..lora.targets import find_linears
from ..models.calibrated_init import inject_calibrated
from ..models.merge_hessians import input_hessians
from ..models.quantize import quantized_layers
from ..quant.gptq import GPTQOptions
from ..quant.recipe import Recipe
from .base import BasePlan


def check_lost_start(init: str, method: str, plan: BasePlan | None, recipe: Recipe) -> None:
    """Raises ValueError where svd, qera or cloq do not go with the rest of a run."""
    if method != "qlora":
        raise ValueError(f"init {init} starts from what rounding lost, and a dense base has lost "
                         "nothing; take gptq, nf4 or rtn, or init pissa")  # fmt: skip
    if init != "svd" and not (plan and plan.calibrate):
        raise ValueError(f"init {init} weighs errors by the layers' inputs, and nothing says on "
                         "which texts: give a plan that calibrates (profile.plan(recipe)), or "
                         "take init svd")  # fmt: skip
    if init != "svd" and plan.stream and recipe.matches_dense:
        raise ValueError(f"stream reads a layer at a time, and init {init} beside match_dense "
                         "runs the dense model; leave one of the two out")  # fmt: skip


def dense_linears(model: nn.Module, lora: dict) -> dict[str, Tensor]:
    """The weights of the targets of a model that was handed over, by name, before it is quantized.
    Raises ValueError for one that is packed."""
    if quantized_layers(model):
        raise ValueError(f"the model is quantized, and init {lora['init']} needs its dense weights "
                         "too: hand the dense model over, or call inject_calibrated(model, dense, "
                         "...)")  # fmt: skip
    found = find_linears(model, lora["target_modules"])
    return {f"{path}.weight": layer.weight.detach() for path, layer in found.items()}


def start_from_lost(
    model: nn.Module, tokenizer, recipe: Recipe, plan: BasePlan | None, lora: dict, adapter: str,
    dense: dict[str, Tensor] | None = None,
) -> list[str]:  # fmt: skip
    """Add the adapter to the quantized model; returns the paths of its layers. dense: what
    dense_linears gave; None: the plan's. GPTQ's damping is the adapter's too."""
    dense, hessians = dense or plan.dense_weights(), None
    damping = (recipe.options or GPTQOptions()).damp_percent
    if lora["init"] != "svd":
        found = find_linears(model, lora["target_modules"])
        twin = dense if recipe.matches_dense else None
        hessians = input_hessians(model, found, plan.shown(tokenizer), damping is None, twin)
    rows = inject_calibrated(model, dense, hessians, damp_percent=damping, adapter=adapter, **lora)
    off = [sum(getattr(row, when) for row in rows) / len(rows) for when in ("before", "after")]
    print(f"adapter: starts from what rounding lost ({lora['init']}): layers are off by "
          f"{off[0]:.4f} in the mean, then by {off[1]:.4f}")  # fmt: skip
    return [row.name for row in rows]
