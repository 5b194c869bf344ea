"""What test_processes.py runs by itself, and again in two processes that share the work:

python shared_run.py FOLDER PORT PORT PORT, with WORLD_SIZE=2 in the environment. The two are
forks of this one where forks are safe, on Linux, so that they import transformers once.
"""

import contextlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch

from qlora_lib.__main__ import main
from qlora_lib.base import processes
from qlora_lib.evaluation.evaluate import evaluate
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.lora.inject import inject_lora
from qlora_lib.models.fingerprint import fingerprint
from qlora_lib.train.config import TrainConfig
from qlora_lib.train.finetune import finetune
from tests.support.small_models import PAIRS, small_model, small_tokenizer

PROBLEMS = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(11)]
CLI = ["--model", "model", "--data", "data", "--max-new-tokens", "4"]
COMMANDS = {
    "finetune": ["finetune", *CLI[:4], "--method", "rtn", "--max-steps", "2", "--rank", "2"],
    "evaluate": ["evaluate", *CLI, "--batch-size", "5", "--out", "cli"],
}


class Killed(Exception):
    pass


def kill(metrics):
    if metrics["step"] == 3:
        raise Killed


def train_and_evaluate(folder: Path, seed: int = 0) -> dict:
    """A run that is killed and goes on, of 13 examples: steps of 12, 1, 12, 1; then samples."""
    model, tokenizer = small_model(), small_tokenizer()
    torch.manual_seed(seed)  # of the adapter: in two processes that of the first counts
    inject_lora(model, ("q_proj", "down_proj"), rank=2)
    config = TrainConfig(
        max_steps=4, batch_size=3, accumulation=4, lr=1e-2, compute_dtype="fp32", save_every=2,
        folder=folder / "training", resume=True,
    )  # fmt: skip
    with contextlib.suppress(Killed):
        finetune(model, tokenizer, PAIRS[:13], config, PAIRS[13:16], kill)
    history = finetune(model, tokenizer, PAIRS[:13], config, PAIRS[13:16])
    decoding = Decoding(temperature=1.0, max_new_tokens=4, batch_size=2)
    asked = []

    def generate(prompts, real=generator(model, tokenizer, decoding)):
        asked.append(len(prompts))
        return real(prompts)

    report = evaluate(generate, PROBLEMS, folder / "eval", chunk=4)
    return {
        "losses": history.losses, "dev": history.dev, "resumed": history.resumed_from,
        "norms": [s["grad_norm"] for s in history.steps], "weights": fingerprint(model),
        "asked": asked, "completions": [p["completion"] for p in report.predictions],
        "strict": report.strict_correct,
    }  # fmt: skip


def errors() -> list[str]:
    """What the processes say that differ, or of which the first one fails."""

    def fail():
        raise FileNotFoundError("no such file")

    said = []
    calls = (lambda: processes.agree("rank", processes.rank()), lambda: processes.on_first(fail))
    for call in calls:
        try:
            call()
        except (ValueError, FileNotFoundError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def summed() -> list:
    """Gradients of three parameters: of both processes, of one of them, of none."""
    three = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    three[0].grad = torch.full((2,), 1.0 + processes.rank())
    if processes.first():
        three[1].grad = torch.ones(2)
    processes.sum_gradients(three)
    return [p.grad if p.grad is None else p.grad.tolist() for p in three]


def run(rank: int, place: Path, library: str, *ports: str) -> None:
    """One of the two processes: what it finds is in RANK.json, what it says in RANK.out."""
    os.dup2(os.open(place / f"{rank}.out", os.O_WRONLY | os.O_CREAT), sys.stdout.fileno())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": library}
    torch.set_num_threads(1)
    processes.start()
    result = train_and_evaluate(place / "two", seed=processes.rank())
    result |= {"errors": errors(), "summed": summed(), "share": list(processes.share(range(5)))}
    (place / f"{rank}.json").write_text(json.dumps(result))
    processes.stop()
    os.chdir(place / "two")
    for port, argv in zip(ports, COMMANDS.values()):
        os.environ["MASTER_PORT"] = port
        code = main(argv)
        assert code == 0, code


if __name__ == "__main__":
    folder, *ports = sys.argv[1:]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    both = [context.Process(target=run, args=(rank, Path(folder), *ports)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    sys.exit(any(process.exitcode for process in both))
