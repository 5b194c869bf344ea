"""Every notebook in JupyterLab: it runs, and every control of every SliderPlot moves its picture.

With --executed, of a notebook that `make run-all` has just run only those cells are run that its
SliderPlots need; but the shortest always runs whole.
"""
import time
from urllib.parse import urlsplit

import pytest
from nbformat.v4 import new_code_cell, new_notebook

from course.tools.copies import fresh_copy_of
from course.tools.normal_form import dumps, normal, notebooks, read, write
from course.tools.side_by_side import longest_first
from tests.support.needed_cells import cells_of_controls

PATHS = longest_first(notebooks())

PIXELS = """image => {
    const canvas = document.createElement('canvas')
    canvas.width = image.naturalWidth
    canvas.height = image.naturalHeight
    canvas.getContext('2d').drawImage(image, 0, 0)
    return canvas.toDataURL()
}"""
CHANGED = f"([image, before]) => image.complete && image.naturalWidth && ({PIXELS})(image) !== before"
# The kernel takes messages in turn: once this is done, so is what a control asked before.
SETTLED = """async () => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel
    await kernel.requestExecute({code: '', silent: true, store_history: false}).done
}"""
ERRORS = ('[data-mime-type="application/vnd.jupyter.error"]', "text=Error displaying widget",
          "text=The picture is that of the setting before", ".jp-Dialog")


def no_error(page):
    for error in ERRORS:
        assert page.locator(error).count() == 0, page.locator(error).first.inner_text()


def settings(control, page):
    """Put the control to one value after another; yields after each."""
    slider, choice = control.locator(".noUi-handle"), control.locator("select")
    box = control.locator("input[type=checkbox]")
    if slider.count():
        readout = control.locator(".widget-readout")
        for key in ("ArrowRight", "ArrowLeft"):
            while True:
                before = readout.inner_text()
                slider.focus()
                page.keyboard.press(key)
                if readout.inner_text() == before:  # the end of the slider
                    break
                yield readout.inner_text()
    elif choice.count():
        current = choice.evaluate("e => e.selectedIndex")
        for index in set(range(choice.locator("option").count())) - {current}:
            choice.select_option(index=index)
            yield index
    elif box.count():
        box.click()
        yield box.is_checked()
    else:
        pytest.fail(f"a control of a kind unknown here: {control.evaluate('e => e.className')}")


def redraws(control, image, page) -> bool:
    """Whether the picture's pixels change for some value of the control."""
    from playwright.sync_api import TimeoutError

    before = image.evaluate(PIXELS)
    for _ in settings(control, page):
        page.evaluate(SETTLED)
        try:
            page.wait_for_function(CHANGED, arg=[image.element_handle(), before], timeout=2000,
                                   polling=50)
            return True
        except TimeoutError:  # this value gives the same picture; the next one may not
            pass
    return False


def to_run(path, cells, executed):
    """Indexes of the code cells to run."""
    if not executed or path == PATHS[-1] or not fresh_copy_of(path):
        return list(range(len(cells)))
    return cells_of_controls(cells)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_runs_and_every_control_redraws(opened, keep_picture, lab, path, record_property, request):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    chosen = to_run(path, cells, request.config.getoption("executed"))
    start = time.monotonic()
    page = opened(path.name)
    page.run(chosen if len(chosen) < len(cells) else None)
    ran = time.monotonic() - start
    no_error(page)
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
    assert [prompts[i] for i in chosen] == [f"[{n}]:" for n in range(1, len(chosen) + 1)]
    plots = page.locator(".widget-vbox", has=page.locator("img.widget-image"))
    assert plots.count() == sum(cell.source.count("SliderPlot(") for cell in cells)
    moved = 0
    for plot in plots.all():
        plot.scroll_into_view_if_needed()
        image, controls = plot.locator("img.widget-image"), plot.locator(".widget-hbox > *").all()
        image.evaluate("image => image.decode()")
        assert controls
        for control in controls:
            changed = redraws(control, image, page)
            no_error(page)
            assert changed, f"'{control.inner_text()}' changes no picture"
            moved += 1
    if plots.count():
        plots.first.evaluate("e => e.closest('.jp-Cell').scrollIntoView()")
        keep_picture(page, path.stem)
    hosts = {urlsplit(a).netloc for a in page.asked if not a.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(lab[0]).netloc}, "something was asked of another host"
    assert page.raised == []
    record_property("said", f"{path.stem}: {plots.count()} pictures, {moved} controls moved; "
                    f"{len(chosen)} of {len(cells)} cells ran in {ran:.0f} s, "
                    f"{time.monotonic() - start:.0f} s in all")


def test_a_live_loss_plot_grows(opened, lab):
    cells = ["from course.kit import LossPlot\nplot = LossPlot(every=2)\nplot",
             "for step in range(4):\n    plot({'step': step, 'loss': 1 / (1 + step)})"]
    book = normal(new_notebook(cells=list(map(new_code_cell, cells))), "live")
    write(lab[2] / "live.ipynb", dumps(book))
    page = opened("live.ipynb")
    page.run([0])
    image = page.locator("img.widget-image")
    image.evaluate("image => image.decode()")
    before = image.evaluate(PIXELS)
    page.run([1])
    page.wait_for_function(CHANGED, arg=[image.element_handle(), before])
    no_error(page)
