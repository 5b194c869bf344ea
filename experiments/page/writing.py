"""Paragraphs, tables and numbers as the page has them."""

import textwrap


def prose(text: str) -> str:
    """`text` as a paragraph with lines of at most 100 characters."""
    text = " ".join(text.split())
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def table(head, rows) -> str:
    """A table of Markdown; cells are texts."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def percent(score: dict, mode: str = "strict") -> str:
    """Exact match in %, with its 95% interval."""
    low, high = score[f"{mode}_interval"]
    return f"{100 * score[mode]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def made(*stamps: dict) -> str:
    """When and where rows were measured, from their stamps."""
    days = sorted({stamp["date"] for stamp in stamps})
    threads = sorted({stamp["threads"] for stamp in stamps})
    device, version = stamps[0]["device"].replace("cpu", "CPU"), stamps[0]["torch"]
    several = "s" if threads != [1] else ""
    return prose(
        f"*{' to '.join(dict.fromkeys((days[0], days[-1])))}, {device} with "
        f"{' or '.join(map(str, threads))} thread{several}, torch {version}, seed "
        f"{stamps[0]['seed']}*"
    )


def span(values, digits: int = 2) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
