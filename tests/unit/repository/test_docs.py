"""Links lead to files and headings that exist; glossary and syllabus cover the course."""

import re
from fnmatch import fnmatch

import pytest

from course.tools.normal_form import notebooks, read
from qlora_lib.base.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md",
         *sorted(DOCS.glob("*.md"))]  # fmt: skip
# Terms that the course uses in one meaning.
TERMS = [
    "scale", "zero-point", "group_size", "act-order", "desc_act", "damp_percent", "Hessian",
    "calibration", "NF4", "absmax", "double quantization", "rank r", "alpha", "target_modules",
    "merge", "exact match",
]  # fmt: skip
PATHS = notebooks()
WORDS = {
    path: "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    for path in PATHS
}


def anchors(path):
    """The fragments that lead to a heading: JupyterLab's of a notebook, GitHub's of a page."""
    text = WORDS[path] if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    found = [heading.replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.M)]
    if path.suffix == ".md":
        found = [re.sub(r"[^\w-]", "", heading).lower() for heading in found]
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target, fragment in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if fragment:
            assert fragment in anchors(path), f"{target} has no #{fragment}"


def test_the_glossary_has_the_courses_terms_once_each_with_its_place():
    glossary = (DOCS / "GLOSSARY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \*\*(.*?)\*\* \| \S.* \| \[\d\d, .*\]\(.*#.*\) \|$", glossary, re.M)
    assert len(rows) == glossary.count("\n| ") - glossary.count("\n|---") and len(rows) == len(set(rows))
    plain = [row.replace("`", "").lower() for row in rows]
    assert [t for t in TERMS if not any(t.lower() in row for row in plain)] == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_syllabus_gives_the_minutes_of_a_notebook_s_exercises(path):
    syllabus = (DOCS / "SYLLABUS.md").read_text(encoding="utf-8")
    minutes = re.findall(r"^Difficulty [^,]*, (\d+) minutes", WORDS[path], re.M)
    row = re.search(rf"^\| .*notebooks/{path.name}\) \| .* (\d+) \|$", syllabus, re.M)
    assert row and int(row[1]) == sum(map(int, minutes))


def test_each_record_is_described_in_the_readme_of_the_data():
    text = (ROOT / "data/README.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w*-]+\.\w+)`", text)
    for path in (ROOT / "data/results").iterdir():
        assert any(fnmatch(path.name, name) for name in named), path.name
