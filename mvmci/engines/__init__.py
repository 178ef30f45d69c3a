"""The ways in to an engine: `embedded` is a call. Their contract is `mvmci.engine`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mvmci.allow import Allow
from mvmci.engine import Engine
from mvmci.store import Store


def open_embedded(
    store: Store,
    root: Path,
    *,
    allow: Allow,
    slots: int,
    min_isolation: str = "process",
    reuse: bool = True,
    notice: Callable[[str], None] = lambda _: None,
    now_ms: Callable[[], int] | None = None,
) -> Engine:
    """An engine in this process. `root` holds its slots and compiled code; `notice` hears of long work.

    `now_ms` is since 1970; by this machine's clock, if absent.
    """
    from mvmci.engines.embedded import Embedded
    from mvmci.sandbox.host import Host, wall_clock_ms

    host = Host(
        store=store,
        root=root,
        allow=allow,
        min_isolation=min_isolation,
        reuse=reuse,
        notice=notice,
        now_ms=now_ms or wall_clock_ms,
    )
    return Embedded(host, slots=slots)
