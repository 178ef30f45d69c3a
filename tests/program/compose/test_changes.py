"""The same on containers: what `plan` names is what `up` touches."""

from __future__ import annotations

from pathlib import Path

from tests.harness.cluster import Cluster
from tests.harness.docker import Docker
from tests.program.cluster.test_changes import apply, exercise


def test_what_plan_names_is_what_up_touches(cluster: Cluster, docker: Docker, tmp_path: Path) -> None:
    base = f"runtime: compose\ncompose: {{base: '{docker.base}'}}\n"
    exercise(cluster, base, tmp_path)


def test_what_is_said_of_containers_alone_restarts_those_that_it_is_for(
    cluster: Cluster, docker: Docker
) -> None:
    base = f"runtime: compose\ncompose: {{base: '{docker.base}', memory: 640MiB}}\n"
    base += "broker: {store: 11GiB}\n"  # a broker that is given less does not take its streams again
    done = apply(cluster, "cluster: demo\nworkers: {count: 2, slots: 1}\n" + base)
    assert {"worker-1", "worker-2"} <= done
