"""The units that `plan` names are those that `up` stops and starts: no other, and none is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from tests.harness.cluster import Cluster
from tests.harness.program import other_build
from tests.harness.waiting import until

Make = Callable[..., Cluster]
SMALL = "cluster: demo\nworkers: {count: 2, slots: 1}\n"
MORE = SMALL.replace("count: 2", "count: 3")
MOST = SMALL.replace("count: 2", "count: 4")
PEER = "access: peer\nexecutors: {slots: 2}\n"
UNITS = {"broker-1", "control-plane-1", "worker-1", "worker-2"}


def planned(cluster: Cluster) -> tuple[set[str], list[str]]:
    """The units that `plan` names, and what it says to set."""
    told = cluster.mvmci.look("plan", cluster.file)
    return {one["name"] for one in told["changes"]}, told["settings"]


def apply(cluster: Cluster, text: str) -> set[str]:
    """`plan`, `up`; the units that were named, which are those of which the process is another."""
    cluster.write(text)
    named, _ = planned(cluster)
    before = cluster.pids()
    cluster.up()
    after = cluster.pids()
    touched = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert touched == named
    assert planned(cluster) == (set(), [])
    return named


def exercise(cluster: Cluster, base: str, builds: Path) -> None:
    """Each kind of change, alone or beside one that touches other units. `base` ends every file."""
    cluster.write(SMALL + base)
    cluster.up()
    assert set(cluster.pids()) == UNITS
    # One more worker.
    assert apply(cluster, MORE + base) == {"worker-3"}
    # Another build of the program, whose broker is the same, and one more worker at once.
    mvmci = dataclasses.replace(cluster.mvmci, zipapp=other_build(cluster.mvmci.zipapp, builds))
    cluster = dataclasses.replace(cluster, mvmci=mvmci)
    assert apply(cluster, MOST + base) == UNITS - {"broker-1"} | {"worker-3", "worker-4"}
    # Another access.
    assert apply(cluster, MOST + base + PEER) == {"executor-1"}
    # What may be done, which no unit is restarted for; and how much is kept, which the broker is.
    more = base + "allow: {exec: [git]}\nbroker: {store: 11GiB}\n"
    assert apply(cluster, MOST + PEER + more) == {"broker-1"}
    # Back, and fewer: what is left by workers goes too.
    assert apply(cluster, SMALL + more) == {"executor-1", "worker-3", "worker-4"}
    # A unit that was revoked.
    assert cluster.mvmci("revoke", "worker-2").code == 0
    until(lambda: "worker-2" in planned(cluster)[0])
    assert apply(cluster, SMALL + more) == {"worker-2"}
    assert set(cluster.states().values()) == {"ready"}


def test_what_plan_names_is_what_up_touches(cluster: Make, tmp_path: Path) -> None:
    demo = cluster(SMALL)
    exercise(demo, "", tmp_path)
