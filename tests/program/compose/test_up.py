"""`up` with containers: what is there stays, goes down and comes back, on another kind of network."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.harness.cluster import Cluster
from tests.harness.places import need
from tests.harness.program import assert_sentence, fresh
from tests.program.compose.conftest import Docker, Guest, assert_nothing_is_left, containers

LINK = "mvmci-test"  # a cable that leads nowhere, for the network's driver
MACVLAN = f"{{driver: macvlan, options: {{parent: {LINK}}}}}"
TOPOLOGY = """
cluster: demo
runtime: compose
access: shared
workers: {{count: 2, slots: 1}}
compose: {{base: '{base}', memory: 1GiB, network: {network}}}
"""


@pytest.fixture(scope="module")
def demo(cluster: Cluster, docker: Docker) -> Iterator[Cluster]:
    add = ["ip", "link", "add", LINK, "type", "veth", "peer", "name", f"{LINK}-end"]
    done = subprocess.run(add, capture_output=True, text=True, check=False)
    need(done.returncode == 0, f"no network interface can be made: {done.stderr}")
    for name in (LINK, f"{LINK}-end"):
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
    try:
        cluster.write(TOPOLOGY.format(base=docker.base, network=MACVLAN))
        cluster.up()
        yield cluster
    finally:
        cluster.mvmci("down", "--cluster", "demo", "--purge")
        subprocess.run(["ip", "link", "delete", LINK], check=True)


def test_jobs_run_on_a_network_of_another_driver(demo: Cluster, docker: Docker, guest: Guest) -> None:
    assert demo.ps()["runtime"] == "compose"
    assert set(demo.states().values()) == {"ready"}
    names = docker("network", "ls", "--filter", "driver=macvlan", "--format", "{{.Name}}").split()
    assert names == ["mvmci-demo_cluster"]
    assert demo.mvmci("submit", guest("exit"), "--wait").code == 0
    assert demo.mvmci("ticket", "inspect", f"@{demo.folder / 'ticket'}").code == 0


def test_the_same_again_changes_nothing(demo: Cluster) -> None:
    files = [path for path in (demo.folder / "compose").rglob("*") if path.is_file()]
    before, pids = {path: path.stat().st_mtime_ns for path in files}, demo.pids()
    assert "nothing to change" in demo.up().text
    assert demo.mvmci("plan", demo.file, "--exit-code").code == 0
    assert ({path: path.stat().st_mtime_ns for path in files}, demo.pids()) == (before, pids)


def test_a_revoked_container_comes_back_under_a_new_key_and_the_others_stay(
    demo: Cluster, docker: Docker
) -> None:
    before = containers(docker)
    assert demo.mvmci("revoke", "worker-2").code == 0
    done = demo.mvmci("up", demo.file, "--detach")
    while "nothing to change" in done.text or done.code:  # it is not seen to be down yet
        done = demo.mvmci("up", demo.file, "--detach")
    assert "+ start worker-2 on local: is down:" in done.text
    assert set(demo.states().values()) == {"ready"}
    after = containers(docker)
    assert {name for name in before if after[name] != before[name]} == {"worker-2"}


def test_another_cluster_does_not_touch_these_containers(demo: Cluster, docker: Docker) -> None:
    before = containers(docker)
    other = demo.mvmci("up", demo.file, "--detach", "--state", demo.file.parent / "other")
    assert_sentence(other, 2, "the compose project mvmci-demo is there, and is not this cluster's")
    assert containers(docker) == before


def test_it_is_made_anew_and_goes_down_and_comes_back_with_its_jobs(
    demo: Cluster, docker: Docker, guest: Guest
) -> None:
    job = fresh("kept")
    assert demo.mvmci("submit", guest("exit"), "--id", job, "--wait").code == 0
    demo.write(demo.file.read_text().replace(MACVLAN, "{}").replace("1GiB", "512MiB"))
    assert demo.mvmci("plan", demo.file).text.splitlines() == [
        "~ restart broker-1 on local: compose.network changes",
        "~ restart control-plane-1 on local: compose.network changes",
        "~ restart executor-1 on local, at 0.0.0.0:27288: compose.network changes, compose.memory changes",
        "~ restart worker-1 on local: compose.network changes, compose.memory changes",
        "~ restart worker-2 on local: compose.network changes, compose.memory changes",
    ]
    demo.up()
    assert docker("network", "ls", "--filter", "driver=macvlan", "--quiet") == ""
    demo.down()
    assert containers(docker) == {}
    assert set(demo.states().values()) == {"down"}
    demo.up()
    assert demo.mvmci.look("status", job)["status"] == "succeeded"
    demo.down("--purge")
    assert not demo.folder.exists()
    assert_nothing_is_left(docker)
