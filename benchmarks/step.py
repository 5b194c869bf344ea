"""One QLoRA training step of a random model of SmolLM2's shape, each side in its own process.

    python -m benchmarks.step ours|peft|dense

Same model code (transformers), dtype, checkpointing, logits and adapters (rank 16 on all seven
linears of each block); what differs is who packs the base and who adapts it. Prints one line of
JSON: seconds of each step, and the process's peak of resident memory before and after.
"""

import json
import resource
import subprocess
import sys
import time

import torch

from .timing import installed, show, summary

SIDES = {"ours": "qlora_lib", "peft": "peft", "dense": "peft"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = dict(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
BATCH, LENGTH = 2, 256


def base():
    """The dense random model, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).train()


def ours():
    from qlora_lib import NF4Spec, inject_lora, quantize_model, trainable_parameters

    model = base()
    quantize_model(model, None, NF4Spec(), method="nf4", target_modules=TARGETS)
    inject_lora(model, TARGETS, rank=16, alpha=16)
    model.enable_input_require_grads()
    return model, list(trainable_parameters(model).values())


def peft(packed: bool = True):
    from peft import LoraConfig, get_peft_model

    model = base()
    if packed:
        import bitsandbytes as bnb

        for path, layer in list(model.named_modules()):
            if path.rpartition(".")[2] in TARGETS:
                out, n = layer.weight.shape
                new = bnb.nn.Linear4bit(
                    n, out, bias=False, compute_dtype=torch.float32, quant_type="nf4",
                    compress_statistics=True,
                )  # fmt: skip
                new.load_state_dict({"weight": layer.weight.detach()})
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, new.to("cpu"))
    config = LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.0)
    model = get_peft_model(model, config)
    model.enable_input_require_grads()
    return model, [p for p in model.parameters() if p.requires_grad]


def measure(side: str, steps: int = 3) -> dict:
    """Seconds of `steps` steps after one that is not counted; bytes."""
    model, parameters = ours() if side == "ours" else peft(packed=side == "peft")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(SHAPE["vocab_size"], (BATCH, LENGTH))
    before, seconds, losses = _peak(), [], []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
        losses.append(float(loss))
    trained = sum(p.numel() for p in parameters)
    return {
        "seconds": seconds[1:], "losses": losses, "trained": trained,
        "peak_before": before, "peak": _peak(), "weights": _bytes(model),
    }  # fmt: skip


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux


def _bytes(model) -> int:
    return sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())


def run(rounds: int = 3) -> dict:
    """Each side in a process of its own, in turns."""
    sides = [s for s, package in SIDES.items() if installed(package)]
    if not installed("bitsandbytes"):
        sides = [s for s in sides if s != "peft"]
    found = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.step", side], capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"the step of {side} failed:\n{done.stderr[-2000:]}")
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    times = {s: summary([t for r in runs for t in r["seconds"]]) for s, runs in found.items()}
    show(f"QLoRA step, SmolLM2's shape, {BATCH} x {LENGTH} tokens, fp32, NF4", times, "ours")
    peaks = {s: min(r["peak"] for r in runs) for s, runs in found.items()}
    print("  peak memory of the process, MB:", {s: round(p / 1e6) for s, p in peaks.items()})
    return {"seconds": times, "peak_bytes": peaks, "runs": found}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
