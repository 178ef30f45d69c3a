"""Raising what was named as the bottleneck, for as long as it takes to see whether the rate moves.

What is raised, and by how much, stands in `mvmci.bench.bottleneck.RAISED`. Here it is done, where that is
possible: slots, and executors beside one whose loop is full, as `up` does with another file; a quota, where
the file of its cgroup is ours to write.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import msgspec

from mvmci.bench.bottleneck import Finding, Raising, raising
from mvmci.bench.stage import SLOTS_MAX, Staged
from mvmci.cluster.topology import ExecutorsSection, Topology
from mvmci.errors import Usage
from mvmci.roles.balancer import find_haproxy
from mvmci.system import usage

Given = tuple[str, str]  # how much there was, and how much there is


@contextlib.asynccontextmanager
async def raised(staged: Staged, found: Finding) -> AsyncIterator[Given | None]:
    """More of what `found` names; None where that cannot be done. Afterwards it is as before.

    Raises what `up` does.
    """
    before, how = staged.topology, raising(found)
    if before is None or how is None:  # a cluster that is not ours to change, or nothing that can be raised
        yield None
    elif how.by == "cgroup" and staged.is_local:
        with _quotas(await _pids(staged, found.whose), how.times) as given:
            yield given
    elif (wanted := more(before, how)) is not None:
        await staged.change(wanted[0])
        try:
            yield wanted[1]
        finally:
            await staged.change(before)
    else:
        yield None


def more(found: Topology, how: Raising) -> tuple[Topology, Given] | None:
    """`found` with more slots of executors, or more of these."""
    executors = found.executors
    if executors is None:
        return None
    if how.by == "file":
        if executors.slots is None:  # as many as its machine has processors
            return None
        slots = min(SLOTS_MAX, round(how.times * executors.slots))
        if slots <= executors.slots:
            return None
        several = msgspec.structs.replace(executors, slots=slots)
        return msgspec.structs.replace(found, executors=several), (str(executors.slots), str(slots))
    if how.by == "units" and _can_be_several(found, executors):
        count = round(how.times * executors.count)
        balancer = "haproxy" if found.access == "shared" else executors.balancer
        several = msgspec.structs.replace(executors, count=count, balancer=balancer)
        given = str(executors.count), str(count)
        return msgspec.structs.replace(found, access="pool", executors=several), given
    return None


def _can_be_several(found: Topology, executors: ExecutorsSection) -> bool:
    """Whether more executors can take part of the work: over HTTP they need what balances them."""
    if found.access == "shared":
        with contextlib.suppress(Usage):
            find_haproxy()
            return True
    return found.access in ("peer", "pool") and executors.url is None


async def _pids(staged: Staged, role: str) -> list[int]:
    """The processes of this machine that are units of `role`."""
    seen = await staged.state.runtime().observe()
    return [one.pid for one in seen if one.role == role and one.pid]


def _is_theirs(cgroup: Path, pids: Sequence[int]) -> bool:
    """Whether nothing but these processes and what they started is there: what bounds others too, as a
    container or a login does, is not ours to raise."""
    theirs = {str(one) for pid in pids for one in (pid, *usage.descendants(pid))}
    try:  # of a cgroup with others below it, these have the processes
        files = [file.read_text().split() for file in cgroup.rglob("cgroup.procs")]
    except OSError:
        return False
    there = {pid for one in files for pid in one}
    return bool(there) and there <= theirs


@contextlib.contextmanager
def _quotas(pids: list[int], times: float) -> Iterator[Given | None]:
    """The cgroups of these processes, with so many times their quota; None where they have none of ours."""
    files = {file for pid in pids if (file := usage.quota_file(pid)) and _is_theirs(file.parent, pids)}
    before = {file: file.read_text().strip() for file in files}
    given = None
    try:
        with contextlib.suppress(OSError):
            for file, text in before.items():
                quota, *rest = text.split()
                more = " ".join([str(round(times * int(quota))), *rest])
                file.write_text(more)
                given = text, more
        yield given
    finally:
        for file, text in before.items():
            with contextlib.suppress(OSError):
                file.write_text(text)
