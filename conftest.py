"""nbval, made proof against the noise of floats and three quirks of its own.

* Outputs are compared by `course.tools.compare`: words and whole numbers exactly, floats
  by a tolerance, which the tag `rtol=0.05` widens for one cell. stderr (progress bars, warnings
  with process numbers) and SVG (random ids) are not compared.
* A cell tagged `varies` is run, not compared.
* Cells run with store_history=True, as in JupyterLab: without it a closing `;` has no effect.

Every SliderPlot draws its whole grid while nbval runs a notebook.
"""
import os


def pytest_configure(config):
    if config.getoption("numprocesses", None) is None or hasattr(config, "workerinput"):
        import torch  # only where tests run: it takes two seconds

        if not torch.cuda.is_available():  # before transformers imports Triton: 06's kernels
            os.environ.setdefault("TRITON_INTERPRET", "1")
    if config.getoption("nbval", False):
        from course.kit import COMPARE_VARIABLE, GRID_VARIABLE
        from course.tools.execute import isolate_kernels

        mend_nbval()
        isolate_kernels()
        os.environ.pop(COMPARE_VARIABLE, None)
        os.environ[GRID_VARIABLE] = "1"


def mend_nbval():
    from nbval import kernel, plugin

    from course.tools.compare import RTOL, same_text

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

    def execute(running, source, allow_stdin=None):
        return running.kc.execute(source, store_history=True, allow_stdin=allow_stdin,
                                  stop_on_error=False)

    plugin.metadata_tags["varies"] = ("check", False)
    plugin.IPyNbCell.sanitize = sanitize
    plugin.IPyNbFile.__init__ = init_file
    kernel.RunningKernel.execute_cell_input = execute
