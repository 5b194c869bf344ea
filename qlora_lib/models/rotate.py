"""A model whose hidden states are rotated, which no output notices, and no channel stands out.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456): the length that an RMSNorm divides by is the same
after a rotation R. So once its gains are in the layers that read it, norm(x R) = norm(x) R, and
the whole residual stream may be rotated: embeddings and all that writes it by R, readers back.
    R1  the residual stream            R2  values within each head, between v_proj and o_proj
are folded into weights and cost nothing. Between up_proj and down_proj stands a product with the
activation, through which no rotation passes: there (R4) it runs with the model, as a fast Hadamard
transform. QuaRot's rotations of keys, for a rounded cache, and across heads are left out.
"""

import torch
from torch import Tensor, nn

from ..layers.hadamard_input import HadamardInput
from ..lora.targets import replace_module
from ..quant.grid import row_slices
from ..quant.hadamard import hadamard_transform, random_orthogonal
from .packed_model import untie
from .rescale import NORMS, checked_blocks, norm_gain, set_norm_gain

READERS = [path for readers in NORMS.values() for path in readers]
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@torch.no_grad()
def fold_norms(model: nn.Module) -> None:
    """Put the gains of each RMSNorm into the columns of the linear layers that read it, in place:
    the gains are 1 then. A head that is tied to the embeddings gets a weight of its own first.
    Raises ValueError as rescaling_places."""
    _, blocks = checked_blocks(model)
    untie_head(model)
    for block in blocks:
        for norm, readers in NORMS.items():
            _fold(block.get_submodule(norm), [block.get_submodule(path) for path in readers])
    _fold(model.get_decoder().norm, [model.get_output_embeddings()])


def _fold(norm: nn.Module, readers: list[nn.Linear]) -> None:
    gain = norm_gain(norm)
    for reader in readers:
        for rows in row_slices(reader.weight.shape, reader.weight.device):
            reader.weight[rows] = (reader.weight[rows].double() * gain).to(reader.weight.dtype)
    set_norm_gain(norm, torch.ones_like(gain))


def untie_head(model: nn.Module) -> bool:
    """Give a head that is tied to the embeddings a copy of them, in model and config; returns
    whether it was."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embeddings.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    names = {name for name, module in model.named_modules() if module is head}
    tied = model.all_tied_weights_keys
    for name in [name for name in tied if name.rpartition(".")[0] in names]:
        del tied[name]
    untie(model.config)
    return True


@torch.no_grad()
def rotate_model(model: nn.Module, seed: int = 0, online: bool = False) -> None:
    """Rotate the hidden states of a model by QuaRot's R1 and R2, in place, after fold_norms: the
    function stays, up to rounding in the model's own dtype.

    seed: of the signs of the Hadamard matrices, or of a random rotation for a width that has none
    (quant/hadamard.py). online: R4 too, so that each down_proj stands in a HadamardInput; such a
    model has no file format here. Raises ValueError as rescaling_places."""
    _, blocks = checked_blocks(model)
    fold_norms(model)
    r1 = random_orthogonal(model.config.hidden_size, seed)
    heads = model.config.num_key_value_heads
    _turn_inputs(model.get_input_embeddings(), r1)  # E R: (vocab, hidden)
    _turn_inputs(model.get_output_embeddings(), r1)
    for block in blocks:
        for path in READERS:
            _turn_inputs(block.get_submodule(path), r1)
        for path in WRITERS:
            _turn_outputs(block.get_submodule(path), r1)
        v, o = block.self_attn.v_proj, block.self_attn.o_proj
        r2 = random_orthogonal(v.out_features // heads, seed + 1)
        _turn_outputs(v, r2)
        _turn_inputs(o, r2)
        if online:
            down = block.mlp.down_proj
            for rows in row_slices(down.weight.shape, down.weight.device):
                down.weight[rows] = hadamard_transform(down.weight[rows].double()).to(down.weight)
            replace_module(block, "mlp.down_proj", HadamardInput("down_proj", down))


def _turn_inputs(layer: nn.Module, r: Tensor) -> None:
    """W -> W R (out, in): the layer then takes x R. A rotation (d, d) smaller than the layer turns
    d features at a time."""
    r, weight = r.to(layer.weight.device), layer.weight
    for rows in row_slices(weight.shape, weight.device):
        parts = weight[rows].double().unflatten(1, (-1, len(r)))  # (rows, in / d, d)
        weight[rows] = (parts @ r).flatten(1).to(weight.dtype)


def _turn_outputs(layer: nn.Linear, r: Tensor) -> None:
    """W -> R^T W (out, in), b -> b R: the layer then gives y R."""
    r = r.to(layer.weight.device)
    parts = layer.weight.double().unflatten(0, (-1, len(r)))  # (out / d, d, in)
    layer.weight.copy_((r.t() @ parts).flatten(0, 1))
    if layer.bias is not None:
        layer.bias.copy_((layer.bias.double().unflatten(0, (-1, len(r))) @ r).flatten())
