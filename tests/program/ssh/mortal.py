"""mvmci, which kills itself at its N-th step: mortal.py N ZIPAPP VERB …

Steps are what it asks of hosts, each before and after, programs that it sends, and files that it writes here.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

WRITERS = (
    "mvmci.deploy.state",
    "mvmci.deploy.up",
    "mvmci.runtimes.ssh.records",
    "mvmci.runtimes.ssh.runtime",
    "mvmci.trust.authority",
)


def main() -> None:
    last = int(sys.argv[1])
    sys.argv = sys.argv[2:]
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(work: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def stepped(*args: Any, **kwargs: Any) -> Any:
            step()
            found = await work(*args, **kwargs)
            step()
            return found

        return stepped

    from mvmci.cli import main as run
    from mvmci.runtimes.ssh import runtime
    from mvmci.runtimes.ssh.client import AgentClient

    AgentClient.ask = around(AgentClient.ask)  # type: ignore[method-assign]
    runtime.put_program = around(runtime.put_program)
    for name in WRITERS:
        module: Any = importlib.import_module(name)

        def stepped(*args: Any, write: Any = module.write_private, **kwargs: Any) -> None:
            write(*args, **kwargs)
            step()

        module.write_private = stepped
    run()


main()
