"""Where the bundled files are, and how a path is printed."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The bundled files. A wheel has none: then those of the working directory, if it is the course's.
DATA = (ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()) / "data"
# What an error adds where they are missing
BUNDLED = "comes with the course's repository, not with the package alone: work in a clone"


def short_path(path: Path) -> str:
    """Return a path below the working directory, or the repository's root, as seen from there."""
    for folder in (Path.cwd(), ROOT):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(path)
