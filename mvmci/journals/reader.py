"""What stands in the journal of a job: all of it, its beginning, or what was written since."""

from __future__ import annotations

import asyncio

from mvmci.errors import NotFound, StoreUnavailable
from mvmci.jobs.journal import Entry, Journal, Message
from mvmci.store import Store
from mvmci.system.clock import boottime_s

ASK_AGAIN_S = 0.5


async def load(store: Store, job: str, first: Entry | None = None) -> Journal:
    """The journal of `job`; as far as `first`, its first message, tells where that is at hand.

    Raises NotFound, StoreUnavailable, and VersionsDiffer where there is more than this build understands.
    """
    journal = Journal(job)
    journal.absorb(await store.journals.read(job) if first is None else [first])
    journal.check_readable()
    if not journal.tail and journal.state.corrupt is None:
        raise NotFound(f"there is no job {job}", hint="`list` shows those that there are")
    return journal


async def read_on(store: Store, journal: Journal, give_up: float) -> list[Message]:
    """Take everything after the tail into `journal`, and return it.

    A store that is away is asked again until `give_up`, by `boottime_s`; then this raises StoreUnavailable.
    """
    while True:
        try:
            return journal.absorb(await store.journals.read(journal.job, after=journal.tail))
        except StoreUnavailable:
            if boottime_s() > give_up:
                raise
        await asyncio.sleep(ASK_AGAIN_S)
