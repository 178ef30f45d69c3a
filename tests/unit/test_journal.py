"""The fold, the chain and the verdict: what can be said of a job from its records alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mvmci.engines.embedded.effects.http import Http, HttpResponse
from mvmci.errors import VersionsDiffer
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
    Origin,
    Progress,
    Released,
    Response,
    Result,
    Spec,
    kind_of,
    records_of,
    status,
    verdict,
)
from mvmci.wire import WIRE, mark
from tests.harness.newer import NEWER, newer_entry, newer_message

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
ENDED_BY_CANCEL = Done(at=9_000, status="cancelled", reason="cancelled by you")
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
    journal, _ = build([SPEC], records[1:-1], [CANCEL])
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


def test_what_comes_after_the_end_is_ignored() -> None:
    journal, entries = build([SPEC], [lease(1), DONE], [lease(2)])
    assert status(journal.state) == ("succeeded", "")
    journal.absorb([Entry(seq=4, data=b"no message at all"), entries[1]])
    assert status(journal.state) == ("succeeded", "")
    assert [one.why for one in journal.ignored] == ["the job had ended"] * 3
    assert (journal.tail, journal.end) == (2, 2)  # the last of these was entry 2 again


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
        ([[SPEC], [OLD]], [("x", [OTHER]), ("y", [LATER])], "fenced"),
        ([[SPEC], [OLD]], [("x", [result(0)])], "reread"),
        ([[SPEC], [OLD]], [("x", [CANCEL])], "retry"),
        ([[SPEC]], [("x", [CANCEL])], "fenced"),
        ([[SPEC], [OLD]], [("x", [DONE])], "fenced"),
        # It is.
        ([[SPEC], [OLD], [ME]], [], "retry"),
        ([[SPEC], [OLD], [ME]], [("mine", [intent(0)])], "written"),
        ([[SPEC], [OLD], [ME]], [("x", [CANCEL])], "retry"),
        ([[SPEC], [OLD], [ME]], [("mine", [intent(0)]), ("x", [CANCEL])], "written"),
        ([[SPEC], [OLD], [ME]], [("x", [LATER])], "fenced"),
        # Fencing comes before "my message is there": a deposed holder does not go on.
        ([[SPEC], [OLD], [ME]], [("mine", [intent(0)]), ("x", [LATER])], "fenced"),
        ([[SPEC], [OLD], [ME]], [("mine", [intent(0)]), ("x", [CANCEL]), ("y", [ENDED_BY_CANCEL])], "fenced"),
        ([[SPEC], [OLD], [ME]], [("mine", [DONE])], "written"),
        ([[SPEC], [OLD], [ME]], [("mine", [SLEEP]), ("x", [CANCEL])], "written"),
        ([[SPEC], [OLD], [ME]], [("x", [DONE])], "fenced"),
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


# Who may write what: each message below follows the chain, and was written as, where and by whom is said.
FAR = msgspec.structs.replace(SPEC, at=2_000)
HELD: list[list[AnyRecord]] = [[SPEC], [lease(1)]]
ENDED: list[list[AnyRecord]] = [[SPEC], [lease(1), DONE]]
ASLEEP: list[list[AnyRecord]] = [[SPEC], [lease(1), SLEEP]]
LATE = Done(at=2_001 + 60_000, status="timed_out", reason="timeout: more than 1m")
FAILED = Done(at=9_000, status="failed", reason="exit: 1")


@pytest.mark.parametrize(
    ("known", "records", "written", "why"),
    [
        # A spec is one spec, and the first.
        (HELD, [FAR], ("spec", "default", "client"), "a spec before"),
        (HELD, [lease(2), DONE], ("spec", "default", "client"), "a spec before"),
        # A cancel is one cancel.
        (HELD, [CANCEL], ("cancel", "default", "client"), ""),
        (HELD, [lease(2), DONE], ("cancel", "default", "client"), "not one cancel"),
        (HELD, [CANCEL, CANCEL], ("cancel", "default", "client"), "not one cancel"),
        (HELD, [CANCEL], ("run", "default", "w"), "not a holder's"),
        (ENDED, [CANCEL], ("cancel", "default", "client"), "had ended"),
        # Everything is of the queue of the spec.
        (HELD, [CANCEL], ("cancel", "other", "client"), "another queue"),
        (HELD, [lease(2)], ("run", "other", "w"), "another queue"),
        (HELD, [DONE], ("done", "other", "w"), "another queue"),
        # A lease is the next one, in the name of who writes it, and begins a message.
        (HELD, [msgspec.structs.replace(lease(2), unit="you")], ("run", "default", "you"), ""),
        (HELD, [lease(2)], ("run", "default", "you"), "name of another"),
        (HELD, [lease(1)], ("run", "default", "w"), "could not be had"),
        (HELD, [lease(99), DONE], ("done", "default", "w"), "could not be had"),
        (HELD, [intent(0), lease(2)], ("run", "default", "w"), "could not be had"),
        ([[SPEC], [CANCEL]], [lease(1)], ("run", "default", "w"), "could not be had"),
        # All else is its holder's.
        *(
            (HELD, [record], ("run", "default", unit), "" if unit == "w" else "not its holder's")
            for unit in ("w", "you", "client")
            for record in (
                intent(0),
                result(0),
                SLEEP,
                DRAIN,
                Response(at=1, value=Payload(text="1")),
                Progress(at=1, done=1, total=2, message=""),
            )
        ),
        ([[SPEC]], [intent(0)], ("run", "default", "w"), "not its holder's"),
        (ASLEEP, [result(0)], ("run", "default", "w"), "not its holder's"),
        (HELD, [SLEEP, result(0)], ("run", "default", "w"), "not its holder's"),
        # So is its end, and nothing follows that; but one that needs no holder.
        (HELD, [DONE], ("done", "default", "w"), ""),
        (HELD, [DONE], ("done", "default", "you"), "not its holder's"),
        (HELD, [FAILED], ("done", "default", "_control-plane-1"), "not its holder's"),
        ([[SPEC]], [DONE], ("done", "default", "w"), "not its holder's"),
        (HELD, [DONE], ("run", "default", "w"), "not to be written"),
        (HELD, [intent(0)], ("done", "default", "w"), "not to be written"),
        (HELD, [intent(0)], ("hello", "default", "w"), "not to be written"),
        (HELD, [DONE, DONE], ("done", "default", "w"), "after its end"),
        (ASLEEP, [LATE, LATE], ("done", "default", "_control-plane-1"), "not its holder's"),
        (
            ASLEEP,
            [msgspec.structs.replace(LATE, status="failed")],
            ("done", "default", "_control-plane-1"),
            "not its holder's",
        ),
        ([*HELD, [CANCEL]], [DONE], ("done", "default", "w"), "a cancel stands"),
        ([*HELD, [CANCEL]], [ENDED_BY_CANCEL], ("done", "default", "w"), ""),
        ([*HELD, [CANCEL]], [ENDED_BY_CANCEL], ("done", "default", "_control-plane-1"), ""),
        ([[SPEC], [CANCEL]], [ENDED_BY_CANCEL], ("done", "default", "_control-plane-1"), ""),
        (HELD, [ENDED_BY_CANCEL], ("done", "default", "_control-plane-1"), "not its holder's"),
        (ASLEEP, [LATE], ("done", "default", "_control-plane-1"), ""),
        ([*ASLEEP, [CANCEL]], [LATE], ("done", "default", "_control-plane-1"), "not its holder's"),
        (
            ASLEEP,
            [msgspec.structs.replace(LATE, at=LATE.at - 1)],
            ("done", "default", "_control-plane-1"),
            "not its holder's",
        ),
        (
            ASLEEP,
            [msgspec.structs.replace(LATE, result=Payload(text="1"))],
            ("done", "default", "_control-plane-1"),
            "not its holder's",
        ),
    ],
)
def test_a_message_is_taken_in_only_as_what_its_writer_may_say(
    known: list[list[AnyRecord]], records: list[AnyRecord], written: tuple[str, str, str], why: str
) -> None:
    journal, _ = build(*known)
    before, head = len(journal.records), journal.head
    entry = Entry(seq=9, data=journal.encode(records, "x"), origin=Origin(*written))
    taken = journal.absorb([entry])
    assert journal.state.corrupt is None
    assert journal.tail == 9  # what is read on stands behind it, whatever becomes of it
    of_queue = written[1] == SPEC.queue
    assert journal.expect == (9 if of_queue else len(known))  # and so does what is written, on its queue
    assert [one.why for one in journal.ignored] == ([journal.ignored[0].why] if why else [])
    if why:
        assert why in journal.ignored[0].why
        assert (taken, len(journal.records), journal.head) == ([], before, head)
    else:
        assert journal.records[before:] == records


@pytest.mark.parametrize(
    "written", [("spec", "default", "c"), ("cancel", "default", "c"), ("run", "other", "w")]
)
@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 5_000])
def test_bytes_that_can_be_no_holders_are_ignored(written: tuple[str, str, str], data: bytes) -> None:
    journal, _ = build(*HELD)
    journal.absorb([Entry(seq=9, data=data, origin=Origin(*written))])
    assert status(journal.state) == ("running", "")
    journal.absorb([Entry(seq=10, data=journal.encode([DONE], "end"), origin=Origin("done", "default", "w"))])
    assert status(journal.state) == ("succeeded", "")


def test_an_end_that_cannot_be_read_is_ignored_if_it_can_be_no_holders() -> None:
    journal, _ = build(*HELD)
    journal.absorb([Entry(seq=9, data=b"{", origin=Origin("done", "default", "_control-plane-1"))])
    assert status(journal.state) == ("running", "")
    journal.absorb([Entry(seq=10, data=b"{", origin=Origin("done", "default", "w"))])
    assert status(journal.state)[1].startswith("journal corrupt")


@pytest.mark.parametrize(
    "written", [("spec", "default", "c"), ("cancel", "default", "c"), ("run", "default", "w")]
)
def test_a_first_message_that_is_no_spec_is_a_corrupt_journal(written: tuple[str, str, str]) -> None:
    other = msgspec.structs.replace(SPEC, queue="other")
    encode = Journal("j1").encode
    for data in (b"", encode([CANCEL], "x"), encode([other], "x"), encode([SPEC, lease(1)], "x")):
        journal = Journal("j1")
        journal.absorb([Entry(seq=1, data=data, origin=Origin(*written))])
        assert status(journal.state)[1].startswith("journal corrupt")


@pytest.mark.parametrize(
    "spec",
    [
        *(
            msgspec.structs.replace(SPEC, limits=msgspec.structs.replace(SPEC.limits, **{name: value}))
            for name in Limits.__struct_fields__
            for value in (-1, 0, 2**62, 2**70)
        ),
        msgspec.structs.replace(SPEC, at=2**62),
        msgspec.structs.replace(SPEC, at=-1),
        msgspec.structs.replace(SPEC, seed=2**63),
        msgspec.structs.replace(SPEC, name="n" * 300),
        msgspec.structs.replace(SPEC, kind="plan"),
    ],
    ids=str,
)
def test_a_spec_out_of_bounds_is_no_spec(spec: Spec) -> None:
    journal = Journal("j1")
    journal.absorb([Entry(seq=1, data=journal.encode([spec], "x"), origin=Origin("spec", "default", "c"))])
    assert status(journal.state)[1].startswith("journal corrupt")


def known() -> Journal:
    """A journal with a spec and a holder."""
    journal = Journal("j1")
    for records in ([SPEC], [lease(1), intent(0)]):
        data = journal.encode(records, "m")
        journal.absorb([Entry(seq=journal.tail + 1, data=data)])
    return journal


@pytest.mark.parametrize("wire", NEWER)
def test_a_message_of_a_newer_level_is_newer_and_not_corrupt(wire: int) -> None:
    journal = known()
    assert journal.absorb([newer_entry(journal, wire)]) == []
    assert (journal.state.corrupt, journal.tail) == (None, 2)
    assert journal.state.newer is not None
    assert "message 3 of j1 is newer than this mvmci" in journal.state.newer
    assert status(journal.state) == ("running", journal.state.newer)
    assert not journal.state.ended
    with pytest.raises(VersionsDiffer):
        journal.check_readable()
    with pytest.raises(VersionsDiffer):
        records_of(newer_entry(journal, wire))


@pytest.mark.parametrize("wire", NEWER)
def test_nothing_behind_what_is_newer_is_taken_in(wire: int) -> None:
    journal = known()
    newer = newer_entry(journal, wire)
    cancelled = Journal("j1").encode([Cancel(at=5, by="me")], "c")
    assert journal.absorb([newer, Entry(seq=4, data=cancelled)]) == []
    assert journal.absorb([Entry(seq=4, data=cancelled)]) == []
    assert (journal.state.cancel, journal.tail, journal.ignored) == (None, 2, [])


@pytest.mark.parametrize("wire", NEWER)
def test_a_holder_that_meets_what_is_newer_writes_nothing_more(wire: int) -> None:
    journal = known()
    news = journal.absorb([newer_entry(journal, wire)])
    assert verdict(journal, news, run="r1", epoch=1, message_id="m") == "fenced"


def test_a_spec_that_is_newer_is_no_end_of_its_job() -> None:
    journal = Journal("j1")
    journal.absorb([newer_entry(journal, WIRE + 1)])
    assert journal.state.newer is not None
    assert (status(journal.state)[0], journal.state.ended, journal.state.corrupt) == ("queued", False, None)


def test_what_was_changed_is_corrupt_also_where_it_says_that_it_is_newer() -> None:
    """The hash of a message covers its level."""
    journal = known()
    data = journal.encode([Result(at=1, index=0)], mark(1, "m"))
    for level in (b"0", b"2", b"3", b"99"):
        again = known()
        again.absorb([Entry(seq=3, data=data.replace(b'"1:m"', b'"' + level + b':m"'))])
        assert (again.state.corrupt, again.state.newer) == ("message 3 of j1 was changed", None)
    foreign = newer_message("0" * 64, WIRE + 1)
    journal.absorb([Entry(seq=3, data=foreign)])
    assert journal.state.corrupt == "message 3 of j1 does not follow the one before it"


@pytest.mark.parametrize(
    "origin",
    [Origin("spec", "default", "client"), Origin("run", "other", "w")],
    ids=["as a second spec", "on another queue"],
)
def test_where_no_reader_would_take_it_in_a_newer_message_is_ignored_as_well(origin: Origin) -> None:
    journal = Journal("j1")
    journal.absorb(
        [Entry(seq=1, data=journal.encode([SPEC], "m"), origin=Origin("spec", "default", "client"))]
    )
    data = newer_message(journal.head, WIRE + 98)
    journal.absorb([Entry(seq=2, data=data, origin=origin)])
    assert (journal.state.newer, len(journal.ignored)) == (None, 1)


@pytest.mark.parametrize("wire", range(WIRE + 1))
def test_a_message_of_every_level_that_is_known_is_read(wire: int) -> None:
    journal = known()
    data = journal.encode([Result(at=1, index=0)], mark(wire, "m"))
    assert len(journal.absorb([Entry(seq=3, data=data)])) == 1
    assert journal.ids == {"m", mark(wire, "m")}


def test_fields_and_values_that_are_not_known_are_passed_over() -> None:
    journal = known()
    for record in (
        b'{"record":"released","at":5,"why":"lunch","colour":"blue"}',
        b'{"record":"lease","at":6,"epoch":2,"unit":"w","incarnation":"i","run":"r2","why":"inherited"}',
    ):
        data = newer_message(journal.head, WIRE, b"[" + record + b"]")
        journal.absorb([Entry(seq=journal.tail + 1, data=data)])
    assert (journal.state.corrupt, journal.state.held) == (None, True)
    assert (journal.state.attempts, journal.state.lost) == (2, 0)
