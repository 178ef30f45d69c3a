"""`python -m benchmarks.peers NAME FOLDER`: one peer, driven by lines on standard input.

A line is a list of JSON, `["noop", 1000]`; each gets a line in answer. The peer is stopped when the input
ends, also in the middle of a call: whoever drives it may die in any way.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import Peer


async def answer(peer: Peer, call: str, *args: Any) -> Any:
    found = getattr(peer, call)(*args)
    return await found if asyncio.iscoroutine(found) else found


async def serve(peer: Peer, folder: Path, answers: int) -> None:
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(lines.put_nowait, line)
        loop.call_soon_threadsafe(lines.put_nowait, "")

    reading = loop.run_in_executor(None, read)
    try:
        at_work: asyncio.Task[Any] = asyncio.create_task(peer.start(folder))
        while True:
            next_line = asyncio.create_task(lines.get())
            await asyncio.wait({at_work, next_line}, return_when=asyncio.FIRST_COMPLETED)
            if not at_work.done():  # the input has ended: nobody waits for an answer any more
                at_work.cancel()
                await asyncio.wait({at_work})
                return
            os.write(answers, json.dumps(at_work.result()).encode() + b"\n")
            line = await next_line
            if not line:
                return
            at_work = asyncio.create_task(answer(peer, *json.loads(line)))
    finally:
        await peer.stop()
        await reading


def main() -> None:
    """Only answers go to the standard output; what libraries print goes to the log."""
    answers = os.dup(1)
    os.dup2(2, 1)
    name, folder = sys.argv[1], Path(sys.argv[2])
    peer: Peer = importlib.import_module(f"benchmarks.peers.{name}").Peer()
    asyncio.run(serve(peer, folder, answers))
    os._exit(0)  # some libraries leave threads behind


main()
