"""Plans: what a cluster file means, when a plan can be no cluster, and what leads from one to another."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvmci import topology
from mvmci.errors import Usage
from mvmci.plan import LOCAL_HOST, UNITS_MAX, Change, Plan, Unit, check, deal, diff
from topologies.per_worker import plan

SHIPPED = Path(topology.__file__).parent.parent / "topologies"


def planned(text: str) -> Plan:
    found = plan(topology.load(text, name="a.yaml"))
    check(found)
    return found


def lines(found: Plan) -> list[str]:
    return [" ".join([unit.name, unit.role, unit.host, *unit.options]) for unit in found.units]


# ---- per-worker


def test_the_file_that_ships_is_a_broker_a_control_plane_and_three_workers() -> None:
    text = (SHIPPED / "per-worker.yaml").read_text()
    assert lines(planned(text)) == [
        "broker-1 broker local",
        "control-plane-1 control-plane local",
        "worker-1 worker local --slots=2 --queue=default",
        "worker-2 worker local --slots=2 --queue=default",
        "worker-3 worker local --slots=2 --queue=default",
    ]


def test_a_count_is_the_total_and_is_dealt_round_the_hosts_that_are_present() -> None:
    text = """
        cluster: demo
        hosts: {a: {}, gone: {state: absent}, b: {}}
        workers: {count: 3}
    """
    assert lines(planned(text)) == [
        "broker-1 broker a",
        "control-plane-1 control-plane a",
        "worker-1 worker a --queue=default",
        "worker-2 worker b --queue=default",
        "worker-3 worker a --queue=default",
    ]


def test_each_role_keeps_to_the_hosts_that_are_named_for_it() -> None:
    text = """
        cluster: demo
        hosts: {a: {}, b: {}, c: {}}
        broker: {hosts: [b]}
        control_plane: {hosts: [a, c]}
        workers: {hosts: [c, b], count: 3, slots: 1}
    """
    assert [line.rpartition(" --slots")[0] or line for line in lines(planned(text))] == [
        "broker-1 broker b",
        "control-plane-1 control-plane a",
        "control-plane-2 control-plane c",
        "worker-1 worker c",
        "worker-2 worker b",
        "worker-3 worker c",
    ]


def test_a_broker_of_ones_own_is_not_started() -> None:
    roles = [unit.role for unit in planned("cluster: d\nworkers: {}\nbroker: {url: 'tls://x:1'}\n").units]
    assert roles == ["control-plane", "worker"]


def test_a_worker_is_told_what_the_file_says_of_workers() -> None:
    text = """
        cluster: demo
        workers: {slots: 4, queues: [default, big], labels: {spot: yes, arch: amd64}}
        min_isolation: confined
        isolation: per-job
    """
    assert planned(text).units[-1].options == (
        "--slots=4",
        "--queue=default",
        "--queue=big",
        "--label=arch=amd64",
        "--label=spot=yes",
        "--min-isolation=confined",
        "--isolation=per-job",
    )


def test_nothing_but_workers_depends_on_what_the_file_says_of_workers() -> None:
    few = planned("cluster: d\nworkers: {count: 3}\n").units
    many = planned("cluster: d\nworkers: {count: 5}\n").units
    assert many[: len(few)] == few


# ---- check


def unit(name: str, role: str = "worker", host: str = LOCAL_HOST, *options: str) -> Unit:
    return Unit(name=name, role=role, host=host, options=options)  # type: ignore[arg-type]


CONTROL = unit("c", "control-plane")


@pytest.mark.parametrize(
    ("units", "sentence"),
    [
        ((CONTROL, unit("w"), unit("w")), "the plan has two units named w"),
        ((CONTROL,), "the plan has no worker"),
        ((unit("w"),), "the plan has no control-plane"),
        ((), "the plan has no control-plane"),
        (
            (CONTROL, *deal("w", "worker", UNITS_MAX, [LOCAL_HOST], ())),
            f"the plan has {UNITS_MAX + 1} units, and may have {UNITS_MAX}",
        ),
    ],
    ids=["twice", "no worker", "no control plane", "nothing", "too many"],
)
def test_a_plan_that_can_be_no_cluster_is_refused(units: tuple[Unit, ...], sentence: str) -> None:
    with pytest.raises(Usage) as caught:
        check(Plan(units=units))
    assert caught.value.message == sentence


@pytest.mark.parametrize("name", ["../up", "Worker", "", "a b", "-x", "x" * 64])
def test_a_strangers_plan_names_no_unit_so_that_it_would_leave_its_folder(name: str) -> None:
    with pytest.raises(Usage, match="name"):
        check(Plan(units=(CONTROL, unit(name))))


# ---- diff


def test_a_plan_leads_to_itself_by_nothing() -> None:
    units = planned("cluster: d\nworkers: {count: 3}\n").units
    assert diff(units, units) == []


def test_from_nothing_everything_starts_in_order() -> None:
    units = planned("cluster: d\nworkers: {count: 2}\n").units
    assert diff((), units) == [Change(kind="start", unit=one) for one in units]


def test_another_count_touches_only_those_that_come_or_go() -> None:
    three = planned("cluster: d\nworkers: {count: 3}\n").units
    five = planned("cluster: d\nworkers: {count: 5}\n").units
    assert [(change.kind, change.unit.name) for change in diff(three, five)] == [
        ("start", "worker-4"),
        ("start", "worker-5"),
    ]
    assert [(change.kind, change.unit.name) for change in diff(five, three)] == [
        ("stop", "worker-4"),
        ("stop", "worker-5"),
    ]


@pytest.mark.parametrize(
    ("was", "becomes", "why"),
    [
        (unit("w"), unit("w", "worker", "b"), "moves from local to b"),
        (
            unit("w", "worker", "a", "--slots=2", "--queue=x"),
            unit("w", "worker", "a", "--slots=4", "--queue=x"),
            "without --slots=2, with --slots=4",
        ),
        (unit("w", "executor"), unit("w"), "was an executor"),
    ],
)
def test_a_unit_that_changes_is_restarted_and_the_change_is_said(was: Unit, becomes: Unit, why: str) -> None:
    assert diff([was], [becomes]) == [Change(kind="restart", unit=becomes, why=why)]


def test_stops_come_last() -> None:
    changes = diff(
        [unit("old"), unit("same"), unit("w", "worker", "a")], [unit("new"), unit("same"), unit("w")]
    )
    assert [(change.kind, change.unit.name) for change in changes] == [
        ("start", "new"),
        ("restart", "w"),
        ("stop", "old"),
    ]
