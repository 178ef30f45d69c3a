"""`metrics` from outside: which units it asks, what it says of silent ones, and what Prometheus reads."""

from __future__ import annotations

import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster
from tests.harness.ports import own_port
from tests.harness.program import Outcome, assert_sentence
from tests.harness.waiting import until

WORKERS = ["worker-1", "worker-2", "worker-3"]


def names(told: dict[str, list[dict[str, str]]]) -> list[str]:
    return [one["unit"] for one in told["units"]]


def asked(demo: Cluster, *words: str, err: str = "") -> Outcome:
    """What `metrics` says once none is silent but who is to be: on a busy machine any may be, for once."""
    told: list[Outcome] = []

    def is_told() -> bool:
        told.append(demo.mvmci("metrics", *words))
        return re.fullmatch(err, told[-1].err) is not None

    until(is_told, lambda: told[-1])
    return told[-1]


def test_a_table_has_a_line_for_each_unit_its_machine_and_the_broker(demo: Cluster) -> None:
    done = asked(demo, "--over", "200ms")
    assert done.code == 0
    lines = done.text.splitlines()
    assert lines[0].split()[:5] == ["UNIT", "ROLE", "HOST", "SLOTS", "JOBS/S"]
    assert [line.split()[0] for line in lines[1:5]] == ["control-plane-1", *WORKERS]
    assert lines[6].split()[:3] == ["MACHINE", "PROCESSORS", "BUSY"]
    assert lines[-1].startswith("broker: ")


def test_who_is_named_is_asked_and_nobody_else(demo: Cluster) -> None:
    told = asked(demo, "worker-2", "worker-1", "--over", "100ms", "--json").json
    assert (names(told), told["broker"], told["silent"]) == (["worker-1", "worker-2"], None, [])
    told = asked(demo, "broker-1", "--over", "100ms", "--json").json
    assert names(told) == []
    assert told["broker"]["connected"] > 0
    assert_sentence(demo.mvmci("metrics", "worker-9"), 2, "no unit worker-9 of demo is there", "worker-3")


def test_a_unit_that_is_stopped_is_named_and_the_others_are_told_of(demo: Cluster) -> None:
    pid = demo.pids()["worker-2"]
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        done = asked(demo, "worker-1", "worker-2", "--over", "100ms", err="worker-2 told nothing: .*\n")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.code == 0
    assert "worker-1 " in done.text


def test_prometheus_reads_all_units_at_one_address_until_it_is_ended(demo: Cluster, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-the-tests")
    url = f"127.0.0.1:{own_port()}"
    running = demo.mvmci.start("metrics", "--listen", url, "--token-file", token)
    running.hears(f"metrics of demo at http://{url}/metrics", "err")
    for _ in range(2):
        request = urllib.request.Request(
            f"http://{url}/metrics", headers={"Authorization": f"Bearer {token.read_text()}"}
        )
        with urllib.request.urlopen(request) as answer:
            text = answer.read().decode()
        assert all(f'unit="{name}"' in text for name in WORKERS)
        assert "mvmci_broker_connections " in text
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://{url}/metrics")
    running.signal(signal.SIGINT)
    assert running.end().code == 130


def test_what_cannot_be_is_refused_in_a_sentence(demo: Cluster) -> None:
    assert_sentence(demo.mvmci("metrics", "--json", "--prometheus"), 2, "exclude each other")
    assert_sentence(demo.mvmci("metrics", "--listen", "0.0.0.0"), 2, "needs --token-file")
    assert_sentence(demo.mvmci("metrics", "--listen", "nowhere:x"), 2, "not of the form HOST:PORT")
    assert_sentence(demo.mvmci("metrics", "--over", "0s"), 2)


def test_a_cluster_that_is_down_is_said_to_be(cluster: Callable[..., Cluster]) -> None:
    one = cluster()
    one.up()
    one.down()
    assert_sentence(one.mvmci("metrics"), 6, "demo is down here", "`mvmci up")
    assert_sentence(one.mvmci("metrics", "--prometheus"), 6, "demo is down here")
