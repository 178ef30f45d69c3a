"""Where a verb looks for jobs: the cluster that is named, the only one known, or this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.program import Mvmci, assert_sentence

Guest = Callable[[str], Path]
NOWHERE = "nats://127.0.0.1:1"
READING = ["status", "logs", "history", "wait", "cancel", "artifacts", "replay"]


def known(mvmci: Mvmci, *names: str) -> None:
    """Make the machine a client of clusters whose broker is not there."""
    for name in names:
        folder = mvmci.state / name
        folder.mkdir(parents=True)
        login = {"urls": [NOWHERE]}
        identity: dict[str, Any] = {"cluster": name, "unit": "me", "role": "client", "login": login}
        (folder / "client.json").write_text(json.dumps(identity))


def verbs(alone: Mvmci, guest: Guest) -> list[list[str | Path]]:
    return [["list"], ["submit", guest("exit")], *([verb, "a"] for verb in READING)]


def test_where_no_cluster_is_known_there_is_a_hint(alone: Mvmci, guest: Guest) -> None:
    for args in verbs(alone, guest):
        assert_sentence(alone(*args), 6, "no cluster is known here", "`mvmci up`", "`mvmci login @ticket`")
    assert not alone.state.exists()


def test_the_only_one_known_is_meant(alone: Mvmci, guest: Guest) -> None:
    known(alone, "demo")
    (alone.state / "_local").mkdir()
    (alone.state / "other").mkdir()  # a folder that is none of ours
    for args in verbs(alone, guest)[:2]:
        assert_sentence(alone(*args), 6, f"no broker answers at {NOWHERE}")


def test_of_several_one_has_to_be_named(alone: Mvmci, guest: Guest) -> None:
    known(alone, "one", "two")
    for args in verbs(alone, guest):
        assert_sentence(alone(*args), 2, "several clusters are known here: one, two", "--cluster")
    assert_sentence(alone("list", "--cluster", "one"), 6, f"no broker answers at {NOWHERE}")
    assert_sentence(alone("list", MVMCI_CLUSTER="two"), 6, f"no broker answers at {NOWHERE}")


def test_an_unknown_cluster_is_named_beside_the_known_ones(alone: Mvmci) -> None:
    known(alone, "one")
    done = alone("list", "--cluster", "three")
    assert_sentence(done, 6, "the cluster three is not known here; known are one")


@pytest.mark.parametrize("name", ["", "-a", "../a", "A", "_local"])
def test_a_malformed_cluster_name_is_refused(alone: Mvmci, name: str) -> None:
    assert_sentence(alone("list", f"--cluster={name}"), 2, "cannot be a cluster name")


def test_local_wins(alone: Mvmci, guest: Guest) -> None:
    known(alone, "one", "two")
    assert alone("run", guest("exit"), "--id", "a").code == 0
    assert alone("status", "a", "--local", MVMCI_CLUSTER="one").code == 0
    assert alone("wait", "a", "--local").code == 0
    done = alone("cancel", "a", "--local")
    assert (done.code, done.err) == (0, "a had already ended: succeeded\n")


def test_a_machine_that_is_only_a_worker_is_told_to_log_in(alone: Mvmci) -> None:
    (alone.state / "demo" / "units" / "w").mkdir(parents=True)
    assert_sentence(alone("list"), 7, "this machine is no client of demo", "`mvmci login @ticket`")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_identity_is_one_sentence(alone: Mvmci, data: bytes) -> None:
    known(alone, "demo")
    (alone.state / "demo" / "client.json").write_bytes(data)
    assert_sentence(alone("list"), 2, "client.json cannot be read: it is damaged", "log in again")


def test_a_running_job_of_this_machine_is_cancelled_from_another_process(alone: Mvmci, guest: Guest) -> None:
    running = alone.start("run", guest("sleeper"), "--id", "a", "--", "20")
    running.hears("tick 30\n")
    assert alone("cancel", "a", "--local").code == 0
    assert alone("wait", "a", "--local").code == 1
    done = running.end()
    assert done.code == 1
    assert "a cancelled: cancelled by " in done.err
