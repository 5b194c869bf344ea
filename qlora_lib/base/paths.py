"""Where the bundled files are, and how a path is printed."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"  # the bundled files


def short_path(path: Path) -> str:
    """The path as seen from the working directory or, for what is not below it, from the
    repository's root; a path outside both stays whole."""
    for folder in (Path.cwd(), ROOT):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(path)
