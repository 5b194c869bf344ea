"""How much is tried: --tries and --seed, or a few tries where they are not given; and a process
that runs commands."""

import pytest

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
