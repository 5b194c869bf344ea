"""What a process may use: within its container, of either version of cgroups."""

import math
import os

import pytest

from qlora_lib.base.machine import container_memory, cores, free_memory

V2 = {"memory.max": "1000\n", "memory.current": "700\n",
      "memory.stat": "anon 600\ninactive_file 50\n"}  # fmt: skip
V1 = {"memory/memory.limit_in_bytes": "1000\n", "memory/memory.usage_in_bytes": "700\n",
      "memory/memory.stat": "rss 600\ninactive_file 1\ntotal_inactive_file 50\n"}  # fmt: skip


@pytest.mark.parametrize("files, none", [(V2, "max\n"), (V1, f"{2**63 - 4096}\n")])
def test_free_memory_is_below_the_containers_limit(tmp_path, files, none):
    assert container_memory(tmp_path) == (math.inf, math.inf)  # no cgroup
    assert 2**20 < free_memory(tmp_path) < 2**50
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert container_memory(tmp_path) == (350, 1000)
    assert free_memory(tmp_path) == 350
    (tmp_path / next(iter(files))).write_text(none)
    assert container_memory(tmp_path) == (math.inf, math.inf)


@pytest.mark.parametrize("share, count", [
    ("350000 100000", 3), ("50000 100000", 1), ("max 100000", 6), (None, 6)])  # fmt: skip
def test_cores_are_those_of_the_container(tmp_path, monkeypatch, share, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    if share:
        (tmp_path / "cpu.max").write_text(share + "\n")
    assert cores(tmp_path) == count
