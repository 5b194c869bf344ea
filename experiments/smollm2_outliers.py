"""SmolLM2-135M-Instruct's own outliers, and what repairs of them are worth: `python -m
experiments.smollm2_outliers`.

where    the largest hidden states behind each block, by channel and position, and how far the
         largest input channel of each kind of layer stands above the median one; as the model is,
         smoothed, and rotated (QuaRot's R1 and R2, and with R4, online)
inputs   perplexity with the inputs of all linear layers rounded to 8 and 4 bits a token, weights
         as they are
weights  perplexity with weights rounded to 3, 2 and 4 bits in groups of 64, to nearest, by GPTQ,
         with four of its options and with GPTQOptions.best(), after AWQ or a rotation or neither.
         Grids span the range: the clip search takes longer than all else, so these figures are for
         each other, not for smollm2-perplexity.json

Perplexity is of the first TOKENS tokens of WikiText-2's test text in windows of TEST_WINDOW, of
which each row keeps the mean loss, so that two rows are compared window by window. AWQ, SmoothQuant
and GPTQ see the first CALIBRATION tokens of its validation text, or at 3 bits also of GSM8K's train
problems with their solutions (gsm8k), or of what the model writes by itself, sampled at temperature
1 (own). Rotating unties the head from the embeddings, which doubles what 16 bits a weight are kept
of: stored_bytes has it.
"""

import copy
import math
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch

from experiments.perplexity import perplexity
from experiments.smollm2 import OPTIONS, text_ids
from experiments.table import Table, asked_rows, command_line
from qlora_lib.base.endings import ending
from qlora_lib.base.paths import DATA, given_path, short_path
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.layers.rounded_inputs import rounded_inputs
from qlora_lib.lora.targets import find_linears
from qlora_lib.models.input_sizes import input_absmax
from qlora_lib.models.merge_hessians import input_hessians
from qlora_lib.models.quantize import dequantize_model, quantize_model
from qlora_lib.models.rescale import awq_scales, rescale_channels, smooth
from qlora_lib.models.rotate import rotate_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.profiles import Profile, load_profile

RESULT = DATA / "results" / "smollm2-outliers.json"
SEED, WINDOW, CALIBRATION = 0, 512, 4096
TOKENS, TEST_WINDOW = 2048, 256
OWN = Decoding(temperature=1, samples=64, seed=SEED, max_new_tokens=128, batch_size=64, stop=())
STEPS = 10  # exponents of AWQ's search, beside 0
SEEN = ("q_proj", "o_proj", "gate_proj", "down_proj")  # a layer of each input in a block
REPAIRS = ("none", "smooth", "rotate", "rotate online")
METHODS = {"rtn": None} | {name: OPTIONS[name] for name in ("gptq", "all_four", "best")}
TEXTS = ("wikitext", "gsm8k", "own")


def plan() -> dict[str, tuple]:
    """Every row: its name, and what it takes; what is asked for most comes first."""
    rows = [("where", repair) for repair in REPAIRS]
    rows += [("inputs", "none", None)]
    rows += [("inputs", repair, bits) for bits, repair in product((8, 4), REPAIRS)]
    ways = product(METHODS, (3, 2, 4), ("none", "awq", "rotate"))
    rows += [("weights", repair, bits, method) for method, bits, repair in ways]
    ways = product(TEXTS[1:], ("gptq", "all_four"), ("none", "awq"))
    rows += [("weights", repair, 3, method, text) for text, method, repair in ways]
    return {", ".join(map(str, row)): row for row in rows}


def calibration(text: str, model, tokenizer, profile: Profile, wikitext: Path) -> list[dict]:
    """CALIBRATION tokens of one of TEXTS, in windows."""
    if text == "wikitext":
        ids = text_ids(tokenizer, wikitext / "valid.txt", CALIBRATION)
    elif text == "gsm8k":
        ids = encoded(tokenizer, ("".join(format_gsm8k(e)) for e in profile.examples("train")))
    else:
        (said,) = generator(model, tokenizer, OWN)([""])  # after the first token of any text
        ids = encoded(tokenizer, said)
    return [{"input_ids": part[None]} for part in ids.split(WINDOW)]


def encoded(tokenizer, texts: Iterable[str]) -> torch.Tensor:
    """The first CALIBRATION ids of some texts, one after the other, int64 (CALIBRATION,)."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        if len(ids) >= CALIBRATION:
            return torch.tensor(ids[:CALIBRATION])
    raise ValueError(f"{len(ids)} tokens, where {CALIBRATION} are needed")


def where(model, batches) -> dict:
    """What is kept of a row "where". blocks: the largest hidden state behind each block (the last
    one's before the final norm), where it is, and the largest and the median channel's of all
    tokens but the first of a window. largest_over_median: by kind of layer, block by block, the
    largest input channel over the median one."""
    hidden: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [block.register_forward_hook(
        lambda _, __, out, rows=rows: rows.append(out[0] if isinstance(out, tuple) else out))
        for block, rows in zip(model.model.layers, hidden)]  # fmt: skip
    try:
        sizes = input_absmax(model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    ratios, blocks = {}, []
    for path, x in sizes.items():
        kind = path.rpartition(".")[2]
        if kind in SEEN:
            ratios.setdefault(kind, []).append(round(float(x.max() / x.median()), 2))
    for rows in hidden:
        h = torch.cat(rows).abs()  # (windows, seq, hidden)
        by_channel = h[:, 1:].amax((0, 1))  # (hidden,)
        position, channel = divmod(int(h.amax(0).argmax()), h.shape[2])
        blocks.append({"largest": float(h.max()), "position": position, "channel": channel,
                       "later": float(by_channel.max()), "later_channel": int(by_channel.argmax()),
                       "later_median": float(by_channel.median())})  # fmt: skip
    return {"tokens": sum(b["input_ids"].numel() for b in batches), "window": WINDOW,
            "blocks": blocks, "largest_over_median": ratios}  # fmt: skip


def losses(model, ids, bits: int | None = None) -> dict:
    """Perplexity, and the mean loss of each window."""
    with rounded_inputs(model, bits) if bits else nullcontext():
        each = [math.log(perplexity(model, part, TEST_WINDOW).value)
                for part in ids.split(TEST_WINDOW)]  # fmt: skip
    return {"wikitext2": math.exp(sum(each) / len(each)), "tokens": len(ids), "window": TEST_WINDOW,
            "losses": each}  # fmt: skip


def repair(model, how: str, batches, spec: QuantSpec | None = None) -> dict:
    """Repair a model in place; returns what is kept of it."""
    if how == "smooth":
        smooth(model, input_absmax(model, batches))
    elif how == "awq":
        hessians = input_hessians(model, find_linears(model, "all"), batches)
        scales, rows = awq_scales(model, hessians, spec, STEPS)
        rescale_channels(model, scales)
        return {"exponents": [row.exponent for row in rows]}
    elif how != "none":
        rotate_model(model, SEED, online=how == "rotate online")
    return {}


def measure(model, batches, ids, kind: str, how: str, *setting) -> dict:
    """What is kept of a row; the model is left as it was."""
    model = copy.deepcopy(model)
    if kind == "where":
        repair(model, how, batches)
        return {"repair": how} | where(model, batches[:4])
    if kind == "inputs":
        repair(model, how, batches)
        return {"repair": how, "input_bits": setting[0]} | losses(model, ids, setting[0])
    bits, method, *text = setting
    spec = QuantSpec(bits, 64, clip_search=False)
    kept = repair(model, how, batches, spec)
    options = METHODS[method]
    report = (quantize_model(model, batches, spec, "gptq", options) if options
              else quantize_model(model, None, spec, "rtn"))  # fmt: skip
    packed = sum(row.bytes_after for row in report)
    weights = sum(math.prod(row.shape) for row in report)
    stored = packed + 2 * sum(p.numel() for p in model.parameters())  # the rest in 16 bits
    dequantize_model(model)
    kept |= {"text": text[0]} if text else {}
    return {"repair": how, "bits": bits, "method": method, "bits_per_weight": 8 * packed / weights,
            "stored_bytes": stored} | kept | losses(model, ids)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULT, "--force", "--rows", "--model", "--data")
    parser.add_argument("--wikitext", type=given_path, default=Path("data/wikitext2"),
                        help="folder with WikiText-2's test.txt and valid.txt")  # fmt: skip
    args, rows = parser.parse_args(argv), plan()
    table, model, seen = Table(args.out, SEED, list(rows), args.force), None, {}
    for name in asked_rows(parser, args.rows, rows):
        if name in table.rows:
            continue
        if model is None:
            profile = load_profile("smollm2", model=args.model, data=args.data)
            model, tokenizer = profile.load(compute_dtype="fp32")
            ids = text_ids(tokenizer, args.wikitext / "test.txt", TOKENS)
        text = rows[name][4] if len(rows[name]) > 4 else TEXTS[0]
        if text not in seen:
            seen[text] = calibration(text, model, tokenizer, profile, args.wikitext)
        table.keep(name, made := measure(model, seen[text], ids, *rows[name]))
        print(f"{name}: {made.get('wikitext2', '')}", flush=True)
    print(f"stored in {short_path(Path(args.out))}")


if __name__ == "__main__":
    sys.exit(ending(main))
