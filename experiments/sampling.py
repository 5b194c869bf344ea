"""Samples, votes and a verifier at length: `python -m experiments.sampling`.

The generator is the fine-tuned tiny model in 2-bit GPTQ with one scale a row: wrong often
enough that choosing among its samples matters. Five stages, each kept when it is done:

temperatures   dev problems, sampled at several temperatures; majority@8 chooses one
verifier       solutions of train problems at that temperature, labelled by their answers; an
               adapter with a scalar head is trained on them (data/tiny-verifier)
test           greedy and 16 samples a problem, each with its likelihood and verifier score
shown          what notebook 08 reads aloud, whole: the logits of one token, texts of samples
lessons        texts from which its reader trains a verifier's head: two solutions each of many
               problems, since the samples of one are much alike

tiny-sampling.json holds settings and stamps, tiny-samples.jsonl a line a problem: all that the
curves of notebook 08 are computed from; tiny-shown.json and tiny-lessons.json the texts. An answer
is a text, of an exact number, or null. At 2 bits the weights themselves differ between one thread
and two: each stage's stamp says how many it had.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from experiments.accuracy import ADAPTER, quantized
from experiments.table import command_line, write_jsonl
from qlora_lib.base.endings import ending
from qlora_lib.base.files import read_json, write_json_atomic
from qlora_lib.base.paths import DATA, given_path, short_path
from qlora_lib.base.ranges import ABOVE_ZERO, COUNT
from qlora_lib.base.stamp import stamp
from qlora_lib.data.gsm8k import format_gsm8k, parse_gold
from qlora_lib.data.rows import read_jsonl
from qlora_lib.data.tokens import encode_prompt
from qlora_lib.evaluation.extraction import extract_answer
from qlora_lib.evaluation.verifier import Verifier, train_verifier
from qlora_lib.evaluation.votes import choose, likelihood
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.profiles import Profile, load_profile
from qlora_lib.train.config import TrainConfig

RESULT = DATA / "results" / "tiny-sampling.json"
VERIFIER = DATA / "tiny-verifier"
GENERATOR = ("gptq", QuantSpec(bits=2, group_size=None))
TEMPERATURES = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
SEED = 0
BATCH = 512  # samples at a time
CHUNK = 250  # problems between two lines of progress
TRAIN = TrainConfig(epochs=2, batch_size=64, lr=2e-3)
RANK = 16
PROMPT = (  # a question of dev, number 140, with the beginning of its solution
    "Question: Finn has 19 cookies. Olga gives Finn 18 more cookies. Then Finn loses 17 cookies. "
    "What number of cookies does he still have?\nAnswer:\n"
    "At first Finn gets to 19+18=37 cookies.\nThen Finn has 37-17="
)
SHOWN = 24  # test problems whose samples are kept as texts
# Problems whose samples teach a head; of train the last ones: the verifier's are the first.
LESSONS = {"train": 400, "dev": 150, "test": 200}


def load_generator(profile: Profile, adapter: Path = ADAPTER):
    """(model, tokenizer): its weights lie on the 2-bit grid, kept dense for speed."""
    tokenizer = profile.load()[1]
    return quantized(profile, adapter, *GENERATOR), tokenizer


def ask(
    model, tokenizer, profile: Profile, entries, temperature: float, samples: int, seed: int
) -> tuple[list[str], list[list]]:
    """The prompts, and a list of Completions for each. Temperature 0: one, greedy."""
    decoding = Decoding(
        temperature, samples=samples, seed=seed, max_new_tokens=profile.max_new_tokens,
        batch_size=max(1, BATCH // samples),
    )  # fmt: skip
    generate = generator(model, tokenizer, decoding)
    prompts, groups = [format_gsm8k(entry)[0] for entry in entries], []
    for start in range(0, len(prompts), CHUNK):
        groups += generate(prompts[start : start + CHUNK])
        print(f"  {len(groups)} of {len(prompts)} problems at {temperature}", flush=True)
    return prompts, [g if isinstance(g, list) else [g] for g in groups]


def text_answer(completion: str) -> str | None:
    """The strict answer as a text: "42", "7/2"; None where there is none."""
    answer = extract_answer(completion)
    return None if answer is None else str(answer)


def record(entry: dict, tokenizer, prompt: str, samples: Sequence[str]) -> dict:
    """What is kept of the samples of a problem."""
    return {
        "gold": str(parse_gold(entry["answer"])),
        "prompt_tokens": len(encode_prompt(tokenizer, prompt)),
        "answers": [text_answer(s) for s in samples],
        "tokens": [s.tokens for s in samples],
    }


def majority_right(row: dict) -> bool:
    """Whether the answer that most of its samples give is right."""
    return row["answers"][choose(row["answers"])] == row["gold"]


def temperatures(model, tokenizer, profile: Profile, entries, samples: int) -> list[dict]:
    """The records of all entries at each temperature; 0, greedy, is the first."""
    rows = []
    for temperature in (0.0, *TEMPERATURES):
        k = samples if temperature else 1
        prompts, groups = ask(model, tokenizer, profile, entries, temperature, k, SEED)
        kept = [record(e, tokenizer, p, g) for e, p, g in zip(entries, prompts, groups)]
        rows.append({"temperature": temperature, "problems": kept})
    return rows


def best_temperature(rows: Sequence[dict]) -> float:
    """With most right majorities; of equals the lowest."""
    sampled = [row for row in rows if row["temperature"]]
    best = max(sampled, key=lambda row: sum(map(majority_right, row["problems"])))
    return best["temperature"]


def make_verifier(
    model, tokenizer, profile: Profile, entries, temperature: float, samples: int,
    config: TrainConfig, folder: Path,
) -> dict:  # fmt: skip
    """Train the verifier and store it in `folder`; returns how it went."""
    prompts, groups = ask(model, tokenizer, profile, entries, temperature, samples, SEED + 1)
    golds = [str(parse_gold(entry["answer"])) for entry in entries]
    asked = [p for p, group in zip(prompts, groups) for _ in group]
    said = [s for group in groups for s in group]
    right = [text_answer(s) == gold for gold, group in zip(golds, groups) for s in group]
    torch.manual_seed(SEED)
    verifier = Verifier(model, tokenizer, RANK)

    def show(metrics):
        if metrics["step"] % 25 == 0:
            print(f"  step {metrics['step']:>5}   loss {metrics['loss']:.4f}", flush=True)

    steps = train_verifier(verifier, asked, said, right, config, show)
    verifier.save(folder)
    return {
        "problems": len(entries),
        "solutions": len(said),
        "right": sum(right),
        "temperature": temperature,
        "rank": RANK,
        "lr": config.lr,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "trained_parameters": sum(p.numel() for p in verifier.parameters.values()),
        "losses": [round(s["loss"], 4) for s in steps],
        "seconds": round(steps[-1]["seconds"], 1),
    }


def test_records(
    model, tokenizer, profile: Profile, entries, temperature: float, samples: int, folder: Path
) -> list[dict]:
    """Greedy and samples of each entry, each sample with both scores."""
    _, greedy = ask(model, tokenizer, profile, entries, 0.0, 1, SEED)
    prompts, groups = ask(model, tokenizer, profile, entries, temperature, samples, SEED + 2)
    asked = [p for p, group in zip(prompts, groups) for _ in group]
    said = [s for group in groups for s in group]
    by_likelihood = likelihood(model, tokenizer)(asked, said)
    by_verifier = Verifier.load(model, tokenizer, folder)(asked, said)
    rows = []
    for i, (entry, prompt, group, (one,)) in enumerate(zip(entries, prompts, groups, greedy)):
        own = slice(i * samples, (i + 1) * samples)
        rows.append(record(entry, tokenizer, prompt, group) | {
            "likelihood": [round(x, 4) for x in by_likelihood[own]],
            "verifier": [round(x, 4) for x in by_verifier[own]],
            "greedy": text_answer(one),
            "greedy_tokens": one.tokens,
        })  # fmt: skip
    return rows


def shown(model, tokenizer, profile: Profile, temperature: float, samples: int) -> dict:
    """The logits after PROMPT, and texts: greedy and samples of test problems."""
    ids = torch.tensor([encode_prompt(tokenizer, PROMPT)])
    with torch.inference_mode():
        logits = model(ids).logits[0, -1].float()
    entries = profile.examples("test")[:SHOWN]
    _, greedy = ask(model, tokenizer, profile, entries, 0.0, 1, SEED)
    _, sampled = ask(model, tokenizer, profile, entries, temperature, samples, SEED)
    return {
        "prompt": PROMPT,
        "logits": [round(x, 5) for x in logits.tolist()],
        "greedy": [one for (one,) in greedy],
        "samples": sampled,
    }


def lessons(model, tokenizer, profile: Profile, temperature: float) -> dict[str, list[list[str]]]:
    """Two solutions each of the LESSONS of each split, as texts."""
    texts = {}
    for split, count in LESSONS.items():
        entries = profile.examples(split)
        entries = entries[-count:] if split == "train" else entries[:count]
        texts[split] = ask(model, tokenizer, profile, entries, temperature, 2, SEED + 1)[1]
    return texts


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULT, "--force", "--model", "--data")
    parser.add_argument("--verifier", type=given_path, default=VERIFIER, help="folder to write it to")
    parser.add_argument("--adapter", type=given_path, default=ADAPTER)
    parser.add_argument("--dev", type=COUNT, default=250, help="problems that choose")
    parser.add_argument("--train", type=COUNT, default=2500, help="problems of the verifier")
    parser.add_argument("--test", type=COUNT, default=1000, help="problems of the report")
    parser.add_argument("--samples", type=COUNT, default=16, help="of a test problem; others have 8")
    parser.add_argument("--max-steps", type=COUNT, help="of the verifier's training, for a trial")
    args = parser.parse_args(argv)

    profile = load_profile("tiny", model=args.model, data=args.data)
    model, tokenizer = load_generator(profile, args.adapter)
    on_dev = args.out.with_name("tiny-temperatures.jsonl")
    samples = args.out.with_name("tiny-samples.jsonl")
    table = read_json(args.out) if args.out.is_file() and not args.force else {}
    settings = {"generator": f"{GENERATOR[0]}, {GENERATOR[1]}", "adapter": short_path(args.adapter)}
    config = TrainConfig(**asdict(TRAIN) | {"max_steps": args.max_steps})
    few = min(8, args.samples)

    def store(stage: str, values: dict) -> None:
        table[stage] = values | {"stamp": stamp(SEED)}
        write_json_atomic(args.out, settings | table)

    if "temperatures" not in table:
        rows = temperatures(model, tokenizer, profile, profile.examples("dev")[: args.dev], few)
        write_jsonl(on_dev, rows)
        store("temperatures", {"samples": few, "chosen": best_temperature(rows)})
    temperature = table["temperatures"].get("chosen")
    if temperature not in ABOVE_ZERO:
        raise ValueError(f"{args.out} has no chosen temperature; --force measures it again")
    print(f"temperature {temperature}: most right majorities on dev")
    if "verifier" not in table:
        entries = profile.examples("train")[: args.train]
        done = make_verifier(
            model, tokenizer, profile, entries, temperature, few, config, args.verifier
        )
        store("verifier", done)
        model, _ = load_generator(profile, args.adapter)  # without the new verifier
    if "test" not in table:
        entries = profile.examples("test")[: args.test]
        rows = test_records(
            model, tokenizer, profile, entries, temperature, args.samples, args.verifier
        )
        write_jsonl(samples, rows)
        store("test", {"problems": len(rows), "samples": args.samples, "temperature": temperature})
    if "shown" not in table:
        texts = shown(model, tokenizer, profile, temperature, few)
        write_json_atomic(args.out.with_name("tiny-shown.json"), texts | {"stamp": stamp(SEED)})
        store("shown", {"problems": SHOWN, "samples": few})
    if "lessons" not in table:
        texts = {"solutions": lessons(model, tokenizer, profile, temperature)}
        write_json_atomic(args.out.with_name("tiny-lessons.json"), texts | {"stamp": stamp(SEED)})
        store("lessons", {"problems": LESSONS, "samples": 2})
    rows = read_jsonl(samples)
    right = sum(map(majority_right, rows))
    print(f"majority of {args.samples}: {right} of {len(rows)} right; stored in "
          f"{short_path(args.out)}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(ending(main))
