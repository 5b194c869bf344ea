"""`python -m qlora_lib verifier`: train a judge of the run's own solutions."""

import dataclasses
from pathlib import Path

from ..base.ranges import ABOVE_ZERO, COUNT
from .common import SHARED, Opened, add_command, make_decoding, open_options, open_run
from .finetune import RATE


def add_commands(commands) -> None:
    text = "sample solutions of train problems, label them, train a verifier on them"
    add = add_command(commands, "verifier", train, text, " ".join(SHARED), asks=True)
    add("--limit", type=COUNT, default=1000, help="train problems to sample for (default: 1000)")
    add("--samples", type=COUNT, default=8, metavar="K", help="solutions of each (default: 8)")
    add("--temperature", type=ABOVE_ZERO, default=0.7)
    add("--epochs", type=COUNT, default=1, help="passes over the solutions")
    add("--batch-size", type=COUNT, default=64, help="solutions at a time")
    add("--rank", type=COUNT, default=16, help="of the adapter")
    add("--lr", type=RATE, default=1e-3, help="peak learning rate")


def train(args) -> None:
    from ..base.lock import held

    opened = open_options(args)
    with held(opened.folder):
        sample_and_train(opened, args)


def sample_and_train(opened: Opened, args) -> None:
    import torch

    from ..base.folders import check_place
    from ..base.paths import short_path
    from ..base.stamp import stamp
    from ..data.gsm8k import format_gsm8k
    from ..evaluation.extraction import is_correct
    from ..evaluation.verifier import HEAD, Verifier, train_verifier
    from ..generation.generate import generator
    from ..train.config import TrainConfig

    profile, out = opened.profile, opened.folder / "verifier"
    check_place(out, HEAD)  # before hours of sampling
    entries = profile.examples("train")[: args.limit]
    settings = {n: getattr(args, n) for n in ("temperature", "samples", "seed")}
    batch_size = max(1, args.batch_size // args.samples)
    decoding = make_decoding(opened, args, **settings, batch_size=batch_size)
    model, tokenizer = open_run(opened, args.dense, not args.no_adapter)
    prompts = [format_gsm8k(entry)[0] for entry in entries]
    groups = generator(model, tokenizer, decoding)(prompts)
    groups = [group if isinstance(group, list) else [group] for group in groups]
    asked = [p for p, group in zip(prompts, groups) for _ in group]
    said = [s for group in groups for s in group]
    right = [is_correct(s, e["answer"]) for e, group in zip(entries, groups) for s in group]
    print(f"{len(said)} solutions of {len(prompts)} train problems, {sum(right)} of them right")
    torch.manual_seed(args.seed)
    verifier = Verifier(model, tokenizer, args.rank, profile.target_modules)
    settings = {n: getattr(args, n) for n in ("epochs", "batch_size", "lr", "seed")}
    steps = train_verifier(verifier, asked, said, right, TrainConfig(**settings))
    about = {"decoding": dataclasses.asdict(decoding), "solutions": len(said), "right": sum(right)}
    about |= {"loss": steps[-1]["loss"], "stamp": stamp(args.seed)}
    verifier.save(out, about)
    print(f"verifier saved to {short_path(out)}")


def open_verifier(model, tokenizer, opened: Opened, folder: Path | None = None):
    """The verifier in `folder`, or the run's own, on `model`."""
    from ..base.paths import short_path
    from ..evaluation.verifier import Verifier

    folder, remedy = folder or opened.folder / "verifier", opened.command("verifier")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no verifier {short_path(folder)}; {remedy}")
    return Verifier.load(model, tokenizer, folder)
