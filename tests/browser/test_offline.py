"""The course as web pages, opened from the disk: whole, and nothing is asked of the network."""
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course.kit import GRID_VARIABLE, OUTPUTS_VARIABLE, SliderPlot
from course.tools import pages
from course.tools.copies import fresh_copy_of
from course.tools.normal_form import dumps, notebooks, write

SMALLEST = """() => Math.min(...Array.from(document.querySelectorAll('math'),
    formula => Math.min(formula.getBoundingClientRect().width,
                        formula.getBoundingClientRect().height)))"""


# A formula that does not fit shows a bar, or is cut off.
FITS = """() => Array.from(document.querySelectorAll('.formula')).filter(formula =>
    formula.scrollWidth > formula.clientWidth || formula.scrollHeight > formula.clientHeight
    ).map(formula => formula.textContent)"""
STATE = "e => e.type === 'checkbox' ? e.checked : e.value"
PUT = """(e, value) => {
    if (e.type === 'checkbox') e.checked = value
    else e.value = value
    e.dispatchEvent(new Event('input'))
}"""
LARGEST, TOGETHER = 5e6, 25e6  # bytes of a page and of all: what a phone loads


def asked(tab):
    """What the page has fetched; data: addresses stand in it."""
    return {address for address in tab.asked if not address.startswith("data:")}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return pages.build(tmp_path_factory.mktemp("site") / "html", notebooks(),
                       sorted(pages.DOCS.glob("*.md")))


def test_formulas_and_pictures_show_without_a_network(site, tab):
    formulas = pictures = 0
    for path in site:
        tab.goto(path.as_uri())
        tab.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
        if count := tab.locator("math").count():
            assert tab.evaluate(SMALLEST) > 2, path.name
            formulas += count
        shown = tab.evaluate("Promise.all(Array.from(document.images, i => i.decode()))"
                             ".then(all => all.length)")  # raises for a picture that is broken
        pictures += shown
        for width in (390, 1200):
            tab.set_viewport_size({"width": width, "height": 860})
            assert tab.evaluate("document.body.scrollWidth <= window.innerWidth"), path.name
        assert tab.evaluate(FITS) == [], path.name
    assert formulas > 100 and pictures > 20
    assert asked(tab) == {path.as_uri() for path in site} and tab.raised == []


def settings(control):
    """Put a control to each of its values, by the keyboard where it is a slider; yields after
    each."""
    kind = control.evaluate("e => e.type")
    if kind == "range":
        control.focus()
        control.press("Home")
        yield
        for _ in range(int(control.get_attribute("max"))):
            control.press("ArrowRight")
            yield
    elif kind == "checkbox":
        for _ in range(2):
            control.click()
            yield
    else:
        for index in range(control.locator("option").count()):
            control.select_option(index=index)
            yield


def moves(plot) -> int:
    """Put every control to all its values, the others where they begin; returns how many there
    are. Each must change the picture."""
    image, controls = plot.locator("img"), plot.locator("input, select").all()
    for control in controls:
        at_first, seen = control.evaluate(STATE), set()
        for _ in settings(control):
            image.evaluate("image => image.decode()")
            seen.add(image.get_attribute("src"))
        assert len(seen) > 1, plot.inner_text()
        control.evaluate(PUT, at_first)
    return len(controls)


def test_every_control_of_the_course_moves_its_picture(site, tab, record_property):
    moved = plots = 0
    for path in site:
        tab.goto(path.as_uri())
        for plot in tab.locator(".plot").all():
            plots, moved = plots + 1, moved + moves(plot)
    ran = [path for path in notebooks() if fresh_copy_of(path)]  # others are film strips
    assert plots >= 2 * len(ran)
    assert asked(tab) == {path.as_uri() for path in site} and tab.raised == []
    sizes = [path.stat().st_size for path in site]
    assert max(sizes) <= LARGEST and sum(sizes) <= TOGETHER
    record_property("said", f"web pages: of {len(ran)} notebooks {plots} pictures, {moved} controls "
                    f"moved; the largest page has {max(sizes) / 1e6:.1f} MB, all "
                    f"{sum(sizes) / 1e6:.1f} MB")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Pages of a notebook with a picture of three controls, and a recall question."""
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path / "outputs"))
    monkeypatch.setenv(GRID_VARIABLE, "1")

    def draw(ax, bits, mirrored, name):
        ax.plot([0, 1], [mirrored, bits], label=name)
        ax.legend()

    plot = SliderPlot(draw, {"bits": [2, 3, 4], "mirrored": [False, True], "name": ["a", "b"]},
                      start={"bits": 3, "name": "b"}, alt="A line", size=(2, 1))
    data, metadata = plot._repr_mimebundle_()
    data = {kind: data[kind] for kind in ("image/png", "text/plain")}
    shown = new_code_cell("plot", outputs=[new_output("display_data", data, metadata=metadata)])
    recall = new_markdown_cell("# Lines\n\nOf <b>lattices</b>.\n\n## Recall\n\n<details><summary>Why?"
                               "</summary>\n\nBecause.\n</details>")
    path = tmp_path / "01_lines.ipynb"
    write(path, dumps(new_notebook(cells=[recall, shown])))
    pages.build(tmp_path / "html", [path], [])
    return tmp_path / "html" / "01_lines.html"


def test_a_picture_begins_as_in_the_notebook_and_says_its_setting(small, tab):
    tab.goto(small.as_uri())
    image = tab.locator(".plot img")
    assert image.get_attribute("alt") == "bits = 3, mirrored = off, name = b. A line"
    first = image.get_attribute("src")
    assert moves(tab.locator(".plot")) == 3 and image.get_attribute("src") == first
    tab.locator("input[type=range]").press("End")
    assert tab.locator("output").first.inner_text() == "4"
    assert tab.locator("input[type=range]").get_attribute("aria-valuetext") == "4"


def test_without_scripts_there_is_the_film_strip(small, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(small.as_uri())
    assert page.locator(".plot img").count() == 1
    assert page.locator(".plot img").bounding_box()["width"] > 100
    assert page.locator(".plot input").count() == 0
    context.close()


def test_what_was_opened_keeps_a_mark(small, tab):
    tab.goto(small.as_uri())
    answer = tab.locator("main details")
    assert "seen" not in (answer.get_attribute("class") or "")
    answer.locator("summary").click()
    tab.wait_for_selector("main details.seen")
    tab.reload()
    tab.wait_for_selector("main details.seen")
    assert not answer.evaluate("e => e.open")  # to be answered once more


def test_a_search_finds_sections_and_runs_nothing_that_is_asked(small, tab):
    tab.goto(small.as_uri())
    tab.locator("input[type=search]").fill("lattices")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("main ol a")
    assert tab.locator("main ol mark").first.inner_text() == "lattices"
    tab.locator("main ol a").first.click()
    tab.wait_for_url("**/01_lines.html#Lines")
    tab.goto(small.with_name("search.html").as_uri() + "?q=%3Cimg+src%3Dx+onerror%3Dalert(1)%3E")
    assert tab.locator("main ol li").count() == 0 and tab.locator("main img").count() == 0
    assert "onerror" in tab.locator("#count").inner_text() and tab.raised == []


@pytest.mark.parametrize("scheme, dark", [("light", False), ("dark", True)])
def test_light_and_dark(small, browser, scheme, dark):
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(small.as_uri())
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, shade[4:-1].split(","))) < 200) == dark
    context.close()
