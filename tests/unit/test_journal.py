"""The fold, the chain and the verdict: what can be said of a job from its records alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mvmci.engines.embedded.effects.http import Http, HttpResponse
from mvmci.jobs.job import Limits, Payload
from mvmci.jobs.journal import (
    AnyRecord,
    Cancel,
    Done,
    Entry,
    Intent,
    Journal,
    Lease,
    Message,
    Progress,
    Released,
    Response,
    Result,
    Spec,
    kind_of,
    status,
    verdict,
)

SPEC = Spec(
    at=1_000,
    id="j1",
    queue="default",
    kind="workflow",
    module="sha256:" + "0" * 64,
    name="flow.wasm",
    component=True,
    limits=Limits(timeout_ms=60_000),
    seed=7,
    by="me",
)


def lease(epoch: int, run: str = "", why: Any = "first") -> Lease:
    return Lease(at=2_000 + epoch, epoch=epoch, unit="w", incarnation="i", run=run or f"r{epoch}", why=why)


def intent(index: int, *, idempotent: bool = False) -> Intent:
    request = Http(method="GET", url=f"http://x/{index}", idempotent=idempotent)
    return Intent(
        at=3_000 + index,
        index=index,
        kind="http",
        digest=request.digest(),
        idempotent=idempotent,
        request=request.fields(),
    )


def result(index: int, tree: str | None = None) -> Result:
    return Result(at=4_000 + index, index=index, value=HttpResponse(status=200).fields(), tree=tree)


DONE = Done(at=9_000, status="succeeded")
CANCEL = Cancel(at=8_000, by="you")
SLEEP = Released(at=5_000, why="sleep", until=99_000)
DRAIN = Released(at=5_000, why="drain")


def build(*messages: list[AnyRecord], job: str = "j1") -> tuple[Journal, list[Entry]]:
    """A journal that absorbed `messages`, and their entries."""
    journal, entries = Journal(job), []
    for seq, records in enumerate(messages, 1):
        entries.append(Entry(seq=seq, data=journal.encode(records, f"m{seq}")))
        journal.absorb(entries[-1:])
    return journal, entries


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([[SPEC]], ("queued", "")),
        ([[SPEC], [lease(1)]], ("running", "")),
        ([[SPEC], [lease(1), intent(0)], [result(0)]], ("running", "")),
        ([[SPEC], [lease(1), SLEEP]], ("suspended", "sleep")),
        ([[SPEC], [lease(1), SLEEP], [lease(2, why="resumed")]], ("running", "")),
        ([[SPEC], [lease(1), DRAIN]], ("queued", "drained")),
        ([[SPEC], [lease(1), DONE]], ("succeeded", "")),
        ([[SPEC], [CANCEL]], ("cancelled", "cancelled by you")),
        ([[SPEC], [lease(1)], [CANCEL]], ("running", "")),
        ([[SPEC], [lease(1), SLEEP], [CANCEL]], ("cancelled", "cancelled by you")),
        ([[SPEC], [lease(1), DRAIN], [CANCEL]], ("cancelled", "cancelled by you")),
        ([[SPEC], [lease(1)], [Done(at=1, status="failed", reason="exit: 3")]], ("failed", "exit: 3")),
    ],
)
def test_status_is_folded_from_the_records(
    messages: list[list[AnyRecord]], expected: tuple[str, str]
) -> None:
    journal, _ = build(*messages)
    assert status(journal.state) == expected


def test_a_lease_that_follows_neither_release_nor_end_counts_as_a_lost_holder() -> None:
    journal, _ = build([SPEC], [lease(1)], [lease(2, why="recovered")], [lease(3, why="recovered")])
    assert (journal.state.lost, journal.state.attempts, journal.state.epoch) == (2, 3, 3)


def test_a_sleep_is_not_an_attempt_and_loses_nobody() -> None:
    journal, _ = build([SPEC], [lease(1), SLEEP], [lease(2, why="resumed"), SLEEP], [lease(3, why="resumed")])
    assert (journal.state.lost, journal.state.attempts) == (0, 1)


def test_a_result_forgives_the_holders_that_were_lost_before_it() -> None:
    journal, _ = build([SPEC], [lease(1), intent(0)], [lease(2, why="recovered")], [result(0)])
    assert journal.state.lost == 0


def test_the_workspace_is_that_of_the_last_result_that_names_one() -> None:
    journal, _ = build([SPEC], [lease(1), intent(0)], [result(0, "t1"), intent(1)], [result(1)])
    assert journal.state.tree == "t1"


def test_the_first_early_response_counts_and_the_newest_progress() -> None:
    responses = [Response(at=1, value=Payload(text=text)) for text in ("1", "2")]
    steps = [Progress(at=1, done=n, total=3, message="") for n in (1, 2)]
    journal, _ = build([SPEC], [lease(1), *responses, *steps])
    assert journal.state.response == Payload(text="1")
    assert journal.state.progress == steps[1]


def test_time_is_up_counted_from_the_first_lease() -> None:
    journal, _ = build([SPEC], [lease(1)], [lease(2, why="recovered")])
    assert journal.state.deadline_ms == 2_001 + 60_000


def test_records_survive_their_encoding() -> None:
    records = [SPEC, lease(1), intent(0), result(0), SLEEP, CANCEL]
    journal, _ = build([SPEC], records[1:])
    assert journal.records == records


@pytest.mark.parametrize("position", range(4))
def test_a_changed_byte_anywhere_is_a_corrupt_journal_and_never_a_silent_continuation(position: int) -> None:
    _, entries = build([SPEC], [lease(1), intent(0)], [result(0)], [DONE])
    data = entries[position].data
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        journal = Journal("j1")
        journal.absorb([*entries[:position], Entry(seq=position + 1, data=changed), *entries[position + 1 :]])
        name, reason = status(journal.state)
        assert name == "errored"
        assert reason.startswith("journal corrupt")


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_message_breaks_the_chain(missing: int) -> None:
    _, entries = build([SPEC], [lease(1), intent(0)], [result(0)], [DONE])
    journal = Journal("j1")
    journal.absorb(entries[:missing] + entries[missing + 1 :])
    assert journal.state.corrupt is not None


def test_the_journal_of_another_job_is_not_taken_for_ones_own() -> None:
    _, entries = build([SPEC])
    journal = Journal("j2")
    journal.absorb(entries)
    assert journal.state.corrupt is not None


@pytest.mark.parametrize("name", ["a b", "a\r\nPUB x 0", "a.b", "a*", "a\n", "", "A"])
def test_a_name_that_would_be_more_than_a_name_in_a_subject_is_a_corrupt_journal(name: str) -> None:
    for records in (
        [msgspec.structs.replace(SPEC, queue=name)],
        [SPEC, msgspec.structs.replace(lease(1), unit=name)],
        [SPEC, msgspec.structs.replace(lease(1), incarnation=name)],
    ):
        journal = Journal("j1")
        for number, record in enumerate(records, 1):
            journal.absorb([Entry(seq=number, data=journal.encode([record], f"m{number}"))])
        assert journal.state.corrupt is not None


def test_nothing_is_read_after_the_end() -> None:
    journal, _ = build([SPEC], [lease(1), DONE], [lease(2)])
    assert journal.state.corrupt is not None


def test_a_lone_end_is_a_tombstone_and_exempt_from_the_chain() -> None:
    _, entries = build([SPEC], [lease(1), DONE])
    journal = Journal("j1")
    journal.absorb(entries[-1:])
    assert journal.state.corrupt is None
    assert journal.state.spec is None
    assert journal.state.done == DONE
    assert journal.state.ended


@pytest.mark.parametrize(
    ("records", "kind"),
    [([SPEC], "spec"), ([lease(1), intent(0)], "run"), ([lease(1), DONE], "done"), ([CANCEL], "cancel")],
)
def test_a_message_is_of_the_kind_of_its_last_record(records: list[AnyRecord], kind: str) -> None:
    assert kind_of(records) == kind


# What a refused or unanswered write of run "me" at epoch 2 comes to. `known` is what it had read,
# `news` what it finds now, as (message id, records).
ME = lease(2, run="me", why="recovered")
OTHER = lease(2, run="you", why="recovered")
LATER = lease(3, run="you", why="recovered")
OLD = lease(1, run="old")


@pytest.mark.parametrize(
    ("known", "news", "expected"),
    [
        # My lease is not on disk yet.
        ([[SPEC], [OLD]], [], "retry"),
        ([[SPEC], [OLD]], [("mine", [ME])], "written"),
        ([[SPEC], [OLD]], [("x", [OTHER])], "fenced"),
        ([[SPEC], [OLD]], [("x", [LATER])], "fenced"),
        ([[SPEC], [OLD]], [("x", [result(0)])], "reread"),
        ([[SPEC], [OLD]], [("x", [CANCEL])], "retry"),
        ([[SPEC]], [("x", [CANCEL])], "fenced"),
        ([[SPEC], [OLD]], [("x", [DONE])], "fenced"),
        # It is.
        ([[SPEC], [ME]], [], "retry"),
        ([[SPEC], [ME]], [("mine", [intent(0)])], "written"),
        ([[SPEC], [ME]], [("x", [CANCEL])], "retry"),
        ([[SPEC], [ME]], [("mine", [intent(0)]), ("x", [CANCEL])], "written"),
        ([[SPEC], [ME]], [("x", [LATER])], "fenced"),
        # Fencing comes before "my message is there": a deposed holder does not go on.
        ([[SPEC], [ME]], [("mine", [intent(0)]), ("x", [LATER])], "fenced"),
        ([[SPEC], [ME]], [("mine", [intent(0)]), ("x", [CANCEL]), ("y", [DONE])], "fenced"),
        ([[SPEC], [ME]], [("mine", [DONE])], "written"),
        ([[SPEC], [ME]], [("mine", [SLEEP]), ("x", [CANCEL])], "written"),
        ([[SPEC], [ME]], [("x", [DONE])], "fenced"),
    ],
)
def test_a_refused_write_is_judged_in_the_order_that_carries_the_promise(
    known: list[list[AnyRecord]], news: list[tuple[str, list[AnyRecord]]], expected: str
) -> None:
    journal, _ = build(*known)
    found: list[Message] = []
    for name, records in news:
        entry = Entry(seq=journal.tail + 1, data=journal.encode(records, name))
        found += journal.absorb([entry])
    assert verdict(journal, found, run="me", epoch=2, message_id="mine") == expected


def test_a_job_that_is_gone_fences_its_holder() -> None:
    assert verdict(Journal("j1"), [], run="me", epoch=2, message_id="mine") == "fenced"
