"""The places where units run: `local`, processes of this machine. Their contract is `mvmci.runtime`."""

from __future__ import annotations

from pathlib import Path

from mvmci.runtime import Runtime


def open_local(root: Path, cluster: str) -> Runtime:
    """The processes of `cluster` on this machine, whose state lies in `root`."""
    from mvmci.runtimes.local import Local

    return Local(root, cluster)
