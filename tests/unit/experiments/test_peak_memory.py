"""The peak of a block is seen, also of memory that is given back before its end."""

import sys

import pytest
import torch

from experiments.peak_memory import PeakMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_what_is_held_at_the_end_of_the_block_counts():
    size = 200_000_000
    with PeakMemory() as memory:
        held = torch.ones(size, dtype=torch.uint8)
    assert 0.9 * held.nbytes < memory.peak - memory.before < 2 * size
    assert memory.resident >= memory.peak


def test_what_is_given_back_within_the_block_counts_too():
    size = 200_000_000
    with PeakMemory() as memory:
        held = torch.ones(size, dtype=torch.uint8)
        seen = memory._look() and memory.peak
        del held
    assert memory.peak >= seen > memory.before + 0.9 * size
