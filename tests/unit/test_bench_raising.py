"""What is raised to confirm a bottleneck: the cluster file with more of what was named."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvmci.bench import raising
from mvmci.bench.bottleneck import RAISED
from mvmci.cluster.topology import Topology, read_topology


def topology(access: str, executors: str) -> Topology:
    text = f"cluster: demo\naccess: {access}\nworkers: {{count: 4}}\n{executors}"
    return read_topology(text.encode(), name="demo.yaml")


def test_of_slots_there_are_three_times_as_many() -> None:
    found = raising.more(topology("peer", "executors: {slots: 3}"), RAISED["slots"])
    assert found is not None
    assert found[0].executors is not None and found[0].executors.slots == 9
    assert found[1] == ("3", "9")


@pytest.mark.parametrize("executors", ["executors: {count: 1}", "executors: {slots: 1024}"])
def test_slots_that_would_not_be_more_are_not_raised(executors: str) -> None:
    assert raising.more(topology("peer", executors), RAISED["slots"]) is None


@pytest.mark.parametrize(("inner", "is_theirs"), [("7\n", True), ("7\n8\n", False), ("", False)])
def test_a_cgroup_is_theirs_by_the_processes_of_all_below_it(
    tmp_path: Path, inner: str, is_theirs: bool
) -> None:
    (tmp_path / "unit").mkdir()
    (tmp_path / "cgroup.procs").write_text("")
    (tmp_path / "unit" / "cgroup.procs").write_text(inner)
    assert raising._is_theirs(tmp_path, [7]) is is_theirs


@pytest.mark.parametrize("access", ["peer", "pool"])
def test_of_executors_there_are_twice_as_many_behind_the_broker(access: str) -> None:
    found = raising.more(topology(access, "executors: {slots: 4}"), RAISED["loop"])
    assert found is not None
    more, given = found
    assert more.executors is not None
    assert (more.access, more.executors.count, more.executors.balancer) == ("pool", 2, None)
    assert given == ("1", "2")


def test_over_http_they_are_behind_a_balancer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raising, "find_haproxy", lambda: "haproxy")
    found = raising.more(topology("shared", "executors: {slots: 4}"), RAISED["loop"])
    assert found is not None and found[0].executors is not None
    assert (found[0].access, found[0].executors.balancer) == ("pool", "haproxy")


def test_a_balancer_of_the_users_own_is_left_alone() -> None:
    found = topology("pool", 'executors: {slots: 4, url: "http://balancer:80"}')
    assert raising.more(found, RAISED["loop"]) is None


@pytest.mark.parametrize("cause", ["slots", "loop"])
def test_where_each_worker_has_its_own_engine_there_is_no_more_of_it(cause: str) -> None:
    assert raising.more(topology("per-worker", ""), RAISED[cause]) is None
