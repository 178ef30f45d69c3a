"""Submitting a job: one message that exists once, however often it is sent.

The id is the idempotency key. A submit that was refused or got no answer reads what is there: the
same request is success, another one is "the id is taken" (PROTOCOL §3).
"""

from __future__ import annotations

import asyncio
import secrets
import time

import msgspec

from mvmci.errors import Conflict, IdTaken, NoAnswer, StoreFull, StoreUnavailable
from mvmci.journal import Journal, Spec
from mvmci.store import Store

GIVE_UP_S = 30.0
RETRY_PAUSE_S = 0.2


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
            hint=f"choose another --id, or see it with `mvmci history {spec.id} --local`",
        )
    return message_id in journal.ids


def _request(spec: Spec) -> Spec:
    """`spec` without who asked, when, and the seed that was drawn."""
    return msgspec.structs.replace(spec, at=0, by="", seed=0)
