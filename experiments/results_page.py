"""Makes docs/RESULTS.md: `python -m experiments.results_page`, whenever a record has changed.

Every number of the page is read or computed from data/results, and so is what its sentences
claim: a claim that the records do not bear, or a row whose counts are not those of its verdicts,
stops it with a ValueError.
"""

import sys
from pathlib import Path

from experiments.page import records
from experiments.page.costs import serving, steps
from experiments.page.outliers import calibration_texts, outliers, outliers_of_smollm2
from experiments.page.peers import beside_gptqmodel, layers, solver, through_llama_cpp
from experiments.page.real_models import contributed, real_model
from experiments.page.records import recorded
from experiments.page.starts import starts
from experiments.page.tiny import epochs, fine_tuning, merging, merging_without_loss, widths
from experiments.page.writing import table
from qlora_lib.base.endings import ending
from qlora_lib.base.files import whole_file
from qlora_lib.base.paths import ROOT

PAGE = ROOT / "docs" / "RESULTS.md"
OPENING = """\
# Results

Made by `python -m experiments.results_page` from [data/results](../data/README.md): change that
script, not this page. Accuracies come with n and a 95% interval.

A 3.5-million parameter model shows that a method works and by how much; it says nothing about how
well LLaMA-2-7B will do."""
ELSEWHERE = [
    ("`tiny-learning-rates.json`: full fine-tuning and LoRA over learning rates, dev loss",
     "03_lora"),
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
    for path in records.RESULTS.glob("*.json"):
        recorded(path.stem)
    parts = (fine_tuning, widths, merging, merging_without_loss, real_model, contributed,
             beside_gptqmodel, solver, layers, steps, epochs, starts, outliers,
             outliers_of_smollm2, calibration_texts, serving, through_llama_cpp,
             elsewhere)  # fmt: skip
    return "\n\n".join([OPENING, *(part() for part in parts)]) + "\n"


def main(out: Path = PAGE) -> None:
    with whole_file(out) as part:
        part.write_text(page(), encoding="utf-8")
    print(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(ending(main))
