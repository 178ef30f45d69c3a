"""What a cluster has on its broker, for tests that are their own control plane."""

from __future__ import annotations

from collections.abc import Sequence

from mvmci.cluster.identity import Login
from mvmci.store import ClusterSettings
from mvmci.stores.nats.layout import STORE_BYTES, Layout
from mvmci.stores.nats.link import Link
from mvmci.stores.nats.streams import maintain


async def ensure(
    login: Login | str, cluster: str, *, store_bytes: int = STORE_BYTES, queues: Sequence[str] = ()
) -> None:
    """Make what `cluster` has on its broker, within `store_bytes`. Raises as `Cluster.maintain`."""
    link = Link(login, f"{cluster}/ensure")
    await link.open()
    try:
        await maintain(link, Layout(cluster), ClusterSettings(store_bytes=store_bytes), queues)
    finally:
        await link.close()
