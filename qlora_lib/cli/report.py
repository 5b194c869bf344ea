"""`python -m qlora_lib report`: an evaluation as one JSON file, to be handed on."""

from pathlib import Path

from ..base.paths import given_path
from .common import add_command


def add_commands(commands) -> None:
    text = "write an evaluation as one JSON file, to be compared with other people's"
    add = add_command(commands, "report", report, text, "")
    add("evaluation", type=given_path, metavar="FOLDER", help="that evaluate wrote")
    add("--run", dest="trained", type=given_path,
        help="folder of the run whose adapter was asked: adds its settings")  # fmt: skip
    add("--out", type=given_path, help="(default: row.json in FOLDER)")


def report(args) -> None:
    from ..base.paths import short_path
    from ..evaluation.result_row import result_row, write_row
    from ..runs.run_folder import read_run

    folder: Path = args.evaluation
    row = result_row(folder, read_run(args.trained) if args.trained else None)
    adapter = row["model"]["adapter"]
    if args.trained and adapter != (own := short_path(args.trained / row["run"]["path"])):
        raise ValueError(f"--run: {short_path(folder)} asked {adapter or 'the base alone'}, and "
                         f"that run made {own}; name the run whose adapter was asked")  # fmt: skip
    if adapter and not args.trained:
        print(f"its training's settings are not in it: add --run {Path(adapter).parent}")
    out = args.out or folder / "row.json"
    write_row(out, row)
    low, high = row["strict_interval"]
    print(f"protocol {row['protocol_hash']}: {row['strict_correct']} of {row['n']} right, "
          f"{row['strict']:.1%} [{low:.1%}, {high:.1%}]; in {short_path(out)}")  # fmt: skip
