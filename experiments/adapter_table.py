"""What adapters and their base take in memory."""

from dataclasses import dataclass

from torch import nn

from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.layer import adapter_names, lora_layers
from qlora_lib.lora.targets import linear_layers


@dataclass(frozen=True)
class AdapterRow:
    """What one adapter takes; the row of name None is the base that all share."""

    name: str | None
    ranks: tuple[int, ...]  # that occur, in order; of the base none
    layers: int  # linear layers that it is in; of the base: that there are
    parameters: int  # of a quantized weight: its elements
    nbytes: int  # as held in memory


def adapter_table(model: nn.Module) -> list[AdapterRow]:
    """The base, then each adapter in the order in which they were added: sizes in memory.

    The base counts all that is not an adapter, embeddings and norms too, tied weights once;
    dense copies made by merge_lora are left out.
    """
    layers, rows, own = lora_layers(model), [], set()
    for name in adapter_names(model):
        having = [m for m in layers.values() if name in m.configs]
        tensors = [t for m in having for t in m.parameters_of(name)]
        own |= {id(t) for t in tensors}
        ranks = tuple(sorted({m.configs[name].rank for m in having}))
        count, size = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
        rows.append(AdapterRow(name, ranks, len(having), count, size))
    linears = linear_layers(model)
    packed = [getattr(m, "base", m) for m in linears.values()]
    packed = [m for m in packed if isinstance(m, QuantizedLinear)]
    for module in [*packed, *(m.merged for m in layers.values() if m.merged is not None)]:
        own |= {id(t) for t in [*module.parameters(), *module.buffers()]}
    dense = [t for t in model.parameters() if id(t) not in own]
    rest = dense + [t for t in model.buffers() if id(t) not in own]
    count = sum(t.numel() for t in dense) + sum(m.out_features * m.in_features for m in packed)
    size = sum(t.nbytes for t in rest) + sum(m.nbytes for m in packed)
    return [AdapterRow(None, (), len(linears), count, size), *rows]
