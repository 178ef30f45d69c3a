"""What units tell of themselves: histograms, what lies between two answers, and the text for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mvmci.api.metrics import text_of
from mvmci.cluster.metrics import (
    BUCKETS,
    BrokerMetrics,
    Connection,
    Histogram,
    UnitMetrics,
    both,
    broker_cores,
    edges_us,
    machine_rates,
    rates,
)
from mvmci.deploy.measure import _go_us
from mvmci.system import usage
from mvmci.system.usage import Cgroup, Machine, Process

S = 1_000_000
NOTHING = Process(
    loop_ran_us=0,
    loop_waited_us=0,
    cpu_us=0,
    children_us=0,
    children_waited_us=0,
    memory_bytes=5,
    files=6,
)
MACHINE = Machine(
    boot="here", processors=4, busy_us=0, memory_bytes=8, free_bytes=7, stalled={"cpu.some": 0, "io.full": 0}
)
FREE = Cgroup(throttled_us=0, killed=0, memory_bytes_max=0)
BROKER = BrokerMetrics(
    at_us=0,
    version="2",
    cores=0.5,
    memory_bytes=1,
    connected=2,
    slow=0,
    messages_in=3,
    messages_out=4,
    bytes_in=5,
    bytes_out=6,
    stored_messages=7,
    stored_bytes=8,
    stored_bytes_max=9,
    requests=10,
    requests_failed=0,
    connections=[Connection(name="demo/w1", round_trip_us=100, pending_bytes=11)],
)


def histogram(us: Iterable[int]) -> Histogram:
    found = Histogram()
    for one in us:
        found.observe(one)
    return found


def unit(**told: Any) -> UnitMetrics:
    common = {"unit": "w1", "incarnation": "i1", "role": "worker", "host": "h1", "at_us": 0}
    parts = {"machine": MACHINE, "process": NOTHING, "cgroup": FREE}
    seen = {name: Histogram() for name in ("writes", "orders", "late", "round_trips")}
    return UnitMetrics(**common | parts | seen | told)  # type: ignore[arg-type]


def replace(struct: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(struct, **fields)


# ---- Histograms


@pytest.mark.parametrize("us", [0, 1, 124, 125, 249, 250, 999, 5_000, 1_000_000, 10**9])
def test_a_duration_is_counted_between_the_edges_of_its_bucket(us: int) -> None:
    found = histogram([us])
    (place,) = (place for place, count in enumerate(found.buckets) if count)
    low, high = edges_us(place)
    assert low <= us
    assert us < high or place == BUCKETS - 1
    assert (found.count, found.total_us, found.longest_us) == (1, us, us)


def test_buckets_follow_each_other_without_a_gap() -> None:
    edges = [edges_us(place) for place in range(BUCKETS)]
    assert edges[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(edges))


def test_a_quantile_is_within_the_bucket_that_has_it_and_none_of_nothing() -> None:
    found = histogram([100] * 90 + [3_000] * 9 + [60_000])
    assert 0 < found.quantile_us(0.5) <= 125
    assert 2_000 < found.quantile_us(0.95) <= 4_000
    assert 32_000 < found.quantile_us(1.0) <= 64_000
    assert Histogram().quantile_us(0.5) == 0


def test_what_came_since_is_what_was_not_there_before() -> None:
    before = histogram([100, 3_000])
    now = histogram([100, 3_000, 50, 9_000])
    assert now.since(before) == replace(histogram([50, 9_000]), longest_us=9_000)


# ---- Between two answers


def test_rates_are_of_the_time_between_two_answers() -> None:
    now = unit(
        at_us=2 * S,
        slots=4,
        slot_us=3 * S,
        jobs={"ended": 5, "released": 1},
        refused=4,
        process=replace(NOTHING, loop_ran_us=S, loop_waited_us=S // 2, cpu_us=S, children_us=2 * S),
        cgroup=replace(FREE, throttled_us=S, killed=2),
        writes=histogram([3_000] * 10),
        late=histogram([100] * 98 + [9_000] * 2),
    )
    did = rates(unit(), now)
    assert (did.seconds, did.slots_taken, did.jobs, did.refused, did.writes) == (2.0, 1.5, 3.0, 2.0, 5.0)
    assert (did.loop_ran, did.loop_waited, did.cores, did.throttled, did.killed) == (0.5, 0.25, 1.5, 0.5, 2)
    assert did.late_us < 1_000 < did.late_p99_us
    assert 2_000 < did.write_us <= 4_000
    assert did.order_us == 0


def test_what_is_held_back_on_two_processors_is_so_all_the_time() -> None:
    assert rates(unit(), unit(at_us=S, cgroup=replace(FREE, throttled_us=2 * S))).throttled == 1.0


def test_a_unit_that_was_started_again_or_came_meanwhile_has_none() -> None:
    before = {"a": unit(), "b": unit(unit="b")}
    now = {"a": unit(incarnation="i2"), "b": unit(unit="b", at_us=S), "c": unit(unit="c")}
    assert list(both(before, now)) == [(before["b"], now["b"])]


def test_what_nobody_of_ours_used_is_others() -> None:
    """Two units and a broker on one machine, one unit on another."""
    far = replace(MACHINE, boot="far")
    before = {"a": unit(), "b": unit(unit="b"), "c": unit(unit="c", host="h2", machine=far)}
    used = replace(NOTHING, cpu_us=S // 2)
    busy = replace(MACHINE, busy_us=3 * S, stalled={"cpu.some": S // 4, "io.full": 0, "new.some": 9})
    now = {
        "a": unit(at_us=S, machine=busy, process=used),
        "b": unit(unit="b", at_us=S, machine=busy, process=used),
        "c": unit(unit="c", host="h2", at_us=S, machine=far, process=used),
    }
    here, there = machine_rates(before, now, {"here": 0.5})
    assert (here.hosts, here.processors, here.busy, here.ours, here.others) == (["h1"], 4, 3.0, 1.5, 1.5)
    assert here.stalled == {"cpu.some": 0.25, "io.full": 0.0, "new.some": 0.0}
    assert (there.hosts, there.ours, there.others) == (["h2"], 0.5, 0.0)


def test_a_brokers_processors_are_by_its_process_where_that_can_be_seen() -> None:
    was, now = (
        replace(BROKER, at_us=at, process=replace(NOTHING, cpu_us=used)) for at, used in ((0, 0), (2 * S, S))
    )
    assert broker_cores(was, now) == 0.5
    assert broker_cores(BROKER, replace(BROKER, cores=0.25)) == 0.25
    assert broker_cores(None, None) == 0.0


@pytest.mark.parametrize(
    ("text", "us"), [("376µs", 376), ("1.5ms", 1_500), ("1m2.5s", 62_500_000), ("900ns", 1), ("", 0)]
)
def test_a_round_trip_is_read_as_the_broker_writes_it(text: str, us: int) -> None:
    assert _go_us(text) == us


def test_an_answer_of_a_build_that_counts_less_or_more_is_read() -> None:
    told: dict[str, Any] = msgspec.to_builtins(unit(jobs={"ended": 1}))
    assert msgspec.convert(told | {"new": 1}, UnitMetrics).jobs == {"ended": 1}
    del told["jobs"], told["refused"], told["slot_us"]
    assert msgspec.convert(told, UnitMetrics) == unit()


def test_a_histogram_of_other_buckets_is_none() -> None:
    """It could not be compared: what has one is of another build, or of somebody who means harm."""
    told: dict[str, Any] = msgspec.to_builtins(unit())
    for buckets in ([], [0] * (BUCKETS - 1), [0] * (BUCKETS + 1)):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(told | {"writes": [1, 2, 3, buckets]}, UnitMetrics)


# ---- For Prometheus


def samples(text: bytes) -> dict[tuple[str, str, str], float]:
    """By name, unit and what else tells them apart."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = sample.labels
            more = labels.get("outcome") or labels.get("le") or labels.get("resource") or ""
            found[sample.name, labels.get("unit") or labels.get("host") or "", more] = sample.value
    return found


def test_a_resource_that_is_not_known_makes_no_label() -> None:
    """What can be a label comes from lists of ours; a unit tells what it likes."""
    strange = replace(MACHINE, stalled={"cpu.some": 1, "a.b.c": 1, "x": 1, "y.some": 1})
    text = text_of([unit(machine=strange, jobs={"ended": 1, "other": 2})])
    labels = {name[2] for name in samples(text) if name[0] == "mvmci_machine_stalled_seconds_total"}
    assert labels == {"cpu"}
    assert b"other" not in text


def test_all_units_and_their_broker_are_one_text() -> None:
    told = samples(
        text_of(
            [
                unit(slot_us=3 * S, jobs={"ended": 7}, writes=histogram([100, 100, 3_000])),
                unit(unit="w2", refused=2, cgroup=replace(FREE, killed=1)),
            ],
            BROKER,
        )
    )
    assert told["mvmci_unit_slot_seconds_total", "w1", ""] == 3
    assert told["mvmci_unit_runs_total", "w1", "ended"] == 7
    assert told["mvmci_unit_orders_refused_total", "w2", ""] == 2
    assert told["mvmci_unit_oom_kills_total", "w2", ""] == 1
    assert told["mvmci_unit_write_seconds_bucket", "w1", "0.000125"] == 2
    assert told["mvmci_unit_write_seconds_bucket", "w1", "0.004"] == 3
    assert told["mvmci_unit_write_seconds_bucket", "w1", "+Inf"] == 3
    assert told["mvmci_unit_write_seconds_count", "w1", ""] == 3
    assert told["mvmci_unit_write_seconds_sum", "w1", ""] == pytest.approx(0.0032)
    assert told["mvmci_machine_processors", "h1", ""] == 4
    assert told["mvmci_machine_stalled_seconds_total", "h1", "cpu"] == 0
    assert told["mvmci_broker_stored_bytes", "", ""] == 8
    assert told["mvmci_broker_pending_bytes", "", ""] == 11


# ---- Cgroups

V2 = {
    "/proc/self/cgroup": "0::/a.slice/u.service\n",
    "/sys/fs/cgroup/a.slice/u.service/cpu.stat": "usage_usec 9\nthrottled_usec 100\n",
    "/sys/fs/cgroup/a.slice/cpu.stat": "usage_usec 9\nthrottled_usec 20\n",
    "/sys/fs/cgroup/a.slice/u.service/memory.events": "low 0\noom 3\noom_kill 2\n",
    "/sys/fs/cgroup/a.slice/memory.events": "oom_kill 7\n",
    "/sys/fs/cgroup/a.slice/u.service/memory.max": "max\n",
    "/sys/fs/cgroup/a.slice/memory.max": "4096\n",
}
V1 = {
    "/proc/self/cgroup": "4:memory:/d/x\n2:cpu,cpuacct:/d/x\n1:name=systemd:/d/x\n0::/\n",
    "/sys/fs/cgroup/cpu/cpu.stat": "nr_throttled 1\nthrottled_time 120000\n",  # as a container sees its own
    "/sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\noom_kill 2\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n",
    "/sys/fs/cgroup/memory/d/memory.limit_in_bytes": "9223372036854771712\n",
}


@pytest.mark.parametrize("files", [V2, V1], ids=["version 2", "version 1, in a container"])
def test_all_cgroups_in_which_a_process_is_bound_it(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> None:
    monkeypatch.setattr(usage, "_text", lambda path: files.get(path, ""))
    assert usage.cgroup() == Cgroup(throttled_us=120, killed=2, memory_bytes_max=4096)


def test_without_cgroups_there_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    usage.machine()  # what a process keeps of its machine, tests after this one want to be true
    monkeypatch.setattr(usage, "_text", lambda path: "")
    assert usage.cgroup() == FREE
    assert usage.machine().stalled == {}
    assert usage.process(1) == replace(NOTHING, memory_bytes=0, files=usage.process(1).files)
