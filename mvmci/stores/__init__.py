"""The places where jobs are kept: `memory` (also in a folder) and `nats`. Their contract is `mvmci.store`.

Each is imported when it is opened, so that whoever needs one does not load the other.
"""

from __future__ import annotations

from pathlib import Path

from mvmci.store import Store


def open_memory(unit: str, folder: Path | None = None) -> Store:
    """A store of this process alone, or in `folder`, which other processes may share. Raises Usage."""
    from mvmci.stores.memory import Memory

    return Memory(folder).store(unit)


async def open_nats(url: str, cluster: str, unit: str) -> Store:
    """The store of `cluster` on the broker at `url`. Raises StoreUnavailable."""
    from mvmci.stores import nats

    return await nats.open_nats(url, cluster, unit)
