"""Channels made larger in one place and smaller in the next, which no output notices.

A channel that one part of a block writes and linear layers read, without more than a product
between them, may be divided by any factor where it is written and multiplied by it in the columns
that read it. There are four such places in a block:
    input_layernorm -> q, k, v          post_attention_layernorm -> gate, up
    v_proj -> o_proj                    up_proj -> down_proj
The function stays; what rounding loses does not. Planted outliers, SmoothQuant's migration and AWQ
differ in nothing but the factors (quant/channel_scales.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base.finite import check_finite
from ..layers.blocks import decoder_blocks
from ..quant.channel_scales import awq_search, smoothing_scales
from ..quant.grid import QuantSpec
from ..quant.hessian import Hessian

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")  # of one layout, by model_type
NORMS = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
         "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
INSIDE = {"self_attn.v_proj": "self_attn.o_proj", "mlp.up_proj": "mlp.down_proj"}


@dataclass(frozen=True)
class Place:
    """Who writes some channels, and which linear layers read them, all as paths. A channel of
    v_proj is read in `repeats` columns of o_proj, by query heads that share a key and value."""

    writer: str
    readers: tuple[str, ...]
    channels: int
    head_dim: int = 1
    repeats: int = 1

    def columns(self, channels: Tensor) -> Tensor:
        """What belongs to the written channels (channels,), for each column that reads: (in,)."""
        heads = channels.unflatten(0, (-1, self.head_dim))  # (key heads, head_dim)
        return heads.repeat_interleave(self.repeats, 0).flatten()

    def by_channel(self, columns: Tensor) -> Tensor:
        """What belongs to the columns (in,), by written channel: (repeats, channels)."""
        heads = columns.unflatten(0, (-1, self.repeats, self.head_dim))
        return heads.transpose(0, 1).flatten(1)


def rescaling_places(model: nn.Module) -> dict[str, Place]:
    """The places of a model whose channels may be rescaled, by the path of their writer, block by
    block. Raises ValueError for a model of another family than FAMILIES, and for one whose layers
    are packed or adapted already."""
    path, blocks = checked_blocks(model)
    config, places = model.config, {}
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    for i, block in enumerate(blocks):
        pairs = NORMS | {writer: (reader,) for writer, reader in INSIDE.items()}
        for writer, readers in pairs.items():
            channels = len(block.get_submodule(writer).weight)
            attention = (channels // shared, heads // shared) if "v_proj" in writer else ()
            names = tuple(f"{path}.{i}.{reader}" for reader in readers)
            name = f"{path}.{i}.{writer}"
            places[name] = Place(name, names, channels, *attention)
    return places


def checked_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder blocks of a dense model of FAMILIES; ValueError for another."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise ValueError(f"{kind!r}: expected a model whose norms and readers are known here, one "
                         f"of {', '.join(FAMILIES)}")  # fmt: skip
    path, blocks = decoder_blocks(model)
    linears = [name for readers in NORMS.values() for name in readers] + list(INSIDE.values())
    for i, block in enumerate(blocks):
        for name in linears:
            if type(layer := block.get_submodule(name)) is not nn.Linear:
                kind = type(layer).__name__
                raise ValueError(f"{path}.{i}.{name} is a {kind}; change a dense model, before it "
                                 "is quantized, adapted or rotated online")  # fmt: skip
    return path, blocks


def norm_gain(norm: nn.Module) -> Tensor:
    """What an RMSNorm multiplies each channel by (channels,), fp64: its weight, in Gemma 1 + it."""
    return norm.weight.detach().double() + _offset(norm)


def set_norm_gain(norm: nn.Module, gain: Tensor) -> None:
    norm.weight.data.copy_(gain - _offset(norm))


def _offset(norm: nn.Module) -> int:
    return 1 if type(norm).__name__.startswith("Gemma") else 0


@torch.no_grad()
def rescale_channels(model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Divide in place what each place of `scales` writes by its factors (channels,), and multiply
    the columns that read it: the function of the model stays, up to rounding in its own dtype.

    The products are made in float64. Raises ValueError, before anything is changed, for unknown
    places, factors of another shape, and factors that are not positive and finite."""
    places = rescaling_places(model)
    if unknown := sorted(set(scales) - set(places)):
        raise ValueError(f"no place {unknown[0]!r}; there are {', '.join(list(places)[:4])}, ...")
    check_finite(scales.items(), "the factors")
    for name, scale in scales.items():
        if tuple(scale.shape) != (places[name].channels,) or not (scale > 0).all():
            raise ValueError(f"{name}: its factors {tuple(scale.shape)} must be positive, "
                             f"({places[name].channels},)")  # fmt: skip
    for name, scale in scales.items():
        place, writer = places[name], model.get_submodule(name)
        scale = scale.double().to(writer.weight.device)
        if isinstance(writer, nn.Linear):
            for t in (writer.weight, writer.bias):
                if t is not None:
                    t.copy_((t.double().t() / scale).t())  # rows of W, entries of b
        else:
            set_norm_gain(writer, norm_gain(writer) / scale)
        for path in place.readers:
            weight = model.get_submodule(path).weight
            weight.copy_(weight.double() * place.columns(scale))  # (out, in) * (in,)


def plant_outliers(
    model: nn.Module, size: float, channels: int = 1, seed: int = 0,
    places: Iterable[str] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Make `channels` channels of each place `size` times as large as they were, in place, without
    changing the function; returns the factors. With a power of two no bit of the logits changes,
    but where Gemma adds 1.

    The channels are drawn by the seed, the same ones wherever as many are written, as in large
    models, whose outliers stay in their channels from block to block. places: paths of writers;
    None: all. Raises ValueError as rescale_channels."""
    known, scales = rescaling_places(model), {}
    for name in known if places is None else places:
        count = known[name].channels if name in known else 1
        if not 0 < channels <= count or not size > 0:
            raise ValueError(f"{channels} channels, {size} times as large: expected 1 to {count} "
                             "channels and a positive size")  # fmt: skip
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:channels]
        scales[name] = torch.ones(count, dtype=torch.float64)
        scales[name][drawn] = 1 / size
    rescale_channels(model, scales)
    return scales


def smooth(
    model: nn.Module, input_absmax: Mapping[str, Tensor], alpha: float = 0.5,
    places: Iterable[str] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Move range from the inputs of linear layers into their weights, in place, as SmoothQuant
    does; returns the factors. input_absmax: the largest |x| of each input channel (in,) of each
    layer, by path (models/input_sizes.py). places: paths of writers; None: all, of which the paper
    smooths those of norms. Raises ValueError as rescale_channels, KeyError for a missing layer."""
    known, scales = rescaling_places(model), {}
    for name in known if places is None else places:
        place = known[name]
        inputs = place.by_channel(input_absmax[place.readers[0]]).amax(0)  # (channels,)
        weights = [model.get_submodule(path).weight.detach() for path in place.readers]
        largest = torch.cat(weights).abs().amax(0)  # (in,)
        largest = place.by_channel(largest).amax(0)  # (channels,)
        scales[name] = smoothing_scales(inputs, largest, alpha)
    rescale_channels(model, scales)
    return scales


@dataclass
class AwqRow:
    """What AWQ's search found for a place: the exponent, and the relative error of what its readers
    put out, rounded to nearest without and with the factors."""

    place: str
    exponent: float
    before: float
    after: float


def awq_scales(
    model: nn.Module, hessians: Mapping[str, Hessian], spec: QuantSpec, steps: int = 20,
    places: Iterable[str] | None = None,
) -> tuple[dict[str, Tensor], list[AwqRow]]:  # fmt: skip
    """AWQ's factors for `rescale_channels`, by place, and a row a place; the model stays as it is.

    hessians: of the inputs of all linear layers of the blocks, by path, as input_hessians gives
    them. Layers that share an input share their factors, and the sum of their errors decides
    (the paper: the error of attention and feed-forward part as a whole). Where query heads share a
    value, a channel's size is the mean of what they make of it. Raises ValueError as
    rescaling_places, and KeyError for a layer that is missing."""
    known, scales, rows = rescaling_places(model), {}, []
    for name in known if places is None else places:
        place = known[name]
        weights = [model.get_submodule(path).weight.detach() for path in place.readers]
        h = hessians[place.readers[0]].matrix.to(weights[0].device)
        sizes = place.by_channel(h.diagonal().clamp(min=0).sqrt()).mean(0)  # (channels,)
        found, exponent, errors = awq_search(weights, h, spec, place.columns(sizes), steps)
        scales[name] = place.by_channel(found)[0]
        rows.append(AwqRow(name, exponent, errors[0], min(errors)))
    return scales, rows
