"""How much is tried: --tries and --seed, or a few tries where they are not given; and a process
that runs commands."""

import shutil

import pytest

from course.kit import OUTPUTS_VARIABLE
from tests.support.child_commands import Commands, make_place


@pytest.fixture
def seed(request):
    return request.config.getoption("seed")


@pytest.fixture
def tries(request):
    return request.config.getoption("tries") or 3


@pytest.fixture(scope="session")
def commands():
    running = Commands()
    yield running
    running.close()


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A folder in which commands begin: a model and problems."""
    folder = tmp_path_factory.mktemp("start") / "place"
    folder.mkdir()
    make_place(folder, problems=140)  # more than an evaluation asks at a time
    return folder


@pytest.fixture(scope="module")
def bad_place(tmp_path_factory):
    from tests.support import bad_files as bad  # it imports Triton: see the root's conftest

    folder = tmp_path_factory.mktemp("bad")
    bad.make_place(folder)
    return folder


@pytest.fixture
def bad_files(bad_place, monkeypatch):
    """The working directory is one of bad files; no hub is asked."""
    monkeypatch.chdir(bad_place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(bad_place / "outputs"))
    for name in ("MODEL", "GSM8K_DIR"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in ("checkpoints", "outputs"):  # of a command that was accepted
        shutil.rmtree(bad_place / name, ignore_errors=True)
