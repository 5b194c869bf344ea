"""Which cells of a notebook others need: a run of these alone gives them what they would have had."""

import ast
import symtable
from collections.abc import Iterable, Sequence

from IPython.core.inputtransformer2 import TransformerManager


def needed_cells(
    sources: Sequence[str], wanted: Iterable[int], asides: Iterable[int] = ()
) -> list[int]:
    """Indexes of the wanted code cells and of those before the last of them that they need.

    A cell is needed if it binds a name that a needed one looks up, and, as a call may change what
    it is given, if it mentions such a name at all, unless the name is a function, a class or an
    import. Cells in `asides` only mention what others need; raises ValueError where they bind a
    name that no other needed cell binds.
    """
    cells = [_names(source) for source in sources]
    data = set().union(*(data for _, _, data in cells))
    kept = set(wanted)
    before = set(range(max(kept, default=-1) + 1)) - set(asides)
    while True:
        looked_up = set().union(*(cells[i][1] for i in kept))
        new = {
            i for i in before
            if cells[i][0] & looked_up or cells[i][1] & looked_up & data
        } - kept  # fmt: skip
        if not new:
            theirs, own = (set().union(*(cells[i][0] for i in some)) for some in (asides, kept))
            if missing := theirs & looked_up - own:
                raise ValueError(f"cells {sorted(asides)} bind what others need: {missing}")
            return sorted(kept)
        kept |= new


def cells_of_controls(cells) -> list[int]:
    """Indexes of the code cells that a notebook's SliderPlots need, without those tagged `aside`."""
    sources = [cell.source for cell in cells]
    asides = [i for i, cell in enumerate(cells) if "aside" in cell.metadata.get("tags", [])]
    wanted = [i for i, source in enumerate(sources) if "SliderPlot(" in source]
    return needed_cells(sources, wanted, asides)


def _names(source: str) -> tuple[set[str], set[str], set[str]]:
    """Global names that a cell binds, that it looks up, and of those bound the values alone."""
    code = TransformerManager().transform_cell(source)
    tables = [symtable.symtable(code, "cell", "exec")]
    bound = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}
    looked_up = {s.get_name() for s in tables[0].get_symbols() if s.is_referenced()}
    while tables:
        inner = tables.pop().get_children()
        looked_up |= {s.get_name() for t in inner for s in t.get_symbols() if s.is_global()}
        tables += inner
    no_values = set()
    for statement in ast.parse(code).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            no_values |= {(a.asname or a.name).partition(".")[0] for a in statement.names}
        elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            no_values.add(statement.name)
    return bound, looked_up, bound - no_values
