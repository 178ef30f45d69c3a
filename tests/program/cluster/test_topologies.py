"""Accesses and plugins on real clusters: what is refused, and what happens when a move cannot be finished."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.harness.cluster import SMALLEST, Cluster
from tests.harness.places import need
from tests.harness.ports import own_port
from tests.harness.program import assert_sentence
from tests.harness.waiting import until

Make = Callable[..., Cluster]
Guest = Callable[[str], Path]
ONE = SMALLEST.replace("3", "1")
PLUGIN = """
from mvmci.cluster.deployment import BROKER, Deployment, central, executors, workers

def plan(topology):
    units = (*central(topology), *executors(topology{more}), *workers(topology))
    return Deployment(units=units, engine=BROKER)
"""


def plugin(demo: Cluster, more: str = "") -> None:
    demo.file.with_name("mine.py").write_text(PLUGIN.format(more=more))
    demo.write(ONE + "plugin: ./mine.py\nexecutors: {slots: 2}\n")


def planned(demo: Cluster) -> list[dict[str, Any]]:
    changes: list[dict[str, Any]] = demo.mvmci.look("plan", demo.file)["changes"]
    return changes


def listens(changes: list[dict[str, Any]]) -> dict[str, str]:
    """Where units of a plan will listen."""
    return {
        one["name"]: option.partition("=")[2]
        for one in changes
        for option in one["options"]
        if option.startswith("--listen=")
    }


def test_a_plan_of_ones_own_runs_jobs_like_ours_and_a_broken_one_leaves_workers_where_they_are(
    cluster: Make, guest: Guest
) -> None:
    demo = cluster(ONE)
    demo.up()
    worker = demo.pids()["worker-1"]
    # An executor that cannot start: nobody moves, and the sentence says why.
    plugin(demo, ", '--no-such-option'")
    done = demo.mvmci("up", demo.file, "--detach")
    assert done.code == 4, done
    assert "executor-1 went down 5 times: " in done.err
    assert "No such option" in done.err
    assert demo.mvmci("submit", guest("hello"), "--wait").code == 0
    job = demo.jobs()[0]
    assert demo.mvmci.look("status", job)["executor"] == "worker-1"
    # The same file, repaired, goes on from there.
    plugin(demo)
    assert "engine becomes broker" in demo.up().text
    assert demo.ps()["access"] == "plugin"
    assert demo.mvmci("submit", guest("hello"), "--wait").code == 0
    assert demo.mvmci.look("status", demo.jobs()[0])["executor"] == "executor-1"
    # Where every slot is taken for long, that they are is proof enough.
    for job in ("long-1", "long-2"):
        assert demo.mvmci("submit", guest("sleeper"), "--id", job, "--", "9000", "100").code == 0
    until(lambda: demo.units()["executor-1"]["busy"] == 2, demo.units)
    demo.write(demo.file.read_text() + "retain: {logs: 1h}\n")
    assert "every slot is taken: " in demo.up().text
    for job in ("long-1", "long-2"):
        assert demo.mvmci("cancel", job).code == 0
    # What was applied is known without the plugin, which may have changed since, or be gone.
    demo.file.with_name("mine.py").unlink()
    assert demo.states() == dict.fromkeys(demo.states(), "ready")
    assert demo.pids()["worker-1"] == worker
    assert_sentence(demo.mvmci("plan", demo.file), 2, "mine.py, which `plugin` names, cannot be read")
    demo.write(ONE)
    assert "- stop executor-1 on local: once no worker uses it" in demo.up().text
    assert demo.pids()["worker-1"] == worker


def test_a_port_that_somebody_took_meanwhile_is_named_before_anything_was_changed(cluster: Make) -> None:
    demo = cluster(ONE + "access: shared\n")
    (listen,) = listens(planned(demo)).values()
    assert f"+ start executor-1 on local, at {listen}\n" in demo.up().text
    demo.down()
    host, _, port = listen.partition(":")
    with socket.create_server((host, int(port))):
        before = sorted(path.name for path in demo.folder.iterdir())
        for verb in (("plan", demo.file), ("up", demo.file, "--detach")):
            sentence = f"executor-1 cannot listen where it did: port {port} of {host} is in use"
            assert_sentence(demo.mvmci(*verb), 2, sentence, "stop what listens there")
        assert sorted(path.name for path in demo.folder.iterdir()) == before
    demo.up()
    assert listens(planned(demo)) == {}  # there is nothing to change
    demo.down()


def test_a_balancer_of_ones_own_in_front_is_used_by_its_url(cluster: Make, guest: Guest) -> None:
    need(shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin"), "no haproxy: apt-get install it")
    port = own_port()
    url = f"http://127.0.0.1:{port}"
    demo = cluster(ONE + f"access: pool\nexecutors: {{count: 2, url: '{url}'}}\n")
    backends = [f"--backend={name}={listen}" for name, listen in listens(planned(demo)).items()]
    assert len(backends) == 2  # known before anything was started
    (demo.mvmci.state / "front" / "units").mkdir(parents=True)
    front = demo.mvmci.start(
        "balancer", "--cluster", "front", f"--listen=127.0.0.1:{port}", *backends, new_session=True
    )
    try:
        until(lambda: answers(port))
        demo.up()
        assert demo.mvmci("submit", "--cluster", "demo", guest("hello"), "--wait").code == 0
        # Without it, jobs wait and say why, and go on when it is back.
        front.kill()
        assert demo.mvmci("submit", "--cluster", "demo", "--id", "waits", guest("hello")).code == 0
        until(lambda: f"the executor at {url} cannot be reached" in reason(demo, "waits"))
        front = demo.mvmci.start(
            "balancer", "--cluster", "front", f"--listen=127.0.0.1:{port}", *backends, new_session=True
        )
        assert demo.mvmci("wait", "--cluster", "demo", "waits").code == 0
    finally:
        front.kill()
        demo.mvmci("down", "--cluster", "demo")


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def reason(demo: Cluster, job: str) -> str:
    time.sleep(0.1)
    return str(demo.mvmci.look("status", "--cluster", "demo", job)["reason"])
