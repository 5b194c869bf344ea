"""The notebook commands, tried on throwaway notebooks."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course.kit import OUTPUTS_VARIABLE
from course.tools import copies
from course.tools import execute as books
from course.tools import side_by_side as beside
from course.tools.__main__ import main
from course.tools.normal_form import (
    WIDGET_VIEW,
    definitions,
    dumps,
    exercises,
    normal,
    notebooks,
    read,
    solve,
    tagged,
    write,
)
from qlora_lib.base.files import write_json_atomic
from qlora_lib.base.paths import ROOT
from tests.support.rehearsal import rehearse

pytestmark = pytest.mark.long


def book(*cells):
    """A notebook of code cells; a cell is a source, or (source, tag)."""
    made = new_notebook()
    for cell in cells:
        source, *tags = cell if isinstance(cell, tuple) else (cell,)
        made.cells.append(new_markdown_cell(source[3:]) if source.startswith("MD ") else
                          new_code_cell(source, metadata={"tags": tags} if tags else {}))
    return made


def save(folder, stem, *cells):
    path = folder / f"{stem}.ipynb"
    write(path, dumps(normal(book(*cells), stem)))
    return str(path)


PARAMETERS = ('profile = "tiny"\nbits = 4', "parameters")


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """A folder for outputs; the environment is as before afterwards."""
    before = dict(os.environ)
    monkeypatch.setattr(books, "BUILD", tmp_path / "build")
    os.environ[OUTPUTS_VARIABLE] = str(tmp_path / "outputs")
    yield tmp_path / "outputs" / "tiny"
    os.environ.clear()
    os.environ.update(before)


# --- run ----------------------------------------------------------------------------------

def test_run_is_strict_and_goes_on(outputs, tmp_path, capsys):
    good = save(tmp_path, "01_good", PARAMETERS, f"import os, sys\n"
                f"assert os.getcwd() == {str(tmp_path)!r} and sys.executable == {sys.executable!r}",
                "assert os.environ['IPYTHONDIR'].endswith('build/ipython')\nassert bits == 4")
    raises = save(tmp_path, "02_raises", PARAMETERS, "1 / 0", "print('not reached')")
    leaves = save(tmp_path, "03_leaves", PARAMETERS, "import sys\nsys.exit(0)", "print(1)")
    hides = save(tmp_path, "04_hides", PARAMETERS, ("1 / 0", "raises-exception"), "print(1)")
    assert books.run([good, raises, leaves, hides], "tiny", {}, jobs=1) == 1
    said = capsys.readouterr().out
    assert "[1/4] 01_good ... ok" in said and "[2/4] 02_raises ... FAILED" in said
    assert "cell 1: ZeroDivisionError: division by zero" in said
    assert "[3/4] 03_leaves ... FAILED" in said and "[4/4] 04_hides ... FAILED" in said
    assert "1 of 4 notebooks ran to their end" in said
    kept = sorted(p.name for p in outputs.iterdir())
    assert kept == ["01_good.ipynb", "02_raises.failed.ipynb", "03_leaves.failed.ipynb",
                    "04_hides.failed.ipynb", "metrics.json"]


def test_a_timeout_is_a_failure(outputs, tmp_path, capsys):
    path = save(tmp_path, "01_hangs", PARAMETERS, "import threading\nthreading.Event().wait()")
    assert books.run([path], "tiny", {}, timeout=1) == 1
    assert "CellTimeoutError" in capsys.readouterr().out


def test_a_parameter_that_no_notebook_has_stops_the_run_before_it_starts(outputs, tmp_path, capsys):
    paths = [save(tmp_path, "01_a", PARAMETERS), save(tmp_path, "02_b", PARAMETERS)]
    assert main(["run", "--parameters", "bit=3", *paths]) == 2
    said = capsys.readouterr()
    assert "no notebook has a parameter 'bit'; there are: bits, profile" in said.err
    assert said.out == "" and not outputs.exists()


def test_a_parameter_goes_to_the_notebooks_that_have_it(tmp_path):
    has = Path(save(tmp_path, "01_a", PARAMETERS))
    lacks = Path(save(tmp_path, "02_b", ('profile = "tiny"', "parameters")))
    parts = books.known_parameters([has, lacks], {"bits": 3, "profile": "smollm2"})
    assert parts == {has: {"bits": 3, "profile": "smollm2"}, lacks: {"profile": "smollm2"}}


def test_parameters_keep_their_types():
    given = "bits=3 rate=1e-3 group_size=None fast=true name=llama path='a b' layers=[1,2]"
    assert books.parse_parameters(given) == {
        "bits": 3, "rate": 1e-3, "group_size": None, "fast": True, "name": "llama",
        "path": "a b", "layers": [1, 2]}
    assert books.parse_parameters("") == {}
    for wrong in ("bits", "=3", "a-b=3"):
        with pytest.raises(ValueError, match="expected name=value"):
            books.parse_parameters(wrong)


def test_run_compares_recorded_numbers_and_says_when_it_does_not(outputs, tmp_path, capsys):
    write_json_atomic(tmp_path / "tiny.json", {
        name: {"value": 0.5, "tolerance": 0.01, "reason": "sums"} for name in ("mean", "median")})
    path = save(tmp_path, "01_records", PARAMETERS, "from pathlib import Path\n"
                "from course.kit import Recorder\n"
                "record = Recorder('01_records', profile, 0, expected=Path('.'))",
                "record('mean', 0.505)\nrecord('median', bits / 10)")
    assert books.run([path], "tiny", {}) == 1
    said = capsys.readouterr().out
    assert "[1/1] 01_records ... ok" in said and "1 as expected, 1 too far off" in said
    assert "  ✓ mean: 0.505 (expected 0.5 ± 0.01)" in said
    assert "  ✗ median: 0.4 (expected 0.5 ± 0.01)" in said
    metrics = json.loads((outputs / "metrics.json").read_text())
    assert metrics["mean"]["within"] and not metrics["median"]["within"]
    # Other parameters give other numbers: nothing is compared, and nothing fails.
    assert books.run([path], "tiny", {"bits": 3}) == 0
    said = capsys.readouterr().out
    assert "with other parameters" in said and "· median: 0.3 (other parameters" in said
    assert "0 as expected, 0 too far off, 2 not compared" in said


# On the stream that the kernel was started with: under pytest ipykernel leaves 2 alone.
SPEAKS = "import os\nos.write(2, b'of no cell\\n')"
HANGS = (SPEAKS, "with open('began', 'w') as file: file.write(str(os.getpid()))",
         "import threading\nthreading.Event().wait()")


def _hear_ctrl_c():
    """What a shell starts in the background ignores SIGINT, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("kill, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130),
                                        (signal.SIGKILL, -9)])
def test_a_killed_run_ends_all_kernels_and_leaves_no_half_file(outputs, tmp_path, kill, code):
    paths, began = [], []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(save(tmp_path / name, f"01_{name}", PARAMETERS, *HANGS))
        began.append(tmp_path / name / "began")
        os.mkfifo(began[-1])
    run = subprocess.Popen([sys.executable, "-m", "course.tools", "run", *paths, "--jobs", "2"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                           start_new_session=True, preexec_fn=_hear_ctrl_c)
    kernels = [psutil.Process(int(path.read_text())) for path in began]  # when the cells ran
    run.send_signal(kill) if kill != signal.SIGINT else os.killpg(run.pid, kill)  # as Ctrl-C does
    said, problems = run.communicate(timeout=120)
    assert psutil.wait_procs(kernels, timeout=120)[1] == []
    assert run.returncode == code
    assert said == "2 notebooks, 2 side by side, one thread each: 01, 01\n"
    assert list(outputs.rglob("*.ipynb")) == [] or kill == signal.SIGKILL
    if kill != signal.SIGKILL:
        assert list(outputs.iterdir()) == []
        assert problems == "stopped; nothing runs any more, and what was not finished is gone\n"


def test_what_a_kernel_says_beyond_its_cells_is_shown_if_it_dies(outputs, tmp_path, capfd):
    lives = save(tmp_path, "01_lives", PARAMETERS, SPEAKS)
    dies = save(tmp_path, "02_dies", PARAMETERS, SPEAKS, "os._exit(3)")
    assert books.run([lives, dies], "tiny", {}, jobs=1) == 1
    said, problems = capfd.readouterr()
    assert "DeadKernelError" in said and said.count("of no cell") == 1
    assert "of no cell" not in problems


# --- side by side -------------------------------------------------------------------------

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


# --- executed copies ----------------------------------------------------------------------

def test_a_fingerprint_is_of_what_a_run_depends_on(tmp_path):
    path = Path(save(tmp_path, "01_a", "print(1)", ("print(2)", "varies")))
    source = tmp_path / "qlora_lib" / "lora" / "merge.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    before, text = copies.fingerprint(path, tmp_path), path.read_text()

    def same():
        return copies.fingerprint(path, tmp_path) == before

    (source.parent / "__pycache__").mkdir()
    (source.parent / "__pycache__" / "merge.pyc").write_bytes(b"1")
    stored = read(path)
    stored.cells[0].outputs = [new_output("stream", name="stdout", text="1")]
    write(path, dumps(stored))
    assert same()
    for changed in (text.replace("print(1)", "print(3)"), text.replace("varies", "rtol=0.1")):
        write(path, changed)
        assert not same()
    write(path, text)
    source.write_text("x = 2\n")
    assert not same()
    source.write_text("x = 1\n")
    source.rename(source.with_name("other.py"))
    assert not same()


def test_nbval_takes_what_a_run_with_the_grid_has_just_executed(outputs, tmp_path, capsys):
    slider = SLIDER.replace('raise ValueError("cannot draw 8")', 'ax.plot([8, 9])')
    path = Path(save(tmp_path, "01_a", PARAMETERS, "print('x = 0.5000')",
                     "ran = open('ran', 'a').write('once ')", slider, ("print(4)", "varies")))
    ran = tmp_path / "ran"
    assert books.store([str(path)]) == 0 and main(["run", "--grid", str(path)]) == 0
    assert ran.read_text() == "once once "
    # A stored output that is another is red, without a run.
    stored = path.read_text()
    path.write_text(stored.replace("x = 0.5000\\n", "x = 0.6000\\n").replace('"4\\n"', '"5\\n"'))
    failed, said = nbval(str(path), "--executed")
    assert failed == [1] and "x = 0.6000" in said and "4 passed" in said
    assert "not run again, as `make run-all` has just run them: 01_a" in said
    assert ran.read_text() == "once once "
    # Another source, and the run counts no more.
    path.write_text(stored.replace("print('x = 0.5000')", "print('x = 0.70' + '00')"))
    failed, said = nbval(str(path), "--executed")
    assert failed == [1] and "not run again" not in said and ran.read_text() == "once once once "


@pytest.mark.parametrize("grid, problem", [(True, "cannot draw 8"), (False, None)])
def test_a_copy_counts_when_every_setting_was_drawn(outputs, tmp_path, capsys, grid, problem):
    path = save(tmp_path, "01_a", PARAMETERS, SLIDER)
    assert books.run([path], "tiny", {}, grid=grid) == (problem is not None)
    assert problem is None or problem in capsys.readouterr().out
    assert copies.fresh_copy_of(Path(path)) is None


# --- store, normal, solved ----------------------------------------------------------------

SLIDER = """\
from course.kit import SliderPlot, show
def draw(ax, bits):
    if bits == 8:
        raise ValueError("cannot draw 8")
    ax.plot([0, bits])
show(draw, alt="A line", bits=2, size=(2, 1))
SliderPlot(draw, {"bits": [2, 4, 8]}, alt="A line", size=(2, 1))"""


def nbval(path, *options):
    """(numbers of the cells that fail, all that is said) of pytest --nbval."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "conftest", "-p", "no:cacheprovider",
         "-p", "nbval", "--nbval", "--nbval-current-env", "--color=no",
         *options, path],
        capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "notebooks")])})
    return [int(n) for n in re.findall(r"^FAILED \S+::Cell (\d+)", done.stdout, re.M)], done.stdout


def test_store_then_nbval(outputs, tmp_path, capsys):
    path = save(tmp_path, "01_a",
                "print('x = 0.5000')",                              # 0: noise in a float
                ("print('seconds: 1.5')", "varies"),                # 1: not compared
                "import sys\nprint('50%', file=sys.stderr)\n1 + 1;",  # 2: says nothing that counts
                ("print('loss 2.00')", "rtol=0.05"),                # 3: a wider tolerance
                "print('y = 0.5000')",                              # 4: a float that changed
                "print('4 bits')",                                  # 5: a whole number that changed
                SLIDER)                                             # 6: fails where nobody looked
    assert books.store([path]) == 0
    stored, cells = Path(path).read_text(), read(Path(path)).cells
    assert [c.execution_count for c in cells] == [1, 2, 3, 4, 5, 6, 7]
    assert cells[2].outputs == [] and WIDGET_VIEW not in stored
    assert [o.metadata["image/png"]["alt"] for o in cells[6].outputs] == ["A line", "A line"]
    assert books.mend([path]) == 0 and Path(path).read_text() == stored

    # As if the notebook had been stored on another machine, and by other code.
    for old, new in (("x = 0.5000\\n", "x = 0.5020\\n"), ("seconds: 1.5\\n", "seconds: 9.9\\n"),
                     ("loss 2.00\\n", "loss 2.08\\n"), ("y = 0.5000\\n", "y = 0.5200\\n"),
                     ("4 bits\\n", "5 bits\\n")):
        assert stored.count(old) == 1
        stored = stored.replace(old, new)
    Path(path).write_text(stored)
    failed, said = nbval(path)
    assert failed == [4, 5, 6] and "3 failed, 4 passed" in said, said
    assert "cannot draw 8" in said


def test_store_leaves_a_failing_notebook_as_it_is(outputs, tmp_path, capsys):
    path = save(tmp_path, "01_a", "1 / 0")
    before = Path(path).read_text()
    assert main(["store", path]) == 1
    assert Path(path).read_text() == before and "FAILED, left as it was" in capsys.readouterr().out


EXERCISES = """\
from course.kit import check
from course.kit.exercise import Exercise, register
for name in ("twice", "thrice"):
    factor = {"twice": 2, "thrice": 3}[name]
    register(Exercise(name, lambda x, f=factor: f * x, [(lambda g: (5,), "five")], []))"""
SOLVED = """MD <details><summary>Hint</summary>

```python
2 + 2
```
</details>

<details><summary>Solution</summary>

```python
def mine(x):
    return 2 * x
```
</details>"""


def exercise_cells(name):
    stub = f"def mine(x: int) -> int:\n    ...\n\n{name} = check(\"{name}\", mine)"
    return (stub, "exercise"), SOLVED


def test_solved_puts_the_folded_solutions_in_place(outputs, tmp_path, capsys):
    path = save(tmp_path, "01_a", EXERCISES, *exercise_cells("twice"), *exercise_cells("thrice"),
                "assert twice(5) == 10 and thrice(5) == 15")
    before = Path(path).read_text()
    assert main(["solved", path]) == 1
    said = capsys.readouterr().out
    assert "1 of 2 solutions pass" in said and "✗ thrice: case 1 of 1 (five): wrong value" in said
    assert Path(path).read_text() == before


def test_an_exercise_is_found_with_its_solution():
    made = book("import math\nx = 1", *exercise_cells("twice"), "class A:\n    y = 2")
    (index, name, solution), = exercises(made)
    assert (index, name) == (1, "twice") and solution == "def mine(x):\n    return 2 * x\n"
    source = solve(made.cells[index].source, solution)
    assert source.index("...") < source.index("return 2 * x") < source.index("check(")
    assert "import math" in definitions(made) and "class A" in definitions(made)
    assert "x = 1" not in definitions(made) and tagged(made, "exercise") == [made.cells[1]]


@pytest.mark.parametrize("cells, problem", [
    ([("x = 1", "exercise")], "has 0 calls"),
    ([("check('a', f)\ncheck('b', f)", "exercise")], "has 2 calls"),
    ([("# check('a', f)\ncheck('b', f)", "exercise"), "x = 1", SOLVED], "'b': 0 folded solutions"),
    ([("check('a', f)", "exercise"), SOLVED, SOLVED], "'a': 2 folded solutions"),
])
def test_an_exercise_that_is_not_whole_is_named(cells, problem):
    with pytest.raises(ValueError, match=problem):
        exercises(book(*cells))


def test_normal_form_keeps_what_counts_and_is_a_fixed_point():
    made = book("a", ("b", "varies"), "c")
    made.metadata = {"kernelspec": {"name": "mine"}, "widgets": {"state": {}}}
    made.cells[0].execution_count, made.cells[2].execution_count = 7, 9
    made.cells[0].metadata = {"papermill": {"duration": 1}, "tags": []}
    made.cells[0].outputs = [
        new_output("stream", name="stdout", text="x"),
        new_output("stream", name="stderr", text="e"),
        new_output("stream", name="stdout", text="y"),
        new_output("execute_result", execution_count=7,
                   metadata={"image/png": {"alt": "z", "w": 1}},
                   data={"text/plain": "z", "image/png": "aa", WIDGET_VIEW: {"model_id": "1"}})]
    made.cells[1].id = made.cells[2].id
    once = normal(made, "01_a")
    assert dumps(normal(once, "01_a")) == dumps(once)
    assert set(once.metadata) == {"kernelspec", "language_info"}
    assert once.metadata.kernelspec.name == "python3"
    first, second, third = once.cells
    assert (first.execution_count, second.execution_count, third.execution_count) == (1, None, 2)
    assert first.id == made.cells[0].id and second.id != third.id
    assert first.metadata == {} and second.metadata == {"tags": ["varies"]}
    assert [o.get("text") for o in first.outputs] == ["xy", None]
    assert set(first.outputs[1].data) == {"text/plain", "image/png"}
    assert first.outputs[1].metadata == {"image/png": {"alt": "z"}}
    assert first.outputs[1].execution_count == 1


def test_notebooks_are_found_by_number_name_or_path(tmp_path):
    paths = [Path(save(tmp_path, stem, "1")) for stem in ("01_a", "02_b", "scratch")]
    assert notebooks(folder=tmp_path) == paths[:2]
    assert notebooks(["02", "01_a", str(paths[2])], tmp_path) == [paths[1], paths[0], paths[2]]
    with pytest.raises(FileNotFoundError, match="no notebook '03'; there are: 01_a, 02_b"):
        notebooks(["03"], tmp_path)
    with pytest.raises(FileNotFoundError, match="no notebook like"):
        notebooks(folder=tmp_path / "nowhere")
