"""The course as web pages that need no network: python -m course.tools html

Each page is one file: its pictures and its style stand in it, and formulas become MathML here, at
build time, so that no script and no font has to be fetched.
"""
import argparse
import html
import re
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
from .execute import BUILD
from .normal_form import notebooks, read

DOCS = ROOT / "docs"
TITLE = "4-bit fine-tuning, built by hand"
STYLE = """\
body { max-width: 52rem; margin: 0 auto; padding: 1rem; color: #222; background: #fff;
       font: 1rem/1.55 system-ui, sans-serif; }
a { color: #0a58a8; }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .6rem; }
img { display: block; max-width: 100%; }
pre { padding: .6rem .8rem; overflow-x: auto; font-size: .875rem; line-height: 1.4;
      margin: .6rem 0; }
.code pre, .highlight pre { background: #f5f6f8; border-left: 3px solid #0072b2; }
.output pre { border-left: 3px solid #ccc; }
code { font-family: ui-monospace, monospace; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; vertical-align: top; }
details { border: 1px solid #ccc; border-radius: 4px; padding: .4rem .8rem; margin: .6rem 0; }
summary { cursor: pointer; }
nav { display: flex; justify-content: space-between; gap: 1rem; }
math[display="block"] { margin: .8rem 0; overflow-x: auto; }
menclose { display: inline-block; border: 1px solid; padding: .3em; }
"""  # browsers draw no menclose, which is \\boxed
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{nav}
{body}
{nav}
</body>
</html>
"""


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
        return formula(body, "block")

    def inline_math(self, body):
        return formula(body, "inline")

    def latex_environment(self, name, body):
        return formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


def markdown(text: str) -> str:
    """Markdown with $formulas$ -> HTML; links to notebooks and documents lead to their pages."""
    made = MarkdownWithMath(renderer=_Renderer(escape=False)).render(text)
    return re.sub(r'href="(?!https?:)(?:[^"#]*/)?([^"#/]+)\.(?:ipynb|md)(?=[#"])',
                  r'href="\1.html', made)


def output(made) -> str:
    """A picture with its words, or text; of several forms the picture."""
    if "text" in made:
        return f"<pre>{html.escape(made.text)}</pre>"
    if png := made.data.get("image/png"):
        alt = html.escape(made.metadata.get("image/png", {}).get("alt", ""), quote=True)
        return f'<img alt="{alt}" src="data:image/png;base64,{png.strip()}">'
    return f"<pre>{html.escape(made.data.get('text/plain', ''))}</pre>"


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


def page(title: str, body: str, nav: str = "") -> str:
    style = STYLE + HtmlFormatter().get_style_defs([".code", ".highlight"])
    return PAGE.format(title=html.escape(plain(title)), style=style, body=body,
                       nav=nav and f"<nav>{nav}</nav>")


def build(out: Path, paths: list[Path], documents: list[Path]) -> list[Path]:
    """Write a page for each notebook and each Markdown document into `out`, and index.html.

    `out` is replaced as a whole, once every page is made. Returns the pages' paths.
    Raises ValueError, naming the file, where there is no title, or a formula or an output that no
    page can show.
    """
    check_place(out, "index.html")  # before the work
    bodies = {}
    for path in [*paths, *documents]:
        try:
            bodies[path] = (cells(read(path)) if path.suffix == ".ipynb" else
                            markdown(read_text(path)))
            if not headings(bodies[path], 1):
                raise ValueError("no title; expected a line '# ...'")
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
    titles = {path: headings(body, 1)[0][1] for path, body in bodies.items()}

    def link(path, text):
        return f'<a href="{path.stem}.html">{text}</a>'

    pages = {}
    for number, path in enumerate(paths):
        nav = ['<a href="index.html">Contents</a>']
        nav += [link(p, f"← {titles[p]}") for p in paths[max(number - 1, 0):number]]
        nav += [link(p, f"{titles[p]} →") for p in paths[number + 1:number + 2]]
        pages[path.stem] = page(titles[path], bodies[path], "".join(nav))
    for path in documents:
        pages[path.stem] = page(titles[path], bodies[path], '<a href="index.html">Contents</a>')
    lines = [f"<h1>{TITLE}</h1>", "<ul>", *(f"<li>{link(p, titles[p])}</li>" for p in documents),
             "</ul>"]
    for path in paths:
        first = re.search(r"<p>(.*?)</p>", bodies[path], re.S)
        lines += [f"<h2>{link(path, titles[path])}</h2>", first.group() if first else "", "<ul>"]
        lines += [f'<li><a href="{path.stem}.html#{anchor}">{text}</a></li>'
                  for anchor, text in headings(bodies[path], 2)]
        lines.append("</ul>")
    pages["index"] = page(TITLE, "\n".join(lines))

    with atomic_folder(out, "index.html") as part:
        for stem, text in pages.items():
            (part / f"{stem}.html").write_text(text, encoding="utf-8")
    return sorted(out.glob("*.html"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m course.tools html",
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=given_path, default=BUILD / "html", help="this folder is replaced")
    out = parser.parse_args(arguments).out
    made = build(out, notebooks(), sorted(DOCS.glob("*.md")))
    size = sum(path.stat().st_size for path in made)
    print(f"{len(made)} pages, {size / 1e6:.1f} MB: open {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(ending(main))
