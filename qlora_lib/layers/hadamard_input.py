"""A linear layer behind a Hadamard transform of its input, which runs with the model."""

from torch import Tensor, nn

from ..quant.hadamard import hadamard_core, hadamard_transform


class HadamardInput(nn.Module):
    """layer(x H): in the place of a layer with the weight W for one with W H.

    The layer keeps its name within this one, so that targets still find it: mlp.down_proj becomes
    mlp.down_proj.down_proj. x (..., in_features) -> (..., out_features)."""

    def __init__(self, name: str, layer: nn.Linear):
        super().__init__()
        core = hadamard_core(layer.in_features).to(layer.weight)
        self.register_buffer("core", core, persistent=False)
        self.name = name
        self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(hadamard_transform(x, self.core.to(x.dtype)))
