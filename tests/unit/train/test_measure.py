"""What does not fit into memory is refused, with what would."""

import pytest

from qlora_lib import memory_ledger
from qlora_lib.train import measure as measuring
from qlora_lib.train.measure import NotEnoughMemory, available_memory, check_fits
from tests.support.memory_models import BATCH, RANK, SEQ, SMALL, SPEC


def test_what_does_not_fit_is_refused_with_the_ledger(monkeypatch):
    ledger = memory_ledger(SMALL, "qlora", BATCH, SEQ, RANK, spec=SPEC)
    check_fits(ledger, "cpu")  # a few MB
    monkeypatch.setattr(measuring, "available_memory", lambda device: ledger.peak)
    check_fits(ledger, "cpu")
    monkeypatch.setattr(measuring, "available_memory", lambda device: ledger.peak - 1)
    with pytest.raises(NotEnoughMemory, match="at its peak, and cpu has .* GB free") as caught:
        check_fits(ledger, "cpu")
    assert str(ledger) in str(caught.value) and "gradient checkpointing" in str(caught.value)
    assert isinstance(caught.value, MemoryError) and isinstance(caught.value, ValueError)


def test_available_memory_is_that_of_the_machine(monkeypatch):
    monkeypatch.setattr(measuring, "free_memory", lambda: 350)
    assert available_memory("cpu") == 350
