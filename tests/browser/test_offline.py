"""The course as web pages, opened from the disk: whole, and nothing is asked of the network."""
import pytest

from course.tools import pages
from course.tools.normal_form import notebooks

SMALLEST = """() => Math.min(...Array.from(document.querySelectorAll('math'),
    formula => Math.min(formula.getBoundingClientRect().width,
                        formula.getBoundingClientRect().height)))"""


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
        assert tab.evaluate("document.body.scrollWidth <= window.innerWidth"), path.name
    assert formulas > 100 and pictures > 20
    # decode() lets data: addresses through; everything else must be one of the pages.
    asked = {a for a in tab.asked if not a.startswith("data:")}
    assert asked == {path.as_uri() for path in site} and tab.raised == []
