"""Outliers and their repairs, and the texts that calibration sees."""

import math
from statistics import fmean, median, stdev

from experiments.outliers import WAYS as PLANTED
from experiments.page.records import claim, recorded
from experiments.page.writing import made, prose, table


def outliers() -> str:
    rows = recorded("tiny-outliers")
    ways = [way for way in PLANTED if any(name.endswith(", ".join(way)) for name in rows)]
    settings = list(dict.fromkeys((row["size"], row["repair"]) for row in rows.values()
                                  if "repair" in row))  # fmt: skip

    def cell(size: int, how: str, way: tuple[str, str]) -> str:
        row = rows.get(f"size {size}, {how}, {', '.join(way)}")
        return f"{row['loss']:.3f}; {100 * row['accuracy']:.0f}" if row else ""

    def loss(how: str, way: str, size: int = 64) -> float:
        return rows[f"size {size}, {how}, {way}"]["loss"]

    exact, broken = rows["exact"], rows["size 64, none, w4a4, rtn"]
    low, high = (100 * x for x in exact["interval"])
    mended = rows["size 64, rotate online, w4a4, rtn"]
    kept = rows["size 64, none, w4a16, rtn"]
    sizes = sorted({size for size, _ in settings})
    grown = [loss("none", "w4a4, rtn", size) for size in sizes]
    turned = [loss(how, "nvfp4, rtn") for how in ("rotate", "rotate online")]
    factors = [loss(how, "nvfp4, rtn") for how in ("smooth", "awq")]
    eight = [loss("none", f"{form}, rtn") for form in ("w8a8", "fp8")]
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
        prose("With the size, 1 to 1024, " + claim(
                  grown == sorted(grown) and loss("none", "w4a16, rtn", 1024) < 1.02 * kept["loss"],
                  f"4-bit inputs lose ever more (loss {', '.join(f'{x:.3f}' for x in grown)}), "
                  "weights at 1024 no more than at 64.")
              + " " + claim(loss("fold", "w4a16, rtn") < kept["loss"]
                            and 1 < loss("fold", "w4a4, rtn") < broken["loss"],
                            "Norms' gains, folded, take off what was planted in norms. That mends "
                            "weights; inputs still meet the values and down_proj's input.")
              + " " + claim(max(factors) < 1.2 * loss("none", "nvfp4, rtn", 1)
                            and max(turned) > min(turned) > 1.5 * loss("none", "nvfp4, rtn"),
                            "SmoothQuant and AWQ find a planted factor wherever it stands. "
                            "Rotations spread what is loud and keep it, and in NVFP4 they do harm "
                            "here: without one an outlier spoils the 16 channels of its own block.")
              + " " + claim(max(eight) < 1.1 * exact["loss"] and loss("none", "w8a8, rtn", 1024) > 1
                            and loss("none", "fp8, rtn", 1024) < 1.1 * exact["loss"],
                            "Eight bits bear outliers of 64 without any repair; those of 1024 "
                            "break whole numbers, and not FP8, whose steps are fine for small "
                            "values.")),
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

    def weighed(how: str, method: str, bits: int = 3) -> tuple[float, float, float]:
        """The factor by which a repair changes perplexity, with its interval."""
        return factor(*(rows[f"weights, {name}, {bits}, {method}"]["losses"]
                        for name in (how, "none")))  # fmt: skip

    channels = [block["channel"] for block in before["blocks"]]
    often = max(set(channels), key=channels.count)
    said = {"inputs": lambda r: ("16, as they are", f"{r['input_bits'] or 'exact'}"),
            "weights": lambda r: (", ".join([str(r["bits"]), r["method"], r.get("text", "")])
                                  .removesuffix(", "), "exact")}  # fmt: skip
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
              "span the range (all_four: damping 0.05, weigh_columns, match_dense, refit_scales); "
              "times what it is in fp32, with 95% intervals over the "
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
                            "them AWQ does harm.")
              + " " + claim(all(low < 1 < high for _, low, high in
                                (weighed(how, "gptq", 4) for how in ("awq", "rotate"))),
                            "At 4 bits neither AWQ nor a rotation changes what GPTQ reaches.")
              + " " + claim(all(2 * rows["weights, none, 2, all_four"]["wikitext2"]
                                < rows[f"weights, {how}, 2, gptq"]["wikitext2"]
                                for how in ("none", "awq", "rotate")),
                            "At 2 bits neither saves GPTQ as the paper has it, and the four "
                            "options alone do far more.")
              + " " + claim(rows["weights, none, 3, all_four"]["wikitext2"]
                            < rows["weights, none, 3, best"]["wikitext2"]
                            < rows["weights, awq, 3, gptq"]["wikitext2"],
                            "`GPTQOptions.best()`, at 3 bits, lies between the four options and "
                            "AWQ with GPTQ.")
              + " " + claim(weighed("awq", "best")[2] < 1 < weighed("awq", "all_four", 2)[1],
                            "With `best()` AWQ does pay at 3 bits: "
                            f"{rows['weights, awq, 3, best']['wikitext2']:.2f}, "
                            "the least here; with the four options it does harm at 2 bits too. A "
                            "rotation is not measured with either.")
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
        beside = {s: with_interval(gaps(s, most, method, plain)) for s in sources}
        gains = [s for s, (mean, half) in beside.items() if mean < -half]
        harms = [s for s, (mean, half) in beside.items() if mean > half]
        told.append(f"{method.upper()}: at {most} windows worse than on the task's text: "
                    f"{', '.join(worse) or 'none'}; better than without any text: "
                    f"{', '.join(gains) or 'none'}; worse than without: "
                    f"{', '.join(harms) or 'none'}; {least} windows of the task cost "
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
