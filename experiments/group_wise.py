"""QA-LoRA: adapters that are constant within a group, and so merge into the zero-points.

Xu et al. 2023 (arXiv 2309.14717): A acts on the sum of a group's inputs, so that each weight of a
group is moved by the same amount, and
    scale * (q - zero_point) + change = scale * (q - (zero_point - change / scale)).
The new zero-points are no whole numbers: a GPTQ file, and the library's packed weight, have no
place for them, hence `RealZeros`.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.layer import LoRAConfig
from qlora_lib.lora.targets import find_linears, replace_module
from qlora_lib.quant.grid import SCALE_DTYPE, QuantizedTensor, by_group


@dataclass
class RealZeros(QuantizedTensor):
    """A packed weight whose zero_point (out, groups) is floating point."""

    def check(self) -> None:
        whole = self.zero_point.round().clamp(0, self.spec.max_code).to(torch.uint8)
        replace(QuantizedTensor(**vars(self)), zero_point=whole).check()


class GroupWiseLinear(QuantizedLinear):
    """A packed layer and lora_B (out, rank) lora_A (rank, groups), which sees sums of inputs."""

    def __init__(self, layer: QuantizedLinear, config: LoRAConfig):
        super().__init__(layer.quantized, layer.bias)
        self.train(layer.training)
        self.config, groups = config, self.scale.shape[1]
        self.lora_A = nn.Parameter(torch.empty(config.rank, groups))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.rank))
        # Sums of group_size inputs vary as sqrt(group_size) of them: kaiming of `in`, not `groups`.
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(self.in_features),
                         1 / math.sqrt(self.in_features))  # fmt: skip

    def multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        groups = self.scale.shape[1]
        in_order = x if self.g_idx is None else x[..., by_group(self.g_idx, groups)]
        sums = in_order.float().unflatten(-1, (groups, -1)).sum(-1)  # (..., in) -> (..., groups)
        update = self.config.scaling * (sums @ self.lora_A.t() @ self.lora_B.t())  # (..., out)
        return super().multiply(x, dtype) + update.to(dtype)

    @torch.no_grad()
    def change(self) -> Tensor:
        """What is added to each weight of a group, (out, groups)."""
        return self.config.scaling * (self.lora_B @ self.lora_A)

    def merged(self, zeros: torch.dtype) -> QuantizedLinear:
        """The layer with zero-points in which the update is; uint8: rounded to the grid's."""
        old = self.quantized
        moved = old.zero_point.float() - self.change() / self.scale.float()
        if zeros == torch.uint8:
            whole = moved.round().clamp(0, old.spec.max_code).to(zeros)
            return QuantizedLinear(replace(old, zero_point=whole), self.bias)
        return QuantizedLinear(RealZeros(**vars(old) | {"zero_point": moved.to(zeros)}), self.bias)


def inject_group_wise(model: nn.Module, target_modules, rank: int, alpha: float) -> list[str]:
    """Freeze a model quantized on grids and put an adapter on each target; returns their paths."""
    config, found = LoRAConfig(rank, alpha), find_linears(model, target_modules)
    model.requires_grad_(False)
    for path, layer in found.items():
        replace_module(model, path, GroupWiseLinear(layer, config))
    return list(found)


def merge_group_wise(model: nn.Module, zeros: torch.dtype = SCALE_DTYPE) -> float:
    """Leave packed layers without adapters, the updates in zero-points of a dtype; returns the part
    of the update that was lost, a mean over the layers. uint8: whole numbers, as GPTQ files have.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, GroupWiseLinear)}
    lost = []
    for path, layer in layers.items():
        new = layer.merged(zeros).train(layer.training)
        change, scale = layer.change(), layer.scale.float()  # (out, groups)
        kept = (layer.zero_point.float() - new.zero_point.float()) * scale
        lost.append(float((change - kept).norm() / change.norm()))
        replace_module(model, path, new)
    return sum(lost) / len(lost)
