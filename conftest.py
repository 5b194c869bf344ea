"""nbval, made proof against the noise of floats and three quirks of its own.

* Outputs are compared by `course.tools.compare`: words and whole numbers exactly, floats
  by a tolerance, which the tag `rtol=0.05` widens for one cell. stderr (progress bars, warnings
  with process numbers) and SVG (random ids) are not compared.
* A cell tagged `varies` is run, not compared.
* Cells run with store_history=True, as in JupyterLab: without it a closing `;` has no effect.

Every SliderPlot draws its whole grid while nbval runs a notebook. What a notebook writes goes to
a folder of its own, not to outputs/. With -n auto, as many notebooks run side by side as there
are cores and memory for, the longest first.

With --executed, a notebook is not run when `course.tools run --grid` has just run it: if nothing
that it depends on has changed since (`course.tools.copies.fresh_copy_of`), the outputs of that
run are compared, by the same rules.
"""
import os
import sys
from tempfile import TemporaryDirectory

import pytest

import course.tools  # noqa: F401  before nbformat, which then takes a second less


def pytest_addoption(parser):
    parser.addoption("--executed", action="store_true", help="with --nbval: compare what run "
                     "--grid has executed, where that is what the notebook would do now")
    parser.addoption("--tries", type=int, metavar="N", help="tests/fuzz: damages a format, and "
                     "a thirtieth of it kills a command (default: a few of each, and few inputs)")
    parser.addoption("--seed", type=int, default=0, help="tests/fuzz: of the tries")


def pytest_configure(config):
    if config.getoption("numprocesses", None) is None or hasattr(config, "workerinput"):
        import torch  # only where tests run: it takes two seconds

        # Before transformers imports Triton: 06's kernels.
        if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
            os.environ["TRITON_INTERPRET"] = "1"
            if "triton" in sys.modules:  # half of it would be the compiler's
                raise pytest.UsageError("a conftest.py imports Triton before the interpreter of "
                                        "its kernels is switched on: import within the fixture")
    if config.getoption("nbval", False):
        from course.kit import COMPARE_VARIABLE, GRID_VARIABLE
        from course.tools.execute import isolate_kernels

        mend_nbval()
        isolate_kernels()
        os.environ.pop(COMPARE_VARIABLE, None)
        os.environ[GRID_VARIABLE] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    from course.tools.side_by_side import how_many

    return how_many()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if config.getoption("nbval", False):
        from course.tools.side_by_side import longest_first

        order = longest_first(list(dict.fromkeys(item.path for item in items)))
        items.sort(key=lambda item: order.index(item.path))


def pytest_runtest_call(item):
    if isinstance(getattr(item.parent, "kernel", None), Executed):
        item.user_properties.append(("executed", item.path.stem))


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    if names := sorted({value for report in reports for name, value in report.user_properties
                        if name == "executed"}):
        terminalreporter.write_line("not run again, as `make run-all` has just run them: "
                                    + ", ".join(names))


class Executed:
    """What nbval takes for a kernel: it answers each cell with the outputs that a copy holds."""

    def __init__(self, copy):
        self.cells = (cell for cell in copy.cells if cell.cell_type == "code")

    def execute_cell_input(self, source, allow_stdin=None):
        cell = next(self.cells)
        assert cell.source == source
        answers = [(output.output_type, output) for output in cell.outputs]
        self.messages = iter([*answers, ("status", {"execution_state": "idle"})])
        return cell.id

    def get_message(self, stream, timeout=None):
        kind, content = next(self.messages)
        return {"msg_type": kind, "content": content, "parent_header": {"msg_id": self.asked}}

    def await_reply(self, msg_id, timeout=None):
        self.asked = msg_id

    def is_alive(self):
        return True

    def stop(self):
        pass


def mend_nbval():
    from nbval import kernel, plugin

    from course.kit import OUTPUTS_VARIABLE
    from course.tools.compare import RTOL, same_text
    from course.tools.copies import fresh_copy_of

    class Text(str):
        """An output whose == is `same_text`."""

        rtol = RTOL

        def __eq__(self, other):
            return isinstance(other, str) and same_text(str(self), str(other), self.rtol)

        def __ne__(self, other):
            return not self == other

        __hash__ = str.__hash__

    exact = plugin.IPyNbCell.sanitize
    init = plugin.IPyNbFile.__init__
    start, end = plugin.IPyNbFile.setup, plugin.IPyNbFile.teardown

    def sanitize(cell, output):
        output = exact(cell, output)
        if not isinstance(output, str):
            return output
        text = Text(output)
        tags = cell.cell.metadata.get("tags", [])
        text.rtol = next((float(t[5:]) for t in tags if t.startswith("rtol=")), RTOL)
        return text

    def init_file(file, *args, **kwargs):
        init(file, *args, **kwargs)
        file.skip_compare += ("stderr", "image/svg+xml")

    def setup(file):
        if file.config.option.executed and (copy := fresh_copy_of(file.path)):
            file.kernel = Executed(copy)
            return file.setup_sanitize_files()
        file.written = TemporaryDirectory(prefix="nbval-", ignore_cleanup_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(OUTPUTS_VARIABLE, file.written.name)
            start(file)

    def teardown(file):
        end(file)
        if hasattr(file, "written"):
            file.written.cleanup()

    def execute(running, source, allow_stdin=None):
        return running.kc.execute(source, store_history=True, allow_stdin=allow_stdin,
                                  stop_on_error=False)

    plugin.metadata_tags["varies"] = ("check", False)
    plugin.IPyNbCell.sanitize = sanitize
    plugin.IPyNbFile.__init__ = init_file
    plugin.IPyNbFile.setup, plugin.IPyNbFile.teardown = setup, teardown
    kernel.RunningKernel.execute_cell_input = execute
