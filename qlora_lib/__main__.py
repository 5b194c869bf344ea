"""`python -m qlora_lib quantize | finetune | verifier | evaluate | generate | report | export |
verify | memory | doctor`.

Thin over the library. A run lives in checkpoints/PROFILE (runs/run_folder.py says what is there).
Several processes share `finetune` and `evaluate`: torchrun --nproc-per-node 2 -m qlora_lib ...,
or accelerate launch. Only the command line reads environment variables: MODEL, GSM8K_DIR, and
those by which a launcher numbers its processes.
"""

import argparse
import os
import sys
from contextlib import nullcontext, redirect_stdout

if sys.version_info < (3, 11):  # which could not read what follows
    sys.exit(f"error: Python 3.11 or newer is needed, and {sys.executable} is "
             f"{sys.version.split()[0]}; make setup PY=python3.12 takes another")  # fmt: skip

from .base.endings import ending, quiet_interrupt
from .cli import doctor, evaluate, export, finetune, memory, report, verifier, verify
from .cli.common import check_device, check_needs


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m qlora_lib", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    for group in (finetune, verifier, evaluate, report, export, verify, memory, doctor):
        group.add_commands(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code, as base/endings.py has it."""
    args = parser().parse_args(argv)
    if args.command == "doctor":  # which must run where torch can't be imported
        return ending(lambda: args.run(args))
    from .base import processes  # and with it torch, which --help does without

    return ending(lambda: _run(args, processes))


def _run(args: argparse.Namespace, processes) -> None:
    check_needs(args, args.needs, args.default)
    try:
        if processes.launched() > 1 and args.command not in ("finetune", "evaluate"):
            raise ValueError(f"{args.command} runs in one process, {processes.launched()} were "
                             f"launched; start it as python -m qlora_lib {args.command}")
        check_device(args.device)
        args.device = processes.start(args.device)
        # One process speaks for all; errors are each one's own.
        with nullcontext() if processes.first() else redirect_stdout(open(os.devnull, "w")):
            args.run(args)
    finally:
        processes.stop()


if __name__ == "__main__":
    quiet_interrupt()
    sys.exit(main())
