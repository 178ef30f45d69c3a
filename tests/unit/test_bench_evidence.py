"""What two looks come to: shares of the time between, of loops, slots and machines."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from mvmci.bench.evidence import Look, machines, seen_between, weigh
from mvmci.cluster.deployment import Unit
from mvmci.cluster.metrics import Histogram, UnitMetrics
from mvmci.system.usage import Cgroup, Machine, Process, boot_id

US = 1_000_000
IDLE = Process(
    loop_ran_us=0,
    loop_waited_us=0,
    cpu_us=0,
    children_us=0,
    children_waited_us=0,
    memory_bytes=0,
    files=0,
)


def machine(busy_s: float, *, boot: str = "a", processors: int = 2) -> Machine:
    return Machine(
        boot=boot,
        processors=processors,
        busy_us=int(busy_s * US),
        memory_bytes=1 << 30,
        free_bytes=1 << 29,
        stalled={},
    )


def unit(at_s: float, name: str = "executor-1", **more: object) -> UnitMetrics:
    told: dict[str, object] = {
        "role": name.rpartition("-")[0],
        "machine": machine(0.0),
        "process": IDLE,
        "cgroup": Cgroup(throttled_us=0, killed=0, memory_bytes_max=0),
        "slots": 2,
    }
    empty = {name: Histogram() for name in ("writes", "orders", "late", "round_trips")}
    return UnitMetrics(unit=name, incarnation="i", host="h", at_us=int(at_s * US), **empty, **(told | more))  # type: ignore[arg-type]


def look(
    at_s: float, *units: UnitMetrics, busy_s: float = 0.0, family_s: float = 0.0, cluster_s: float = 0.0
) -> Look:
    return Look(
        at=at_s,
        machine=machine(busy_s),
        family_us=int(family_s * US),
        own=IDLE,
        cluster_us=int(cluster_s * US),
        started={one.unit: one.incarnation for one in units},
        units={one.unit: one for one in units},
    )


def process(**more: float) -> Process:
    told = {name: int(seconds * US) for name, seconds in more.items()}
    return Process(**({name: getattr(IDLE, name) for name in IDLE.__struct_fields__} | told))


def test_others_are_what_neither_the_cluster_nor_the_load_took_of_all_processors() -> None:
    seen = seen_between(look(0), look(10, busy_s=15, family_s=9), is_local=True, slotted=())
    assert (seen.busy, seen.others) == (pytest.approx(0.75), pytest.approx(0.3))


def test_what_other_clusters_of_the_run_take_is_told_apart() -> None:
    before, after = look(0), look(10, busy_s=15, family_s=9, cluster_s=6)
    after = dataclasses.replace(after, own=process(cpu_us=1.0))
    seen = seen_between(before, after, is_local=True, slotted=())
    assert weigh(seen, seen, failed=0).beside == seen.beside == pytest.approx(0.1)
    assert seen_between(before, after, is_local=False, slotted=()).beside == 0.0


def test_of_units_elsewhere_each_machine_is_seen_by_what_they_tell() -> None:
    before = look(0, unit(100, machine=machine(0, boot="b", processors=4)))
    used = process(cpu_us=2.0, children_us=10.0)
    after = look(10, unit(110, machine=machine(36, boot="b", processors=4), process=used))
    seen = seen_between(before, after, is_local=False, slotted=())
    assert (seen.busy, seen.others) == (pytest.approx(0.9), pytest.approx(0.6))


def test_a_loop_ran_and_waited_for_so_much_of_its_own_time() -> None:
    before = look(0, unit(100))
    after = look(10, unit(120, process=process(loop_ran_us=5.0, loop_waited_us=1.0), machine=machine(10)))
    (loop,) = seen_between(before, after, is_local=True, slotted=()).units
    assert (loop.unit, loop.role) == ("executor-1", "executor")
    assert (loop.ran, loop.waited, loop.idle) == (
        pytest.approx(0.25),
        pytest.approx(0.05),
        pytest.approx(0.75),
    )


def test_slots_are_those_of_the_units_that_are_looked_at() -> None:
    before = look(0, unit(0), unit(0, "worker-1", slots=8))
    jobs = {"succeeded": 20, "failed": 10}
    after = look(10, unit(10, slot_us=15 * US, jobs=jobs), unit(10, "worker-1", slots=8, slot_us=80 * US))
    seen = seen_between(before, after, is_local=True, slotted={"executor-1"})
    assert (seen.slots_taken, seen.in_slot_ms) == (pytest.approx(0.75), pytest.approx(500))


def test_a_unit_that_tells_nothing_is_left_out() -> None:
    before, after = look(0, unit(0), unit(0, "worker-1")), look(10, unit(10), unit(10, "worker-2"))
    seen = seen_between(before, after, is_local=True, slotted=())
    assert [one.unit for one in seen.units] == ["executor-1"]


def test_a_unit_that_was_started_again_or_left_is_told() -> None:
    before = look(0, unit(0), unit(0, "worker-1"), unit(0, "worker-2"))
    after = look(10, unit(10), msgspec.structs.replace(unit(10, "worker-1"), incarnation="j"))
    seen = seen_between(before, after, is_local=True, slotted=())
    assert seen.started_again == ["worker-1", "worker-2"]


def placed(**units: tuple[str, str]) -> Any:
    """A candidate elsewhere, whose units are each on a host of its file, which is on a machine."""
    names = {name.replace("_", "-"): place for name, place in units.items()}

    async def ask(asked: set[str]) -> dict[str, UnitMetrics]:
        booted = {name: names[name][1] for name in asked}
        return {name: unit(0, name, machine=machine(0, boot=boot)) for name, boot in booted.items()}

    async def broker() -> SimpleNamespace:
        return SimpleNamespace(version="2.15")

    return SimpleNamespace(
        is_local=False,
        units=[Unit(name=name, role="worker", host=host) for name, (host, _) in names.items()],
        beside_broker={"worker-2"},
        asker=SimpleNamespace(ask=ask),
        broker=broker,
    )


async def test_machines_are_all_on_which_units_are_and_the_one_that_makes_the_load() -> None:
    here, *there = await machines([placed(worker_1=("a", "x"), worker_2=("b", "y"), worker_3=("c", "y"))])
    assert (here.hosts, bool(here.kernel), here.nats) == ([], True, "")
    assert [(one.name, one.hosts, one.nats) for one in sorted(there, key=lambda one: one.name)] == [
        ("a", ["a"], ""),
        ("b, c", ["b", "c"], "2.15"),
    ]


async def test_hosts_that_are_this_machine_are_one_with_it() -> None:
    (here,) = await machines([placed(worker_1=("a", boot_id()), worker_2=("b", boot_id()))])
    assert (here.hosts, here.nats) == (["a", "b"], "2.15")
