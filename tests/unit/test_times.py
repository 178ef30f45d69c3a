"""Where the time of a job goes: durations by one clock each; what is left of the broker's is the queue's."""

from __future__ import annotations

import contextlib

import msgspec
import pytest

from mvmci.jobs.journal import Cancel, Done, Entry, Journal, Lease, Released, Spec
from mvmci.jobs.summary import TimesSummary, summarise
from mvmci.jobs.times import PARTS, PHASES, WORDS, Moment, Stopwatch, Times, in_phases, in_words
from tests.unit.test_journal import SPEC, lease

MS = 1_000_000


class Clock:
    """A monotonic clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.ns = 5_000 * MS

    def __call__(self) -> int:
        return self.ns

    def pass_us(self, us: int) -> None:
        self.ns += us * 1000


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_moment_counts_for_the_innermost_part_alone(clock: Clock) -> None:
    stopwatch = Stopwatch(clock)
    clock.pass_us(10)
    stopwatch.begin("slot")
    clock.pass_us(20)
    with stopwatch.part("compile"):
        clock.pass_us(300)
    stopwatch.begin("guest")
    clock.pass_us(4_000)
    with stopwatch.part("effects"):
        clock.pass_us(50_000)
        with stopwatch.part("writes"):
            clock.pass_us(600_000)
    clock.pass_us(5)
    times = stopwatch.times()
    assert times == Times(order=10, slot=20, compile=300, guest=4_005, effects=50_000, writes=600_000)
    assert times.total == 654_335


def test_a_part_that_fails_gives_the_time_back(clock: Clock) -> None:
    stopwatch = Stopwatch(clock, order=7, way=9)
    with contextlib.suppress(KeyError), stopwatch.part("layout"):
        clock.pass_us(30)
        raise KeyError
    clock.pass_us(2)
    assert stopwatch.times() == Times(order=7, way=9, layout=30, slot=2)


def test_the_way_of_an_order_is_told_where_one_clock_saw_both_ends() -> None:
    sent = Moment(boot="a start of a machine", at=5_000)
    assert sent.us_until(Moment(boot=sent.boot, at=805_000)) == 800
    assert sent.us_until(Moment(boot="another", at=805_000)) == 0
    assert sent.us_until(Moment(boot=sent.boot, at=0)) == 0  # an order is what somebody sent


def test_times_are_few_bytes_and_what_is_added_later_is_passed_over() -> None:
    times = Times(order=1_234, slot=99_000, guest=2_000_000, writes=5_300)
    written = msgspec.json.encode(times)
    assert len(written) < 60
    assert msgspec.json.decode(written, type=Times) == times
    assert msgspec.json.decode(written[:-1] + b",17]", type=Times) == times
    for hostile in (b"[-1]", b"[1e99]", b'["1"]', b"[9007199254740993]"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(hostile, type=Times)


def ended(*records: object, began_ms: int = 10, ended_ms: int = 1_010) -> Journal:
    """A journal of SPEC and `records`, each a message; the first and last were stored at those times."""
    journal = Journal(SPEC.id)
    for seq, record in enumerate((SPEC, *records), 1):
        stored = (began_ms if isinstance(record, Spec) else ended_ms) * MS
        data = journal.encode([record], f"m{seq}")  # type: ignore[list-item]
        journal.absorb([Entry(seq=seq, data=data, stored=stored)])
    return journal


def test_the_queue_is_what_the_broker_saw_less_all_that_is_accounted_for() -> None:
    journal = ended(lease(1), Done(at=9, status="succeeded", times=Times(slot=1_000, guest=300_000)))
    assert journal.queued_us == 1_000_000 - 301_000
    summary = summarise(journal, result=None, response=None)
    assert summary.times is not None
    assert (summary.times.queue, summary.times.slot, summary.times.guest) == (699.0, 1.0, 300.0)


def test_runs_are_summed_up_and_sleep_is_nobodys() -> None:
    first = Released(at=3_000, why="sleep", until=3_400, times=Times(guest=100_000))
    again = Lease(at=3_400, epoch=2, unit="w", incarnation="i", run="r2", why="resumed")
    journal = ended(lease(1), first, again, Done(at=4_000, status="succeeded", times=Times(guest=50_000)))
    assert journal.state.times == Times(guest=150_000)
    assert journal.queued_us == 1_000_000 - 150_000 - 400_000


def test_a_sleep_that_a_cancel_ends_is_nobodys_either() -> None:
    asleep = Released(at=3_000, why="sleep", until=900_000, times=Times(guest=100_000))
    cancelled = Done(at=3_800, status="cancelled")
    journal = ended(lease(1), asleep, Cancel(at=3_750, by="me"), cancelled)
    assert journal.queued_us == 1_000_000 - 100_000 - 800_000


def test_of_a_tombstone_no_queue_is_told() -> None:
    kept = Journal(SPEC.id)
    data = kept.encode([Done(at=9, status="succeeded", times=Times(guest=5))], "m1")
    kept.absorb([Entry(seq=7, data=data, stored=7 * MS)])
    assert (kept.state.times.guest, kept.queued_us) == (5, None)


def test_the_bytes_of_an_end_are_those_of_before_with_its_times_behind_them() -> None:
    end = Done(at=9, status="succeeded")
    timed = msgspec.structs.replace(end, times=Times(order=152, slot=310, compile=95, guest=1_200))
    was, now = (Journal(SPEC.id).encode([one], "m1") for one in (end, timed))
    assert b'"status":"succeeded"}' in was
    assert b'"status":"succeeded","times":[152,0,310,95,0,1200,0,0]}' in now
    assert len(now) - len(was) < 60


def test_nothing_is_told_of_a_run_of_an_older_build_or_a_store_without_a_clock() -> None:
    old = ended(lease(1), Done(at=9, status="succeeded"))
    assert summarise(old, result=None, response=None).times is None
    folder = ended(lease(1), Done(at=9, status="succeeded", times=Times(guest=5)), began_ms=0, ended_ms=0)
    assert folder.queued_us is None
    times = summarise(folder, result=None, response=None).times
    assert times is not None
    assert (times.queue, times.guest) == (None, 0.005)


def test_every_part_has_its_own_words_in_one_phase() -> None:
    assert list(WORDS) == list(TimesSummary.__struct_fields__)
    assert set(WORDS) == {"queue", "way", *PARTS}
    assert len(set(WORDS.values())) == len(WORDS)
    assert all(word.split(":")[0] in PHASES for word in WORDS.values())


def test_phases_are_sums_of_their_parts_and_what_took_no_time_is_not_said() -> None:
    parts = {"queue": None, "order": 1.0, "slot": 2.0, "compile": 4.0, "effects": 8.0, "writes": 0.0}
    assert in_phases(parts) == {"wait": 3, "compile": 4, "run": 8, "record": 0}
    assert in_words(parts, "{:g}ms".format) == (
        "wait 3ms (engine 1ms, slot 2ms), compile 4ms, run 8ms (effects 8ms)"
    )
    assert in_words({}, str) == ""
