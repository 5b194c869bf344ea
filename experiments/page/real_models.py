"""SmolLM2 on GSM8K and WikiText-2; LLaMA-2-7B as published and as contributed."""

from experiments.page import records
from experiments.page.records import claim, p_value, recorded
from experiments.page.tiny import COLUMNS, WIDTHS, WIDTHS_HEAD
from experiments.page.writing import made, percent, prose, span, table
from qlora_lib.evaluation.result_row import read_row


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
    rows = [read_row(path) for path in sorted(records.RESULTS.glob("contributed-*.json"))]
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
