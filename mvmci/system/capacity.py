"""What this process may use of its machine: an affinity, a container or a service may have less than all."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC = Path("/proc")
_UNLIMITED = 1 << 60  # what the first version of cgroups says for no limit is somewhat more


def processors() -> int:
    """How many processors this process may use: by its affinity and the quotas of its cgroups, at least 1."""
    shares = [share for group in _cgroups() if (share := _quota(group)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *(-int(-share // 1) for share in shares)]))


def memory_bytes() -> int:
    """How much memory this process may have: by the machine, its cgroups and its own limits."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group in _cgroups():
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            text = _read(group / name)
            if text.isdecimal() and int(text) < _UNLIMITED:
                found.append(int(text))
    limits = (resource.getrlimit(number)[0] for number in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return min(found + [limit for limit in limits if limit != resource.RLIM_INFINITY])


def _quota(group: Path) -> float | None:
    """How many processors a cgroup may use at a time."""
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    with contextlib.suppress(ValueError, ZeroDivisionError):
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def _cgroups() -> Iterator[Path]:
    """The folders of the cgroups that we are in and of those above them, as far as they are mounted here."""
    ours = [line.split(":", 2) for line in _read(PROC / "self/cgroup").splitlines()]
    for line in _read(PROC / "self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        root, place = fields.split(" ")[3:5]
        for _, controllers, path in ours:
            named = set(controllers.split(",")) & set(options.rpartition(" ")[2].split(","))
            if (kind == "cgroup2" and not controllers) or (kind == "cgroup" and named):
                with contextlib.suppress(ValueError):
                    beneath = PurePosixPath(path).relative_to(root)
                    yield from (
                        Path(place, *beneath.parts[:depth]) for depth in range(len(beneath.parts) + 1)
                    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
