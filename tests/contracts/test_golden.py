"""What was written before is read, and at its level the same bytes are written again: `golden/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmci.cluster.identity import decode_ticket
from mvmci.cluster.witness import Loss, Witness
from mvmci.engines.remote import Failed, read_reply, read_request
from mvmci.jobs.job import Artifact
from mvmci.jobs.journal import Entry, Journal, records_of
from mvmci.store import Chunk, ClusterSettings, Member
from mvmci.trust.enrol.client import EnrolReply, EnrolRequest
from mvmci.trust.registry import TicketRecord, UnitRecord
from mvmci.wire import WIRE
from tests.contracts.golden.messages import journal, messages, rights

GOLDEN = Path(__file__).parent / "golden"
LEVELS = range(WIRE + 1)
KINDS = {
    "member": Member,
    "settings": ClusterSettings,
    "enrolment": EnrolRequest,
    "enrolled": EnrolReply,
    "not enrolled": EnrolReply,
    "ticket's record": TicketRecord,
    "unit's record": UnitRecord,
    "witness": Witness,
    "loss": Loss,
    "chunk": Chunk,
    "artifact": Artifact,
}


def golden(wire: int) -> Any:
    return json.loads((GOLDEN / f"level-{wire}.json").read_text())


@pytest.mark.parametrize("wire", LEVELS)
def test_at_a_level_the_bytes_are_those_that_were_written_before(wire: int) -> None:
    assert messages(wire) == golden(wire)["messages"]


@pytest.mark.parametrize("wire", LEVELS)
def test_what_was_written_before_is_read_and_nothing_of_it_is_lost(wire: int) -> None:
    there = golden(wire)["messages"]
    for name, text in there.items():
        data = text.encode()
        kind = next((kind for begin, kind in KINDS.items() if name.startswith(begin)), None)
        if name.startswith("journal"):
            continue
        if name == "ticket":
            assert decode_ticket(text).id == "t"
        elif name.startswith("request"):
            assert msgspec.json.encode(read_request(data)) == data
        elif name.startswith("reply"):
            found = read_reply(data)
            assert not (isinstance(found, Failed) and found.why == "newer")
            assert msgspec.json.encode(found) == data
        else:
            assert kind is not None, f"{name} is read by nobody here"
            assert msgspec.json.encode(msgspec.json.decode(data, type=kind)) == data


@pytest.mark.parametrize("wire", LEVELS)
def test_a_journal_that_was_written_before_is_read_to_its_end(wire: int) -> None:
    there = golden(wire)["messages"]
    known, wanted = Journal("j"), journal()
    for number, records in enumerate(wanted, 1):
        entry = Entry(seq=number, data=there[f"journal {number}"].encode())
        assert records_of(entry) == records
        assert [one.records for one in known.absorb([entry])] == [records]
    assert (known.state.corrupt, known.state.newer, known.ignored) == (None, None, [])
    assert known.state.done is not None


def test_within_a_level_streams_consumers_and_rights_are_only_added_to() -> None:
    """A build of the same level works with what another one made, and may do all that it needs."""
    was, now = golden(0)["rights"], rights()
    for what in ("streams", "consumers"):
        for name, settings in was[what].items():
            there = json.loads(json.dumps(now[what][name]))
            assert set(settings.pop("subjects", ())) <= set(there.pop("subjects", ())), name
            assert settings == {key: there.get(key) for key in settings}, name
    for what in ("publish", "subscribe", "imports"):
        for who, subjects in was[what].items():
            assert set(subjects) <= set(now[what][who]), (what, who)
