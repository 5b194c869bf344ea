"""Which texts to calibrate on, and how many: `python -m experiments.calibration_data`.

The fine-tuned tiny model (the bundled adapter, merged), its linears in 2 bits in groups of 64, by
GPTQ or by AWQ's factors and rounding to nearest. Both see `n` windows of WINDOW tokens of a text:

task      train problems with their solutions, what the model is for
own       what it writes itself, sampled at temperature 1 from the problems' first word
wikitext  WikiText-2's validation text: another language than its own, in its tokens
random    tokens drawn evenly from its vocabulary

A seed draws the windows. Kept is the mean loss of each of DEV problems on its solution, so that two
rows are compared problem by problem. GPTQ's options are the defaults.
"""

import copy
import sys
from functools import cache
from itertools import product
from pathlib import Path

import torch

from experiments.accuracy import ADAPTER, merged
from experiments.smollm2 import text_ids
from experiments.table import Table, asked_rows, command_line
from qlora_lib.base.endings import ending
from qlora_lib.base.paths import DATA, given_path, short_path
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.data.tokens import collate, encode_example, pad_id
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.lora.targets import find_linears
from qlora_lib.models.merge_hessians import input_hessians
from qlora_lib.models.quantize import quantize_model
from qlora_lib.models.rescale import awq_scales, rescale_channels
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.profiles import load_profile
from qlora_lib.train.loss import chunk_for, token_losses

RESULT = DATA / "results" / "tiny-calibration-data.json"
SOURCES, METHODS = ("task", "own", "wikitext", "random"), ("gptq", "awq")
COUNTS, SEEDS = (16, 64, 512), (0, 1, 2)
WINDOW, POOL = 64, 600  # tokens of a window, and windows of each text to draw from
SPEC, DEV, BATCH = QuantSpec(2, 64), 256, 32
STEPS = 10  # exponents of AWQ's search, beside 0


def row_name(source: str, n: int, method: str, seed: int) -> str:
    return f"{source}, {n} windows, {method}, seed={seed}"


def plan() -> dict[str, tuple | None]:
    """Every row: its name, and what `measure` takes."""
    rows = product(SEEDS, METHODS, COUNTS, SOURCES)
    named = {row_name(s, n, m, seed): (s, n, m, seed) for seed, m, n, s in rows}
    return {"exact": None, "rtn": ("none", 0, "rtn", 0)} | named


@cache
def solver():
    """(the fine-tuned model, tokenizer, profile); the model is not to be changed."""
    profile = load_profile("tiny")
    return *merged(profile, ADAPTER), profile


@cache
def windows(source: str, wikitext: Path) -> torch.Tensor:
    """int64 (POOL, WINDOW): the tokens of a text, cut."""
    model, tokenizer, profile = solver()
    size = POOL * WINDOW
    if source == "random":
        draw = torch.Generator().manual_seed(0)
        return torch.randint(len(tokenizer), (POOL, WINDOW), generator=draw)
    if source == "wikitext":
        return text_ids(tokenizer, wikitext / "valid.txt", size).view(POOL, WINDOW)
    texts = ("".join(format_gsm8k(entry)) for entry in profile.examples("train"))
    if source == "own":
        decoding = Decoding(max_new_tokens=2 * WINDOW, temperature=1, batch_size=100, stop=(),
                            samples=3 * POOL // 2, seed=0)  # fmt: skip
        (said,) = generator(model, tokenizer, decoding)(["Question:"])
        texts = (f"Question:{text}" for text in said)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        if len(ids) >= size:
            return torch.tensor(ids[:size]).view(POOL, WINDOW)
    raise ValueError(f"{source}: {len(ids)} tokens, where {size} are needed")


@torch.no_grad()
def problem_losses(model) -> list[float]:
    """The mean loss of each of DEV problems on its solution."""
    _, tokenizer, profile = solver()
    rows = [encode_example(tokenizer, *format_gsm8k(e), 256) for e in profile.examples("dev")[:DEV]]
    found, chunk = [], chunk_for(model, torch.float32)
    for start in range(0, len(rows), BATCH):
        batch = collate(rows[start : start + BATCH], pad_id(tokenizer))
        found += [float(loss.mean()) for loss in token_losses(model, batch, chunk)]
    return found


def measure(setting: tuple | None, wikitext: Path) -> dict:
    """What is kept of a row."""
    if setting is None:
        return {"losses": problem_losses(solver()[0])}
    source, n, method, seed = setting
    model, batches = copy.deepcopy(solver()[0]), []
    if n:
        order = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))
        batches = [{"input_ids": ids} for ids in windows(source, wikitext)[order[:n]].split(BATCH)]
    if method == "awq":
        hessians = input_hessians(model, find_linears(model, "all"), batches)
        rescale_channels(model, awq_scales(model, hessians, SPEC, STEPS)[0])
    gptq = method == "gptq"
    quantize_model(model, batches if gptq else None, SPEC, "gptq" if gptq else "rtn")
    return {"source": source, "windows": n, "tokens": n * WINDOW, "method": method, "seed": seed,
            "losses": problem_losses(model)}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULT, "--force", "--rows")
    parser.add_argument("--wikitext", type=given_path, default=Path("data/wikitext2"),
                        help="folder with WikiText-2's valid.txt")  # fmt: skip
    args, rows = parser.parse_args(argv), plan()
    table = Table(args.out, SEEDS[0], list(rows), args.force)
    for name in asked_rows(parser, args.rows, rows):
        if name not in table.rows:
            table.keep(name, made := measure(rows[name], args.wikitext))
            print(f"{name}: loss {sum(made['losses']) / len(made['losses']):.4f}", flush=True)
    print(f"stored in {short_path(Path(args.out))}")


if __name__ == "__main__":
    sys.exit(ending(main))
