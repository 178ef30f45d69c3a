"""How each unit of a cluster is: the runtime's word and presence's, put together."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mvmci.cluster.changes import HostRow, Observed
from mvmci.cluster.deployment import Unit
from mvmci.deploy.status import SILENT, SILENT_MS, UnitRow, rows
from mvmci.store import About, Member

NOW_MS = 1_000_000
HERE = "this-machine"
BROKER = Unit(name="broker-1", role="broker", host="local")
W1 = Unit(name="w-1", role="worker", host="local")
W2 = Unit(name="w-2", role="worker", host="local")


def status(unit: Unit, **more: Any) -> Observed:
    told = {"state": "starting", "pid": 11, "since": NOW_MS - 10} | more
    return Observed(name=unit.name, role=unit.role, host=unit.host, **told)


def member(name: str, pid: int = 11, *, holds: Any = (), keeps: Any = (), **about: Any) -> Member:
    told = {"role": "worker", "host": HERE, "slots": 2, "queues": ("default",), "version": "1"} | about
    return Member(unit=name, incarnation="i", holds=holds, keeps=keeps, about=About(pid=pid, **told))


def look(planned: list[Unit], seen: list[Observed], members: list[Member] | None) -> list[UnitRow]:
    return rows(planned, seen, members, here=HERE, now_ms=NOW_MS)


def states(*args: Any) -> list[str]:
    return [row.state for row in look(*args)]


def test_a_unit_is_ready_when_presence_says_so() -> None:
    (row,) = look([W1], [status(W1)], [member("w-1", isolation="confined", labels={"arch": "amd64"})])
    assert row == UnitRow(
        name="w-1",
        role="worker",
        host="local",
        state="ready",
        pid=11,
        slots=2,
        queues=("default",),
        labels={"arch": "amd64"},
        isolation="confined",
        version="1",
    )


def test_a_process_that_nobody_has_heard_of_is_starting_and_after_a_while_down() -> None:
    assert states([W1], [status(W1)], []) == ["starting"]
    (row,) = look([W1], [status(W1, since=NOW_MS - SILENT_MS - 1)], [])
    assert (row.state, row.pid, row.reason) == ("down", 11, SILENT)


def test_where_nobody_could_be_asked_a_process_that_runs_is_starting() -> None:
    old = status(W1, since=NOW_MS - SILENT_MS - 1)
    assert states([BROKER, W1], [status(BROKER), old], None) == ["starting", "starting"]


def test_a_broker_that_was_asked_for_the_members_is_ready() -> None:
    assert states([BROKER], [status(BROKER)], []) == ["ready"]
    assert states([BROKER], [status(BROKER, state="down", pid=None)], []) == ["down"]


def test_a_balancer_is_ready_when_its_runtime_has_heard_it() -> None:
    balancer = Unit(name="balancer-1", role="balancer", host="local")
    assert states([balancer], [status(balancer)], []) == ["starting"]
    assert states([balancer], [status(balancer, since=NOW_MS - SILENT_MS - 1)], []) == ["down"]
    heard = status(balancer, state="ready", since=NOW_MS - SILENT_MS - 1)
    assert states([balancer], [heard], []) == ["ready"]
    assert states([balancer], [heard], None) == ["ready"]


def test_the_word_of_an_earlier_process_does_not_count() -> None:
    assert states([W1], [status(W1, pid=12)], [member("w-1", pid=11)]) == ["starting"]
    assert states([W1], [status(W1, pid=12)], [member("w-1", pid=11), member("w-1", pid=12)]) == ["ready"]
    (row,) = look([W1], [status(W1, state="down", pid=None, reason="no room")], [member("w-1")])
    assert (row.state, row.slots, row.reason) == ("down", 0, "no room")


@pytest.mark.parametrize(
    ("state", "said"), [("draining", "ready"), ("starting", "draining"), ("draining", "draining")]
)
def test_a_unit_drains_when_its_runtime_or_itself_says_so(state: str, said: str) -> None:
    assert states([W1], [status(W1, state=state)], [member("w-1", state=said)]) == ["draining"]


@pytest.mark.parametrize(
    ("state", "drained", "settled"),
    [("starting", True, True), ("starting", False, False), ("draining", True, False)],
    ids=["by the verb", "by a signal", "while it is stopped"],
)
def test_a_unit_that_was_drained_by_the_verb_is_as_it_is_to_be(
    state: str, drained: bool, settled: bool
) -> None:
    (row,) = look([W1], [status(W1, state=state)], [member("w-1", state="draining", drained=drained)])
    assert (row.state, row.is_settled) == ("draining", settled)


def test_who_is_dialled_has_an_address() -> None:
    executor = Unit(name="executor-1", role="executor", host="local", options=("--listen=127.0.0.1:8000",))
    units = [BROKER, executor, W1]
    found = rows(units, map(status, units), [], here=HERE, now_ms=NOW_MS, broker_at="tls://10.0.0.1:4222")
    assert [row.address for row in found] == ["tls://10.0.0.1:4222", "127.0.0.1:8000", None]


@pytest.mark.parametrize("address", ["10.0.0.7", "[fd00::7]", "h1.lan"])
def test_who_is_dialled_on_another_host_has_the_address_of_that_host(address: str) -> None:
    """It listens at every address, which is none."""
    executor = Unit(name="executor-1", role="executor", host="h1", options=("--listen=0.0.0.0:27288",))
    worker = Unit(name="w-1", role="worker", host="h1")
    host = HostRow(name="h1", address=f"{address}:22")
    found = rows([executor, worker], [], None, here=HERE, now_ms=NOW_MS, hosts=[host])
    assert [row.address for row in found] == [f"{address}:27288", None]


def test_what_is_not_running_is_down() -> None:
    assert states([BROKER, W1], [], None) == ["down", "down"]


def test_busy_counts_jobs_that_are_held_or_whose_hints_are_kept_once() -> None:
    (row,) = look([W1], [status(W1)], [member("w-1", holds=("a@1", "b@2"), keeps=("b", "c"))])
    assert row.busy == 3


def test_who_joined_by_hand_is_there_too_behind_the_plan_by_role_and_name() -> None:
    members = [
        member("w-1"),
        member("zoe", pid=21),
        member("adam", pid=22, host="elsewhere"),
        member("plane", pid=23, role="control-plane"),
        member("laptop", pid=24, role="client"),
    ]
    found = look([W1], [status(W1)], members)
    assert [(row.name, row.pid) for row in found] == [
        ("w-1", 11),
        ("plane", 23),
        ("adam", None),  # a number means nothing on another machine
        ("zoe", 21),
    ]


@pytest.mark.parametrize("planned", [[W1], []], ids=["of up", "joined"])
def test_an_identity_that_was_copied_is_there_twice_and_says_so(planned: list[Unit]) -> None:
    here = msgspec.structs.replace(member("w-1"), first=3, last=20)
    there = msgspec.structs.replace(member("w-1", pid=12, host="other"), incarnation="j", first=15, last=19)
    found = look(planned, [status(unit) for unit in planned], [there, here])
    assert sorted((row.pid, row.state) for row in found if row.pid) == [(11, "ready")]
    assert len(found) == 2
    says = "its identity was copied: it runs on other (process 12) and on this-machine (process 11)"
    assert {row.reason for row in found} == {says}


def test_a_unit_that_was_started_again_was_not_copied() -> None:
    before = msgspec.structs.replace(member("w-1"), first=3, last=14)
    now = msgspec.structs.replace(member("w-1", pid=12), incarnation="j", first=15, last=19)
    (row,) = look([W1], [status(W1, pid=12)], [before, now])
    assert (row.pid, row.reason) == (12, None)


def test_a_unit_that_is_planned_no_more_and_has_yet_to_leave_is_there_once() -> None:
    leaving = status(W2, state="draining", pid=12)
    found = look([W1], [status(W1), leaving], [member("w-1"), member("w-2", pid=12)])
    assert [(row.name, row.state) for row in found] == [("w-1", "ready"), ("w-2", "draining")]
