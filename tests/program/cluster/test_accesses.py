"""One black-box suite over every way to an engine: what a user sees is the same in all of them."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mvmci.trust.client import open_client
from tests.harness.cluster import Cluster
from tests.harness.places import need
from tests.harness.program import Mvmci, at, fresh, steps
from tests.harness.server import Server, serving
from tests.harness.waiting import LONG_S, until

Guest = Callable[[str], Path]
ELSEWHERE_S = 25.0  # five times what is promised
CANCEL_S = 10.0
ACCESSES = {
    "per-worker": "access: per-worker",
    "peer": "access: peer\nexecutors: {slots: 4}",
    "pool": "access: pool\nexecutors: {count: 2, slots: 2}",
    "pool behind HAProxy": "access: pool\nexecutors: {count: 2, slots: 2, balancer: haproxy}",
    "shared": "access: shared\nexecutors: {slots: 4}",
}
EXECUTORS = {"per-worker": 0, "pool": 2, "pool behind HAProxy": 2}  # one, where nothing is said
MEASURED = ("control-plane", "worker", "executor")
BALANCED = ("pool behind HAProxy",)  # those with a balancer
TOPOLOGY = "cluster: demo\n{access}\nworkers: {{count: 2, slots: 4}}\nallow: {{http: ['{url}/*']}}\n"


@dataclasses.dataclass(frozen=True)
class Way:
    """A cluster of one access, and the server that its workflows may call."""

    cluster: Cluster
    access: str
    server: Server

    @property
    def mvmci(self) -> Mvmci:
        return self.cluster.mvmci

    def status(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = self.mvmci.look("status", job)
        return found

    def pid(self, unit: str) -> int:
        pid = self.cluster.pids()[unit]
        assert pid is not None
        return pid


@pytest.fixture(scope="module", params=ACCESSES)
def way(
    request: pytest.FixtureRequest, program: Mvmci, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Way]:
    folder = tmp_path_factory.mktemp("way")
    cluster = Cluster(dataclasses.replace(program, state=folder / "state"), folder / "topology.yaml")
    if request.param in BALANCED:
        need(Path("/usr/sbin/haproxy").exists(), "no haproxy: apt-get install haproxy")
    with serving() as server:
        cluster.write(TOPOLOGY.format(access=ACCESSES[request.param], url=server.url))
        cluster.up()
        yield Way(cluster, request.param, server)
        cluster.down()
    cluster.assert_nothing_is_left()


def test_its_units_are_seen_and_up_again_changes_nothing(way: Way) -> None:
    roles = [unit["role"] for unit in way.cluster.ps()["units"]]
    assert roles.count("executor") == EXECUTORS.get(way.access, 1)
    assert roles.count("balancer") == (way.access in BALANCED)
    assert set(way.cluster.states().values()) == {"ready"}
    before = way.cluster.pids()
    assert "nothing to change" in way.cluster.up().text
    assert way.cluster.pids() == before


def test_a_command_runs_and_its_streams_and_its_end_come_back(way: Way, guest: Guest) -> None:
    job = fresh("hello")
    done = way.mvmci("submit", guest("hello"), "--id", job, "--wait")
    assert done.code == 0, done
    assert done.out
    logs = way.mvmci("logs", job)
    assert (logs.code, logs.out) == (0, done.out)
    assert way.mvmci("submit", guest("exit"), "--wait", "--", "7").code == 1
    found = way.status(job)
    assert found["worker"].startswith("worker-")
    role = "worker" if way.access == "per-worker" else "executor"
    assert found["executor"].startswith(f"{role}-")


def test_a_workflow_has_its_effects_once_and_its_result_comes_back(way: Way, guest: Guest) -> None:
    job = fresh("effects")
    asked = [{"http": {"method": "POST", "url": f"{way.server.url}/{job}/{number}"}} for number in range(3)]
    done = way.mvmci("submit", guest("script"), "--id", job, "--wait", "--input", steps(*asked))
    assert done.code == 0, done
    assert [way.server.count(f"/{job}/{number}") for number in range(3)] == [1, 1, 1]
    assert way.mvmci("replay", job).text.strip() == "identical"


async def life_us(way: Way, job: str) -> int:
    """How long lies between its first message and its end, by the broker."""
    async with open_client(way.cluster.folder) as cluster:
        stored = [entry.stored for entry in await cluster.store.journals.read(job)]
    return (stored[-1] - stored[0]) // 1000


def test_where_the_time_of_a_job_went_is_told_and_the_parts_add_up(way: Way, guest: Guest) -> None:
    def is_timed() -> bool:
        """Offers tell when they were sent from level 1 on, which a new cluster reaches after some seconds."""
        probe = fresh("probe")
        assert way.mvmci("submit", guest("exit"), "--id", probe, "--wait").code == 0
        return bool(way.status(probe)["times"]["order"])

    until(is_timed)
    job = fresh("times")
    url = f"{way.server.url}/{job}"
    way.server.on_request = lambda path: time.sleep(0.1 if path == f"/{job}" else 0.0)
    body = steps({"http": {"method": "POST", "url": url}}, {"sleep": 50})
    assert way.mvmci("submit", guest("script"), "--id", job, "--wait", "--input", body).code == 0

    times = way.status(job)["times"]
    assert times["effects"] >= 150
    assert all(times[part] > 0 for part in ("order", "slot", "compile", "guest", "writes"))
    assert (times["way"] > 0) == (way.access != "per-worker")  # units of one machine have one clock
    us = {part: round(ms * 1000) for part, ms in times.items()}
    assert sum(us.values()) == asyncio.run(life_us(way, job))

    (listed,) = (one for one in way.mvmci.look("list") if one["id"] == job)
    assert listed["times"] == times
    done = way.mvmci.look("history", job)[-1]
    assert done["times"] == {part: value for part, value in us.items() if part != "queue"}
    line = way.mvmci("history", job).text.splitlines()[-1]
    assert all(f"{part} " in line for part in ("job", "effects", "record"))
    table = way.mvmci("list").text.splitlines()
    assert table[0].split()[4:8] == ["WAIT", "COMPILE", "RUN", "RECORD"]
    assert "effects " in way.mvmci("status", job).text


def test_metrics_are_of_every_unit_and_count_what_was_done(way: Way, guest: Guest) -> None:
    assert way.mvmci("submit", guest("exit"), "--wait").code == 0
    units = {unit["name"]: unit for unit in way.cluster.ps()["units"] if unit["role"] in MEASURED}
    told: dict[str, Any] = {}

    def is_counted() -> bool:
        """What is watched is so while somebody asks: it comes with the next question at the latest."""
        nonlocal told
        told = way.mvmci.look("metrics", "--over", "1s")
        found = {one["unit"]: one for one in told["units"]}
        workers = [one for one in found.values() if one["role"] == "worker"]
        return (
            {name: one["role"] for name, one in found.items()}
            == {name: unit["role"] for name, unit in units.items()}
            and sum(one["jobs"].get("ended", 0) for one in workers) > 0
            and sum(one["writes"]["count"] for one in found.values()) > 0
            and sum(one["slot_us"] for one in workers) > 0
            and all(one["late"]["count"] and one["round_trips"]["count"] for one in found.values())
            and all(bool(one["orders"]["count"]) == (way.access != "per-worker") for one in workers)
        )

    until(is_counted, lambda: told)
    assert told["broker"]["stored_messages"] > 0
    local = way.cluster.ps()["runtime"] == "local"
    assert bool(told["broker"]["process"]) == local  # that of a container is not looked at
    (machine,) = told["machines"]
    assert machine["ours"] >= 0
    text = way.mvmci("metrics", "--prometheus").text
    assert all(f'unit="{name}"' in text for name in units)
    assert "mvmci_broker_stored_bytes " in text


def test_an_executor_that_listens_tells_its_own_metrics_too(way: Way) -> None:
    listening = [unit for unit in way.cluster.ps()["units"] if unit["role"] == "executor" and unit["address"]]
    for unit in listening:
        with urllib.request.urlopen(f"http://{unit['address']}/metrics") as answer:
            text = answer.read().decode()
        assert f'unit="{unit["name"]}"' in text
    assert bool(listening) == (way.access in ("shared", *BALANCED))


def test_a_cancel_ends_a_running_job(way: Way, guest: Guest) -> None:
    job = fresh("loop")
    assert way.mvmci("submit", guest("loop"), "--id", job).code == 0
    until(lambda: way.status(job)["status"] == "running", lambda: way.status(job))
    assert way.mvmci("cancel", job).code == 0
    until(lambda: way.status(job)["status"] == "cancelled", lambda: way.status(job))
    assert at(way.mvmci, job, "done") - at(way.mvmci, job, "cancel") < CANCEL_S


@contextmanager
def in_an_effect(way: Way, guest: Guest, job: str) -> Iterator[None]:
    """`job` asks for `a`, `held` and `b`; meanwhile it is in the second, which may be repeated."""
    may_go = threading.Event()

    def hold(path: str) -> None:
        if path == f"/{job}/held":
            may_go.wait(LONG_S)

    asked = [{"method": "POST", "url": f"{way.server.url}/{job}/{name}"} for name in ("a", "held", "b")]
    body = steps(*({"http": one | {"idempotent": "held" in one["url"]}} for one in asked))
    way.server.on_request = hold
    try:
        assert way.mvmci("submit", guest("script"), "--id", job, "--input", body).code == 0
        until(lambda: way.server.count(f"/{job}/held") == 1, lambda: way.status(job))
        yield
    finally:
        may_go.set()


def assert_each_effect_once(way: Way, job: str) -> None:
    """It ends, and what it asked for in `in_an_effect` was seen once, or under one key."""
    done = way.mvmci("wait", job)
    assert done.code == 0, done
    assert [way.server.count(f"/{job}/{name}") for name in "ab"] == [1, 1]
    assert len({key for path, key in way.server.requests if path == f"/{job}/held"}) == 1


@pytest.mark.parametrize("victim", ["worker", "executor"])
def test_whoever_is_killed_a_workflow_goes_on_and_repeats_no_effect(
    way: Way, guest: Guest, victim: str
) -> None:
    job = fresh(f"kill-{victim}")
    with in_an_effect(way, guest, job):
        killed = way.status(job)[victim]
        os.kill(way.pid(killed), signal.SIGKILL)
        killed_at = time.time()
        holder_died = victim == "executor" or way.access == "per-worker"
        if holder_died:
            until(lambda: way.status(job)["epoch"] == 2, lambda: way.status(job))
            assert at(way.mvmci, job, "lease") - killed_at < ELSEWHERE_S
    assert_each_effect_once(way, job)
    assert way.status(job)["epoch"] == (2 if holder_died else 1), "a running job is not started again"
    way.cluster.all_ready()


@pytest.mark.parametrize("victim", ["control-plane", "broker", "balancer"])
def test_whatever_else_is_killed_what_runs_goes_on_and_new_jobs_begin(
    way: Way, guest: Guest, victim: str
) -> None:
    if victim == "balancer" and way.access not in BALANCED:
        pytest.skip("this access has no balancer")
    job = fresh(f"kill-{victim}")
    with in_an_effect(way, guest, job):
        killed = way.pid(f"{victim}-1")
        os.kill(killed, signal.SIGKILL)
        until(lambda: way.cluster.pids()[f"{victim}-1"] not in (killed, None), way.cluster.ps)
        assert way.mvmci("submit", guest("exit"), "--wait").code == 0
    assert_each_effect_once(way, job)
    assert way.status(job)["epoch"] == 1, "its holder lived all the time"
    way.cluster.all_ready()


def test_while_the_control_plane_is_silent_jobs_are_taken_and_end(way: Way, guest: Guest) -> None:
    silent = way.pid("control-plane-1")
    os.kill(silent, signal.SIGSTOP)
    try:
        assert way.mvmci("submit", guest("exit"), "--wait").code == 0
    finally:
        os.kill(silent, signal.SIGCONT)
    way.cluster.all_ready()


def test_a_drained_executor_is_passed_over(way: Way, guest: Guest) -> None:
    if way.access != "pool":
        pytest.skip("it takes two executors")
    assert way.mvmci("drain", "executor-1").code == 0
    for _ in range(3):
        job = fresh("drained")
        assert way.mvmci("submit", guest("exit"), "--id", job, "--wait").code == 0
        assert way.status(job)["executor"] == "executor-2"
    assert way.mvmci("drain", "executor-1", "--undo").code == 0


def test_with_no_executor_jobs_wait_and_say_why_and_none_fails(way: Way, guest: Guest) -> None:
    if way.access != "shared":
        pytest.skip("one access is enough: it has the only executor that workers reach over HTTP")
    supervisor_keeps_it_away = way.pid("executor-1")
    os.kill(supervisor_keeps_it_away, signal.SIGSTOP)
    job = fresh("waits")
    try:
        assert way.mvmci("submit", guest("exit"), "--id", job).code == 0
        until(lambda: way.status(job)["reason"].startswith("waiting: the executor at http://"))
        assert way.status(job)["status"] == "queued"
    finally:
        os.kill(supervisor_keeps_it_away, signal.SIGCONT)
    assert way.mvmci("wait", job).code == 0
