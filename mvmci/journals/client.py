"""What a client does with a job: submit it, wait for its end, ask for its end.

The id is the idempotency key: a submit is one message that exists once, however often it is sent. Where
a job is there already, the same request is success, and another one is "the id is taken" (docs/protocol.md
§2). A client never holds a job, so it waits by reading, and a cancel is a message like any other.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import aclosing

import msgspec

from mvmci.errors import IdTaken, JournalCorrupt, StoreFull, StoreUnavailable
from mvmci.jobs.journal import Cancel, Journal, Spec, State
from mvmci.journals.reader import read_on
from mvmci.journals.writer import Writer
from mvmci.store import Store
from mvmci.system.clock import boottime_s, wall_clock_ms

_GIVE_UP_S = 30.0
_AWAY_S = 600.0  # for so long a store that does not answer is waited for, once a job was accepted


def mint_id() -> str:
    """A new job id; ids made later sort later, to the millisecond."""
    return f"{int(time.time() * 1000):011x}-{secrets.token_hex(5)}"


async def submit(store: Store, spec: Spec) -> bool:
    """Write `spec` as the first message of its job, once. True: it is new; False: it was there.

    Raises IdTaken when the id belongs to another request or to a job that was forgotten, JournalCorrupt when
    what stands there cannot be read, StoreFull when there is no room for it, and StoreUnavailable when
    nobody can say whether it was accepted.
    """
    journal = Journal(spec.id)

    def wanted() -> Sequence[Spec]:
        _check_id_is_free(journal.state, spec)
        return () if journal.tail else (spec,)

    try:
        accepted = await Writer(store, journal, spec.queue).write(wanted, give_up_s=_GIVE_UP_S)
        _check_id_is_free(journal.state, spec)
        return accepted
    except StoreFull:
        raise
    except StoreUnavailable as away:
        raise StoreUnavailable(
            f"nobody can say whether {spec.id} was accepted",
            hint=f"submit it again with --id {spec.id}: it will exist once",
        ) from away


def _check_id_is_free(state: State, spec: Spec) -> None:
    """Raises IdTaken where the id belongs to another request, JournalCorrupt where nobody can say."""
    if state.spec is None and state.done is not None:
        raise IdTaken(f"job {spec.id} has already ended and was forgotten", hint="choose another --id")
    if state.spec is None and state.corrupt is not None:
        raise JournalCorrupt(
            f"{spec.id} errored: journal corrupt: {state.corrupt}", hint="choose another --id"
        )
    if state.spec is not None and _request(state.spec) != _request(spec):
        raise IdTaken(
            f"the id {spec.id} is taken by another job",
            hint="choose another --id, or look at that job with `history`",
        )


def _request(spec: Spec) -> Spec:
    """`spec` without who asked, when, and the seed that was drawn."""
    return msgspec.structs.replace(spec, at=0, by="", seed=0)


async def until_ended(store: Store, journal: Journal) -> None:
    """Follow `journal` until its job has ended. A store that is away is waited for, up to `_AWAY_S`.

    Raises StoreUnavailable after that, and VersionsDiffer where what follows is not known here.
    """

    def ended() -> bool:
        journal.check_readable()
        return journal.state.ended

    while not ended():
        try:
            async with aclosing(store.journals.follow(journal.job, journal.tail)) as entries:
                async for entry in entries:
                    journal.absorb([entry])
                    if ended():
                        return
        except StoreUnavailable:
            await read_on(store, journal, boottime_s() + _AWAY_S)


async def cancel_job(store: Store, journal: Journal, by: str) -> bool:
    """Let the job of `journal` end as cancelled. Whether this call asked for it; else it was not needed.

    Where no holder is at work that is its end; else its holder ends it as soon as it looks. Raises
    StoreFull, and StoreUnavailable when nobody can say whether the cancel was written.
    """
    assert journal.state.spec is not None
    asked = Cancel(at=wall_clock_ms(), by=by)

    def wanted() -> Sequence[Cancel]:
        return () if journal.state.cancel is not None or journal.state.ended else (asked,)

    try:
        return await Writer(store, journal, journal.state.spec.queue).write(wanted, give_up_s=_GIVE_UP_S)
    except StoreFull:
        raise
    except StoreUnavailable as away:
        raise StoreUnavailable(
            f"nobody can say whether {journal.job} is cancelled",
            hint="cancel it again when the store answers; twice is once",
        ) from away
