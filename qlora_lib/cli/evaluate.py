"""`python -m qlora_lib evaluate | generate`: ask what `finetune` saved."""

from pathlib import Path

from .common import add_run_options, open_profile, open_run

SPLITS = ("dev", "test", "test_changed", "test_larger", "gsm_hard")


def add_evaluate_and_generate(commands, shared) -> None:
    """The two commands and their options."""
    text = "score the fine-tuned model on held-out problems"
    add = commands.add_parser("evaluate", parents=[shared], help=text).add_argument
    add_run_options(add)
    add("--split", default="test", choices=SPLITS, help="which problems (default: test)")
    add("--limit", type=int, help="only the first so many problems")
    add("--few-shot", type=int, default=0, metavar="K", help="solved problems before each")
    add("--batch-size", type=int, default=64)
    add("--out", type=Path, help="(default: outputs/PROFILE/eval, and what is special)")
    add("--restart", action="store_true", help="replace answers instead of going on")
    add("--compare", type=Path, metavar="REPORT", help="folder of another evaluation")

    add = commands.add_parser("generate", parents=[shared], help="answer one question").add_argument
    add_run_options(add)
    add("question")


def make_generator(profile, args, batch_size: int):
    from ..generation import Decoding, generator

    length = args.max_new_tokens or profile.max_new_tokens
    model, tokenizer = open_run(profile, args)
    return generator(model, tokenizer, Decoding(max_new_tokens=length, batch_size=batch_size))


def evaluate(args) -> None:
    from ..comparison import report_difference
    from ..data import format_gsm8k, short_path
    from ..evaluation import EvalReport, few_shot
    from ..evaluation import evaluate as score
    from ..results import stamp

    other = EvalReport.load(args.compare) if args.compare else None  # missing: say so at once
    profile = open_profile(args)
    problems = profile.examples(args.split)[: args.limit]
    prompt = format_gsm8k
    if args.few_shot:
        prompt = few_shot(profile.examples("train"), args.few_shot)
    out = args.out or Path("outputs") / profile.name / evaluation_name(args)
    generate = make_generator(profile, args, args.batch_size)
    adapter = None if args.no_adapter else short_path(args.folder / "adapter")
    generate.info |= {"adapter": adapter, "split": args.split, "few_shot": args.few_shot}
    generate.info |= stamp(args.seed)

    def show(prediction):
        mark = "\u2713" if prediction["strict"] else "\u2717"
        answer = prediction["strict_answer"] or "none"
        print(f"{mark} {answer:>8}   gold {prediction['gold']:>8}   {prediction['question']:.60}")

    report = score(generate, problems, out, prompt, show, args.batch_size, restart=args.restart)
    print(report)
    print(f"report in {short_path(out)}")
    if other:
        names = (short_path(args.compare), short_path(out))
        print(report_difference(other, report, names))


def evaluation_name(args) -> str:
    """A folder for each kind of evaluation: eval, or eval-test_changed-3shot."""
    special = {
        args.split: args.split != "test",
        "dense": args.dense,
        "base": args.no_adapter,
        f"{args.few_shot}shot": args.few_shot,
        f"first{args.limit}": args.limit,
    }
    return "-".join(["eval", *(name for name, on in special.items() if on)])


def generate(args) -> None:
    from ..data import PROMPT

    profile = open_profile(args)
    (completion,) = make_generator(profile, args, 1)([PROMPT.format(question=args.question)])
    print(completion)
