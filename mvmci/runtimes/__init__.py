"""The places where units run: `local`, processes of this machine, and `compose`, containers of Docker's.

Their contract is `mvmci.runtime`.
"""

from __future__ import annotations

from pathlib import Path

from mvmci.errors import Usage
from mvmci.runtime import Runtime

RUNTIMES = ("local", "compose")  # those of this version


def open_runtime(name: str, root: Path, cluster: str) -> Runtime:
    """The runtime `name` of `cluster`, whose state lies in `root`. Raises Usage. Nothing is started."""
    if name == "local":
        from mvmci.runtimes.local.runtime import Local

        return Local(root, cluster)
    if name == "compose":
        from mvmci.runtimes.compose.runtime import Containers

        return Containers(root, cluster)
    raise Usage(
        f"runtime {name} is not in this version", hint=f"there is {', '.join(RUNTIMES)}: `runtime: local`"
    )
