"""The places where jobs are kept: `folder` and `nats`. Their contract is `mvmci.store`.

Each is imported when it is opened, so that whoever needs one does not load the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mvmci.cluster.identity import Identity
from mvmci.store import Store

if TYPE_CHECKING:
    from mvmci.stores.nats import Cluster


def open_folder(unit: str, folder: Path, *, make: bool = True) -> Store:
    """The store in `folder`, which other processes may share. Raises Usage.

    One that is not to be made, and is not there, has no jobs.
    """
    from mvmci.stores.folder import Folder

    return Folder(folder, make=make).store(unit)


async def open_cluster(
    identity: Identity, *, maintains: bool = False, announce: bool = True, unit: str | None = None
) -> Cluster:
    """The cluster of `identity` on its broker. Who `maintains` it also hears of every unit at once.

    Raises StoreUnavailable, TicketRefused.
    """
    from mvmci.stores import nats

    return await nats.dial_cluster(
        identity.login,
        identity.cluster,
        unit or identity.unit,
        maintains=maintains,
        announce=announce,
        listens=maintains,
    )
