"""`python -m qlora_lib doctor`: what this machine has and lacks for the course, with the remedies.

It imports neither torch nor anything else that may be missing or broken: what torch sees, a
process of its own says, and no answer is waited for longer than some seconds.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from .checks.bundled import check_data
from .checks.finding import Finding, note
from .checks.gpu import check_torch
from .checks.hub import check_hub
from .checks.jupyter import check_jupyter
from .checks.machine import check_machine
from .checks.packages import check_packages, check_python

CHECKS = (check_python, check_packages, check_torch, check_machine, check_jupyter, check_hub,
          check_data)  # fmt: skip


def add_commands(commands) -> None:
    text = "say what this machine has and lacks for the course, with the remedies"
    command = commands.add_parser("doctor", help=text)
    command.add_argument("--json", action="store_true", help="a list of states and texts")
    command.set_defaults(run=doctor)


def doctor(args) -> int:
    """Print the findings; returns 1 where the bundled course cannot run, else 0."""
    with ThreadPoolExecutor() as pool:
        found = [line for lines in pool.map(_lines, CHECKS) for line in lines]
    problems = sum(line.state == "problem" for line in found)
    if args.json:
        print(json.dumps([asdict(line) for line in found], indent=1))
        return int(problems > 0)
    for line in found:
        print(f"{line.state:8} {line.text}")
    can = "cannot run here before the problems are mended" if problems else "can run here"
    print(f"\nThe bundled course {can}.")
    return int(problems > 0)


def _lines(check) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # of a check, it says nothing about the course
        name = check.__name__.removeprefix("check_")
        return [note(f"{name} could not be checked: {type(error).__name__}: {error}")]
