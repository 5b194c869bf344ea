"""Notebooks and other tasks side by side, each in a process of its own; a rehearsal of them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from course.tools import execute as books
from course.tools import side_by_side as beside
from course.tools.__main__ import main
from course.tools.normal_form import dumps, normal, notebooks, read, write
from qlora_lib.base.paths import ROOT
from tests.support.rehearsal import rehearse
from tests.support.throwaway_notebooks import PARAMETERS, save

pytestmark = pytest.mark.long


def test_side_by_side_gives_what_one_after_the_other_gives(outputs, tmp_path, capsys):
    paths = [save(tmp_path, f"0{i}_n", PARAMETERS, f"print({i} / 3)\nbits / {i}",
                  f"assert {i} != 2, 'the second fails'",
                  "import os\nprint(*map(os.environ.get, ('OMP_NUM_THREADS', 'COURSE_BESIDE')))")
             for i in (1, 2, 3)]
    os.environ["OMP_NUM_THREADS"] = "7"
    printed = {}
    for jobs in (1, 3):
        assert books.run(paths, "tiny", {}, jobs=jobs) == 1
        said = capsys.readouterr().out
        assert "02_n ... FAILED" in said and "the second fails" in said
        assert said.count("... ok") == 2 and "2 of 3 notebooks ran to their end" in said
        assert ("3 side by side, one thread each" if jobs == 3 else "one at a time") in said
        cells = [normal(read(outputs / f"0{i}_n.ipynb"), "n").cells for i in (1, 3)]
        assert {c[3].outputs[0].text for c in cells} == {"7 0\n" if jobs == 1 else "1 2\n"}
        printed[jobs] = [c[1].outputs for c in cells]
    assert printed[1] == printed[3] and printed[1][0][0].text == "0.3333333333333333\n"


def test_tasks_run_together_and_after_what_they_need(tmp_path):
    to, back, log = (str(tmp_path / name) for name in ("to", "back", "log"))
    os.mkfifo(to)
    os.mkfifo(back)
    note = f"open({log!r}, 'a').write('{{}} ')"
    # Each of the first two waits for the other: they end only if they run at the same time.
    first = f"[open({to!r}, 'w').close(), open({back!r}).close(), {note.format('first')}] and None"
    second = f"[open({to!r}).close(), open({back!r}, 'w').close()] and 'went wrong'"
    tasks = {"first": (first,), "needs": (f"{note.format('needs')} and None",),
             "second": (second,), "last": (f"{note.format('last')} and None",)}
    ended = beside.side_by_side(eval, tasks, 2, after={"needs": "first", "last": "absent"})
    assert {name: problem for name, problem, _ in ended} == {
        "first": None, "second": "went wrong", "needs": None, "last": None}
    noted = Path(log).read_text().split()
    assert sorted(noted) == ["first", "last", "needs"]
    assert noted.index("first") < noted.index("needs")


def test_no_more_than_asked_run_at_a_time_in_the_order_given(tmp_path):
    log = tmp_path / "log"
    tasks = {name: (f"[open({str(log)!r}, 'a').write(f'{{word}} {name} ')"
                    " for word in ('begin', 'end')] and None",) for name in "cab"}
    assert [name for name, *_ in beside.side_by_side(eval, tasks, 1)] == ["c", "a", "b"]
    assert log.read_text() == "begin c end c begin a end a begin b end b "


def test_a_process_that_dies_is_named_and_the_others_go_on():
    tasks = {"dies": ("__import__('os')._exit(3)",), "lives": ("None",)}
    assert {name: problem for name, problem, _ in beside.side_by_side(eval, tasks, 2)} == {
        "dies": "its process ended with exit code 3", "lives": None}


def test_what_waits_for_a_kernel_waits_for_neither_torch_nor_a_grammar():
    """Each notebook's process imports the runner, and most kernels a slider and a recorder. lark
    would parse jsonschema's grammar of international addresses."""
    script = ("import sys\nimport course.tools.side_by_side, course.kit.record, course.kit.slider\n"
              "print([name for name in ('torch', 'lark') if name in sys.modules])")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "notebooks")])})
    assert done.stdout == "[]\n", done.stderr


def test_05_waits_for_the_adapter_of_04(outputs, tmp_path, capsys):
    paths = [save(tmp_path, "05_b", PARAMETERS, "assert open('adapter').read() == 'whole'"),
             save(tmp_path, "04_a", PARAMETERS, "open('adapter', 'w').write('whole')")]
    assert books.run(paths, "tiny", {}, jobs=2) == 0


def test_the_longest_begins_first(outputs, tmp_path):
    def said(text):
        return f"MD | profile | time |\n|---|---|\n| `tiny` (default) | {text} on 2 cores |"

    paths = [Path(save(tmp_path, f"0{i}_n", *cells)) for i, cells in enumerate([
        [said("about a minute")], [said("3.5 minutes")], ["1"], [said("a minute and a half")],
        [said("about 2 minutes")]])]
    assert [beside.expected_seconds(path) for path in paths] == [60, 210, 60, 90, 120]
    # What a run took on this machine counts more than what the notebook says.
    ran = read(paths[0])
    ran.metadata.papermill = {"duration": 150.5}
    outputs.mkdir(parents=True)
    write(outputs / paths[0].name, dumps(ran))
    assert [path.stem[:2] for path in beside.longest_first(paths)] == ["01", "00", "04", "03", "02"]


def test_every_notebook_says_its_minutes():
    assert [path.stem for path in notebooks() if not any(
        beside.MINUTES.search(cell.source) for cell in read(path).cells[:6])] == []


@pytest.mark.parametrize("cores, free, jobs", [(8, 5e9, 2), (2, 1e12, 2), (4, 1e8, 1)])
def test_as_many_as_there_are_cores_and_memory_for(monkeypatch, cores, free, jobs):
    monkeypatch.setattr(beside, "cores", lambda: cores)
    monkeypatch.setattr("qlora_lib.train.measure.available_memory", lambda device: free)
    assert beside.how_many() == jobs


@pytest.mark.parametrize("wrong", ["0", "-1", "two"])
def test_jobs_are_a_whole_number(wrong, capsys):
    with pytest.raises(SystemExit):
        main(["run", "--jobs", wrong])
    assert "expected a whole number of at least 1" in capsys.readouterr().err


PLANS = """\
from transformers import LlamaConfig, LlamaForCausalLM
from qlora_lib import fitting_batch
model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, vocab_size=99,
                                     num_hidden_layers=1, num_attention_heads=4))
fitting_batch(model, 100, 64)"""


@pytest.mark.parametrize("free, batch", [(5 * 10**6, 8), (10**12, 64)])
def test_a_rehearsal_finds_little_memory_and_asks_for_smaller_batches(
        outputs, tmp_path, capsys, free, batch):
    path = save(tmp_path, "04_a", PARAMETERS, PLANS)
    assert rehearse([path], {}, free) == (batch == 64)
    assert f"{batch} sequences of 100 tokens at once, of at most 64" in capsys.readouterr().out
    assert list((tmp_path / "build").rglob("startup/*.py")) == []  # other kernels find it all
