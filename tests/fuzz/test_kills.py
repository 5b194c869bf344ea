"""Commands killed at random moments and in the narrow windows between two changes of files: the
command again, with --resume where it has that, gives what an undisturbed one gives.

Between the two nothing may give a wrong answer: a run's folder answers as before, as afterwards,
or with an error.
"""

import random
import sys
from dataclasses import dataclass

import pytest

from tests.support.child_commands import ASK, EXPORT, JUDGE, QUANTIZE, STREAM, TRAIN, VOTE, answers
from tests.support.folder_content import content, put
from tests.support.fuzzing import Tally

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts CPU time")

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
    "finetune on another base": Case(TRAIN.replace("rtn", "nf4"), (TRAIN,), asked=ASK),
    "finetune beside a dense base": Case(TRAIN.replace("rtn", "none"), (TRAIN,), asked=ASK),
    "verifier": Case(JUDGE, (TRAIN,)),
    "verifier anew": Case(f"{JUDGE} --seed 1 --lr 0.1", (TRAIN, JUDGE), asked=VOTE),
    "evaluate": Case(ASK, (TRAIN,)),
    "evaluate --restart": Case(f"{ASK} --restart", (TRAIN, ASK)),
    "export": Case(EXPORT, (TRAIN,)),
    "export anew": Case(f"{EXPORT} --format gptq", (TRAIN, EXPORT)),
    "export --format gguf": Case(f"{EXPORT} --format gguf", (TRAIN,)),
    "export --merge": Case(f"{EXPORT} --merge rtn", (TRAIN,)),
}  # fmt: skip


def moment(draw: random.Random, whole) -> dict:
    """Draw when a command is killed that takes as long, and does as much, as the one that ended."""
    if draw.random() < 0.3:
        return {"cpu": round(draw.uniform(0.05, 0.8) * whole.cpu, 3)}
    when = draw.choice(("before", "after"))
    return {"at": draw.randint(1, whole.operations), "when": when}


def pytest_generate_tests(metafunc):
    few = metafunc.config.getoption("tries") is None  # make long has time for one
    one = [pytest.param("quantize", marks=pytest.mark.long)]
    metafunc.parametrize("name", one if few else CASES)


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
    again = (case.again or case.command).split()
    for number in range(max(1, tries // 30)):
        draw, done = random.Random(f"{seed} {name} {number}"), case.command
        put(before, place)
        for argv in [case.command.split(), again][: draw.choice((1, 1, 2))]:
            how = moment(draw, whole)
            killed = commands.run(place, argv, **how)
            done += f", killed {how}"
        if case.asked:
            put(place, probe)
            said = answers(commands, probe, case.asked)
            if said not in allowed and not (isinstance(said, str) and said.startswith("error: ")):
                tally.add(number, "wrong between", f"{done}: {str(said):.300}")
                continue
        ended = commands.run(place, again)
        if ended.code:
            tally.add(number, "refused", f"{done}: {ended.error}")
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
        elif scratch:  # the next write of that folder removes it
            old = all(".old/" in name for name in scratch)
            tally.add(number, "ok equal, old beside it" if old else "scratch left",
                      f"{done}: {scratch}")  # fmt: skip
        else:
            tally.add(number, "ok equal" if killed.code else "ok not killed", done)
    tally.check()
