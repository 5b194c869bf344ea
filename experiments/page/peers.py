"""Errors and times beside GPTQModel, bitsandbytes and llama.cpp."""

from experiments.page.records import claim, recorded
from experiments.page.writing import made, prose, table

# (label, dtype, tokens, with backward, our layer)
LAYERS = [
    ("bf16, 1 token (`decoding_layout`)", "bfloat16", 1, False, "ours, decoding_layout"),
    ("bf16, 32 tokens (`decoding_layout`)", "bfloat16", 32, False, "ours, decoding_layout"),
    ("bf16, 256 tokens", "bfloat16", 256, False, "ours, 4-bit grid"),
    ("fp32, 1 token", "float32", 1, False, "ours, 4-bit grid"),
    ("fp32, 32 tokens", "float32", 32, False, "ours, 4-bit grid"),
    ("fp32, 256 tokens, with backward", "float32", 256, True, "ours, 4-bit grid"),
]


def beside_gptqmodel() -> str:
    record = recorded("gptq-quality")
    rows, head = record["rows"], ("layer", "bits", "ours, the paper's", "ours, best", "damping")
    best, plain, shown = [], [], []
    for row in rows:
        peer = [error for name, error in row["errors"].items() if name.startswith("GPTQModel")]
        claim(len(peer) == 12, "twelve settings of GPTQModel")
        plain.append(row["errors"]["ours, defaults"] / min(peer))
        best.append(row["errors"]["ours, best"] / min(peer))
        shown.append((row["layer"], str(row["bits"]), f"{plain[-1]:.2f}", f"{best[-1]:.2f}",
                      f"{row['chosen_damping']:g}"))  # fmt: skip
    return "\n\n".join([
        "## Errors beside GPTQModel's",
        prose(f"Four layers, three of them SmolLM2's, in groups of {rows[0]['group_size']}: the "
              "error on unseen tokens, over that of the best of twelve settings of GPTQModel "
              "([record](../data/results/gptq-quality.json); `python -m benchmarks.quality` "
              "measures it again). Damping is what `GPTQOptions.best()` chose."),
        table(head, shown),
        made(record),
        prose(claim(max(best) < 1, "`GPTQOptions.best()` leaves an error "
                    f"{100 * (1 - max(best)):.0f} to {100 * (1 - min(best)):.0f}% below that of "
                    "the best of GPTQModel's")
              + "; " + claim(min(plain) > 1, "that of the defaults is "
                             f"{100 * (min(plain) - 1):.0f} to {100 * (max(plain) - 1):.0f}% "
                             "above it.")),
    ])  # fmt: skip


def solver() -> str:
    record = recorded("bench-cpu")
    rows = {(r["out"], r["in"], r["clip_search"]): r["seconds"] for r in record["solver"]}

    def times(size: int, name: str, clip: bool = False) -> str:
        seconds = rows[size, size, clip]
        return f"{seconds[name]['median'] / seconds['ours']['median']:.1f}"

    drift = [abs(d) for r in record["solver"]
             for d in r.get("objective_over_reference", {}).values()]  # fmt: skip
    return "\n\n".join([
        "## GPTQ's solver",
        prose("How many times as long others take, at 4 bits in groups of 64, medians of one run "
              "([record](../data/results/bench-cpu.json), drawn in [bench-cpu.png]"
              "(../data/results/bench-cpu.png)). "
              + claim(max(drift) < 2e-5, "Objectives agree within 2e-5.")
              + " `make bench` measures it again, with layers and training steps."),
        table(("layer", "a plain column loop", "GPTQModel", "GPTQModel, both with clip search"), [
            (f"{size} x {size}", times(size, "column loop"), times(size, "GPTQModel"),
             times(size, "GPTQModel", True))
            for size in (1024, 4096)
        ]),
        made(record),
    ])  # fmt: skip


def layers() -> str:
    record, size = recorded("bench-layers"), 4096
    found = {(r["dtype"], r["tokens"], r["backward"]): r["seconds"] for r in record["layers"]
             if r["out"] == r["in"] == size}  # fmt: skip
    rows = []
    for label, *setting, ours in LAYERS:
        seconds = found[tuple(setting)]
        dense = seconds["F.linear"]["median"]
        rows.append((label, *(f"{seconds[name]['median'] / dense:.2f}"
                              for name in (ours, "bitsandbytes NF4"))))  # fmt: skip
    token = found["float32", 1, False]
    return "\n\n".join([
        "## A packed layer",
        prose(f"A layer of {size} x {size} (4 bits, groups of 128) beside bitsandbytes' NF4 layer, "
              "on a CPU with AVX2 and no bf16 instructions: times over the dense layer's, medians "
              "of 5 rounds ([record](../data/results/bench-layers.json), drawn in "
              "[bench-layers.png](../data/results/bench-layers.png))."),
        table(("", "ours", "bitsandbytes"), rows),
        made(record),
        prose("In fp32 bitsandbytes makes the whole layer dense in each call, and glibc maps those "
              "64 MiB afresh. With memory that stays mapped (`MALLOC_MMAP_THRESHOLD_=1073741824 "
              "MALLOC_TRIM_THRESHOLD_=4294967296`) its "
              f"{1e3 * token['bitsandbytes NF4']['median']:.1f} ms for one token became 12.5 in a "
              "run of its own, whose record was not kept: "
              f"{0.0125 / token['F.linear']['median']:.1f} times the dense layer's."),
    ])  # fmt: skip


def through_llama_cpp() -> str:
    tables = {"tiny": recorded("tiny-gguf"), "SmolLM2": recorded("smollm2-gguf")}
    rows = [(model, name, row) for model, found in tables.items() for name, row in found.items()]
    least = min(row["equal"] / row["n"] for row in tables["tiny"].values())
    return "\n\n".join([
        "## The same model through llama.cpp",
        prose("Greedy completions here and by llama.cpp, of GGUF files that hold our very codes "
              "(nearest: llama.cpp's own rounding) ([record](../data/results/tiny-gguf.json), "
              "[SmolLM2's](../data/results/smollm2-gguf.json)). Up to 128 new tokens; speed: one "
              "prompt at a time on one thread, in turns."),
        table(("model", "weights", "the same text", "exact match here, %", "by llama.cpp, %",
               "McNemar's p", "times as fast"), [
            (model, name, f"{row['equal']} of {row['n']}", _exact(row["ours"]),
             _exact(row["llama_cpp"]), f"{row['p']:.2f}", f"{row['ratio']:.1f}")
            for model, name, row in rows
        ]),
        made(*(row["stamp"] for _, _, row in rows)),
        prose(claim(least > 0.9, "Over nine in ten texts of the tiny model are the same; ")
              + claim(all(row["p"] > 0.05 for _, _, row in rows), "no accuracy can be told from the "
                      "other's. What differs is that llama.cpp rounds activations to 8 bits.")),
    ])  # fmt: skip


def _exact(score: dict) -> str:
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
