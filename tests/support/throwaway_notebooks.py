"""Notebooks of a few cells, for tests of what runs, stores and compares notebooks."""

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course.tools.normal_form import dumps, normal, write

PARAMETERS = ('profile = "tiny"\nbits = 4', "parameters")
SOLVED = """MD <details><summary>Hint</summary>

```python
2 + 2
```
</details>

<details><summary>Solution</summary>

```python
def mine(x):
    return 2 * x
```
</details>"""


def book(*cells):
    """A notebook of code cells; a cell is a source, or (source, tag)."""
    made = new_notebook()
    for cell in cells:
        source, *tags = cell if isinstance(cell, tuple) else (cell,)
        made.cells.append(new_markdown_cell(source[3:]) if source.startswith("MD ") else
                          new_code_cell(source, metadata={"tags": tags} if tags else {}))
    return made


def save(folder, stem, *cells):
    path = folder / f"{stem}.ipynb"
    write(path, dumps(normal(book(*cells), stem)))
    return str(path)


def exercise_cells(name):
    stub = f"def mine(x: int) -> int:\n    ...\n\n{name} = check(\"{name}\", mine)"
    return (stub, "exercise"), SOLVED
