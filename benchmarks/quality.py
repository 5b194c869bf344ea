"""GPTQ's held-out error beside GPTQModel's, and what tries to go beyond GPTQ, on equal layers.

    python -m benchmarks.quality [--model FOLDER --wikitext FOLDER] [--out data/results/gptq-quality.json]

Layers: a random one of 1024 x 1024 with correlated inputs, and with --model the down_proj of
three blocks of a real model, on its own inputs. Every contestant gets the same weight and the
same calibration tokens; errors are |x W^T - x Q^T| / |x W^T| on tokens that none has seen.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qlora_lib.base.endings import ending
from qlora_lib.base.files import write_json_atomic
from qlora_lib.base.paths import ROOT, given_path
from qlora_lib.base.stamp import stamp
from qlora_lib.quant.damping import choose_damping
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize, output_error
from qlora_lib.quant.grid import QuantSpec, encode, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.refit import refit_scales

from .solver import column_loop, gptqmodel_solver
from .timing import correlated, installed

BITS, GROUP, TOKENS, WINDOW = (4, 3, 2), 128, 8192, 512
PEER = [
    (damp, order, mse)
    for damp in (0.01, 0.05) for order in ("plain", "desc_act", "gar") for mse in (0.0, 2.4)
]  # fmt: skip


def random_layer() -> tuple[Tensor, Tensor, Tensor]:
    """Weight (1024, 1024), calibration and held-out inputs, (TOKENS, 1024) each."""
    weight = 0.02 * torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    return weight, correlated(TOKENS, 1024, seed=0), correlated(TOKENS, 1024, seed=7)


def real_layers(folder: Path, wikitext: Path) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """down_proj of the first, the middle and the last block, with its inputs on WikiText-2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    blocks = model.model.layers
    chosen = {f"block {i}, down_proj": blocks[i].mlp.down_proj for i in (0, len(blocks) // 2, -1)}
    inputs: dict[str, list[Tensor]] = {name: [] for name in chosen}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, n=name: inputs[n].append(args[0][0]))
        for name, layer in chosen.items()
    ]
    for split in ("valid", "test"):
        text = (wikitext / f"{split}.txt").read_text(encoding="utf-8")[: 8 * TOKENS]
        ids = torch.tensor(tokenizer.encode(text)[:TOKENS]).view(-1, WINDOW)
        with torch.no_grad():
            for window in ids:
                model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {
        name: (chosen[name].weight.detach(), *torch.cat(inputs[name]).split(TOKENS))
        for name in chosen
    }


def pivoted_order(h: Tensor) -> Tensor:
    """Columns by falling pivots: the last one is the smallest diagonal of H, the one before it
    the smallest of what is left of H once the last is explained, and so on (arXiv 2507.18553)."""
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    open_, order = torch.ones(len(h), dtype=torch.bool), []
    for _ in range(len(h)):
        j = int(h.diagonal().masked_fill(~open_, float("inf")).argmin())
        order.append(j)
        open_[j] = False
        h = h - torch.outer(h[:, j], h[j]) / h[j, j]
    return torch.tensor(order).flip(0)


def in_order(w: Tensor, h: Tensor, spec: QuantSpec, order: Tensor) -> Tensor:
    """GPTQ through the columns in a given order, with the grids of the original groups."""
    return column_loop(w, h, spec.group_size, spec=spec, order=order)


def descend(w: Tensor, h: Tensor, quantized, sweeps: int) -> Tensor:
    """Coordinate descent from a quantized weight: each column in turn is rounded anew to the
    best place given all others (QuantEase, arXiv 2309.01885). The objective never rises."""
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    q = quantized.dequantize()
    size = w.shape[1] // quantized.scale.shape[1]
    scale, zero = (t.float() for t in (quantized.scale, quantized.zero_point))
    pull = (w - q) @ damped  # (out, in): minus half the gradient
    for _ in range(sweeps):
        for j in range(w.shape[1]):
            s, z = scale[:, j // size], zero[:, j // size]
            target = q[:, j] + pull[:, j] / damped[j, j]
            new = (encode(target, s, z, quantized.spec.max_code) - z) * s
            pull -= torch.outer(new - q[:, j], damped[j])
            q[:, j] = new
    return q


def ours(w: Tensor, hessian: Hessian, spec: QuantSpec) -> dict:
    """name -> quantized weight: our defaults first, then what is tried beside them."""
    h = hessian.matrix
    default, nearest = gptq_quantize(w, h, spec), quantize_rtn(w, spec)
    plain = replace(spec, clip_search=False)

    def by(options=GPTQOptions, **given):
        return gptq_quantize(w, hessian, spec, options(**given)).dequantize()

    return {
        "ours, defaults": default.dequantize(),
        "ours, min-max grids": gptq_quantize(w, h, plain).dequantize(),
        "ours, left to right": by(desc_act=False),
        "ours, dynamic groups": by(static_groups=False),
        "ours, damping 0.001": by(damp_percent=1e-3),
        "ours, damping 0.05": by(damp_percent=0.05),
        "ours, weighed": by(weigh_columns=True),
        "ours, weighed, damping 0.05": by(weigh_columns=True, damp_percent=0.05),
        "ours, weighed, dynamic groups": by(weigh_columns=True, static_groups=False),
        "ours, refit": by(refit_scales=True),
        "ours, weighed, refit": by(weigh_columns=True, refit_scales=True),
        "ours, weighed, refit, damping 0.05": by(
            weigh_columns=True, refit_scales=True, damp_percent=0.05
        ),
        "ours, weighed, dynamic groups, refit": by(
            weigh_columns=True, static_groups=False, refit_scales=True
        ),
        "ours, weighed, dynamic groups, refit, damping 0.05": by(
            weigh_columns=True, static_groups=False, refit_scales=True, damp_percent=0.05
        ),
        "ours, chosen damping": by(damp_percent=None),
        "ours, best": by(GPTQOptions.best),
        "ours, best, dynamic groups": by(GPTQOptions.best, static_groups=False),
        "round to nearest, refit": refit_scales(w, nearest, h).dequantize(),
        "ours, pivoted order": in_order(w, h, spec, pivoted_order(h)),
        "ours, 1 sweep of descent": descend(w, h, default, 1),
        "ours, 3 sweeps of descent": descend(w, h, default, 3),
    }  # fmt: skip


def run(layers: dict[str, tuple[Tensor, Tensor, Tensor]]) -> list[dict]:
    peer, rows = installed("gptqmodel"), []
    for name, (w, seen, held) in layers.items():
        hessian, other = Hessian(w.shape[1], halves=True), Hessian(w.shape[1])
        for windows, x in ((hessian, seen), (other, held)):
            for batch in x.split(4 * WINDOW):
                windows.update(batch)
        h_held, damping = other.matrix, choose_damping(hessian)
        print(f"\n{name}: damping {damping} is chosen")
        for bits in BITS:
            spec = QuantSpec(bits, GROUP)
            results = {"round to nearest": quantize_rtn(w, spec).dequantize()}
            results |= ours(w, hessian, spec)
            for damp, order, mse in PEER if peer else ():
                solve = gptqmodel_solver(
                    w, seen, GROUP, mse, bits=bits, damp=damp,
                    desc_act=order == "desc_act", gar=order == "gar",
                )  # fmt: skip
                results[f"GPTQModel, {order}, damping {damp}, mse {mse}"] = solve(0)
            errors = {k: output_error(w, q, h_held) for k, q in results.items()}
            best = min((v, k) for k, v in errors.items() if k.startswith("GPTQModel")) if peer else None
            print(f"\n{name}, {bits} bits, group {GROUP}: relative output error, held-out")
            for key, error in errors.items():
                mark = " <- the peer's best" if best and key == best[1] else ""
                print(f"  {key:<44}{error:.4f}  {error / errors['ours, defaults']:.3f} x ours{mark}")
            rows.append({"layer": name, "bits": bits, "group_size": GROUP,
                         "chosen_damping": damping, "errors": errors})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=given_path, help="folder of a Llama-like model, for real layers")
    parser.add_argument("--wikitext", type=given_path, help="folder with WikiText-2's test.txt, valid.txt")
    parser.add_argument("--out", type=given_path, default=ROOT / "data" / "results" / "gptq-quality.json")
    args = parser.parse_args()
    layers = {"random, correlated inputs": random_layer()}
    if args.model:
        layers |= real_layers(args.model, args.wikitext)
    write_json_atomic(args.out, stamp(seed=0, tokens=TOKENS) | {"rows": run(layers)})


if __name__ == "__main__":
    sys.exit(ending(main))
