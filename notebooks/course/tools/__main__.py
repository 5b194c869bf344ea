"""Run, store, mend, check and hand out the notebooks: python -m course.tools --help

    run      execute them, strictly, into outputs/<profile>/, and compare recorded numbers
    store    execute them with their defaults and keep the outputs, in normal form
    normal   bring notebooks saved by JupyterLab to normal form
    solved   run them with every exercise solved by its folded solution
    html     the course as web pages that need no network
    student  the notebooks without solutions and outputs
    grade    check the exercises of a folder of submissions
    badges   the notebooks for Colab and Kaggle, of a repository of your own
"""
import argparse
import signal
import sys
from importlib import import_module

from qlora_lib.base.endings import ending
from qlora_lib.base.ranges import COUNT

ELSEWHERE = {"html": "pages", "student": "student", "grade": "grade",
             "badges": "hosted"}  # with options of their own
PROFILES = ("tiny", "smollm2", "llama2-7b")  # of qlora_lib, which takes long to import
STOPPED = "stopped; nothing runs any more, and what was not finished is gone"
KILLED = 143  # what a process says that SIGTERM has ended


def main(arguments: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(KILLED))  # so that a kill tidies up
    try:
        return ending(lambda: _main(sys.argv[1:] if arguments is None else arguments), STOPPED)
    except SystemExit as stop:
        if stop.code != KILLED:
            raise  # argparse's
        print(STOPPED, file=sys.stderr)
        return KILLED


def _main(arguments: list[str]) -> int:
    from . import execute  # not above: the notebooks' processes import this file, but no torch

    if arguments and arguments[0] in ELSEWHERE:
        return import_module(f".{ELSEWHERE[arguments[0]]}", __package__).main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m course.tools", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ELSEWHERE:
        commands.add_parser(name, add_help=False)
    helps = {"run": "execute into outputs/<profile>/ and compare the recorded numbers",
             "store": "execute with the defaults and keep the outputs in the notebooks",
             "normal": "bring saved notebooks to the form in which they are committed",
             "solved": "run with every exercise solved by its folded solution"}
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("names", nargs="*", help="notebooks, as 01 or 01_name; all if none")
        if name == "run":
            command.add_argument("--profile", default="tiny", choices=PROFILES)
            command.add_argument("--parameters", default="", metavar="'bits=3 group_size=32'",
                                 help="other parameters; expected numbers are then not compared")
            command.add_argument("--jobs", type=COUNT, metavar="N",
                                 help="side by side, one thread each; as many as fit if not given")
            command.add_argument("--grid", action="store_true",
                                 help="each slider draws its whole grid, as for nbval")
        if name != "normal":
            command.add_argument("--timeout", type=COUNT, help="seconds for one cell")
    given = parser.parse_args(arguments)
    if given.command == "run":
        return execute.run(given.names, given.profile, execute.parse_parameters(given.parameters),
                           given.timeout, given.jobs, given.grid)
    if given.command == "normal":
        return execute.mend(given.names)
    return {"store": execute.store, "solved": execute.solved}[given.command](
        given.names, given.timeout or execute.CELL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
