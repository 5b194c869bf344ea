"""A model in stages of calibration, batches for it, and what is compared."""

import torch
from torch import nn

from qlora_lib.models.quantize import quantized_layers


def batches(count: int = 3, rows: int = 4, length: int = 16, seed: int = 0, pad: int = 0):
    """Random tokens; with `pad`, each row is followed by that many padding tokens."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 260, (rows, length), generator=g)
        mask = torch.ones_like(ids)
        found.append(
            {
                "input_ids": nn.functional.pad(ids, (0, pad)),
                "attention_mask": nn.functional.pad(mask, (0, pad)),
            }
        )
    return found


def logits(model, ids=batches(1)[0]["input_ids"]):
    with torch.no_grad():
        return model(ids).logits



def packed(model) -> dict[str, torch.Tensor]:
    return {f"{p}.{n}": b for p, m in quantized_layers(model).items() for n, b in m.named_buffers()}


def same(a, b) -> bool:
    a, b = packed(a), packed(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# The order in which a Llama block reads its weights; those of one line share an input.
STAGES = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
          ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
