"""How much is tried: --tries and --seed, or a few tries where they are not given."""

import pytest


@pytest.fixture
def seed(request):
    return request.config.getoption("seed")


@pytest.fixture
def tries(request):
    return request.config.getoption("tries") or 3
