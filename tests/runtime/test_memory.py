"""How much memory is free."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from runtime.device import Machine
from runtime.memory import free_memory, left_in_cgroup

CPU = Machine(torch.device("cpu"), torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_no_more_is_free_than_the_system_has_available():
    total = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    assert 0 < free_memory(CPU) <= total


def test_where_nobody_tells_there_is_no_number(monkeypatch):
    assert free_memory(Machine(torch.device("mps"), torch.float32)) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert free_memory(CPU) is None


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000", "memory.current": "400", "memory.stat": "anon 1\ninactive_file 150\n"}, 750),
        ({"memory.max": "max", "memory.current": "400", "memory.stat": ""}, None),
        ({"memory.max": "100", "memory.current": "400", "memory.stat": ""}, 0),
        (
            {
                "memory.limit_in_bytes": "1000",
                "memory.usage_in_bytes": "300",
                "memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
            },
            900,
        ),
        ({}, None),
    ],
)
def test_what_a_control_group_leaves(tmp_path, files, left):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert left_in_cgroup(tmp_path) == left
