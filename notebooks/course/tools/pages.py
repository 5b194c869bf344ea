"""The course as web pages that need no network: python -m course.tools html

Each page is one file: its pictures, its style and its script stand in it, and formulas become
MathML here, at build time, so that nothing has to be fetched. A picture with controls holds what
it shows at each setting (`kit/grids.py`), and a few lines of script (web/page.js) move it.
"""
import argparse
import base64
import html
import json
import re
import string
import sys
from pathlib import Path

from latex2mathml.converter import convert
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from qlora_lib.base.endings import ending
from qlora_lib.base.files import read_text
from qlora_lib.base.folders import atomic_folder, check_place
from qlora_lib.base.paths import ROOT, given_path
from ..kit import grids
from . import execute
from .copies import fresh_copy_of
from .normal_form import normal, notebooks, read

DOCS, WEB = ROOT / "docs", Path(__file__).with_name("web")
TITLE = "4-bit fine-tuning, built by hand"
ASKED_IN = ("01_", "05_")  # notebooks whose pages lead to the model
ASK = ('<p><a href="ask.html">Ask the model here, in this browser</a>: choose bits, groups and '
       "rank, and see each token's probabilities.</p>")
SEARCH = """\
<h1>Search</h1>
<form role="search"><input type="search" name="q" aria-label="Search"></form>
<noscript><p>The search needs scripts, which are off in this browser.</p></noscript>
<p id="count" role="status"></p>
<ol></ol>
<script type="application/json" id="sections">{sections}</script>"""


def formula(latex: str, display: str) -> str:
    """LaTeX -> MathML; `display` is "block" or "inline".

    Raises ValueError for a command that the converter does not know: it would stay as text.
    """
    made = convert(latex.strip(), display=display)
    if "\\" in made:
        raise ValueError(f"the formula {latex.strip()!r} holds a command that latex2mathml does "
                         "not know; write it otherwise")
    return made


def plain(made: str) -> str:
    """The text of a piece of HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", made)).strip()


def anchor(heading: str) -> str:
    """The fragment that leads to a heading, as in JupyterLab and on GitHub: "2.-Two-words"."""
    return plain(heading).replace(" ", "-")


class _Renderer(IPythonRenderer):
    def heading(self, text, level, **attrs):
        name = html.escape(anchor(text), quote=True)
        return f'<h{level} id="{name}">{text}</h{level}>\n'

    def block_math(self, body):
        return _block(body)

    def inline_math(self, body):
        return formula(body, "inline")

    def latex_environment(self, name, body):
        return _block(rf"\begin{{{name}}}{body}\end{{{name}}}")


def _block(latex: str) -> str:
    return f'<div class="formula">{formula(latex, "block")}</div>'


def markdown(text: str) -> str:
    """Markdown with $formulas$ -> HTML; links to notebooks and documents lead to their pages."""
    made = MarkdownWithMath(renderer=_Renderer(escape=False)).render(text)
    return re.sub(r'href="(?!https?:)(?:[^"#]*/)?([^"#/]+)\.(?:ipynb|md)(?=[#"])',
                  r'href="\1.html', made)


def output(made) -> str:
    """A picture with its words, or text; of several forms the picture. One with controls can be
    moved where its grid was kept, and is a film strip where not."""
    if "text" in made:
        return f"<pre>{html.escape(made.text)}</pre>"
    if png := made.data.get("image/png"):
        alt = made.metadata.get("image/png", {}).get("alt", "")
        strip = (f'<img alt="{html.escape(alt, quote=True)}" '
                 f'src="data:image/png;base64,{png.strip()}">')
        grid = grids.kept(base64.b64decode(png)) if has_controls(made) else None
        return strip if grid is None else plot(grid, strip, alt)
    return f"<pre>{html.escape(made.data.get('text/plain', ''))}</pre>"


def has_controls(made) -> bool:
    """Whether an output of a notebook is that of a SliderPlot."""
    data = made.get("data", {})
    return "image/png" in data and data.get("text/plain", "").startswith("[controls: ")


def plot(grid: dict, strip: str, alt: str) -> str:
    """A picture that web/page.js moves; without scripts the film strip."""
    pictures = [grids.address(base64.b64decode(png)) for png in grid["pictures"]]
    data = {"controls": grid["controls"], "pictures": pictures, "shown": grid["shown"], "alt": alt}
    return (f'<div class="plot"><noscript>{strip}</noscript>'
            f'<script type="application/json">{as_script(data)}</script></div>')


def cells(book) -> str:
    """The body of a notebook's page; raises ValueError for an output that is an error."""
    parts = []
    for index, cell in enumerate(book.cells):
        if cell.cell_type == "markdown":
            parts.append(markdown(cell.source))
        elif cell.cell_type == "code":
            parts.append(highlight(cell.source, PythonLexer(), HtmlFormatter(cssclass="code")))
            if any(o.output_type == "error" for o in cell.outputs):
                raise ValueError(f"cell {index} stores an error; run the notebook again")
            if cell.outputs:
                parts.append(f'<div class="output">{"".join(map(output, cell.outputs))}</div>')
    return "\n".join(parts)


def headings(body: str, level: int) -> list[tuple[str, str]]:
    """(anchor, what stands there) of each heading of that level."""
    return re.findall(rf'<h{level} id="([^"]*)">(.*?)</h{level}>', body, re.S)


def as_script(data) -> str:
    """Data as JSON that can stand in a page's script: without a tag that would end it."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")


def sections(body: str) -> list[tuple[str, str, str]]:
    """(anchor, heading, text) of each part of a page between headings, for the search."""
    body = re.sub(r'<script\b.*?</script>|<noscript>.*?</noscript>', "", body, flags=re.S)
    parts = re.split(r'<h[1-3] id="([^"]*)">(.*?)</h[1-3]>', body, flags=re.S)[1:]
    return [(html.unescape(anchor), plain(heading), " ".join(plain(text).split()))
            for anchor, heading, text in zip(parts[::3], parts[1::3], parts[2::3])]


def style() -> str:
    light, dark = (HtmlFormatter(style=name).get_style_defs([".code", ".highlight"])
                   for name in ("default", "github-dark"))
    ours = read_text(WEB / "style.css")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{ours}"


def page(title: str, body: str, contents: str = "", neighbors: str = "", script: str = "") -> str:
    """A whole page. contents: of the column beside it; neighbors: links at the end; script: what
    the page runs beside web/page.js."""
    return string.Template(read_text(WEB / "page.html")).substitute(
        title=html.escape(plain(title)), style=style(), body=body, contents=contents,
        neighbors=neighbors and f'<nav class="neighbors">{neighbors}</nav>',
        script=read_text(WEB / "page.js") + script)


def link(stem: str, text: str, current: bool = False) -> str:
    return f'<a href="{stem}.html"{" aria-current=page" * current}>{text}</a>'


def contents(titles: dict[str, str], stem: str, body: str) -> str:
    """The column: all pages by their title, and under this one its sections."""
    lines = ["<nav><ul>", f"<li>{link('index', 'The course', stem == 'index')}</li>"]
    for other, title in titles.items():
        lines.append(f"<li>{link(other, title, other == stem)}")
        if other == stem:
            lines += ["<ul>", *(f'<li><a href="#{anchor}">{text}</a></li>'
                                for anchor, text in headings(body, 2)), "</ul>"]
        lines.append("</li>")
    return "\n".join([*lines, "</ul></nav>"])


def build(out: Path, paths: list[Path], documents: list[Path], ask: bool = False) -> list[Path]:
    """Write a page for each notebook and each Markdown document into `out`, and index.html and
    search.html; ask: also ask.html, on which the bundled model answers.

    Of a notebook that `run --grid` has executed as it is now, the page shows that run, where
    pictures have all their settings; else what is stored in it. `out` is replaced as a whole, once
    every page is made. Returns the pages' paths.
    Raises ValueError, naming the file, where there is no title, or a formula or an output that no
    page can show.
    """
    check_place(out, "index.html")  # before the work
    bodies = {}
    for path in [*paths, *documents]:
        try:
            bodies[path.stem] = (cells(shown(path)) if path.suffix == ".ipynb" else
                                 markdown(read_text(path)))
            if not headings(bodies[path.stem], 1):
                raise ValueError("no title; expected a line '# ...'")
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
    scripts = {}
    if ask:
        from .page_model import page_model, problems  # which wait for torch

        data = as_script(page_model() | {"problems": problems()})
        bodies["ask"] = (read_text(WEB / "ask.html")
                         + f'<script type="application/json" id="model">{data}</script>')
        scripts["ask"] = read_text(WEB / "ask.js")
        for stem in bodies:
            bodies[stem] += ASK if stem.startswith(ASKED_IN) else ""
    titles = {stem: headings(body, 1)[0][1] for stem, body in bodies.items()}
    stems, pages = [path.stem for path in paths], {}
    for number, stem in enumerate(stems):
        before, after = stems[max(number - 1, 0):number], stems[number + 1:number + 2]
        around = [link(s, f"← {titles[s]}") for s in before] + \
            [link(s, f"{titles[s]} →") for s in after]
        pages[stem] = bodies[stem], "".join(around), ""
    others = [stem for stem in bodies if stem not in stems]
    pages |= {stem: (bodies[stem], "", scripts.get(stem, "")) for stem in others}
    pages["index"] = index(others, stems, bodies, titles), "", ""
    found = [(stem, anchor, plain(titles[stem]), heading, text) for stem, body in bodies.items()
             for anchor, heading, text in sections(body)]
    pages["search"] = SEARCH.format(sections=as_script(found)), "", read_text(WEB / "search.js")
    titles_of = titles | {"index": TITLE, "search": "Search"}
    with atomic_folder(out, "index.html") as part:
        for stem, (body, around, script) in pages.items():
            text = page(titles_of[stem], body, contents(titles, stem, body), around, script)
            (part / f"{stem}.html").write_text(text, encoding="utf-8")
    return sorted(out.glob("*.html"))


def shown(path: Path):
    """The notebook that a page shows: as it was run just now, or as it is stored."""
    copy = fresh_copy_of(path)
    return normal(copy, path.stem) if copy else read(path)


def index(others: list[str], stems: list[str], bodies: dict, titles: dict) -> str:
    """The first page: each notebook with its first paragraph and its sections."""
    lines = [f"<h1>{TITLE}</h1>", "<ul>", *(f"<li>{link(s, titles[s])}</li>" for s in others),
             "</ul>"]
    for stem in stems:
        first = re.search(r"<p>(.*?)</p>", bodies[stem], re.S)
        lines += [f"<h2>{link(stem, titles[stem])}</h2>", first.group() if first else "", "<ul>"]
        lines += [f'<li><a href="{stem}.html#{anchor}">{text}</a></li>'
                  for anchor, text in headings(bodies[stem], 2)]
        lines.append("</ul>")
    return "\n".join(lines)


def not_run() -> list[str]:
    """The notebooks that no run with --grid has executed as they are now."""
    return [path.stem for path in notebooks() if fresh_copy_of(path) is None]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m course.tools html",
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=given_path, default=execute.BUILD / "html",
                        help="this folder is replaced")
    parser.add_argument("--stored", action="store_true", help="run nothing: show what is "
                        "stored in notebooks that were not run just now, with film strips")
    given = parser.parse_args(arguments)
    if stale := [] if given.stored else not_run():
        print("to be run first, so that every setting of their pictures is drawn:")
        execute.run(stale, "tiny", {}, grid=True)
        if not_run():
            return 1
    made = build(given.out, notebooks(), sorted(DOCS.glob("*.md")), ask=True)
    size = sum(path.stat().st_size for path in made)
    print(f"{len(made)} pages, {size / 1e6:.1f} MB: open {given.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(ending(main))
