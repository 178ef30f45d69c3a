"""Waits for what has to come. They end as it comes, and give up so late that only what hangs is given up."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

from mvmci.jobs.journal import Journal
from mvmci.journals.reader import load
from mvmci.store import Store

LONG_S = 300.0
LOOK_S = 0.02


def until(there: Callable[[], object], told: Callable[[], object] = lambda: "") -> None:
    """Wait until `there()` is true; what is `told` stands in the failure.

    A look may run a verb: at most a fifth of a core is kept from that which is waited for.
    """
    end = time.monotonic() + LONG_S
    began = time.monotonic()
    while not there():
        now = time.monotonic()
        assert now < end, f"it never came to that: {told()}"
        time.sleep(max(LOOK_S, 4 * (now - began)))
        began = time.monotonic()


async def until_true(there: Callable[[], object | Awaitable[object]], within_s: float = LONG_S) -> None:
    """`until`, beside other tasks; `there` may be asynchronous."""
    async with asyncio.timeout(within_s):
        while True:
            found = there()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return
            await asyncio.sleep(LOOK_S)


async def until_journal(store: Store, job: str, condition: Callable[[Journal], object]) -> Journal:
    """The journal of `job`, once it is as `condition` wants it."""
    async with asyncio.timeout(LONG_S):
        while not condition(journal := await load(store, job)):  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(LOOK_S)
    return journal


async def until_done(store: Store, job: str) -> Journal:
    """The journal of `job`, once it has its last record."""
    return await until_journal(store, job, lambda journal: journal.state.done is not None)
