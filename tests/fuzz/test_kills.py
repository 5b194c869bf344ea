"""Commands killed at random moments and in the narrow windows between two changes of files: the
command again, with --resume where it has that, gives what an undisturbed one gives.

Between the two nothing may give a wrong answer: a run's folder answers as before, as afterwards,
or with an error.
"""

import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from qlora_lib.base.folders import HASHES, check_folder
from tests.support.child_commands import Commands, make_place
from tests.support.fuzzing import Tally, plain

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts CPU time")

OPTIONS = "--model model --data data"
QUANTIZE = f"quantize {OPTIONS} --method rtn"
STREAM = f"quantize {OPTIONS} --group-size 32 --stream"
TRAIN = f"finetune {OPTIONS} --method rtn --max-steps 5 --batch-size 4 --accumulation 1 --rank 2"
JUDGE = (f"verifier {OPTIONS} --limit 6 --samples 4 --temperature 2 --max-new-tokens 4 --rank 2 "
         "--batch-size 8")  # fmt: skip
ASK = f"evaluate {OPTIONS} --max-new-tokens 2"
VOTE = f"{ASK} --samples 2 --vote verifier"
# What differs between two runs that are equal but for time and machine
VARIES = {"seconds", "tokens_per_second", "peak_memory", "stamp", "training", "sha256"}


@dataclass(frozen=True)
class Case:
    """A command that is killed. before: what was run before it; again: what is run after the kill,
    if not the command itself; asked: a command whose answers must be those before or after."""

    command: str
    before: tuple[str, ...] = ()
    again: str | None = None
    asked: str | None = None


CASES = {
    "quantize": Case(QUANTIZE),
    "quantize anew": Case(f"{QUANTIZE} --bits 3", (TRAIN,), asked=ASK),
    "quantize --stream": Case(STREAM),
    "quantize --stream anew": Case(STREAM, (TRAIN,), asked=ASK),
    "finetune": Case(TRAIN),
    "finetune --resume": Case(TRAIN, again=f"{TRAIN} --resume"),
    "finetune anew": Case(f"{TRAIN} --seed 1 --lr 0.01", (TRAIN,), asked=ASK),
    "finetune on another base": Case(
        TRAIN.replace("rtn", "nf4"), (TRAIN, QUANTIZE), asked=ASK),
    "finetune beside a dense base": Case(TRAIN.replace("rtn", "none"), (TRAIN,), asked=ASK),
    "verifier": Case(JUDGE, (TRAIN,)),
    "verifier anew": Case(f"{JUDGE} --seed 1 --lr 0.1", (TRAIN, JUDGE), asked=VOTE),
    "evaluate": Case(ASK, (TRAIN,)),
    "evaluate --restart": Case(f"{ASK} --restart", (TRAIN, ASK)),
    "export": Case(f"export {OPTIONS}", (TRAIN,)),
    "export anew": Case(f"export {OPTIONS} --format gptq", (TRAIN, f"export {OPTIONS}")),
    "export --merge": Case(f"export {OPTIONS} --merge rtn", (TRAIN,)),
}  # fmt: skip


@pytest.fixture(scope="module")
def commands():
    running = Commands()
    yield running
    running.close()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "place"
    folder.mkdir()
    make_place(folder, problems=140)  # more than an evaluation asks at a time
    return folder


def put(source: Path, place: Path) -> None:
    """Make `place` a copy of `source`."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)


def content(place: Path) -> dict:
    """Return what the files below `place` hold but for times, by path; raises ValueError for a
    folder whose hashes are not those of its files."""
    found = {}
    for path in sorted(p for p in place.rglob("*") if p.is_file()):
        name = path.relative_to(place).as_posix()
        if path.name == HASHES:
            check_folder(path.parent)
        elif path.suffix == ".json":
            found[name] = steady(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            found[name] = [steady(json.loads(line)) for line in lines]
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = {k: steady_text(v) for k, v in (file.metadata() or {}).items()
                         if k not in VARIES}  # fmt: skip
                found[name] = about, plain({n: file.get_tensor(n) for n in file.keys()})
        else:
            found[name] = path.read_bytes()
    return found


def steady(value):
    """Return a value of JSON without what VARIES."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in VARIES}
    return [steady(v) for v in value] if isinstance(value, list) else value


def steady_text(text: str):
    return steady(json.loads(text)) if text.startswith("{") else text


def answers(commands, place: Path, asked: str):
    """Return the completions and scores of a command `evaluate` in `place`, or its error."""
    ended = commands.run(place, f"{asked} --out probe".split())
    if ended.code:
        return error_of(ended)
    rows = content(place / "probe")["predictions.jsonl"]
    return [(row["completion"], row.get("scores")) for row in rows]


def error_of(ended) -> str:
    """Return the line of an error; "traceback ..." for what is no plain error."""
    line = ended.said.strip().splitlines()[-1] if ended.said.strip() else "nothing said"
    plainly = ended.code == 2 and line.startswith("error: ") and "Traceback" not in ended.said
    return line if plainly else f"traceback, exit code {ended.code}: {ended.said[-400:]}"


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.long] if i else []) for i, name in enumerate(CASES)
])  # fmt: skip
def test_the_command_again_gives_what_an_undisturbed_one_gives(
    name, commands, start, tmp_path, tries, seed
):
    case, tally, place = CASES[name], Tally(seed), tmp_path / "place"
    before, probe = tmp_path / "before", tmp_path / "probe"
    put(start, place)
    for command in case.before:
        assert commands.run(place, command.split()).code == 0
    put(place, before)
    allowed = []
    if case.asked:
        allowed.append(answers(commands, place, case.asked))
        put(before, place)
    whole = commands.run(place, case.command.split())
    assert whole.code == 0, whole.said
    expected = content(place)
    if case.asked:
        allowed.append(answers(commands, place, case.asked))
    for number in range(max(1, tries // 30)):
        draw = random.Random(f"{seed} {name} {number}")
        if draw.random() < 0.3:
            how = {"cpu": round(draw.uniform(0.05, 0.8) * whole.cpu, 3)}
        else:
            how = {"at": draw.randint(1, whole.operations), "when": draw.choice(("before", "after"))}
        put(before, place)
        killed = commands.run(place, case.command.split(), **how)
        done = f"{case.command}: {how}"
        if case.asked:
            put(place, probe)
            said = answers(commands, probe, case.asked)
            if said not in allowed and not (isinstance(said, str) and said.startswith("error: ")):
                tally.add(number, "wrong between", f"{done}: {str(said):.300}")
                continue
        again = commands.run(place, (case.again or case.command).split())
        if again.code:
            tally.add(number, "refused", f"{done}: {error_of(again)}")
            continue
        try:
            found = content(place)
        except ValueError as error:
            tally.add(number, "unreadable", f"{done}: {error}")
            continue
        other = sorted(k for k in found.keys() | expected.keys()
                       if found.get(k) != expected.get(k))  # fmt: skip
        scratch = [k for k in other if k not in expected]
        if len(scratch) < len(other):
            tally.add(number, "other result", f"{done}: {other}")
        elif scratch:
            tally.add(number, "scratch left", f"{done}: {scratch}")
        else:
            tally.add(number, "ok equal" if killed.code else "ok not killed", done)
    tally.check()
