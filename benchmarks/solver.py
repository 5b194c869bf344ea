"""GPTQ: ours, the column loop that it must agree with, the paper's blocks, and GPTQModel."""

import os

import torch
from torch import Tensor, nn

from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec, encode, fit_grid
from qlora_lib.quant.hessian import Hessian

from .timing import correlated, in_turns, installed, show

SIZES = ((1024, 1024), (1536, 576), (576, 1536), (4096, 4096), (4096, 11008))  # (out, in)
PLAIN_UP_TO = 4096  # features; beyond, the references would take minutes a run
GROUP = 64  # divides the widths of SmolLM2 too


def prepared(w: Tensor, h: Tensor, group: int, spec: QuantSpec | None = None, order=None):
    """Order, grids by column and the damped Hessian in that order: what every loop needs."""
    if order is None:
        order = h.diagonal().argsort(descending=True, stable=True)
    spec = spec or QuantSpec(4, group, clip_search=False)
    grids = fit_grid(w.unflatten(1, (-1, group)), spec)
    scale, zero = (g.repeat_interleave(group, 1)[:, order] for g in grids)  # (out, in)
    h = h[order][:, order]
    h.diagonal().add_(0.01 * h.diagonal().mean())
    return order, scale, zero, h


def column_loop(w: Tensor, h: Tensor, group: int, spec=None, order=None) -> Tensor:
    """Round a column, move its error to all columns after it, take the next. (out, in)"""
    order, scale, zero, h = prepared(w, h, group, spec, order)
    max_code = spec.max_code if spec else 15
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)  # H^-1 = U^T U
    # Transposed, so that a column is contiguous, and updated in place: many times as fast as written
    # down naively.
    w, scale, zero = (t.t().contiguous() for t in (w[:, order], scale, zero))  # (in, out)
    for j in range(len(w)):
        value = (encode(w[j], scale[j], zero[j], max_code) - zero[j]) * scale[j]  # (out,)
        w[j + 1 :].addr_(u[j, j + 1 :], (w[j] - value) / u[j, j], alpha=-1)
        w[j] = value
    return w.t()[:, order.argsort()]


def papers_blocks(w: Tensor, h: Tensor, group: int, block: int = 128) -> Tensor:
    """Algorithm 1: the rest is updated once a block; three steps to the factor. (out, in)"""
    order, scale, zero, h = prepared(w, h, group)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    w, q = w[:, order].clone(), torch.empty_like(w)
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        inside, errors = w[:, start:end].clone(), torch.empty_like(w[:, start:end])
        for i, j in enumerate(range(start, end)):
            code = encode(inside[:, i], scale[:, j], zero[:, j], 15)
            q[:, j] = (code - zero[:, j]) * scale[:, j]
            errors[:, i] = (inside[:, i] - q[:, j]) / u[j, j]
            inside[:, i:] -= torch.outer(errors[:, i], u[j, j:end])
        w[:, end:] -= errors @ u[start:end, end:]
    return q[:, order.argsort()]


def gptqmodel_solver(
    w: Tensor, x: Tensor, group: int, mse: float, bits=4, damp=0.01, desc_act=True, gar=False
):
    """A function that sets up a layer, and one that times nothing but its quantize()."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its thread pools fail without, on 2 cores
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = w.clone()
    config = QuantizeConfig(
        bits=bits, group_size=group, sym=False, desc_act=desc_act, act_group_aware=gar, mse=mse,
        damp_percent=damp, offload_to_disk=False,
    )  # fmt: skip
    task = GPTQ(layer, config)
    task.quantizer.configure(perchannel=True)
    task.add_batch(x[None], None)
    h = task.finalize_hessian().clone()

    def solve(_):
        task.H, task.nsamples = h.clone(), len(x)  # the copy is part of the time: 1% of it
        return task.quantize()[0]

    return solve


def run(sizes=SIZES, rounds: int = 5) -> list[dict]:
    """A row a size and a setting, with times and relative differences of the objective."""
    peer, rows = installed("gptqmodel"), []
    for out, n in sizes:
        x = correlated(4096, n, seed=0)  # fewer than features, where these are many: damping helps
        h = Hessian(n)
        h.update(x)
        h = h.matrix
        w = torch.randn(out, n, generator=torch.Generator().manual_seed(1)) * 0.02

        def objective(q):
            d = w - q
            return float((d @ h * d).sum())

        for clip in (False, True):
            spec = QuantSpec(4, GROUP, clip_search=clip)
            runs = {"ours": lambda i: gptq_quantize(w, h, spec, GPTQOptions())}
            if not clip:
                if n <= PLAIN_UP_TO:
                    runs["paper's blocks"] = lambda i: papers_blocks(w, h, GROUP)
                    runs["column loop"] = lambda i: column_loop(w, h, GROUP)
            if peer and n <= PLAIN_UP_TO:
                runs["GPTQModel"] = gptqmodel_solver(w, x, GROUP, 2.4 if clip else 0.0)
            few = max(3, rounds // 2) if n > 2048 else rounds
            times = in_turns(runs, few, budget=2.0)
            setting = "clip search" if clip else "min-max grids"
            show(f"GPTQ {out} x {n}, 4 bits, group {GROUP}, act-order, {setting}", times, "ours")
            row = {"out": out, "in": n, "clip_search": clip, "seconds": times}
            if not clip:
                mine = objective(runs["ours"](0).dequantize())
                row["objective_over_reference"] = {
                    name: mine / objective(runs[name](0)) - 1
                    for name in ("column loop", "paper's blocks") if name in runs
                }
                print("  objective, ours / reference - 1:", row["objective_over_reference"])
            rows.append(row)
    return rows
