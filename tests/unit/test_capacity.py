"""What a process may use of its machine, told by cgroups of both versions and by its own limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvmci.system import capacity

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight processors, 64 GiB, and whatever the test mounts."""
    (tmp_path / "self").mkdir()
    monkeypatch.setattr(capacity, "PROC", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 16 << 20, "SC_PAGE_SIZE": 4096}.__getitem__)
    return tmp_path


def mount(machine: Path, groups: str, root: str, kind: str, options: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        (machine / "mnt" / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / "mnt" / name).write_text(text)
    (machine / "self" / "cgroup").write_text(groups)
    line = f"35 31 0:32 {root} {machine}/mnt rw,relatime shared:1 - {kind} {kind} rw,{options}\n"
    (machine / "self" / "mountinfo").write_text(line)


def test_without_cgroups_it_is_the_machine(machine: Path) -> None:
    assert (capacity.processors(), capacity.memory_bytes()) == (8, 64 * GIB)


def test_the_least_of_a_group_and_those_above_it_counts(machine: Path) -> None:
    files = {
        "a/cpu.max": "150000 100000\n",
        "a/b/cpu.max": "max 100000\n",
        "a/memory.max": f"{2 * GIB}\n",
        "a/b/memory.max": "max\n",
    }
    mount(machine, "0::/a/b\n", "/", "cgroup2", "nsdelegate", files)
    assert (capacity.processors(), capacity.memory_bytes()) == (2, 2 * GIB)


def test_a_container_of_the_first_version_sees_its_own_group_alone(machine: Path) -> None:
    files = {
        "cpu.cfs_quota_us": "50000\n",
        "cpu.cfs_period_us": "100000\n",
        "memory.limit_in_bytes": f"{GIB}\n",
    }
    mount(machine, "4:memory,cpu:/docker/x\n", "/docker/x", "cgroup", "cpu,memory", files)
    assert (capacity.processors(), capacity.memory_bytes()) == (1, GIB)


def test_no_limit_is_none(machine: Path) -> None:
    files = {
        "cpu.cfs_quota_us": "-1\n",
        "cpu.cfs_period_us": "100000\n",
        "memory.limit_in_bytes": "9223372036854771712\n",
    }
    mount(machine, "4:memory:/\n3:cpu:/\n", "/", "cgroup", "cpu,memory", files)
    assert (capacity.processors(), capacity.memory_bytes()) == (8, 64 * GIB)


def test_limits_and_affinity_of_the_process_count_too() -> None:
    script = f"""
import os, resource
from mvmci.system import capacity
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
resource.setrlimit(resource.RLIMIT_AS, ({GIB}, {GIB}))
print(capacity.processors(), capacity.memory_bytes() <= {GIB})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "1 True\n"
