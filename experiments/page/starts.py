"""Where an adapter starts."""

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
from experiments.page.records import recorded
from experiments.page.writing import made, prose, table
from qlora_lib.base.statistics import wilson


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
