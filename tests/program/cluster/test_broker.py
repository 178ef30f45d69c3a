"""A broker of the user's own carries a cluster, or is refused before anything is changed; ours moves."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mvmci.roles.broker import find_server
from tests.harness.cluster import SMALLEST, Cluster
from tests.harness.program import Running, assert_sentence
from tests.harness.waiting import until

Make = Callable[..., Cluster]
Guest = Callable[[str], Path]


def test_a_broker_that_is_not_there_is_named_before_anything_was_changed(cluster: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    demo = cluster(SMALLEST + f"broker: {{url: 'nats://127.0.0.1:{port}'}}\n")
    assert_sentence(
        demo.mvmci("up", demo.file, "--detach"), 6, f"no broker answers at nats://127.0.0.1:{port}"
    )
    assert not demo.folder.exists()


@pytest.fixture
def plain_broker(tmp_path: Path) -> Any:
    """Starts a nats-server of the user's own, with these options; its URL."""
    running: list[Running] = []

    def start(*options: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        command = [str(find_server()), "-a", "127.0.0.1", "-p", str(port), *options]
        pipe = subprocess.PIPE
        server_ = Running(subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe))
        running.append(server_)
        server_.hears("Server is ready", "err")
        return f"nats://127.0.0.1:{port}"

    yield start
    for one in running:
        one.kill()


def test_a_broker_without_jetstream_is_refused_before_anything_was_changed(
    cluster: Make, plain_broker: Callable[..., str]
) -> None:
    url = plain_broker()
    demo = cluster(SMALLEST + f"broker: {{url: '{url}'}}\n")
    assert_sentence(demo.mvmci("up", demo.file, "--detach"), 2, url, "it has no JetStream")
    assert not demo.folder.exists()


def test_a_broker_of_ones_own_carries_a_cluster_and_stays_when_it_goes(
    cluster: Make, plain_broker: Callable[..., str], tmp_path: Path
) -> None:
    url = plain_broker("-js", "-sd", str(tmp_path / "store"))
    demo = cluster(SMALLEST.replace("3", "1") + f"broker: {{url: '{url}'}}\n")
    told = demo.up("--json")
    assert "does not tell us whether it syncs" in told.err
    assert "each may do what any other may" in told.err
    assert b"each may do what any other may" in demo.mvmci("doctor").out
    assert [unit["name"] for unit in told.json["units"]] == ["control-plane-1", "worker-1"]
    assert told.json["url"] == url
    assert len(demo.jobs()) == 1
    demo.down("--purge")
    demo.up()
    assert len(demo.jobs()) == 1  # another one: nothing of the first is left


def test_a_cluster_keeps_to_its_broker(cluster: Make) -> None:
    demo = cluster(SMALLEST.replace("3", "1"))
    demo.up()
    demo.write(SMALLEST + "broker: {url: 'nats://127.0.0.1:1'}\n")
    assert_sentence(demo.mvmci("plan", demo.file), 2, "cannot change to another broker")


def test_a_broker_that_moves_takes_everybody_along(cluster: Make, guest: Guest) -> None:
    demo = cluster(SMALLEST.replace("3", "1"))
    demo.up()
    job = demo.mvmci("submit", guest("sleeper"), "--attempts", "1", "--", "50", "60").text.strip()
    until(lambda: demo.units()["worker-1"]["busy"], demo.ps)
    jobs, before = demo.jobs(), demo.pids()
    demo.write(SMALLEST.replace("3", "1") + "broker: {listen: 0.0.0.0}\n")
    done = demo.up()
    assert done.text.count("the broker moves to 0.0.0.0, port ") == 3
    assert not set(before.values()) & set(demo.pids().values())
    assert set(jobs) < set(demo.jobs())
    assert demo.mvmci("wait", job).code == 0
    assert demo.up().text.startswith("nothing to change")
    told = demo.up("--json").json
    assert "127.0.0.1" not in told["url"]  # it is for other machines
    address, _, port = told["url"].partition("://")[2].rpartition(":")
    with socket.create_connection((address.strip("[]"), int(port)), timeout=5) as plain:
        plain.sendall(b"CONNECT {}\r\nPING\r\n")  # a broker without TLS would have answered with INFO
        assert b"INFO" not in plain.recv(100)
