"""Glossary and syllabus: links lead to headings that exist, minutes are those of the notebooks."""
import re

import pytest

from course.tools.normal_form import notebooks, read
from qlora_lib.base.paths import ROOT

DOCS = ROOT / "docs"
GLOSSARY = (DOCS / "GLOSSARY.md").read_text(encoding="utf-8")
SYLLABUS = (DOCS / "SYLLABUS.md").read_text(encoding="utf-8")
# Terms that the course uses in one meaning.
TERMS = re.split(r",\s+", """scale, zero-point, group_size, act-order, desc_act, damp_percent, Hessian, calibration,
NF4, absmax, double quantization, rank r, alpha, target_modules, merge, exact match""")
PATHS = notebooks()
BOOKS = {path: read(path) for path in PATHS}


def words(path):
    return "\n".join(c.source for c in BOOKS[path].cells if c.cell_type == "markdown")


def anchors(path):
    return {heading.replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", words(path), re.M)}


@pytest.mark.parametrize("document", sorted(DOCS.glob("*.md")), ids=lambda p: p.name)
def test_every_link_leads_somewhere(document):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text(encoding="utf-8"))
    assert links
    known = {path.name: anchors(path) for path in PATHS}
    for target, fragment in links:
        assert (DOCS / target).is_file(), target
        if fragment:
            assert fragment in known[target.rpartition("/")[2]], f"{target} has no #{fragment}"


def test_the_glossary_has_the_courses_terms_once_and_in_order():
    rows = re.findall(r"^\| \*\*(.*?)\*\* \| \S.* \| \[\d\d, .*\]\(.*#.*\) \|$", GLOSSARY, re.M)
    assert len(rows) == GLOSSARY.count("\n| ") - 1 and len(rows) == len(set(rows))
    plain = [row.replace("`", "").lower() for row in rows]
    assert plain == sorted(plain)
    assert [t for t in TERMS if not any(t.lower() in row for row in plain)] == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_syllabus_gives_a_notebooks_minutes(path):
    text, cells = words(path), BOOKS[path].cells
    title = re.search(r"^# (.*)", text, re.M)[1]
    exercises = sum(map(int, re.findall(r"^Difficulty [^,]*, (\d+) minutes", text, re.M)))
    visible = re.sub(r"<details>.*?</details>", "", text, flags=re.S)
    lines = sum(c.source.count("\n") + 1 for c in cells if c.cell_type == "code")
    reading = 5 * round((len(visible.split()) / 130 + lines / 30) / 5)
    row = rf"\| \d+ \| \[{re.escape(title)}\]\(\.\./notebooks/{path.name}\) \| (\d+) \| \d+ \| (\d+) \|"
    found = re.search(row, SYLLABUS)
    expected = f"a row for {path.stem} with {reading} minutes to read, {exercises} of exercises"
    assert found and int(found[2]) == exercises, f"docs/SYLLABUS.md: expected {expected}"
    assert abs(int(found[1]) - reading) <= 5, f"docs/SYLLABUS.md: expected {expected}"
