"""Fixtures of several files."""

import os

import pytest

from course.kit import OUTPUTS_VARIABLE
from course.tools import execute


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """A folder for outputs; the environment is as before afterwards."""
    before = dict(os.environ)
    monkeypatch.setattr(execute, "BUILD", tmp_path / "build")
    os.environ[OUTPUTS_VARIABLE] = str(tmp_path / "outputs")
    yield tmp_path / "outputs" / "tiny"
    os.environ.clear()
    os.environ.update(before)
