"""Fixtures of several files."""

from dataclasses import replace
from functools import cache

import pytest


@pytest.fixture
def short_answers(monkeypatch):
    """The experiments' answers end after 16 tokens: a random model knows no end."""
    from qlora_lib.runs.profiles import load_profile

    def short(*args, **given):
        return replace(load_profile(*args, **given), max_new_tokens=16)

    for module in ("accuracy", "sampling"):
        monkeypatch.setattr(f"experiments.{module}.load_profile", short)


@pytest.fixture
def quick_pictures(monkeypatch):
    """Pictures are raw pixels, drawn without the layout: half the time of a PNG. Sliders make
    no film strip, and formulas are parsed once.

    Enough to see that a setting is drawn and what changes the picture. The whole way is that of
    test_slider and test_picture, and nbval draws every setting of every slider of the notebooks.
    """
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure

    from course.kit import picture as plots
    from course.kit import slider as widgets

    monkeypatch.setattr(plots, "Figure", lambda **k: Figure(**k | {"layout": "none"}))
    monkeypatch.setattr(plots, "_png", lambda pixels: pixels.tobytes())
    monkeypatch.setattr(widgets.SliderPlot, "film_strip", lambda slider: b"")
    monkeypatch.setattr(backend_agg, "MathTextParser", cache(backend_agg.MathTextParser))
