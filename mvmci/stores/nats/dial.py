"""Which of several addresses of a broker is to be dialled: the first that answers.

A broker knows addresses that others cannot reach, such as those of bridges and of private networks; and a
stranger may answer at one of them. So all are tried at once, each as far as that a broker speaks, which
with TLS is one that we trust. The one that is known to be good gets a little time of its own before.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from contextlib import suppress

from mvmci.cluster.identity import TLS_NAME
from mvmci.system.tasks import cancel

HEAD_START_S = 0.15
ANSWER_S = 2.0
_GREETING = b"INFO "  # what a broker says to whoever comes


async def first_to_answer(places: Sequence[tuple[str, int]], trust: ssl.SSLContext | None) -> int | None:
    """The index of the first of `places` that answers; None when none does.

    Raises ssl.SSLCertVerificationError when only others do than who we trust.
    """
    tries = [
        asyncio.create_task(_try(place, trust, HEAD_START_S if index else 0.0), name="dial")
        for index, place in enumerate(places)
    ]
    strangers: list[ssl.SSLCertVerificationError] = []
    waiting = set(tries)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                failure = one.exception()
                if failure is None:
                    return tries.index(one)
                if isinstance(failure, ssl.SSLCertVerificationError):
                    strangers.append(failure)
    finally:
        await cancel(*tries)
    if strangers:
        raise strangers[0]
    return None


async def _try(place: tuple[str, int], trust: ssl.SSLContext | None, after_s: float) -> None:
    """Raises OSError, TimeoutError, EOFError when nobody answers there."""
    await asyncio.sleep(after_s)
    name = TLS_NAME if trust is not None else None
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_connection(*place, ssl=trust, server_hostname=name)
        try:
            if await reader.readexactly(len(_GREETING)) != _GREETING:
                raise ConnectionError("what answers there is no broker")
        finally:
            writer.close()
            with suppress(OSError):
                writer.transport.abort()
