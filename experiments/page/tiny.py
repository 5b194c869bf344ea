"""The tiny model: fine-tuned, in fewer bits, merged, and how often it sees an example."""

from itertools import combinations, product
from statistics import fmean

from experiments.adapters import read_epochs
from experiments.exact_merge import RANK
from experiments.page.records import claim, p_value, recorded
from experiments.page.writing import made, percent, prose, table
from qlora_lib.base.statistics import mcnemar

WIDTHS = (8, 4, 3, 2)  # bits
COLUMNS = [f"{method}_{{}}bit_{group}" for group in ("row", "64") for method in ("gptq", "rtn")]
WIDTHS_HEAD = ("bits", "one scale a row: GPTQ", "round to nearest", "64 weights a scale: GPTQ",
               "round to nearest")  # fmt: skip
FINE_TUNED = {
    "base": "the base, in GSM8K's format",
    "base_3shot": "the base, three solved examples before the question",
    "base_bare_question": "the base, the bare question",
    "base_statement":
        "the base, the question without its last sentence (its pretraining's wording)",
    "lora_attention_r16": "LoRA on the dense base, r=16 on q, k, v, o",
    "lora_all_r32": "LoRA on the dense base, r=32 on all seven linears",
    "qlora_attention_r16": "QLoRA on a 4-bit GPTQ base, r=16 on q, k, v, o",
    "qlora_all_r8": "QLoRA on a 4-bit GPTQ base, r=8 on all seven linears",
    "qlora_all_r32": "QLoRA on a 4-bit GPTQ base, r=32 on all seven linears",
}
MERGES = {
    "dense": "into dense weights from the dequantized base: exact",
    "rtn": "and rounded to nearest again",
    "gptq": "and quantized with GPTQ again",
    "original": "into the original, never quantized weights: another model",
}


def fine_tuning() -> str:
    rows = recorded("tiny-accuracy")
    scores = {label: rows[name] for name, label in FINE_TUNED.items()}
    n = {score["n"] for score in scores.values()}
    best = max(rows[name]["flexible"] for name in FINE_TUNED if name.startswith("base"))
    trained = {name: rows[name]["training"]["trained_parameters"] for name in FINE_TUNED
               if "training" in rows[name]}  # fmt: skip
    few, many = rows["qlora_attention_r16"], rows["qlora_all_r8"]
    return "\n\n".join([
        "## Fine-tuning the tiny model",
        prose(f"Exact match on the {n.pop():,} test problems of mini-GSM, in % with 95% intervals: "
              "strict is the number after `####`, flexible the last number of the answer."),
        table(("tiny profile", "strict `#### N`, %", "last number, %"),
              [(label, percent(s), percent(s, "flexible")) for label, s in scores.items()]),
        made(*(score["stamp"] for score in scores.values())),
        prose(claim(rows["qlora_all_r32"]["strict"] >= max(0.8, best + 0.6),
                    "Fine-tuning teaches what no prompt gets out of the base.")
              + " One seed each, so a few points between two trained rows mean little. "
              + claim(few["strict_interval"][1] < many["strict_interval"][0],
                      "Where LoRA sits matters more than its rank:")
              + f" r=8 on all seven linears trains {trained['qlora_all_r8']:,} parameters, "
              f"r=16 on q, k, v, o {trained['qlora_attention_r16']:,}."),
        prose("How they were obtained: the tiny model was pretrained on language and single "
              "arithmetic steps only ([data card](../data/tiny-llama/README.md)); it never saw a "
              "chain of two steps, nor a question with its answer. Train, dev and test of mini-GSM "
              "share no numbers ([data](../data/README.md)). Greedy decoding, the prompt only as "
              "input, every question in the denominator, Wilson intervals. Settings were chosen "
              "on dev; the test set was used once. `make experiments` measures it again."),
    ])  # fmt: skip


def widths() -> str:
    rows = recorded("tiny-accuracy")
    cells = {bits: [rows["merged_" + column.format(bits)] for column in COLUMNS] for bits in WIDTHS}
    beaten = [("3bit_row", "at 3 bits a row"), ("2bit_row", "at 2 bits a row"),
              ("2bit_64", "at 2 bits in groups of 64")]  # fmt: skip
    apart = all(
        rows[f"merged_gptq_{name}"]["strict_interval"][0]
        > rows[f"merged_rtn_{name}"]["strict_interval"][1]
        for name, _ in beaten
    )
    return "\n\n".join([
        "## Bits of the fine-tuned model",
        prose("The adapter of notebook 04 (r=16 on all seven linears, [data/tiny-adapter]"
              "(../data/README.md)) is merged and all linears are quantized again; strict, in %, "
              f"the same {rows['merged_fp32']['n']:,} problems. In fp32: "
              f"{percent(rows['merged_fp32'])}."),
        table(WIDTHS_HEAD, [(str(bits), *map(percent, row)) for bits, row in cells.items()]),
        made(*(score["stamp"] for row in cells.values() for score in row)),
        prose(claim(apart, "GPTQ's intervals lie above those of rounding "
                    + ", ".join(words for _, words in beaten) + ".")),
    ])  # fmt: skip


def merging() -> str:
    record = recorded("tiny-merges")
    rows = {row["method"]: row for row in record["rows"]}
    tests = {pair: p_value(*(rows[name]["measured"] for name in pair))
             for pair in combinations(MERGES, 2)}  # fmt: skip
    least = min(tests, key=tests.get)
    errors = [rows[name]["logit_error"] for name in ("dense", "rtn", "gptq")]
    return "\n\n".join([
        "## What merging costs",
        prose("The same adapter, merged by `merge_lora` and `merge_into_original`: relative error "
              "of the logits on dev problems, and strict exact match on the "
              f"{rows['dense']['measured']['n']:,} test problems, in %."),
        table(("merged", "logit error", "strict, %"), [
            (label, f"{rows[name]['logit_error']:.1e}" if "logit_error" in rows[name]
             else "not comparable", percent(rows[name]["measured"]))
            for name, label in MERGES.items()
        ]),
        made(record["stamp"]),
        prose("PEFT refuses to merge into a GPTQ base. In exact match "
              + claim(tests[least] > 0.05 / len(tests), "no two rows differ beyond chance")
              + f": of McNemar's tests of the {len(tests)} pairs, the least p is "
              f"{tests[least]:.3f} ({' and '.join(least)}), where {len(tests)} looks ask for "
              f"{0.05 / len(tests):.4f}; "
              + claim(min(errors[1:]) > 1e4 * errors[0], "in logits they differ by orders of "
                      "magnitude.")),
    ])  # fmt: skip


# (kind of training, way to merge): what it is called
EXACT = {
    ("lora", "dense"): "LoRA, into dense weights",
    ("lora", "rtn"): "LoRA, rounded to nearest",
    ("lora", "gptq"): "LoRA, by GPTQ",
    ("lora", "own grid"): "LoRA, codes moved on their grid",
    ("on_grid", "exact"): "codes trained on their grid (LR-QAT)",
    ("group_wise", "real zero-points"): "QA-LoRA, zero-points in fp16",
    ("group_wise", "whole zero-points"): "QA-LoRA, whole zero-points",
}


def merging_without_loss() -> str:
    rows = list(recorded("tiny-exact-merges").values())
    after: dict = {(row["bits"], row["lr"]): {} for row in rows}
    shown = []
    for (bits, lr), ((kind, way), label) in product(after, EXACT.items()):
        own = [row for row in rows if (row["bits"], row["lr"], row["kind"]) == (bits, lr, kind)]
        merged = [row["merged"][way] for row in own]
        loss, error = (fmean(m[k] for m in merged) for k in ("dev_loss", "logit_error"))
        after[bits, lr][kind, way] = loss
        shown.append((f"{bits}", f"{lr:g}", label, f"{fmean(r['dev_loss'] for r in own):.3f}",
                      f"{loss:.3f}", f"{error:.0e}", str(len(own))))  # fmt: skip
    exact = [row["merged"]["exact"] for row in rows if row["kind"] == "on_grid"]
    return "\n\n".join([
        "### Merges that lose nothing",
        prose("Adapters trained for their merge beside LoRA, from one base in GPTQ's codes: rank "
              f"{RANK} on all linears, {rows[0]['steps']} steps; loss on solutions of "
              f"{rows[0]['dev_problems']} dev problems before and after the merge, and the "
              "relative error of the logits, means over the seeds "
              "([record](../data/results/tiny-exact-merges.json); [notebook 11]"
              "(../notebooks/11_calibrated_adapters.ipynb) says how and why)."),
        table(("bits", "rate", "adapter and merge", "loss before", "after", "logit error", "seeds"),
              shown),
        made(*(row["stamp"] for row in rows)),
        prose(claim(all(m["logit_error"] == 0 for m in exact),
                    "Codes trained on their grid merge to the bit, ")
              + claim(all(loss["on_grid", "exact"] > loss["lora", "dense"]
                          for loss in after.values()), "but they learn less: ")
              + claim(all(min(loss[way] for way in loss if way != ("lora", "dense"))
                          == loss["lora", "gptq"] for loss in after.values()),
                      "of the merges into few bits LoRA's by GPTQ ends with the lowest loss, each "
                      "time.")),
    ])  # fmt: skip


def epochs() -> str:
    record, rows = recorded("tiny-adapters-epochs"), read_epochs()
    last = {examples: own[max(own)] for examples, own in rows.items()}
    best = max(rows[8], key=lambda n: rows[8][n]["correct"])
    early, late = rows[8][best]["right"], last[8]["right"]
    lost = sum(a > b for a, b in zip(early, late))  # "1" > "0"
    gained = sum(a < b for a, b in zip(early, late))
    return "\n\n".join([
        "## How often the same examples",
        prose("LoRA of rank 8 on all linears of the tiny model, rate 0.003, two seeds: naming "
              "one of four operations in a sentence. Every row is a training of its own, whose "
              "rate falls to 0 at its end; exact match on the same 200 dev questions for each "
              "seed, so the intervals are somewhat too narrow "
              "([record](../data/results/tiny-adapters-epochs.json))."),
        table(("examples", "epochs", "steps", "dev loss", "loss on the examples",
               "exact match, %"), [
            (f"{examples:,}", str(count), str(row["steps"]), f"{row['dev_loss']:.4f}",
             f"{row['train_loss']:.4f}", "{:.1f} [{:.1f}, {:.1f}]".format(
                 *(100 * x for x in (row["correct"] / row["n"], *row["interval"]))))
            for examples, own in rows.items() for count, row in own.items()
        ]),
        made(record["stamp"]),
        prose(claim(last[64]["correct"] == last[1000]["correct"] == last[64]["n"],
                    "64 examples again and again end where 1,000 do. ")
              + claim(mcnemar(lost, gained) < 0.01 and lost > gained,
                    f"Eight are best after {best} passes; from there to {max(rows[8])} {lost} "
                    f"answers are lost and {gained} gained, while the loss on the eight still "
                    "falls.")),
    ])  # fmt: skip
