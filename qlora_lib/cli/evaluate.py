"""`python -m qlora_lib evaluate | generate`: ask what `finetune` saved."""

import dataclasses
from pathlib import Path

from ..base.paths import given_path
from ..base.ranges import COUNT, FROM_ZERO, SHARE, ZERO_ON
from .common import SHARED, Opened, add_command, make_decoding, open_options, open_run
from .verifier import open_verifier

SPLITS = ("dev", "test", "test_changed", "test_larger", "gsm_hard")
SAMPLING = ("with sampling (--samples 2 or more, or a --temperature above 0)",
            lambda args: usual_temperature(args) > 0)  # fmt: skip
NEEDS = {
    "vote": ("with --samples 2 or more", lambda args: args.samples > 1),
    "verifier": ("with --vote verifier or weighted", lambda args: args.vote in ("verifier", "weighted")),
    "top_p": SAMPLING,
    "seed": SAMPLING,
}
VOTES = ("majority", "verifier", "weighted", "likelihood")


def add_commands(commands) -> None:
    text = "score the fine-tuned model on held-out problems"
    add = add_command(commands, "evaluate", evaluate, text, " ".join(SHARED), needs=NEEDS, asks=True)
    add("--split", default="test", choices=SPLITS, help="which problems (default: test)")
    add("--limit", type=COUNT, help="only the first so many problems")
    add("--few-shot", type=FROM_ZERO, default=0, metavar="K", help="solved problems before each")
    add("--batch-size", type=COUNT, help="completions at a time (default: 64, or what fits)")
    add("--out", type=given_path, help="(default: outputs/PROFILE/eval, and what is special)")
    add("--restart", action="store_true", help="replace answers instead of going on")
    add("--compare", type=given_path, metavar="REPORT", help="folder of another evaluation")
    add("--samples", type=COUNT, default=1, metavar="K", help="completions a question")
    add("--vote", choices=VOTES, help="which of the samples counts (default: majority)")
    add("--temperature", type=ZERO_ON, help="(default: 0, with --samples 0.7)")
    add("--top-p", type=SHARE, default=1.0, help="only the likeliest tokens, this much together")
    add("--verifier", type=given_path, help="(default: verifier in the run's folder)")

    shared = "profile model folder device compute-dtype"
    add = add_command(commands, "generate", generate, "answer one question", shared, asks=True)
    add("--form", choices=("question", "prompt", "chat"), default="question",
        help="how it is asked: with the template of the problems (default; the answer ends before "
        "another \"Question:\"), exactly as it stands, or as a chat's first turn")  # fmt: skip
    add("question")


def sampler(opened: Opened, args, prompts: list[str]):
    """(function from prompts to completions, vote or None) as the options say."""
    from ..evaluation import votes as sampling
    from ..generation.generate import generator

    settings = {"temperature": usual_temperature(args), "top_p": args.top_p}
    decoding = make_decoding(opened, args, **settings, samples=args.samples, seed=args.seed)
    model, tokenizer = open_run(opened, args.dense, not args.no_adapter)
    batch = args.batch_size or usual_batch(model, tokenizer, prompts, decoding)
    decoding = dataclasses.replace(decoding, batch_size=max(1, batch // args.samples))
    generate = generator(model, tokenizer, decoding)
    if args.samples == 1:
        return generate, None
    vote = args.vote or "majority"
    if vote in ("verifier", "weighted"):
        verifier = open_verifier(model, tokenizer, opened, args.verifier)
        # After it: the adapter takes part in what the fingerprint covers.
        generate = sampling.with_scores(generate, verifier, "verifier")
    elif vote == "likelihood":
        generate = sampling.with_scores(generate, sampling.likelihood(model, tokenizer), vote)
    votes = {"majority": sampling.majority, "weighted": sampling.weighted_vote}
    return generate, votes.get(vote, sampling.best_score)


def usual_temperature(args) -> float:
    """The temperature asked for; else 0, with several samples 0.7."""
    if args.temperature is not None:
        return args.temperature
    return 0.7 if args.samples > 1 else 0.0


def usual_batch(model, tokenizer, prompts: list[str], decoding) -> int:
    """64 completions at a time, or what fits into memory on every process."""
    from ..base import processes
    from ..data.tokens import encode_prompt
    from ..generation.kv_cache import CacheSpec
    from ..train.memory import fitting_batch

    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    cache = CacheSpec(decoding.cache_bits) if decoding.cache_bits else None
    fits = fitting_batch(model, longest + decoding.max_new_tokens, 64, cache)
    return min(processes.gather(fits))


def evaluate(args) -> None:
    from ..base.paths import short_path
    from ..base.stamp import stamp
    from ..data.gsm8k import format_gsm8k
    from ..evaluation.comparison import report_difference
    from ..evaluation.evaluate import EvalReport, few_shot
    from ..evaluation.evaluate import evaluate as score

    other = EvalReport.load(args.compare) if args.compare else None  # missing: say so at once
    opened = open_options(args)
    profile = opened.profile
    problems, prompt = profile.examples(args.split)[: args.limit], format_gsm8k
    if args.few_shot:
        prompt = few_shot(profile.examples("train"), args.few_shot)
    out = args.out or Path("outputs") / profile.name / evaluation_name(args)
    generate, vote = sampler(opened, args, [prompt(entry)[0] for entry in problems])
    adapter = None if args.no_adapter else short_path(opened.folder / "adapter")
    generate.info |= {"adapter": adapter, "split": args.split, "few_shot": args.few_shot}
    generate.info |= stamp(args.seed)

    def show(prediction):
        mark = "\u2713" if prediction["strict"] else "\u2717"
        answer = prediction["strict_answer"] or "none"
        print(f"{mark} {answer:>8}   gold {prediction['gold']:>8}   {prediction['question']:.60}")

    batch = args.samples * generate.info["decoding"]["batch_size"]
    report = score(generate, problems, out, prompt, show, batch, vote, restart=args.restart)
    print(f"{report}\nreport in {short_path(out)}")
    if other:
        print(report_difference(other, report, (short_path(args.compare), short_path(out))))


def evaluation_name(args) -> str:
    """A folder for each kind of evaluation: eval, or eval-test_changed-3shot."""
    special = {
        args.split: args.split != "test",
        "dense": args.dense,
        "base": args.no_adapter,
        f"{args.few_shot}shot": args.few_shot,
        f"first{args.limit}": args.limit,
        f"cache{args.cache_bits}bit": args.cache_bits,
        f"{args.vote or 'majority'}{args.samples}": args.samples > 1,
    }
    return "-".join(["eval", *(name for name, on in special.items() if on)])


def generate(args) -> None:
    from ..data.examples import write_chat
    from ..data.gsm8k import PROMPT
    from ..data.rows import text_of
    from ..generation.generate import generator

    text_of({"question": args.question}, "question")
    opened = open_options(args)
    model, tokenizer = open_run(opened, args.dense, not args.no_adapter)
    stop = {} if args.form == "question" else {"stop": ()}
    ask = generator(model, tokenizer, make_decoding(opened, args, batch_size=1, **stop))
    prompt = args.question
    if args.form == "question":
        prompt = PROMPT.format(question=prompt)
    elif args.form == "chat":
        prompt = write_chat(tokenizer, [{"role": "user", "content": prompt}], ask=True)
    print(*ask([prompt]))
