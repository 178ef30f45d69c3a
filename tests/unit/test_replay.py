"""The matcher, virtual time and seeded chance."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvmci.engines.embedded.effects import show
from mvmci.engines.embedded.effects.exec import Exec
from mvmci.engines.embedded.effects.http import Http, HttpResponse
from mvmci.engines.embedded.effects.sleep import Sleep
from mvmci.errors import Nondeterminism
from mvmci.jobs import effect
from mvmci.jobs.journal import AnyRecord, Done, Intent, Lease, Released, Result
from mvmci.jobs.replay import Live, Recorded, RecordedEffect, Replay, steps
from mvmci.sandbox.determinism import Chance, VirtualClock

GET = Http(method="GET", url="http://x/a")
PUT = Http(method="PUT", url="http://x/b", idempotent=True)
RUN = Exec(argv=("git", "status"))
NAP = Sleep(ms=50)
OK = HttpResponse(status=200, body="yes")


def intent(index: int, request: effect.Request) -> Intent:
    return Intent(
        at=10 + index,
        index=index,
        kind=request.kind,
        digest=request.digest(),
        idempotent=request.idempotent,
        request=request.fields(),
    )


def result(index: int) -> Result:
    return Result(at=100 + index, index=index, value=OK.fields())


def lease(epoch: int) -> Lease:
    return Lease(at=1_000 * epoch, epoch=epoch, unit="w", incarnation="i", run=f"r{epoch}", why="recovered")


def replay_of(records: list[AnyRecord]) -> Replay:
    return Replay(records, show)


def test_recorded_requests_are_answered_from_the_journal_and_the_next_goes_live() -> None:
    replay = replay_of([lease(1), intent(0, GET), result(0)])
    assert replay.ask(GET) == Recorded(0, 100, OK.fields(), None, None)
    assert replay.live
    assert replay.ask(PUT) == Live(1, None)


def test_an_effect_that_was_begun_by_a_lost_holder_is_interrupted_at_the_next_lease() -> None:
    records: list[AnyRecord] = [lease(1), intent(0, GET), lease(2), lease(3)]
    assert replay_of(records).ask(GET) == Recorded(
        0, 2_000, effect.Error(why="interrupted").fields(), None, None
    )


def test_an_idempotent_effect_is_done_again_under_the_same_intent() -> None:
    begun = intent(0, PUT)
    assert replay_of([lease(1), begun, lease(2)]).ask(PUT) == Live(0, begun)


def test_a_sleep_is_gone_on_with_after_a_release() -> None:
    begun = intent(0, NAP)
    records: list[AnyRecord] = [lease(1), begun, Released(at=20, why="sleep", until=60), lease(2)]
    assert replay_of(records).ask(NAP) == Live(0, begun)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Http(method="GET", url="http://x/b"), "effect 0: expected http GET http://x/a, got http GET"),
        (Http(method="GET", url="http://x/a", body="!"), "effect 0"),
        (RUN, "got exec git status"),
        (NAP, "got sleep 50 ms"),
    ],
)
def test_another_request_than_the_recorded_one_is_nondeterminism(asked: effect.Request, words: str) -> None:
    with pytest.raises(Nondeterminism, match=words):
        replay_of([lease(1), intent(0, GET), result(0)]).ask(asked)


def test_records_left_over_at_the_end_are_nondeterminism() -> None:
    replay = replay_of([lease(1), intent(0, GET), result(0), intent(1, RUN), result(1)])
    replay.ask(GET)
    with pytest.raises(Nondeterminism, match="effect 1: expected exec git status, got the end"):
        replay.finish()


def test_a_replay_that_consumed_everything_may_end() -> None:
    replay = replay_of([lease(1), intent(0, GET), result(0)])
    replay.ask(GET)
    replay.finish()


def test_a_tombstone_has_no_effects_though_its_end_shares_a_message_with_a_result() -> None:
    done = Done(at=200, status="succeeded")
    assert steps([result(0), done]) == []
    assert steps([result(1), intent(2, RUN), result(2), done]) == [RecordedEffect(intent(2, RUN))]


def test_virtual_time_is_that_of_the_last_record_and_a_tick_for_every_look() -> None:
    clock = VirtualClock(1_000)
    assert [clock.now(), clock.now()] == [1_000, 1_001]
    clock.consume(5_000)
    assert [clock.now(), clock.now()] == [5_000, 5_001]


@given(st.lists(st.one_of(st.none(), st.integers(0, 10_000)), max_size=50))
def test_virtual_time_always_goes_forward_even_when_records_do_not(steps: list[int | None]) -> None:
    clock, seen = VirtualClock(0), []
    for step in steps:
        if step is None:
            seen.append(clock.now())
        else:
            clock.consume(step)
    assert seen == sorted(set(seen))


@given(st.integers(0, 2**63 - 1))
def test_chance_is_the_same_for_a_seed_and_fits_in_64_bits(seed: int) -> None:
    one, two = Chance(seed), Chance(seed)
    drawn = [one.next() for _ in range(5)]
    assert drawn == [two.next() for _ in range(5)]
    assert len(set(drawn)) == 5
    assert all(0 <= number < 2**64 for number in drawn)


def test_chance_differs_between_seeds() -> None:
    assert Chance(1).next() != Chance(2).next()
