"""The one way to write to a journal: append; if that is refused or unanswered, read on; decide.

Each message is appended by compare-and-set behind the last one on the job's queue that its writer has read.
Where somebody else was first the store refuses it, and where an answer does not come nobody knows: the
message may be there, or land later. So nothing but the journal tells what was written (docs/protocol.md §2):

    is anything still to be written?  -- no -->  over
       | yes                      ^
    append behind the tail        |
       |                          +------ what now stands there is taken in
       +-- stored ----------------+
       +-- refused, no answer --> read on from the tail

A message that is tried again keeps its id, and of its tries one at most can land: each expects the tail
of the one before, or a later one behind which that can no longer land.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence

from mvmci.errors import Conflict, MvmciError, NoAnswer, StoreFull, StoreUnavailable
from mvmci.jobs.journal import OUTSIDE, AnyRecord, Done, Entry, Journal, Lease, Message, Origin, kind_of
from mvmci.journals.reader import read_on
from mvmci.store import Store
from mvmci.system.clock import boottime_s
from mvmci.wire import mark

RETRY_PAUSES_S = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)  # while nothing new is read; the last is repeated


def _nothing(news: Sequence[Message], message_id: str) -> None:
    pass


class Writer:
    """Appends to the journal of one job in `queue`, of which it keeps `journal` up to date.

    `absorbed(news, message_id)` hears of all that is taken in, and of nothing new after a read that found
    nothing; `message_id` is that of the message being written, or empty. It may raise, and stops a write.
    One write or look at a time.
    """

    def __init__(
        self,
        store: Store,
        journal: Journal,
        queue: str,
        absorbed: Callable[[Sequence[Message], str], None] = _nothing,
    ) -> None:
        self.journal = journal
        self._store = store
        self._queue = queue
        self._absorbed = absorbed

    async def write(
        self, wanted: Callable[[], Sequence[AnyRecord]], *, give_up_s: float, waits_for_room: bool = False
    ) -> bool:
        """Append what is `wanted` as one message, until nothing more is; whether this message stands there.

        `wanted` is asked before every try, goes by the journal as it is known then, and may raise. To a
        journal that is corrupt nothing is written.

        Raises StoreUnavailable when after `give_up_s` nobody can say whether it was written, StoreFull
        when it surely was not, unless this `waits_for_room`, and VersionsDiffer where somebody else wrote
        what this build does not understand.
        """
        message_id = mark(self._store.level.spoken, secrets.token_hex(8))
        give_up = boottime_s() + give_up_s
        refusal: MvmciError | None = None
        unsure = False  # whether an earlier try may still land
        pauses = iter(RETRY_PAUSES_S)
        while self.journal.state.corrupt is None:
            self.journal.check_readable()
            if not (records := wanted()):
                break
            if refusal is not None and boottime_s() > give_up:
                raise StoreUnavailable(
                    f"the store took no record of {self.journal.job} for {give_up_s:.0f} s: {refusal}"
                ) from refusal
            tail = self.journal.tail
            try:
                news = [await self._append(records, message_id)]
            except (Conflict, StoreUnavailable) as refused:
                refusal = refused
                unsure = unsure or isinstance(refused, NoAnswer)
                if isinstance(refused, StoreFull) and not (unsure or waits_for_room):
                    raise
                news = await read_on(self._store, self.journal, give_up)
            self._absorbed(news, message_id)
            # Else at once: who writes often leaves little time between two messages.
            if self.journal.tail == tail:
                await asyncio.sleep(next(pauses, RETRY_PAUSES_S[-1]))
        return message_id in self.journal.ids

    async def look(self, *, give_up_s: float) -> None:
        """Take in what others wrote. Raises StoreUnavailable after `give_up_s`."""
        self._absorbed(await read_on(self._store, self.journal, boottime_s() + give_up_s), "")

    def _holds(self, records: Sequence[AnyRecord], unit: str) -> bool:
        """Whether who writes `records` is the job's holder, or becomes it by them."""
        state = self.journal.state
        return isinstance(records[0], Lease) or (
            state.held and state.lease is not None and state.lease.unit == unit
        )

    async def _append(self, records: Sequence[AnyRecord], message_id: str) -> Message:
        data = self.journal.encode(records, message_id)
        kind, unit = kind_of(records), self._store.presence.unit
        if kind == "done" and not self._holds(records, unit):
            kind, unit = "end", OUTSIDE + unit
        origin = Origin("done" if kind == "end" else kind, self._queue, unit)
        found = self.journal.judge(Entry(seq=self.journal.tail + 1, data=data, origin=origin))
        if isinstance(found, str):
            raise AssertionError(f"no reader would take this record of {self.journal.job}: {found}")
        seq = await self._store.journals.append(
            self.journal.job,
            kind,
            self._queue,
            data,
            expect=self.journal.expect,
            # A short job without effects: should its holder die meanwhile, it runs again.
            may_delay=isinstance(records[0], Lease) and isinstance(records[-1], Done),
        )
        self.journal.extend(Entry(seq=seq, data=data), message_id, records)
        return Message(id=message_id, records=tuple(records))
