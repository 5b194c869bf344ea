"""Fixtures of several files."""

import sys

import pytest

# jsonschema would build a grammar of international addresses, which takes longer than all else
# that nbformat imports, and which no notebook needs.
sys.modules.setdefault("rfc3987_syntax", None)


@pytest.fixture
def quick_pictures(monkeypatch):
    """Pictures are raw pixels, drawn without the layout: half the time of a PNG.

    Enough to see that a setting is drawn and what changes the picture. The whole way is that of
    test_classroom, and nbval draws every setting of every slider of the notebooks.
    """
    from matplotlib.figure import Figure

    from qlora_lib.classroom import plots

    monkeypatch.setattr(plots, "Figure", lambda **k: Figure(**k | {"layout": "none"}))
    monkeypatch.setattr(plots, "_png", lambda pixels: pixels.tobytes())
