"""What a client does with a job: submit it, wait for its end, ask for its end.

The id is the idempotency key: a submit is one message that exists once, however often it is sent. One
that was refused or got no answer reads what is there: the same request is success, another one is "the
id is taken" (PROTOCOL §3). A client never holds a job, so it waits by reading, and a cancel is a
message like any other: written under compare-and-set, read for when its answer does not come.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import aclosing

import msgspec

from mvmci.errors import Conflict, IdTaken, NoAnswer, StoreFull, StoreUnavailable
from mvmci.jobs.journal import Cancel, Entry, Journal, Spec
from mvmci.store import Store

GIVE_UP_S = 30.0
RETRY_PAUSE_S = 0.2
AWAY_S = 600.0  # for so long a store that does not answer is waited for, once a job was accepted


def mint_id() -> str:
    """A new job id; ids made later sort later, to the millisecond."""
    return f"{int(time.time() * 1000):011x}-{secrets.token_hex(5)}"


async def submit(store: Store, spec: Spec) -> bool:
    """Write `spec` as the first message of its job, once. True: it is new; False: it was there.

    Raises IdTaken when the id belongs to another request or to a job that was forgotten, StoreFull
    when there is no room for it, and StoreUnavailable when nobody can say whether it was accepted.
    """
    message_id = secrets.token_hex(8)
    data = Journal(spec.id).encode([spec], message_id)
    give_up = time.monotonic() + GIVE_UP_S
    unsure = False  # whether an earlier try may still land
    while True:
        try:
            await store.journals.append(spec.id, "spec", spec.queue, data, message_id=message_id, expect=0)
            return True
        except (Conflict, StoreUnavailable) as refusal:
            unsure = unsure or isinstance(refusal, NoAnswer)
            if isinstance(refusal, StoreFull) and not unsure:
                raise
        try:
            found = await _find(store, spec, message_id)
            if found is not None:
                return found
        except StoreUnavailable:
            pass
        if time.monotonic() > give_up:
            raise StoreUnavailable(
                f"nobody can say whether {spec.id} was accepted",
                hint=f"submit it again with --id {spec.id}: it will exist once",
            )
        await asyncio.sleep(RETRY_PAUSE_S)


async def _find(store: Store, spec: Spec, message_id: str) -> bool | None:
    """Whether the job is there by this very message; None if it is not there at all."""
    journal = Journal(spec.id)
    journal.absorb(await store.journals.read(spec.id))
    found = journal.state.spec
    if found is None and journal.state.done is not None:
        raise IdTaken(f"job {spec.id} has already ended and was forgotten", hint="choose another --id")
    if journal.state.corrupt is not None:
        return False  # its status says so
    if found is None:
        return None
    if _request(found) != _request(spec):
        raise IdTaken(
            f"the id {spec.id} is taken by another job",
            hint="choose another --id, or look at that job with `history`",
        )
    return message_id in journal.ids


def _request(spec: Spec) -> Spec:
    """`spec` without who asked, when, and the seed that was drawn."""
    return msgspec.structs.replace(spec, at=0, by="", seed=0)


async def until_ended(store: Store, journal: Journal) -> None:
    """Follow `journal` until its job has ended. A store that is away is waited for, up to `AWAY_S`.

    Raises StoreUnavailable after that.
    """

    def ended() -> bool:
        return journal.state.ended

    while not ended():
        try:
            async with aclosing(store.journals.follow(journal.job, journal.tail)) as entries:
                async for entry in entries:
                    journal.absorb([entry])
                    if ended():
                        return
        except StoreUnavailable:
            journal.absorb(await _read_on(store, journal, time.monotonic() + AWAY_S))


async def cancel(store: Store, journal: Journal, by: str) -> bool:
    """Let the job of `journal` end as cancelled. Whether this call asked for it; else it was not needed.

    Where no holder is at work that is its end; else its holder ends it as soon as it looks. Raises
    StoreFull, and StoreUnavailable when nobody can say whether the cancel was written.
    """
    message_id = secrets.token_hex(8)
    give_up = time.monotonic() + GIVE_UP_S
    unsure = False
    while journal.state.cancel is None and not journal.state.ended:
        try:
            journal.absorb([await _ask_for_the_end(store, journal, by, message_id)])
            break
        except (Conflict, StoreUnavailable) as refusal:
            unsure = unsure or isinstance(refusal, NoAnswer)
            if isinstance(refusal, StoreFull) and not unsure:
                raise
        # At once: a holder that writes often leaves little time between two of its messages.
        try:
            news = journal.absorb(await _read_on(store, journal, give_up))
        except StoreUnavailable:
            news = []
        if time.monotonic() > give_up:
            raise StoreUnavailable(
                f"nobody can say whether {journal.job} is cancelled",
                hint="cancel it again when the store answers; twice is once",
            )
        if not news:
            await asyncio.sleep(RETRY_PAUSE_S)
    return message_id in journal.ids


async def _ask_for_the_end(store: Store, journal: Journal, by: str, message_id: str) -> Entry:
    assert journal.state.spec is not None
    data = journal.encode([Cancel(at=time.time_ns() // 1_000_000, by=by)], message_id)
    queue = journal.state.spec.queue
    seq = await store.journals.append(
        journal.job, "cancel", queue, data, message_id=message_id, expect=journal.tail
    )
    return Entry(seq=seq, data=data)


async def _read_on(store: Store, journal: Journal, give_up: float) -> list[Entry]:
    """What was written since; tried until `give_up`. Raises StoreUnavailable."""
    while True:
        try:
            return await store.journals.read(journal.job, after=journal.tail)
        except StoreUnavailable:
            if time.monotonic() > give_up:
                raise
        await asyncio.sleep(RETRY_PAUSE_S)
