"""Whom a name means that is to be revoked."""

from __future__ import annotations

import pytest

from mvmci.cluster.deployment import RoleName, Unit
from mvmci.deploy.revoke import Named, know_token, named
from mvmci.errors import NotFound, Usage
from mvmci.store import About, Member
from mvmci.trust.registry import UnitRecord


def unit(name: str, host: str, role: RoleName = "worker") -> Unit:
    return Unit(name=name, role=role, host=host)


def record(host: str = "", revoked: int = 0) -> UnitRecord:
    return UnitRecord(key="U", role="worker", host=host, revoked=revoked)


def member(name: str, host: str) -> Member:
    return Member(unit=name, incarnation="i", about=About(role="worker", host=host))


DEPLOYED = (
    unit("broker-1", "a", "broker"),
    unit("control-plane-1", "a", "control-plane"),
    unit("worker-1", "a"),
    unit("worker-2", "b"),
)
RECORDS = {
    "worker-1": record("box-a"),
    "worker-2": record("box-b"),
    "joined": record("box-a"),
    "build-7": record("build-7"),
    "laptop": record("home"),
}
MEMBERS = (member("worker-1", "box-a"), member("joined", "box-a.lan"), member("executor-9", "gpu"))
PLANES = ("control-plane-1",)


def meant(name: str, kind: str | None = None) -> Named:
    return named(name, DEPLOYED, RECORDS, MEMBERS, PLANES, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["worker-1", "laptop", "control-plane-1", "build-7"])
def test_a_unit_is_itself(name: str) -> None:
    assert meant(name) == Named("unit", (name,))


def test_a_host_of_the_file_is_all_that_is_on_it_and_what_joined_there() -> None:
    assert meant("a") == Named("host", ("control-plane-1", "joined", "worker-1"), ("broker-1",))
    assert meant("b") == Named("host", ("worker-2",))


@pytest.mark.parametrize("name", ["box-a", "Box-A.lan"])
def test_a_host_is_also_what_its_machine_calls_itself(name: str) -> None:
    assert meant(name) == Named("host", ("joined", "worker-1"))


def test_two_hosts_that_call_themselves_alike_are_told_apart_by_the_file() -> None:
    records = {"worker-1": record("debian"), "worker-2": record("debian"), "joined": record("debian")}
    assert named("a", DEPLOYED, records, (), ()).units == ("worker-1",)
    assert named("debian", DEPLOYED, records, (), ()).units == ("joined", "worker-1", "worker-2")


def test_who_was_revoked_is_on_no_host_and_may_be_revoked_again() -> None:
    records = {"old": record("box", revoked=1), "new": record("box")}
    assert named("box", (), records, (), ()).units == ("new",)
    assert named("old", (), records, (), ()) == Named("unit", ("old",))


def test_a_name_of_both_is_asked_about() -> None:
    records = RECORDS | {"build-7-executor": record("build-7")}
    with pytest.raises(Usage, match="build-7 is a unit, and a host with build-7, build-7-executor") as caught:
        named("build-7", DEPLOYED, records, MEMBERS, PLANES)
    assert "--unit" in str(caught.value.hint) and "--host" in str(caught.value.hint)
    assert named("build-7", DEPLOYED, records, MEMBERS, PLANES, "unit").units == ("build-7",)
    assert named("build-7", DEPLOYED, records, MEMBERS, PLANES, "host").units == (
        "build-7",
        "build-7-executor",
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("nowhere", None), ("a", "unit"), ("laptop", "host"), ("executor-9", None), ("gpu", None), ("", None)],
)
def test_what_has_no_credential_is_not_found(name: str, kind: str | None) -> None:
    with pytest.raises(NotFound, match="with a credential"):
        meant(name, kind)


def test_members_know_the_token_of_executors_where_those_listen() -> None:
    executor = Unit(name="executor-1", role="executor", host="b", options=("--listen=0.0.0.0:27288",))
    assert not know_token(("worker-1", "laptop"), DEPLOYED)
    assert know_token(("worker-1", "laptop"), (*DEPLOYED, executor))
    assert know_token(("executor-1",), (*DEPLOYED, executor))
    assert not know_token(("control-plane-1", "laptop"), (*DEPLOYED, executor))
