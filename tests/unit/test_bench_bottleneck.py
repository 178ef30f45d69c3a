"""What bounds a cluster is named from what was seen, causes first, and withdrawn where raising it is vain."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mvmci.bench.bottleneck import (
    FIXED,
    RAISED,
    RULES,
    Evidence,
    Finding,
    Loop,
    find,
    named,
    raising,
    tried,
)


def loops(role: str, count: int = 1, **seen: Any) -> list[Loop]:
    given = {"idle": 0.4, "ran": 0.15, "waited": 0.05, "late_ms": 0.4, "round_trip_ms": 0.9} | seen
    return [Loop(unit=f"{role}-{n}", role=role, **given) for n in range(1, count + 1)]


def shared(
    *,
    executor: dict[str, Any] | None = None,
    workers: dict[str, Any] | None = None,
    all_units: dict[str, Any] | None = None,
    **seen: Any,
) -> Evidence:
    """`shared`, four workers, effects, as a spike saw it on two cores: nothing of the cluster is full."""
    every = all_units or {}
    units = [
        *loops("executor", **({"ran": 0.3, "waited": 0.15} | every | (executor or {}))),
        *loops("worker", 4, **({"order_ms": 1.6} | every | (workers or {}))),
        *loops("control-plane", **({"ran": 0.02, "waited": 0.01} | every)),
    ]
    given = {
        "generator": loops("client", ran=0.08, waited=0.05)[0],
        "units": units,
        "busy": 0.6,
        "others": 0.03,
        "slots_taken": 0.25,
        "in_slot_ms": 140,
        "in_slot_alone_ms": 124,
        "write_ms": 3.0,
        "write_alone_ms": 2.1,
        "round_trip_ms": 0.9,
        "round_trip_alone_ms": 0.7,
        "order_alone_ms": 1.5,
    }
    return Evidence(**(given | seen))


def per_worker(**seen: Any) -> Evidence:
    return Evidence(**{f: getattr(shared(), f) for f in Evidence.__struct_fields__} | seen)


LIGHT = {"in_slot_ms": 2.5, "in_slot_alone_ms": 1.5}
# What was planted, what was seen then, and all that is named, the first first.
PLANTED: dict[str, tuple[Evidence, list[tuple[str, str]]]] = {
    "nothing": (shared(), []),
    "one slot, on a machine that others use": (
        shared(others=0.53, busy=0.8, slots_taken=0.9, in_slot_ms=129),
        [("others", ""), ("slots", "executor")],
    ),
    "three slots": (shared(slots_taken=0.9, in_slot_ms=132, busy=0.4), [("slots", "executor")]),
    "a tenth of a core for the executor": (
        shared(
            executor={"ran": 0.07, "waited": 0.87, "idle": 0.82, "late_ms": 58, "round_trip_ms": 60},
            busy=0.18,
            slots_taken=0.9,
            in_slot_ms=600,
        ),
        [("quota", "executor"), ("loop", "executor")],
    ),
    "a quarter of a core for the executor": (
        shared(executor={"ran": 0.18, "waited": 0.44, "idle": 0.77, "late_ms": 20}, busy=0.23),
        [("quota", "executor")],
    ),
    "the executor stopped for nine tenths of the time": (
        shared(executor={"ran": 0.08, "waited": 0.03, "late_ms": 31, "round_trip_ms": 30}, busy=0.2),
        [("stopped", "executor")],
    ),
    "10 ms each way to the broker": (
        shared(all_units={"round_trip_ms": 22}, workers={"order_ms": 1.6}, round_trip_ms=22, write_ms=24),
        [("network", "")],
    ),
    "3 ms each way to the broker": (
        shared(all_units={"round_trip_ms": 8}, round_trip_ms=8, write_ms=10),
        [("network", "")],
    ),
    "10 ms each way to the executor, of jobs that last": (shared(workers={"order_ms": 22}), []),
    "10 ms each way to the executor, light": (
        shared(workers={"order_ms": 22}, **LIGHT),
        [("way", "executor")],
    ),
    "the executor's own link to the broker, light": (
        shared(executor={"round_trip_ms": 21}, workers={"order_ms": 22}, **LIGHT),
        [("way", "executor")],
    ),
    "the same, at rest as well": (
        shared(workers={"order_ms": 22}, order_alone_ms=21, **LIGHT),
        [("way", "executor")],
    ),
    "the same, at rest as well, of jobs that last": (
        shared(workers={"order_ms": 22}, order_alone_ms=21),
        [],
    ),
    "20 ms to the broker, at rest as well": (
        shared(all_units={"round_trip_ms": 22}, round_trip_ms=22, round_trip_alone_ms=21, write_ms=24),
        [("network", "")],
    ),
    "a slow disk, at rest as well": (
        shared(write_ms=2_400, write_alone_ms=900, busy=0.1),
        [("sync", "broker")],
    ),
    "a machine so full that every way is long": (
        shared(
            all_units={"round_trip_ms": 8}, workers={"order_ms": 22}, round_trip_ms=8, write_ms=60, busy=0.95
        ),
        [("processors", "")],
    ),
    "the executor's loop full, light": (
        shared(executor={"ran": 0.7, "waited": 0.2, "idle": 0.3}, workers={"order_ms": 22}, **LIGHT),
        [("loop", "executor")],
    ),
    "an executor that comes late, light": (
        shared(executor={"late_ms": 4.5}, workers={"order_ms": 7, "late_ms": 0.4}, **LIGHT),
        [],
    ),
    "orders that wait for their turn, light": (
        shared(workers={"order_ms": 4.4}, order_alone_ms=0.9, busy=0.77, **LIGHT),
        [],
    ),
    "the broker's link, light, which orders of `peer` go through too": (
        shared(all_units={"round_trip_ms": 22}, workers={"order_ms": 44}, **LIGHT),
        [("network", "")],
    ),
    "a disk of 60 writes a second": (
        shared(write_ms=2_400, round_trip_ms=1.0, busy=0.1),
        [("sync", "broker")],
    ),
    "a generator of a tenth of a core, light": (
        shared(
            generator=Loop(unit="load", role="client", idle=0.2, ran=0.1, waited=0.34), write_ms=4.5, **LIGHT
        ),
        [("generator", "")],
    ),
    "a generator that computes all the time": (
        shared(generator=Loop(unit="load", role="client", idle=0.1, ran=0.8, waited=0.1)),
        [("generator", "")],
    ),
    "sixteen workers": (
        shared(executor={"ran": 0.55, "waited": 0.34, "late_ms": 3, "idle": 0.19}, busy=0.81, in_slot_ms=413),
        [("loop", "executor")],
    ),
    "sixteen workers, each with its engine": (
        per_worker(
            units=loops("worker", 16, ran=0.2, waited=0.4, late_ms=7, round_trip_ms=6, idle=0.07),
            busy=0.93,
            round_trip_ms=6,
            write_ms=30,
        ),
        [("processors", "")],
    ),
    "all workers at a hundredth of a core": (
        shared(workers={"ran": 0.01, "waited": 0.9, "idle": 0.9, "late_ms": 300, "round_trip_ms": 600}),
        [("quota", "worker"), ("loop", "worker")],
    ),
    "the same, where only the cgroup tells": (
        shared(workers={"ran": 0.01, "waited": 0.0, "throttled": 0.9, "round_trip_ms": 600}),
        [("quota", "worker")],
    ),
    "another program that takes a core": (shared(others=0.5, busy=0.95), [("others", "")]),
    "260 MB for the executor": (
        shared(killed=52, failed=39, executor={"ran": 0.5, "waited": 0.4, "idle": 0.1}),
        [("memory", ""), ("loop", "executor")],
    ),
    "slots that are full because jobs are slow": (shared(slots_taken=1.0, in_slot_ms=400), []),
    "one worker with a slow link": (
        shared(units=[*shared().units, *loops("worker", round_trip_ms=300)]),
        [],
    ),
    "light, whose writes wait for each other": (shared(write_ms=8.0, busy=0.7, **LIGHT), []),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_was_planted_is_what_is_named(planted: str) -> None:
    seen, wanted = PLANTED[planted]
    assert [(one.cause, one.whose) for one in find(seen)] == wanted
    assert named(find(seen)).cause == (wanted[0][0] if wanted else "nothing")


def test_each_rule_is_shown_by_a_case_of_its_own() -> None:
    first = {wanted[0][0] for _, wanted in PLANTED.values() if wanted}
    assert first == {*RAISED, *FIXED}
    assert len(RULES) == len(first)


@pytest.mark.parametrize("planted", [name for name, (_, wanted) in PLANTED.items() if wanted])
def test_why_is_a_sentence_with_the_figures_that_it_rests_on(planted: str) -> None:
    for found in find(PLANTED[planted][0]):
        assert any(letter.isdigit() for letter in found.why)
        assert not found.why.endswith(".")


def test_orders_of_one_worker_alone_that_are_late_say_nothing_of_the_way() -> None:
    seen = shared(workers={"order_ms": 1.6}, order_alone_ms=1.2, **LIGHT)
    for late in (["worker-1"], [one.unit for one in seen.units if one.role == "worker"]):
        units = [
            msgspec.structs.replace(one, order_ms=22.0) if one.unit in late else one for one in seen.units
        ]
        found = find(msgspec.structs.replace(seen, units=units))
        assert [one.cause for one in found] == ["way"] * (len(late) > 1)


def test_a_quota_says_what_held_the_unit_back() -> None:
    seen, _ = PLANTED["a tenth of a core for the executor"]
    assert find(seen)[0].why == (
        "executor-1 ran 7% of the time and waited 87% for a processor while 82% of its machine was idle"
    )
    (of_cgroup,) = find(PLANTED["the same, where only the cgroup tells"][0])
    assert "held back by its limit for 90%" in of_cgroup.why


def test_each_cause_says_what_is_raised_or_why_nothing_can_be() -> None:
    loop = {whose: Finding(cause="loop", whose=whose, why="") for whose in ("executor", "worker")}
    assert raising(loop["executor"]) == RAISED["loop"]
    assert raising(loop["worker"]) is None
    for cause in ("others", "network", "sync", "processors", "memory", "way", "stopped"):
        assert raising(Finding(cause=cause, why="")) is None
        assert FIXED[cause]
    assert {cause: (one.times, one.by) for cause, one in RAISED.items()} == {
        "slots": (3, "file"),
        "quota": (2.5, "cgroup"),
        "loop": (2, "units"),
    }


SLOTS = Finding(cause="slots", whose="executor", why="90% of the slots were taken")


@pytest.mark.parametrize(
    ("before", "after", "noise", "stands"),
    [
        (7.0, 21.5, 0.05, True),  # one slot, three
        (7.0, 7.2, 0.01, False),
        (7.0, 7.7, 0.08, False),  # within what windows differ by
        (7.0, 7.7, 0.02, True),
        (7.0, 0.0, 0.02, False),
    ],
)
def test_a_cause_stands_once_raising_it_has_moved_the_rate(
    before: float, after: float, noise: float, stands: bool
) -> None:
    assert tried(SLOTS, ("1", "3"), (before, after), noise=noise, others=0.0).stands is stands


def test_what_stands_says_how_it_moved_and_what_does_not_is_unclear_with_both() -> None:
    moved = tried(SLOTS, ("1", "3"), (7.0, 21.5), noise=0.05, others=0.0)
    assert (moved.cause, moved.why) == (SLOTS.cause, SLOTS.why)
    assert moved.tried == "raising slots from 1 to 3 moved it: 7.0 → 21.5 jobs/s"
    vain = tried(SLOTS, ("1", "3"), (1_207.0, 1_211.0), noise=0.05, others=0.0)
    assert vain.tried == (
        "it looked like executor's slots, and raising slots from 1 to 3 moved nothing "
        "(1,207.0 → 1,211.0 jobs/s)"
    )
    assert named([vain]) == Finding(cause="unclear", why=vain.tried, stands=False)


def test_what_others_may_have_held_back_is_not_withdrawn() -> None:
    beside = tried(SLOTS, ("1", "3"), (7.0, 7.0), noise=0.05, others=0.3)
    assert beside.stands is None
    assert beside.tried == (
        "raising slots from 1 to 3 told nothing: other programs took 30% of the machine then"
    )
    assert tried(SLOTS, ("1", "3"), (7.0, 21.5), noise=0.05, others=0.3).stands


def test_what_was_withdrawn_gives_way_to_the_next_that_holds() -> None:
    processors = Finding(cause="processors", why="busy")
    vain = tried(SLOTS, ("1", "3"), (7.0, 7.0), noise=0.05, others=0.0)
    assert named([vain, processors]) == processors
    assert named([]).cause == "nothing"
