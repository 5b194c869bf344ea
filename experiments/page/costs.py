"""What training takes in time and memory, and what serving many adapters saves."""

from experiments.page.records import claim, recorded
from experiments.page.writing import made, prose, table


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
