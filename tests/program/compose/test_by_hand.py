"""A rendered folder in the hands of somebody who has only Docker: the first success list of the study.

The folder is made by `mvmci render`; all else is `docker compose`, or `docker-compose`, and clients. Each
bound of the list is asserted at five times its value, and what was measured is printed (`pytest -s`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmci.cluster.identity import decode_ticket
from mvmci.runtimes.compose.render import USER
from mvmci.trust.provision import ControlPlaneConfig
from tests.harness.cluster import Cluster
from tests.harness.program import Mvmci, fresh
from tests.harness.waiting import until
from tests.program.compose.conftest import Docker, Guest, assert_nothing_is_left, containers

UP_S, CONNECTED_S, LATENCY_MS, WORKER_MIB = 60, 30, 500, 300  # the study's
TIMES = 5
LONE_JOBS = 10
SIZES = {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}
TOPOLOGY = """
cluster: demo
access: shared
runtime: compose
executors: {{slots: 4}}
workers: {{count: 3, slots: 1}}
compose: {{base: '{base}'}}
"""


@dataclasses.dataclass
class Hand:
    """A folder whose cluster runs, and what was measured when it came up."""

    docker: Docker
    folder: Path
    cluster: Cluster
    up_s: float = 0.0
    connected_s: float = 0.0

    @property
    def mvmci(self) -> Mvmci:
        return self.cluster.mvmci

    def workers(self) -> list[str]:
        return sorted(name for name, unit in self.cluster.units().items() if unit["role"] == "worker")

    def status(self, job: str) -> Any:
        return self.mvmci.look("status", job)


@pytest.fixture(scope="module")
def hand(contained: Mvmci, docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hand]:
    place = tmp_path_factory.mktemp("hand")
    folder, file = place / "rendered", place / "topology.yaml"
    file.write_text(TOPOLOGY.format(base=docker.base))
    done = contained("render", file, "--format", "compose", "--output", folder)
    assert done.code == 0, done
    found = Hand(docker, folder, Cluster(dataclasses.replace(contained, state=folder / "state"), file))
    docker.compose(folder, "build")
    began = time.monotonic()
    docker.compose(folder, "up", "-d")
    started = time.monotonic()
    until(lambda: found.mvmci("ps", "--json").code == 0)
    found.cluster.all_ready()
    until(lambda: len(found.workers()) == 3, found.cluster.ps)
    found.connected_s, found.up_s = time.monotonic() - started, time.monotonic() - began
    yield found
    assert found.mvmci("down", "--purge").code == 0
    assert_nothing_is_left(docker)


def test_it_is_up_and_its_workers_are_connected_in_time(hand: Hand) -> None:
    print(f"up in {hand.up_s:.1f} s, workers connected in {hand.connected_s:.1f} s")
    assert hand.up_s < TIMES * UP_S
    assert hand.connected_s < TIMES * CONNECTED_S


def test_the_control_plane_starts_without_errors(hand: Hand) -> None:
    said = hand.docker.compose(hand.folder, "logs", "--no-color", "control-plane")
    assert "has joined demo" in said
    assert not re.search(r"error|traceback|critical", said, re.IGNORECASE)


def test_each_compose_program_that_is_here_takes_the_file(hand: Hand) -> None:
    for program in hand.docker.programs():
        told = hand.docker.run(*program, "config", "--services", cwd=hand.folder).split()
        assert set(told) == {"broker", "control-plane", "executor", "worker"}


def test_the_tickets_are_saved_for_any_number_of_machines_and_for_ever(hand: Hand) -> None:
    for role in ("worker", "executor"):
        file = hand.folder / "secrets" / f"{role}.ticket"
        told = hand.mvmci("ticket", "inspect", f"@{file}", "--json").json
        assert (told["cluster"], told["role"], told["expires_at"]) == ("demo", role, None)
    for ticket in hand.mvmci("ticket", "ls", "--json").json:
        assert (ticket["uses"], ticket["expires_at"], ticket["state"]) == (0, None, "open")


def test_jobs_run_and_how_they_stand_and_what_they_print_is_seen_from_this_machine(
    hand: Hand, guest: Guest
) -> None:
    job = fresh("hello")
    done = hand.mvmci("submit", guest("hello"), "--id", job, "--wait")
    assert (done.code, done.text) == (0, "arg hello.wasm\n")
    assert hand.mvmci("logs", job).text == "arg hello.wasm\n"
    found = hand.status(job)
    assert (found["status"], found["executor"]) == ("succeeded", "executor-1")
    assert found["worker"] in hand.workers()


def test_a_lone_job_does_not_take_long(hand: Hand, guest: Guest) -> None:
    took = []
    for _ in range(LONE_JOBS):
        found = hand.mvmci("submit", guest("exit"), "--wait", "--json").json
        began, ended = (datetime.fromisoformat(found[key]) for key in ("submitted_at", "ended_at"))
        took.append((ended - began).total_seconds() * 1000)
    print(f"a lone job: median {statistics.median(took):.0f} ms, longest {max(took):.0f} ms")
    assert statistics.median(took) < TIMES * LATENCY_MS


def test_three_workers_at_once_do_not_disturb_each_other(hand: Hand, guest: Guest) -> None:
    line = json.dumps({"module": str(guest("sleeper")), "args": ["10", "100"]}) + "\n"
    jobs = hand.mvmci("submit", "--batch", "-", stdin=(9 * line).encode()).text.split()
    assert hand.mvmci("wait", *jobs).code == 0
    found = [hand.status(job) for job in jobs]
    assert {one["worker"] for one in found} == {"worker-1", "worker-2", "worker-3"}
    assert {(one["status"], one["attempts"]) for one in found} == {("succeeded", 1)}


def test_a_worker_takes_little_memory(hand: Hand) -> None:
    form = "{{.Name}} {{.MemUsage}}"
    taken = {}
    for line in hand.docker("stats", "--no-stream", "--format", form).splitlines():
        found = re.match(r"mvmci-demo[-_](\S+) ([0-9.]+)([KMG]iB)", line)
        if found is not None:
            taken[found[1]] = float(found[2]) * SIZES[found[3]]
    print("memory:", ", ".join(f"{name} {mib:.0f} MiB" for name, mib in sorted(taken.items())))
    workers = [mib for name, mib in taken.items() if name.startswith("worker")]
    assert len(workers) == 3
    assert max(workers) < TIMES * WORKER_MIB


def test_it_is_scaled_and_each_container_keeps_a_name_of_its_own(hand: Hand) -> None:
    hand.docker.compose(hand.folder, "up", "-d", "--scale", "worker=5")
    names = [f"worker-{number}" for number in range(1, 6)]
    until(lambda: hand.workers() == names and set(hand.cluster.states().values()) == {"ready"})
    before = hand.cluster.pids()
    fourth = containers(hand.docker)["worker-4"]
    hand.docker("restart", "--time", "20", fourth)
    until(lambda: hand.cluster.pids()["worker-4"] not in (before["worker-4"], None), hand.cluster.ps)
    hand.cluster.all_ready()
    assert hand.workers() == names
    assert {**hand.cluster.pids(), "worker-4": 0} == {**before, "worker-4": 0}
    said = hand.docker.compose(hand.folder, "logs", "--no-color", "control-plane")
    assert sorted(re.findall(r"(worker-\d+) has enrolled", said)) == names


def test_containers_are_not_root_and_shut_in(hand: Hand) -> None:
    for name, container in containers(hand.docker).items():
        told = json.loads(hand.docker("inspect", container))[0]
        assert told["Config"]["User"] == f"{USER}:{USER}", name
        assert told["HostConfig"]["CapDrop"] == ["ALL"]
        assert told["HostConfig"]["SecurityOpt"] == ["no-new-privileges:true"]
        assert 0 < told["HostConfig"]["Memory"] <= 8 << 30
        assert told["State"]["Health"]["Status"] in ("healthy", "starting")


def test_no_secret_shows_in_a_container_nor_in_the_image(hand: Hand) -> None:
    secrets = hand.folder / "secrets"
    plane = msgspec.json.decode((secrets / "control-plane.json").read_bytes(), type=ControlPlaneConfig)
    hidden = {plane.seed, plane.signer().seed, (secrets / "engine.token").read_text().strip()}
    hidden |= set((secrets / "broker.key").read_text().splitlines()[1:-1])
    for role in ("worker", "executor"):
        text = (secrets / f"{role}.ticket").read_text().strip()
        hidden |= {text, decode_ticket(text).login.seed, decode_ticket(text).login.jwt}
    assert all(len(secret) > 20 for secret in hidden)
    running = containers(hand.docker)
    image = hand.docker("image", "ls", "-q", "mvmci-demo").split()[0]
    shown = hand.docker("inspect", *running.values()) + hand.docker("image", "inspect", image)
    shown += hand.docker("history", "--no-trunc", image)
    shown += hand.docker.compose(hand.folder, "config")
    for container in running.values():
        shown += hand.docker("exec", container, "env") + hand.docker("top", container, "-eo", "pid,args")
    assert not [secret for secret in hidden if secret in shown]
    for file in secrets.iterdir():
        assert (file.stat().st_mode & 0o777, file.stat().st_uid) == (0o600, USER)
    assert secrets.stat().st_mode & 0o777 == 0o700
    find = ("run", "--rm", "--user", "0", "--entrypoint", "find", image, "/", "-xdev", "-name", "*.ticket")
    kept = hand.docker(*find)
    assert kept == ""


def test_the_same_again_changes_no_file(hand: Hand) -> None:
    def written() -> dict[Path, int]:
        files = [path for path in hand.folder.rglob("*") if path.is_file() and "state" not in path.parts]
        assert len(files) > len(("compose.yaml", "Dockerfile", ".env", "mvmci.pyz"))
        return {path: path.stat().st_mtime_ns for path in files}

    before = written()
    assert hand.mvmci("render", hand.cluster.file, "--output", hand.folder).code == 0
    assert written() == before


def test_a_ticket_that_was_revoked_stays_so(hand: Hand) -> None:
    """Whatever a control plane makes known when it starts. Who came with the ticket stays."""
    ticket = decode_ticket((hand.folder / "secrets" / "worker.ticket").read_text())
    assert hand.mvmci("ticket", "revoke", ticket.id).code == 0
    before = hand.cluster.pids()
    hand.docker("restart", containers(hand.docker)["control-plane-1"])
    until(lambda: hand.cluster.pids()["control-plane-1"] not in (before["control-plane-1"], None))
    hand.cluster.all_ready()
    states = {one["id"]: one["state"] for one in hand.mvmci("ticket", "ls", "--json").json}
    assert states[ticket.id] == "revoked"
    assert len(hand.workers()) == 5
