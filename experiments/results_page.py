"""Makes docs/RESULTS.md: `python -m experiments.results_page`, whenever a record has changed.

Every number of the page is read or computed from data/results, and so is what its sentences
claim: a claim that the records do not bear, or a row whose counts are not those of its verdicts,
stops it with a ValueError.
"""


import math
import sys
import textwrap
from itertools import combinations
from pathlib import Path
from statistics import fmean, median, stdev

from experiments.adapters import read_epochs
from experiments.calibrated_init import (
    BASELINE,
    BASES,
    RANKS,
    RATES,
    SEEDS,
    STARTS,
    STEPS,
    TRAINED,
    comparisons,
    row_name,
)
from experiments.outliers import WAYS as PLANTED
from qlora_lib.base.endings import ending
from qlora_lib.base.files import read_json, read_text, whole_file
from qlora_lib.base.paths import DATA, ROOT
from qlora_lib.base.statistics import mcnemar, wilson
from qlora_lib.evaluation.result_row import read_row

RESULTS, PAGE = DATA / "results", ROOT / "docs" / "RESULTS.md"
STAMPED = ("device", "torch", "seed", "date", "command")
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
# (label, dtype, tokens, with backward, our layer)
LAYERS = [
    ("bf16, 1 token (`decoding_layout`)", "bfloat16", 1, False, "ours, decoding_layout"),
    ("bf16, 32 tokens (`decoding_layout`)", "bfloat16", 32, False, "ours, decoding_layout"),
    ("bf16, 256 tokens", "bfloat16", 256, False, "ours, 4-bit grid"),
    ("fp32, 1 token", "float32", 1, False, "ours, 4-bit grid"),
    ("fp32, 32 tokens", "float32", 32, False, "ours, 4-bit grid"),
    ("fp32, 256 tokens, with backward", "float32", 256, True, "ours, 4-bit grid"),
]


def recorded(name: str) -> dict:
    """A record, stamped, with its rows' counts and intervals compared with their verdicts."""
    found, text = read_json(RESULTS / f"{name}.json"), read_text(RESULTS / f"{name}.json")
    claim(all(f'"{key}":' in text for key in STAMPED), f"{name} has {', '.join(STAMPED)}")
    check_scores(found, name)
    return found


def check_scores(part: dict | list, where: str) -> None:
    """Raises ValueError unless each score in `part`, at whatever depth, agrees with itself: a
    verdict ("0" or "1") a question in `right`, and the counts and intervals that follow."""
    if isinstance(part, dict):
        if isinstance(part.get("right"), str):
            exact = part["right"].count("1")
            prefix, share = ("strict_", "strict") if "strict" in part else ("", "accuracy")
            counted = len(part["right"]), exact, exact / part["n"], *wilson(exact, part["n"])
            stated = (part["n"], part[prefix + "correct"], part[share],
                      *part[prefix + "interval"])  # fmt: skip
            if any(abs(a - b) > 1e-12 for a, b in zip(counted, stated)):
                raise ValueError(f"{where}: its verdicts give {counted}, it states {stated}")
    inside = part.items() if isinstance(part, dict) else enumerate(part)
    for name, value in inside:
        if isinstance(value, (dict, list)):
            check_scores(value, f"{where}, {name}")


def claim(holds: bool, text: str) -> str:
    """`text`; ValueError when the records say otherwise."""
    if not holds:
        raise ValueError(f"the records do not bear this out any more: {text!r}")
    return text


def prose(text: str) -> str:
    """`text` as a paragraph with lines of at most 100 characters."""
    text = " ".join(text.split())
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def table(head, rows) -> str:
    """A table of Markdown; cells are texts."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def percent(score: dict, mode: str = "strict") -> str:
    """Exact match in %, with its 95% interval."""
    low, high = score[f"{mode}_interval"]
    return f"{100 * score[mode]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def made(*stamps: dict) -> str:
    """When and where rows were measured, from their stamps."""
    days = sorted({stamp["date"] for stamp in stamps})
    threads = sorted({stamp["threads"] for stamp in stamps})
    device, version = stamps[0]["device"].replace("cpu", "CPU"), stamps[0]["torch"]
    several = "s" if threads != [1] else ""
    return prose(
        f"*{' to '.join(dict.fromkeys((days[0], days[-1])))}, {device} with "
        f"{' or '.join(map(str, threads))} thread{several}, torch {version}, seed "
        f"{stamps[0]['seed']}*"
    )


def span(values, digits: int = 2) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def p_value(a: dict, b: dict) -> float:
    """McNemar's test of two rows on the same questions."""
    pairs = list(zip(a["right"], b["right"], strict=True))
    return mcnemar(pairs.count(("1", "0")), pairs.count(("0", "1")))


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


def real_model() -> str:
    gsm8k, sizes = recorded("smollm2-gsm8k"), recorded("smollm2-perplexity")
    before, after = gsm8k["base"], gsm8k["qlora"]
    value = {name: row["wikitext2"] for name, row in sizes.items()}

    def texts(how: str, bits: int) -> str:
        return span([value[f"{how}_{bits}bit_64{text}"] for text in ("", "_text1", "_text2")])

    p = p_value(before, after)
    return "\n\n".join([
        "## SmolLM2-135M-Instruct",
        prose(f"On GSM8K, {before['n']} fixed test problems, strict: {percent(before)} % before "
              f"and {percent(after)} % after {after['training']['steps']} QLoRA steps, "
              + claim(p > 0.05, f"which {before['n']} questions cannot tell apart")
              + f" (McNemar's p = {p:.2f}; [record](../data/results/smollm2-gsm8k.json); notebook "
              "05 reads it)."),
        made(before["stamp"], after["stamp"]),
        prose("Its perplexity on the first 32,768 tokens of WikiText-2's test text, in windows of "
              f"{sizes['fp32']['window']} ([record](../data/results/smollm2-perplexity.json)); in "
              f"fp32 {value['fp32']:.2f}. The weights come from a file of 4-bit codes, so 8 bits "
              "measure plumbing, 4 bits a second rounding, 3 and 2 bits quality."),
        table(WIDTHS_HEAD, [
            (str(bits), *(f"{value[column.format(bits)]:,.2f}" for column in COLUMNS))
            for bits in WIDTHS
        ]),
        made(*(row["stamp"] for row in sizes.values())),
        prose("What goes beyond the paper, in groups of 64; the spans are over three calibration "
              "texts:"),
        table(("options", "2 bits", "3 bits"), [
            ("the paper's", texts("gptq", 2), texts("gptq", 3)),
            ("`weigh_columns`, `match_dense` and damping 0.05", texts("together", 2),
             texts("together", 3)),
            ("`refit_scales`", texts("refit", 2), f"{value['refit_3bit_64']:.2f} (one text)"),
            ("`GPTQOptions.best()`, a damping a layer", f"{value['best_2bit_64']:.2f} (one text)",
             "not measured"),
            ("`GPTQOptions.best(match_dense=True)`",
             f"{value['best_match_2bit_64']:.2f} (one text)", "not measured"),
        ]),
    ])  # fmt: skip


# LLaMA-2-7B, trained on GSM8K's train problems alone: what, bits, exact match in %, where from
PUBLISHED = [
    ("LoRA, rank 64", "16", 36.9, "LoftQ, [2310.08659](https://arxiv.org/abs/2310.08659)"),
    ("QLoRA, rank 64", "4", 35.1, "the same"),
    ("LoftQ, rank 64", "4", 35.0, "the same"),
    ("QLoRA, rank 64", "3", 32.1, "the same"),
    ("LoftQ, rank 64", "3", 32.9, "the same"),
    ("LoftQ, rank 64", "2", 20.9, "the same"),
    ("QERA", "4.25", 32.3, "QERA, [2410.06040](https://arxiv.org/abs/2410.06040)"),
    ("CLoQ", "2", 33.7, "CLoQ, [2501.18475](https://arxiv.org/abs/2501.18475)"),
]
GSM8K_TEST = 1319


def contributed() -> str:
    rows = [read_row(path) for path in sorted(RESULTS.glob("contributed-*.json"))]
    shown = []
    for row in rows:
        base = (row["run"] or {}).get("base") or {}
        bits = (base.get("spec") or {}).get("bits", "4" if base.get("method") == "nf4" else "16")
        asked, trained = row["protocol"], "the base alone" if row["run"] is None else (
            f"{base.get('method') or 'dense'}, rank {row['run'].get('lora', {}).get('rank', '-')}")
        shown.append((row["model"]["model"], trained, str(bits), f"{asked['split']}, {row['n']:,}",
                      percent(row), f"`{row['protocol_hash']}`", row["stamp"]["device"]))
    head = ("model", "trained", "bits", "problems", "strict, %", "protocol", "device")
    wide = 1.96 * (0.35 * 0.65 / GSM8K_TEST) ** 0.5
    return "\n\n".join([
        "## LLaMA-2-7B on GSM8K, and how to add a row",
        prose("Published exact match after training on GSM8K alone; each paper has a script, a "
              "prompt and a scoring of its own, and 16-bit baselines 2.5 points apart. Beside them "
              f"stands the chance of {GSM8K_TEST:,} questions: about {100 * wide:.1f} points "
              "either way at 35%."),
        table(("what", "bits", "exact match, %", "from"),
              [(what, bits, f"{score:.1f}", source) for what, bits, score, source in PUBLISHED]),
        prose("A row of your own, of any model, is one file:"),
        "```\npython -m qlora_lib evaluate --profile llama2-7b\n"
        "python -m qlora_lib report outputs/llama2-7b/eval --run checkpoints/llama2-7b\n```",
        prose("`row.json` holds the protocol and its hash (questions, prompts, decoding, scoring: "
              "rows of one hash compare), the run's settings, counts with intervals, a verdict a "
              "question, the hash of the answers, and the device with versions, seed and date. "
              "Put it here as `data/results/contributed-NAME.json`, run `python -m "
              "experiments.data_hashes` and `python -m experiments.results_page`, and send both. "
              "Keep `predictions.jsonl`: its hash is in the row."),
        table(head, shown) if rows else prose("Contributed so far: none."),
    ])  # fmt: skip


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


def steps() -> str:
    record, wide = recorded("bench-step"), recorded("llama2-7b-shape-step")
    step, streamed = record["step"], recorded("llama2-7b-shape-streaming")
    names = {"ours": "ours", "peft": "PEFT over bitsandbytes", "dense": "ours, a dense base"}
    gigabytes = [wide[part]["peak"] / 1e9 for part in ("measured_bytes", "predicted_bytes")]
    return "\n\n".join([
        "## Training steps and memory",
        prose("One QLoRA step of a random model of SmolLM2's shape (NF4, fp32, 2 x 256 tokens, "
              "checkpointing; [record](../data/results/bench-step.json), drawn in "
              "[bench-step.png](../data/results/bench-step.png)):"),
        table(("", "seconds, median", "peak of the process, GB"), [
            (label, f"{step['seconds'][name]['median']:.2f}",
             f"{step['peak_bytes'][name] / 1e9:.2f}")
            for name, label in names.items()
        ]),
        made(record),
        prose(f"Two QLoRA steps of {wide['blocks']} LLaMA-2-7B-wide blocks of random weights "
              f"took {gigabytes[0]:.3f} GB where the ledger predicted {gigabytes[1]:.3f} (fp32, "
              "CPU; [record](../data/results/llama2-7b-shape-step.json); `python -m "
              "experiments.step` measures it again)."),
        made(wide["stamp"]),
        prose("GPTQ block by block (`--stream`) at LLaMA-2-7B's width took "
              f"{streamed['peak_anonymous_bytes'] / 1e9:.1f} GB and "
              f"{streamed['seconds_a_block']:.0f} s a block, with "
              f"{streamed['calibration_tokens']:,} tokens, on {streamed['cores']} busy cores "
              "([record](../data/results/llama2-7b-shape-streaming.json))."),
        made(streamed["stamp"]),
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


def starts() -> str:
    rows = recorded("calibrated-init")
    plain, columns = rows["before, dense"], (*STARTS, "again")

    def kl(base: str, rank: int, start: str) -> str:
        row = rows.get(row_name("before", base, rank, start))
        return f"{1e3 * row['kl']:.2f}" if row else ""

    before = [row for row in rows.values() if "kl" in row]
    parts = [
        "## Where an adapter starts",
        prose("The tiny model's base in GPTQ's codes or NF4, groups of 64, and an adapter on all "
              "linears before any training: how far the next token's distribution has moved from "
              f"the dense model's on {plain['dev_problems']} dev questions, KL in 1/1000 nat a "
              "token ([record](../data/results/calibrated-init.json), which has losses too). zero "
              "is the base alone; svd, qera and cloq leave it as it is. pissa and loftq round "
              "residuals of their own to nearest, and again is cloq and GPTQ in turn: their bases "
              "fit their adapter alone."),
        table(("base", "rank", *columns), [
            (base, str(rank), *(kl(base, rank, start) for start in columns))
            for base in BASES for rank in RANKS if kl(base, rank, BASELINE)
        ]),
        made(*(row["stamp"] for row in before)),
    ]  # fmt: skip
    found = comparisons(rows)
    if not found:
        return "\n\n".join(parts)
    shown, after = [], [row for name, row in rows.items() if name.startswith("trained")]
    settings = [setting for setting in TRAINED if any(key[:2] == setting for key in found)]
    for base, rank in settings:
        for start in STARTS:
            own = [rows.get(row_name("trained", base, rank, start, seed=seed)) for seed in SEEDS]
            if all(own):
                right = "".join(row["right"] for row in own)
                low, high = wilson(right.count("1"), len(right))
                share, p = right.count("1") / len(right), found.get((base, rank, start))
                shown.append((
                    f"{base}, r={rank}", start, f"{own[0]['lr']:g}",
                    f"{sum(row['loss'] for row in own) / len(own):.4f}",
                    f"{p['difference']:+.4f} (p {p['p']:.3f}, {p['holm']:.3f})" if p else "",
                    f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                ))  # fmt: skip
    told = {side: [f"{start} ({base}, r={rank})" for (base, rank, start), row in found.items()
                   if row["holm"] < 0.05 and (row["difference"] < 0) == (side == "lower")]
            for side in ("lower", "higher")}  # fmt: skip
    steps, n = after[0]["steps"], after[0]["n"]
    return "\n\n".join([
        *parts,
        prose(f"After {steps} steps of {STEPS.batch_size} problems, five seeds, each start at the "
              f"better of {len(RATES)} learning rates (by dev loss, one seed): the mean loss a "
              "token on solutions of test problems; its difference from that of zero, with p of a paired t "
              f"test over the seeds, alone and by Holm over the {len(found)} of this table; exact "
              f"match on {n} test problems a seed, in % (the intervals take seeds for other "
              "problems, and are somewhat too narrow)."),
        table(("base", "start", "rate", "loss", "minus zero's", "exact match, %"), shown),
        made(*(row["stamp"] for row in after)),
        prose(f"By Holm's 5%, lower losses than from zero: {', '.join(told['lower']) or 'none'}; "
              f"higher ones: {', '.join(told['higher']) or 'none'}."),
    ])  # fmt: skip


def outliers() -> str:
    rows = recorded("tiny-outliers")
    ways = [way for way in PLANTED if any(name.endswith(", ".join(way)) for name in rows)]
    settings = list(dict.fromkeys((row["size"], row["repair"]) for row in rows.values()
                                  if "repair" in row))  # fmt: skip

    def cell(size: int, how: str, way: tuple[str, str]) -> str:
        row = rows.get(f"size {size}, {how}, {', '.join(way)}")
        return f"{row['loss']:.3f}; {100 * row['accuracy']:.0f}" if row else ""

    exact, broken = rows["exact"], rows["size 64, none, w4a4, rtn"]
    low, high = (100 * x for x in exact["interval"])
    mended = rows["size 64, rotate online, w4a4, rtn"]
    kept = rows["size 64, none, w4a16, rtn"]
    return "\n\n".join([
        "## Planted outliers",
        prose(f"{broken['channels']} channels of each norm's output, of the values and of what "
              "down_proj reads are made `size` times as large in the fine-tuned tiny model, its "
              "function left alone; then it is repaired, and weights (and inputs, a grid a token) "
              f"are rounded: loss a token on solutions of {exact['dev_problems']} dev problems, "
              f"and exact match on {exact['n']} of them, in %; in fp32 {exact['loss']:.3f}; "
              f"{100 * exact['accuracy']:.0f} [{low:.0f}, {high:.0f}] "
              "([record](../data/results/tiny-outliers.json), which has the intervals)."),
        table(("size", "repair", *(f"{form.upper()}, {method}" for form, method in ways)), [
            (str(size), how, *(cell(size, how, way) for way in ways)) for size, how in settings
        ]),
        made(*(row["stamp"] for row in rows.values())),
        prose(claim(broken["interval"][1] < mended["interval"][0],
                    "Outliers break 4-bit inputs, and rotations mend a part of it")
              + "; " + claim(broken["loss"] > kept["loss"] + 1,
                             "weights alone, in groups of 64, hardly notice them: the columns that "
                             "were made small round to 0, and lose no more than themselves.")
              + " " + claim(rows["size 64, rotate online, w4a16, rtn"]["loss"] > 2 * kept["loss"],
                            "Rotated weights do, in o_proj: all columns of a head then meet the "
                            "planted value with their errors.")
              + " " + claim(rows["size 64, rotate online, w4a16, gptq"]["loss"] < kept["loss"],
                            "GPTQ, which knows the inputs, mends that.")),
    ])  # fmt: skip


def outliers_of_smollm2() -> str:
    rows = recorded("smollm2-outliers")
    before, after = rows["where, none"], rows["where, rotate online"]
    deep = max(before["blocks"], key=lambda block: block["largest"])
    kinds = list(before["largest_over_median"])
    exact, broken = rows["inputs, none, None"], rows["inputs, none, 4"]
    mended = rows["inputs, rotate online, 4"]
    rounded = [rows[f"weights, {how}, 3, rtn"] for how in ("none", "rotate")]
    stored = [row["stored_bytes"] for row in rounded]

    def weighed(how: str, method: str) -> tuple[float, float, float]:
        """The factor by which a repair changes perplexity at 3 bits, with its interval."""
        return factor(*(rows[f"weights, {name}, 3, {method}"]["losses"] for name in (how, "none")))

    channels = [block["channel"] for block in before["blocks"]]
    often = max(set(channels), key=channels.count)
    said = {"inputs": lambda r: ("16, as they are", f"{r['input_bits'] or 'exact'}"),
            "weights": lambda r: (f"{r['bits']}, {r['method']}", "exact")}  # fmt: skip
    shown = []
    for name, row in rows.items():
        if (kind := name.partition(",")[0]) in said:
            middle, low, high = factor(row["losses"], exact["losses"])
            shown.append((*said[kind](row), row["repair"], f"{row['wikitext2']:,.2f}",
                          f"{middle:.3f} [{low:.3f}, {high:.3f}]"))  # fmt: skip
    return "\n\n".join([
        "## SmolLM2's own outliers",
        prose(f"Over {before['tokens']:,} tokens of WikiText-2 in windows of {before['window']}, "
              "the largest hidden state is "
              f"{deep['largest']:,.0f}, at position {deep['position']} of a window in channel "
              f"{deep['channel']}; among later positions of the same block {deep['later']:,.0f} is "
              f"the largest and {deep['later_median']:.0f} the median channel's. In "
              f"{channels.count(often)} of {len(channels)} blocks the largest is in channel "
              f"{often} ([record](../data/results/smollm2-outliers.json)). The largest input "
              "channel of a layer over the median one, the worst block and the median one:"),
        table(("inputs of", "as it is", "rotated, also online"), [
            (kind, *(worst(row["largest_over_median"][kind]) for row in (before, after)))
            for kind in kinds
        ]),
        prose(f"Perplexity of {exact['tokens']:,} tokens in windows of {exact['window']}, with "
              "inputs of linear layers rounded a token, or weights in groups of 64 whose grids "
              f"span the range; times what it is in fp32, with 95% intervals over the "
              f"{len(exact['losses'])} windows (Student's t):"),
        table(("bits of weights", "of inputs", "repair", "perplexity", "times fp32's"), shown),
        made(*(row["stamp"] for row in rows.values())),
        prose(claim(factor(broken["losses"], exact["losses"])[1] > 5
                    and factor(mended["losses"], exact["losses"])[2] < 2,
                    "Four bits for the inputs break the model, and rotated inputs bear them.")
              + " " + claim(factor(rounded[1]["losses"], rounded[0]["losses"])[1] > 2,
                            "Weights alone, rounded to nearest, are worse off rotated. Not all of "
                            "it is explained: what made one channel large is then in every row of "
                            "down_proj, and so are its errors; and as they come they lie on a 4-bit "
                            "grid, which a rotation leaves.")
              + " " + claim(weighed("awq", "rtn")[2] < 1 and weighed("awq", "gptq")[2] < 1
                            and weighed("awq", "all_four")[1] > 1
                            and rows["weights, none, 3, all_four"]["wikitext2"]
                            < rows["weights, awq, 3, gptq"]["wikitext2"],
                            "AWQ's factors mend a part at 3 bits, to nearest and with GPTQ as the "
                            "paper has it; four of GPTQ's options together mend more, and with "
                            "them AWQ does harm, so it is no option of `quantize` either.")
              + " Rotating costs SmolLM2 a head of its own, as norms are folded into it: at 3 bits "
              f"{stored[1] / 1e6:.0f} MB are stored instead of {stored[0] / 1e6:.0f}, "
              + claim(stored[1] > 1.5 * stored[0], "more than half as much again")
              + ". So `quantize` has no option for it; `rotate_model` is there for models whose "
              "head is their own."),
    ])  # fmt: skip


def factor(losses: list[float], exact: list[float]) -> tuple[float, float, float]:
    """exp of the mean difference of two rows' losses, window by window, and its 95% interval."""
    gaps = [a - b for a, b in zip(losses, exact, strict=True)]
    claim(len(gaps) == 8, "eight windows, for the t of 7 degrees of freedom")
    half = 2.365 * stdev(gaps) / math.sqrt(len(gaps))
    return tuple(math.exp(fmean(gaps) + by) for by in (0, -half, half))


def worst(ratios: list[float]) -> str:
    return f"{max(ratios):,.0f}; {median(ratios):.1f}"


def calibration_texts() -> str:
    rows = recorded("tiny-calibration-data")
    exact, plain = rows["exact"]["losses"], rows["rtn"]["losses"]
    counts = sorted({row["windows"] for row in rows.values() if row.get("windows")})
    sources = list(dict.fromkeys(row["source"] for row in rows.values() if row.get("windows")))

    def gaps(source: str, n: int, method: str, base: list[float]) -> list[float]:
        """How far the loss lies above `base`, problem by problem, the mean of the seeds."""
        own = [row["losses"] for row in rows.values() if
               (row.get("source"), row.get("windows"), row.get("method")) == (source, n, method)]
        return [fmean(several) - b for *several, b in zip(*own, base, strict=True)]

    def with_interval(found: list[float]) -> tuple[float, float]:
        return fmean(found), 1.96 * stdev(found) / math.sqrt(len(found))

    def cell(*setting) -> str:
        mean, half = with_interval(gaps(*setting, exact))
        return f"{mean:+.4f} ± {half:.4f}"

    seeds = {row["seed"] for row in rows.values() if row.get("windows")}
    tokens = next(row["tokens"] // row["windows"] for row in rows.values() if row.get("windows"))
    told = []
    for method in ("gptq", "awq"):
        least, most = counts[0], counts[-1]
        task = [row["losses"] for row in rows.values() if (row.get("source"), row.get("windows"),
                row.get("method")) == ("task", most, method)]  # fmt: skip
        best = [fmean(several) for several in zip(*task, strict=True)]
        worse = [s for s in sources if s != "task"
                 and (g := with_interval(gaps(s, most, method, best)))[0] > g[1]]
        few = with_interval(gaps("task", least, method, best))
        told.append(f"{method.upper()}: at {most} windows worse than on the task's text: "
                    f"{', '.join(worse) or 'none'}; {least} windows of the task cost "
                    f"{few[0]:+.4f} ± {few[1]:.4f} beside {most}.")
    mean, half = with_interval([a - b for a, b in zip(plain, exact, strict=True)])
    return "\n\n".join([
        "## Which text to calibrate on",
        prose(f"The fine-tuned tiny model in 2 bits, groups of 64, calibrated on windows of {tokens} "
              "tokens of train problems (task), of its own samples, of WikiText-2, and of random "
              f"tokens: loss a token on solutions above fp32's, the mean over {len(exact)} dev "
              f"problems and {len(seeds)} draws of the windows, with 95% intervals over the "
              f"problems. To nearest, without any text: {mean:+.4f} ± {half:.4f} "
              "([record](../data/results/tiny-calibration-data.json))."),
        table(("method", "text", *(f"{n} windows" for n in counts)), [
            (method, source, *(cell(source, n, method) for n in counts))
            for method in ("gptq", "awq") for source in sources
        ]),
        made(*(row["stamp"] for row in rows.values())),
        prose("Paired by problem. " + " ".join(told)),
    ])  # fmt: skip


def serving() -> str:
    record = recorded("tiny-serving")
    setting, bases = record["setting"], record["bases"]
    least = min(row["speedup"]["median"] for row in bases.values())
    return "\n\n".join([
        "## Many adapters on one base",
        prose(f"{setting['requests']} requests for {setting['adapters']} random adapters of rank "
              f"{setting['rank']} on the tiny model, {setting['new_tokens']} new tokens each: "
              "tokens a second in one batch that mixes them and in one batch an adapter, medians "
              f"of {setting['turns']} turns ([record](../data/results/tiny-serving.json))."),
        table(("base", "mixed", "one batch an adapter", "times as fast: median [least, most]"), [
            (base, *(f"{row['tokens_per_second'][way]:,.0f}"
                     for way in ("mixed", "one batch an adapter")),
             "{median:.2f} [{least:.2f}, {most:.2f}]".format(**row["speedup"]))
            for base, row in bases.items()
        ]),
        made(record["stamp"]),
        prose(claim(least >= 1.3, "Over either base the mixed batch is clearly faster.")),
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


OPENING = """\
# Results

Made by `python -m experiments.results_page` from [data/results](../data/README.md): change that
script, not this page. Accuracies come with n and a 95% interval.

A 3.5-million parameter model shows that a method works and by how much; it says nothing about how
well LLaMA-2-7B will do."""
ELSEWHERE = [
    ("`tiny-learning-rates.json`: full fine-tuning and LoRA over learning rates, dev loss",
     "03_lora"),
    ("`tiny-exact-merges.json`: merges that lose nothing, and what they cost in training",
     "11_calibrated_adapters"),
    ("`tiny-cache.json`, `smollm2-cache.json`: keys and values in 8, 4 and 2 bits",
     "06_int4_kernels"),
    ("`tiny-adapters-*.json`: tasks, ranks, learning rates, sums, averages",
     "07_adapters_at_work"),
    ("`tiny-sampling.json`, `tiny-samples.jsonl`, `tiny-temperatures.jsonl`, `tiny-shown.json`, "
     "`tiny-lessons.json`: votes, the verifier",
     "08_sampling_and_verifiers"),
]  # fmt: skip


def elsewhere() -> str:
    rows = [(what, f"[{name[:2]}](../notebooks/{name}.ipynb)") for what, name in ELSEWHERE]
    return "## Recorded, and shown elsewhere\n\n" + table(("record", "shown in"), rows)


def page() -> str:
    """The whole page. Raises ValueError when a record contradicts itself or a sentence."""
    for path in RESULTS.glob("*.json"):
        recorded(path.stem)
    parts = (fine_tuning, widths, merging, real_model, contributed, beside_gptqmodel, solver,
             layers, steps, epochs, starts, outliers, outliers_of_smollm2, calibration_texts,
             serving, through_llama_cpp, elsewhere)  # fmt: skip
    return "\n\n".join([OPENING, *(part() for part in parts)]) + "\n"


def main(out: Path = PAGE) -> None:
    with whole_file(out) as part:
        part.write_text(page(), encoding="utf-8")
    print(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(ending(main))
