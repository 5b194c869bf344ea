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


def test_available_memory_is_below_the_containers_limit(monkeypatch, tmp_path):
    assert 2**20 < available_memory("cpu") < 2**50
    assert measuring._room_in_container(tmp_path) == float("inf")  # no cgroup v2
    files = {"memory.max": "1000\n", "memory.current": "700\n"}
    files["memory.stat"] = "anon 600\ninactive_file 50\n"
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert measuring._room_in_container(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert measuring._room_in_container(tmp_path) == float("inf")
    monkeypatch.setattr(measuring, "_room_in_container", lambda: 350)
    assert available_memory("cpu") == 350
