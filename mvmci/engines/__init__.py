"""The ways in to an engine: `embedded` is a call, `broker` and `http` lead to executors. The contract is
`mvmci.engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mvmci.engine import Engine
from mvmci.jobs.allow import Allow
from mvmci.store import Store
from mvmci.system.clock import wall_clock_ms

if TYPE_CHECKING:
    from mvmci.engines.embedded.engine import Embedded
    from mvmci.stores.nats import Cluster


def open_embedded(
    store: Store,
    root: Path,
    *,
    allow: Callable[[], Allow],
    slots: int,
    min_isolation: str = "process",
    reuse: bool = True,
    notice: Callable[[str], None] = lambda _: None,
    trouble: Callable[[str], None] = lambda _: None,
    now_ms: Callable[[], int] = wall_clock_ms,
) -> Embedded:
    """An engine in this process. `root` holds its slots and compiled code; `notice` hears of long work.

    `allow` is asked at every effect what workflows may do. `trouble` hears why no job can run here, and ""
    once one can. `now_ms` is since 1970.
    """
    from mvmci.engines.embedded.engine import Embedded
    from mvmci.engines.embedded.host import Host

    host = Host(
        store=store,
        root=root,
        allow=allow,
        min_isolation=min_isolation,
        reuse=reuse,
        notice=notice,
        trouble=trouble,
        now_ms=now_ms,
    )
    return Embedded(host, slots=slots)


async def open_remote(cluster: Cluster, where: str, token: str = "", *, public: bool = False) -> Engine:
    """The executors of `cluster`, through the broker or at a URL: `where` is a `Settings.engine`. If it
    is `public`, a balancer of the user's own is there. Raises StoreUnavailable.
    """
    from mvmci.engines.remote import Remote

    transport: BrokerTransport | HttpTransport
    if where == "broker":
        from mvmci.engines.broker import BrokerTransport

        transport = BrokerTransport(cluster.link, cluster.layout, cluster.store.presence.unit)
    else:
        from mvmci.engines.http import HttpTransport

        transport = HttpTransport(where, token, cluster.link, cluster.layout, public=public)
    await transport.open()
    return Remote(cluster.store, transport)
