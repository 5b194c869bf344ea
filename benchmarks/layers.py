"""One linear layer: dense, packed by us, packed by bitsandbytes; forward, and with backward."""

import torch
from torch import nn
from torch.nn.functional import linear

from qlora_lib.layers.kernels import work_dtype
from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.nf4 import quantize_nf4

from .timing import in_turns, installed, rotating, show

# (out, in, group): SmolLM2's, squares, LLaMA-2-7B's
SHAPES = (
    (1536, 576, 64), (576, 1536, 64), (1024, 1024, 128),
    (4096, 4096, 128), (11008, 4096, 128), (4096, 11008, 128),
)  # fmt: skip
TOKENS = (1, 32, 256)
# Without instructions for it, bf16's backward of F.linear and of the peer takes seconds a call at
# 4096 square, and more beyond: nothing that a ratio would add to.
SLOW_BF16 = 1 << 24
DTYPES = torch.bfloat16, torch.float32
CPU = torch.device("cpu")


def bitsandbytes_layer(w: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    out, n = w.shape
    layer = bnb.nn.Linear4bit(n, out, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict({"weight": w.to(dtype)})
    return layer.to("cpu").requires_grad_(False)  # .to() quantizes


def contestants(out: int, n: int, group: int, dtype: torch.dtype, peer: bool) -> dict:
    """name -> call number -> layer; several copies of each, so that no cache holds them all."""
    copies = range(max(2, min(16, (1 << 27) // (out * n * dtype.itemsize))))
    weights = [torch.randn(out, n, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    spec = QuantSpec(4, group, clip_search=False)
    grids = [quantize_rtn(w, spec) for w in weights]
    nf4 = [quantize_nf4(w) for w in weights]

    def packed(parts, tiles=False):
        def make(i):
            part = parts[i % 2]
            layer = QuantizedLinear(part)
            layer.codes = part.codes.clone()
            if tiles:
                layer.lay_out(decoding=True)
            return layer

        return make

    def dense(i):
        w = weights[i % 2].to(dtype)  # a copy where dtype differs
        w = w.clone() if w.data_ptr() == weights[i % 2].data_ptr() else w
        return lambda x: linear(x, w)

    made = {"F.linear": dense, "ours, 4-bit grid": packed(grids), "ours, NF4": packed(nf4)}
    if dtype == torch.bfloat16:
        made["ours, decoding_layout"] = packed(grids, tiles=True)
    if peer:
        made["bitsandbytes NF4"] = lambda i: bitsandbytes_layer(weights[i % 2], dtype)
    return {name: rotating(make, copies) for name, make in made.items()}


def run(shapes=SHAPES, rounds: int = 9) -> list[dict]:
    peer, rows = installed("bitsandbytes"), []
    for out, n, group in shapes:
        for dtype in DTYPES:
            layers = contestants(out, n, group, dtype, peer)
            for tokens in TOKENS:
                slow = out * n >= SLOW_BF16 and work_dtype(dtype, CPU) != dtype
                for backward in (False, True) if tokens > 1 and not slow else (False,):
                    xs = rotating(lambda i: torch.randn(tokens, n, dtype=dtype))
                    grad = torch.randn(tokens, out, dtype=dtype)

                    def call(layer):
                        def forward(i):
                            with torch.no_grad():
                                layer(i)(xs(i))

                        def both(i):
                            x = xs(i).detach().requires_grad_()
                            layer(i)(x).backward(grad)

                        return both if backward else forward

                    runs = {name: call(layer) for name, layer in layers.items()}
                    times = in_turns(runs, rounds, budget=0.5)
                    kind = "forward and backward" if backward else "forward"
                    name = str(dtype).removeprefix("torch.")
                    show(f"{out} x {n}, {name}, {tokens} tokens, {kind}", times, "F.linear")
                    rows.append({
                        "out": out, "in": n, "dtype": name, "tokens": tokens,
                        "backward": backward, "seconds": times,
                    })  # fmt: skip
    return rows
