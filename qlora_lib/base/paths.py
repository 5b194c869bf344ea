"""Where the bundled files are, and how a path is printed."""

from argparse import ArgumentTypeError
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The bundled files. A wheel has none: then those of the working directory, if it is the course's.
DATA = (ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()) / "data"
# What an error adds where they are missing
BUNDLED = "comes with the course's repository, not with the package alone: work in a clone"


def plain_name(name: str, what: str) -> str:
    """Return `name`, if it can only be a file or a folder where it is put; ValueError for one that
    leads elsewhere, or that no file may have. what: what it names."""
    if not isinstance(name, str) or name.strip(". ") == "" or len(name) > 200 or not (
            name.isprintable() and not set(name) & set("/\\:")):  # fmt: skip
        raise ValueError(f"{what} {name!r:.80} can't name a file; expected letters and digits")
    return name


def given_path(text: str) -> Path:
    """Return the path that a text names, for argparse; ArgumentTypeError where it names none."""
    try:
        text.encode()
        if text and "\0" not in text:
            real_path(text)
            return Path(text)
    except (OSError, UnicodeEncodeError) as error:
        raise ArgumentTypeError(f"{text!r:.80} is no path: {error}") from None
    raise ArgumentTypeError(f"{text!r:.80} is no path")


def real_path(path: Path | str) -> Path:
    """Return where a path leads, past links; OSError for links that lead to themselves."""
    try:
        return Path(path).resolve()
    except RuntimeError as error:  # what Python 3.11 and 3.12 raise
        raise OSError(f"{path} is a link that leads to itself") from error


def short_path(path: Path) -> str:
    """Return a path below the working directory, or the repository's root, as seen from there."""
    for folder in (Path.cwd(), ROOT):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(path)
