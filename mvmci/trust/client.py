"""Who the user of this machine is to a cluster, and the connection of a verb under that identity."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from mvmci.cluster.identity import Identity, Login
from mvmci.errors import MvmciError, TicketRefused, Usage
from mvmci.stores import open_cluster
from mvmci.stores.nats import Cluster
from mvmci.system.tasks import cancel
from mvmci.trust.authority import Authority, read_identity
from mvmci.trust.enrol.client import is_due, remember_address, renew, renew_always
from mvmci.trust.known import CLIENT

RENEW_S = 2.0  # for so long a verb waits for a newer credential, while the old one is still good

_T = TypeVar("_T")


def client_of(folder: Path) -> Identity:
    """Who this machine is to the cluster in `folder`: what its keys make of it, else what `login` left.

    Raises TicketRefused, StoreUnavailable, Usage.
    """
    path = folder / CLIENT
    # Before `up` has started its broker there are keys, but no place to dial.
    facts = _read(folder / "cluster.json", dict) if (folder / "keys").is_dir() else None
    if facts is not None:
        there = read_identity(path)
        unit = there.unit if there is not None else f"client-{secrets.token_hex(4)}"
        base = msgspec.convert(facts["login"], Login)
        return Authority.load(folder).identity(unit, "client", (), base, path)
    found = _read(path, Identity)
    if found is None:
        raise TicketRefused(
            f"this machine is no client of {folder.name}", hint="`mvmci login @ticket` makes it one"
        )
    return found


def _read(path: Path, kind: type[_T]) -> _T | None:
    """What a file of JSON says; None if there is none. Raises Usage."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise Usage(f"{path} cannot be read: {why}", hint="remove it, and `up` or log in again") from None


@asynccontextmanager
async def open_client(folder: Path) -> AsyncIterator[Cluster]:
    """The cluster in `folder` as its client sees it, who is no member, and whose token is kept good.

    Who cannot get a newer token goes on with the one that there is. Raises as `client_of`.
    """
    identity, path = client_of(folder), folder / CLIENT
    cluster = await open_cluster(identity, announce=False)
    renewing: asyncio.Task[None] | None = None
    try:
        identity = remember_address(cluster.link, identity, path)
        if is_due(identity, time.time()):  # most verbs are over before anything in the background is
            with suppress(MvmciError, TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    identity = await renew(cluster.link, identity, path)
                    cluster.link.login = identity.login
        renewing = asyncio.create_task(renew_always(cluster.link, identity, path), name="renew")
        yield cluster
    finally:
        await cancel(renewing)
        await cluster.close()
