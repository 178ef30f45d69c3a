"""A cluster that was brought up: how its units are, a unit that is to drain, and no cluster again."""

from __future__ import annotations

import asyncio
import shlex
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import msgspec

from mvmci.cluster.changes import Observed
from mvmci.cluster.identity import Identity
from mvmci.cluster.topology import HostSection
from mvmci.cluster.witness import Loss
from mvmci.deploy.state import ClusterState
from mvmci.deploy.status import ClusterStatus, Room, rows
from mvmci.errors import MvmciError, NotFound, PartlyApplied, StoreUnavailable, Usage
from mvmci.roles.broker import FOLDER, trouble
from mvmci.runtime import GRACE_S
from mvmci.store import Member
from mvmci.stores import open_cluster
from mvmci.system.clock import wall_clock_ms
from mvmci.system.tasks import cancel
from mvmci.trust.authority import Authority
from mvmci.trust.client import client_of

if TYPE_CHECKING:
    from mvmci.stores.nats import Cluster

_LOOK_EVERY_S = 0.03
_SAY_EVERY_S = 1.0
DRAIN = ("worker", "executor")  # roles that can be told to


async def look(state: ClusterState, identity: Callable[[], Identity]) -> ClusterStatus:
    """How the cluster's units are. Where it is not run from this machine, presence is all there is.

    Raises StoreUnavailable, TicketRefused when there is nothing at all to tell.
    """
    applied, facts = state.applied(), state.facts()
    planned, seen = state.applied_deployment().units, await state.runtime().observe()
    members: Sequence[Member] | None = None
    loss: Loss | None = None
    store: dict[str, Room] = {}
    if applied is None or seen or applied.broker.url is not None:
        try:
            cluster = await open_cluster(identity(), announce=False)
            try:
                members = await cluster.store.presence.members()
                loss = await cluster.config.loss()
                with suppress(StoreUnavailable):
                    store = {part: Room(*found) for part, found in (await cluster.room()).items()}
            finally:
                await cluster.close()
        except StoreUnavailable as away:
            if not planned and not seen:
                await check_up(state, away)  # an `up` that was broken off has begun it, and applied nothing
                raise
    why = trouble(state.folder / FOLDER)
    here, at = socket.gethostname(), facts.outside.urls[0] if facts is not None else None
    hosts, now_ms = state.runtime().hosts(), wall_clock_ms()
    units = rows(planned, seen, members, here=here, now_ms=now_ms, broker_at=at, hosts=hosts)
    if why:
        units = [
            msgspec.structs.replace(row, state="down")
            if (row.role, row.state) == ("broker", "ready")
            else row
            for row in units
        ]
    return ClusterStatus(
        cluster=state.cluster,
        access=applied.access if applied is not None else None,
        runtime=facts.runtime if facts is not None else None,
        units=units,
        loss=loss.what if loss is not None else (),
        trouble=why,
        store=store,
        hosts=hosts,
    )


async def check_up(state: ClusterState, away: StoreUnavailable) -> None:
    """Raises StoreUnavailable where the reason for `away` is that the cluster, which is of here, is down."""
    facts = state.facts()
    if type(away) is not StoreUnavailable or facts is None or facts.broker is None or not state.is_ours:
        return
    if await state.runtime().observe():
        return
    file = shlex.quote(facts.file) if facts.file else "FILE"
    raise StoreUnavailable(f"{state.cluster} is down here", hint=f"`mvmci up {file}` starts it")


async def drain(state: ClusterState, name: str, *, undo: bool) -> None:
    """Let a worker or executor take no more jobs and wait until it has none; `undo`: let it take jobs again.

    Raises NotFound, Usage, StoreUnavailable, TicketRefused.
    """
    async with open_admin(state) as cluster:
        roles = _roles(await cluster.store.presence.members(), await state.runtime().observe())
        if name not in roles:
            known = sorted(unit for unit, role in roles.items() if role in DRAIN)
            raise NotFound(
                f"no unit {name} of {state.cluster} is there", hint=f"there are {', '.join(known) or 'none'}"
            )
        if roles[name] not in DRAIN:
            raise Usage(f"{name} is a {roles[name]}", hint="only workers and executors take jobs")
        key = f"drain.{name}"
        if undo:
            await cluster.config.delete(key)
        else:
            await cluster.config.put(key, b"{}")
        while not _has_heard(await cluster.store.presence.members(), name, undo):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_EVERY_S)


@asynccontextmanager
async def open_admin(state: ClusterState) -> AsyncIterator[Cluster]:
    """The cluster, with the rights of who has its keys. Raises StoreUnavailable, TicketRefused, Usage."""
    authority, facts = Authority.load(state.folder), state.facts()
    if facts is None:
        raise StoreUnavailable(f"cluster {state.cluster} was never brought up here", hint="`mvmci up FILE`")
    try:
        cluster = await open_cluster(authority.admin(facts.login), announce=False)
    except StoreUnavailable as away:
        await check_up(state, away)
        raise
    try:
        yield cluster
    finally:
        await cluster.close()


def _roles(members: Sequence[Member], seen: Sequence[Observed]) -> dict[str, str]:
    """Of each unit that is there: one that has just started has not said yet what it is."""
    said = {member.unit: member.about.role for member in members if member.about.role}
    return {one.name: str(one.role) for one in seen} | said


def _has_heard(members: Sequence[Member], name: str, undo: bool) -> bool:
    """Whether the worker is as it was told to be; one that left has no jobs either."""
    return all(
        member.about.state == "ready"
        if undo
        else member.about.state == "draining" and not member.holds and not member.keeps
        for member in members
        if member.unit == name
    )


async def stop(state: ClusterState, *, say: Callable[[str], None], grace_s: float = GRACE_S) -> bool:
    """Let units see to their jobs and end, and `say` whom that waits for. False: nothing was running."""
    telling = asyncio.create_task(_tell_who_is_busy(state, say))
    try:
        return await state.runtime().stop(grace_s=grace_s)
    finally:
        await cancel(telling)


async def _tell_who_is_busy(state: ClusterState, say: Callable[[str], None]) -> None:
    told = ""
    while True:
        await asyncio.sleep(_SAY_EVERY_S)
        with suppress(MvmciError):  # the broker may have gone, or never have come
            units = (await look(state, lambda: client_of(state.folder))).units
            busy = ", ".join(f"{row.name} ({row.busy})" for row in units if row.busy and row.role in DRAIN)
            if busy not in ("", told):
                say(f"waiting for jobs of {busy}")
                told = busy


async def down(
    state: ClusterState,
    *,
    grace_s: float = GRACE_S,
    purge: bool = False,
    lost: Mapping[str, HostSection] = {},
    say: Callable[[str], None] = lambda _: None,
) -> bool:
    """Stop all that `up` started; with `purge`, forget the cluster too. False: nothing was running.

    The hosts that are `lost` by its file are not asked, and those that were given up before.

    Raises LockHeld, StoreUnavailable, also where the cluster was not brought up from here.
    """
    state.check_version()
    state.check_keys()
    running = state.runtime(hosts=lost or None)
    with state.lock():
        facts, seen = state.facts(), await running.observe()
        authority = Authority.load(state.folder) if state.is_ours else None
        owner = authority.owner if authority is not None else ""
        async with running.lock({one.host for one in seen} if not purge else None, owner):
            ran = await stop(state, say=say, grace_s=0 if purge else grace_s)
            if purge:
                await running.forget()
        for sentence in running.left():
            say(sentence)
        if running.away:
            why = "; ".join(f"nothing is done on {host}: {why}" for host, why in sorted(running.away.items()))
            raise PartlyApplied(
                f"{state.cluster} is down in part: {why}",
                hint="the same command finishes it once they can be reached; `mvmci down FILE` asks none "
                "that is `state: lost` in FILE",
            )
        if purge:
            if authority is not None and facts is not None and facts.broker is None:
                from mvmci.stores.nats import remove

                await remove(authority.admin(facts.login).login, state.cluster)
            state.remove()
    return ran
