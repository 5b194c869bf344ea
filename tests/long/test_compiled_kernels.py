"""The Triton kernels, compiled for an H100 that need not be there."""

import sys
from importlib.util import find_spec

import pytest

from tests.support.triton_cases import in_a_process

pytestmark = pytest.mark.long


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler has wheels for Linux")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no wheel here")
def test_the_kernels_compile_for_an_h100_without_one():
    made = in_a_process(0, "sm90")
    assert {name for name, how in made.items() if how["tensor cores"]} == {"_matrix", "_backward"}
    assert all(how["shared"] < 227 * 1024 and how["bytes"] for how in made.values())
