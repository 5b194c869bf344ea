"""Web pages and copies for students, made from small notebooks and from the course's own."""
import base64
import json
import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course.kit import OUTPUTS_VARIABLE, grids
from course.kit.picture import bundle, render
from course.tools import pages, student
from course.tools.normal_form import (
    NOTEBOOKS,
    SOLUTION,
    dumps,
    exercises,
    notebooks,
    read,
    tagged,
    write,
)

PNG = "data:image/png;base64,"
FORMULAS = r"""# 01 Sums & norms

The **first** paragraph, with $H^{-1}$.

## 1. Why $\sqrt 2$

$$\boxed{\sum_k w_k \le \tfrac12} \qquad \text{if } a < b$$

Costs `$5`. See [the end](02_b.ipynb#What-you-built), [words](../docs/WORDS.md) and
[a paper](https://arxiv.org/abs/1).
"""
SOLVED = """<details><summary>Hint</summary>

Twice.
</details>

<details><summary>Solution</summary>

```python
def mine(x):
    return 2 * x
```
</details>

And on."""


def a_book(*cells):
    return new_notebook(cells=[c if not isinstance(c, str) else new_markdown_cell(c)
                               for c in cells])


def stub(outputs=()):
    source = "def mine(x):\n    ...\n\ntwice = check('twice', mine)"
    return new_code_cell(source, metadata={"tags": ["exercise"]}, outputs=list(outputs),
                         execution_count=1)


@pytest.fixture
def site(tmp_path):
    """Pages of two notebooks and a document."""
    picture = new_output("display_data", {"image/png": base64.b64encode(b"png").decode(),
                                          "text/plain": "words"},
                         metadata={"image/png": {"alt": 'a "line" < 2'}})
    said = new_output("stream", name="stdout", text="1 < 2 & $x$\n")
    write(tmp_path / "01_a.ipynb", dumps(a_book(
        FORMULAS, new_code_cell("assert 1 < 2  # $y$", outputs=[said, picture]))))
    write(tmp_path / "02_b.ipynb", dumps(a_book("# 02 B\n\nWords.", "## What you built")))
    table = "| a | b |\n|---|---|\n| [c](../notebooks/01_a.ipynb) | d |\n"
    write(tmp_path / "WORDS.md", f"# Words\n\n{table}")
    paths = [tmp_path / "01_a.ipynb", tmp_path / "02_b.ipynb"]
    out = tmp_path / "html"
    assert [p.name for p in pages.build(out, paths, [tmp_path / "WORDS.md"])] == [
        "01_a.html", "02_b.html", "WORDS.html", "index.html", "search.html"]
    return {path.stem: path.read_text(encoding="utf-8") for path in out.iterdir()}


def test_formulas_pictures_and_outputs_stand_in_the_page(site):
    page = site["01_a"]
    whole = page[page.index("<main>"):]
    assert whole.count("<math ") == 3 and whole.count('<div class="formula">') == 1
    assert "<title>01 Sums &amp; norms</title>" in page and 'id="1.-Why-2"' in page
    assert "<code>$5</code>" in page and "<pre>1 &lt; 2 &amp; $x$\n</pre>" in page
    assert '<img alt="a &quot;line&quot; &lt; 2" src="data:image/png;base64,cG5n">' in page
    assert "<pre>words" not in page and '<span class="c1"># $y$</span>' in page


def test_pages_lead_to_each_other_and_ask_nobody(site):
    for name, page in site.items():
        for target, fragment in re.findall(r'href="(?!https:)([^"#]*)#?([^"]*)"', page):
            there = site[target.removesuffix(".html") if target else name]
            assert not fragment or f'id="{fragment}"' in there, (name, target, fragment)
        fetched = r'<(?:script\b[^>]*src|link|iframe|object)\b|url\(|@import|src="(?!data:)'
        assert re.findall(fetched, page) == []
    assert 'href="02_b.html#What-you-built"' in site["01_a"] and "WORDS.html" in site["01_a"]
    assert 'href="https://arxiv.org/abs/1"' in site["01_a"]
    assert '<a href="02_b.html">02 B →</a>' in site["01_a"]
    assert "<p>The <strong>first</strong> paragraph" in site["index"]


def test_a_picture_with_controls_holds_its_settings_where_they_were_kept(tmp_path, monkeypatch):
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path / "outputs"))
    picture = render(lambda ax: ax.plot([0, 1]), [{}], size=(1, 1))
    other = render(lambda ax: ax.plot([1, 0]), [{}], size=(1, 1))
    data, metadata = bundle(picture, "[controls: x: 1, 2] A </script> line", "A </script> line")
    path, out = tmp_path / "01_a.ipynb", tmp_path / "html"
    write(path, dumps(a_book("# A", new_code_cell("plot", outputs=[
        new_output("display_data", data, metadata=metadata)]))))
    strip = f'<img alt="A &lt;/script&gt; line" src="{PNG}{data["image/png"]}">'
    pages.build(out, [path], [])
    page = (out / "01_a.html").read_text()
    assert strip in page and '"plot"' not in page
    controls = [{"name": "x", "kind": "slider", "labels": ["1", "2"], "start": 1}]
    grids.keep(picture, controls, [picture, other])
    pages.build(out, [path], [])
    page = (out / "01_a.html").read_text()
    found = re.search(r'<div class="plot"><noscript>(.*?)</noscript>'
                      r'<script type="application/json">(.*?)</script></div>', page, re.S)
    assert found[1] == strip and "</script>" not in found[2]
    held = json.loads(found[2])
    assert held["controls"] == controls and held["alt"] == "A </script> line"
    assert held["shown"] == [0, 1]
    assert held["pictures"] == list(map(grids.address, (picture, other)))


def test_the_search_knows_every_section_by_its_words(site):
    found = json.loads(re.search(r'id="sections">(.*?)</script>', site["search"], re.S)[1])
    by_place = {(stem, anchor): said for stem, anchor, *said in found}
    assert by_place["02_b", "What-you-built"][:2] == ["02 B", "What you built"]
    assert "The first paragraph" in by_place["01_a", "01-Sums-&-norms"][2]
    assert "a paper" in by_place["01_a", "1.-Why-2"][2] and ("WORDS", "Words") in by_place


def test_what_no_page_can_show_is_named_and_the_old_pages_stay(tmp_path):
    path, out = tmp_path / "01_a.ipynb", tmp_path / "html"
    write(path, dumps(a_book("# A")))
    pages.build(out, [path], [])
    error = new_output("error", ename="E", evalue="e", traceback=[])
    for cell, problem in ((r"$\nosuchcommand x$", "01_a.ipynb: the formula .*nosuchcommand"),
                          (new_code_cell("1 / 0", outputs=[error]), "cell 2 stores an error")):
        write(path, dumps(a_book("# A", "## B", cell)))
        with pytest.raises(ValueError, match=problem):
            pages.build(out, [path], [])
    write(path, dumps(a_book("## B")))
    with pytest.raises(ValueError, match="01_a.ipynb: no title"):
        pages.build(out, [path], [])
    assert "<h2" not in (out / "01_a.html").read_text()
    write(path, dumps(a_book("# A", "## B")))
    pages.build(out, [path], [])
    assert '<h2 id="B">' in (out / "01_a.html").read_text()


def test_a_copy_for_students_has_stub_and_hint_alone(tmp_path):
    said = new_output("stream", name="stdout", text="… twice: not solved yet")
    made = a_book("# A", stub([said]), SOLVED, new_code_cell("twice(1)", execution_count=2))
    copy = student.without_solutions(made)
    assert [c.source for c in copy.cells] == [
        "# A", made.cells[1].source,
        "<details><summary>Hint</summary>\n\nTwice.\n</details>\n\nAnd on.", "twice(1)"]
    assert all(c.outputs == [] and c.execution_count is None
               for c in copy.cells if c.cell_type == "code")
    assert made.cells[1].outputs == [said] and exercises(made)
    whole = SOLVED[SOLVED.index("<details><summary>Sol"):SOLVED.index("And on")]
    assert len(student.without_solutions(a_book("# A", stub(), whole)).cells) == 2
    recall = "<details><summary>2. Why not whole solutions?</summary>\n\nThey differ.\n</details>"
    assert student.without_solutions(a_book("# A", recall)).cells[1].source == recall


def test_a_solution_that_would_be_handed_out_stops_the_build(tmp_path):
    bare = SOLVED.replace("<details><summary>Solution", "<summary>Solution")
    for left in ([bare], [SOLVED, "def mine(x):\n    return 2 * x\n"]):
        write(tmp_path / "01_a.ipynb", dumps(a_book(stub(), *left)))
        with pytest.raises(ValueError, match="01_a.ipynb: the solution of exercise 'twice'"):
            student.build(tmp_path / "out", [tmp_path / "01_a.ipynb"])
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stem", [path.stem for path in notebooks()])
def test_the_course_can_be_handed_out_and_its_formulas_are_all_known(stem):
    book = read(NOTEBOOKS / f"{stem}.ipynb")
    copy = student.without_solutions(book)
    text = "\n".join(cell.source for cell in copy.cells)
    assert not SOLUTION.search(text) and text.lower().count("<summary>hint") >= 3
    assert [c.source for c in tagged(copy, "exercise")] == \
        [c.source for c in tagged(book, "exercise")]
    for cell in book.cells:
        if cell.cell_type == "markdown" and "$" in cell.source:
            assert "$$" not in pages.markdown(cell.source).replace("<code>$$", "")
