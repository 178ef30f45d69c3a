"""Asking the units of a cluster for their metrics, and its broker for its own."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from mvmci.cluster.deployment import ROLES
from mvmci.cluster.identity import Login
from mvmci.cluster.metrics import BrokerMetrics, Connection, UnitMetrics
from mvmci.deploy.operate import open_admin
from mvmci.deploy.state import ClusterState
from mvmci.errors import NotFound, StoreUnavailable
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.link import Link
from mvmci.stores.nats.parser import Incoming
from mvmci.system import usage
from mvmci.trust.authority import Authority
from mvmci.trust.permissions import CONNZ, JSZ, VARZ

WITHIN_S = 2.0
CONNECTIONS_MAX = 64  # of which the broker tells: those for which most is on its way
_US = {"ns": 0.001, "µs": 1.0, "ms": 1_000.0, "s": 1_000_000.0, "m": 60_000_000.0, "h": 3_600_000_000.0}

_encode = msgspec.json.Encoder().encode
_told = msgspec.json.Decoder(UnitMetrics)


class Asker:
    """One who asks all units at once, and takes what they tell."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._found: dict[str, UnitMetrics] = {}
        self._more = asyncio.Event()

    async def ask(
        self, units: Collection[str], *, watch_s: float = 0.0, within_s: float = WITHIN_S
    ) -> dict[str, UnitMetrics]:
        """What `units` tell, each by its name; who has not told within `within_s` is left out.

        They watch what has to be watched for another `watch_s`. Raises StoreUnavailable.
        """
        self._found.clear()
        await self._cluster.link.publish(self._cluster.layout.measure(), _encode({"watch_s": watch_s}))
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not self._found.keys() >= set(units):
                    self._more.clear()
                    await self._more.wait()
        return {unit: found for unit, found in self._found.items() if unit in units}

    def hear(self, word: Incoming) -> None:
        """Take what a unit tells: only of itself, as its subject says."""
        try:
            metrics = _told.decode(word.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return  # of another build
        unit, incarnation = self._cluster.layout.member_of(word.subject)
        self._found[unit] = msgspec.structs.replace(metrics, unit=unit, incarnation=incarnation)
        self._more.set()


@asynccontextmanager
async def asking(cluster: Cluster) -> AsyncIterator[Asker]:
    """An asker, whose connection is that of an administrator. Raises StoreUnavailable."""
    asker = Asker(cluster)
    leave = await cluster.link.subscribe(cluster.layout.measured("*", "*"), asker.hear)
    try:
        yield asker
    finally:
        await leave()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was told: by units, by the broker unless it is one of the user's own, and who was silent.

    `broker_boot` is the start of the machine on which the broker is, where a unit there told something.
    """

    units: dict[str, UnitMetrics]
    broker: BrokerMetrics | None
    broker_boot: str
    silent: list[str]


class Measuring:
    """Measures of one cluster, or of those units and that broker which `names` names."""

    def __init__(self, state: ClusterState, cluster: Cluster, asker: Asker, names: Collection[str]) -> None:
        self._state = state
        self._cluster = cluster
        self._asker = asker
        self._names = set(names)
        self._planned = state.applied_deployment().units

    async def measure(self, *, watch_s: float = 0.0) -> Measured:
        """As they are now. Raises NotFound for a name that nobody has, StoreUnavailable, TicketRefused."""
        members = await self._cluster.store.presence.members()
        units = {member.unit for member in members if member.about.role in ROLES}
        brokers = {unit.name: unit.host for unit in self._planned if unit.role == "broker"}
        known = units | brokers.keys()
        if strange := self._names - known:
            raise NotFound(
                f"no unit {min(strange)} of {self._state.cluster} is there",
                hint=f"there are {', '.join(sorted(known))}",
            )
        wanted = self._names or known
        found = await self._asker.ask(units & wanted, watch_s=watch_s)
        beside = (unit.name for unit in self._planned if unit.host in brokers.values())
        return Measured(
            units=found,
            broker=await self._broker() if wanted & brokers.keys() else None,
            broker_boot=next((found[name].machine.boot for name in beside if name in found), ""),
            silent=sorted((units & wanted) - found.keys()),
        )

    async def _broker(self) -> BrokerMetrics:
        facts = self._state.facts()
        assert facts is not None
        told = await ask_broker(Authority.load(self._state.folder).system_login(facts.login))
        seen = await self._state.runtime().observe() if facts.runtime == "local" else []
        pid = next((one.pid for one in seen if one.role == "broker"), None)
        return told if pid is None else msgspec.structs.replace(told, process=usage.process(pid))


@asynccontextmanager
async def measuring(state: ClusterState, names: Collection[str] = ()) -> AsyncIterator[Measuring]:
    """Measures of the cluster, or of those that are named. Raises as `open_admin`."""
    async with open_admin(state) as cluster, asking(cluster) as asker:
        yield Measuring(state, cluster, asker, names)


async def ask_broker(system: Login) -> BrokerMetrics:
    """What the broker tells a login of its own account. Raises StoreUnavailable, TicketRefused."""
    link = Link(system, "metrics")
    await link.open()
    try:
        most = _encode({"sort": "pending", "limit": CONNECTIONS_MAX})
        asked = ((VARZ, b""), (JSZ, b""), (CONNZ, most))
        varz, jsz, connz = [_data(await link.call(subject, data)) for subject, data in asked]
    finally:
        await link.close()
    return BrokerMetrics(
        at_us=time.monotonic_ns() // 1000,
        version=varz.get("version", ""),
        cores=varz.get("cpu", 0.0) / 100,
        memory_bytes=varz.get("mem", 0),
        connected=varz.get("connections", 0),
        slow=varz.get("slow_consumers", 0),
        messages_in=varz.get("in_msgs", 0),
        messages_out=varz.get("out_msgs", 0),
        bytes_in=varz.get("in_bytes", 0),
        bytes_out=varz.get("out_bytes", 0),
        stored_messages=jsz.get("messages", 0),
        stored_bytes=jsz.get("storage", 0),
        stored_bytes_max=jsz.get("config", {}).get("max_storage", 0),
        requests=jsz.get("api", {}).get("total", 0),
        requests_failed=jsz.get("api", {}).get("errors", 0),
        connections=[
            Connection(
                name=one.get("name", ""),
                round_trip_us=_go_us(one.get("rtt", "")),
                pending_bytes=one.get("pending_bytes", 0),
            )
            for one in connz.get("connections", ())
        ],
    )


def _data(answer: bytes) -> dict[str, Any]:
    try:
        return dict(msgspec.json.decode(answer, type=dict[str, Any]).get("data", {}))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreUnavailable(f"the broker's answer cannot be read: {error}") from None


def _go_us(text: str) -> int:
    """A duration as Go writes it, `1m2.5s` or `376µs`, in µs; 0 for none."""
    parts = re.findall(r"([0-9.]+)(ns|µs|ms|s|m|h)", text)
    return round(sum(float(number) * _US[unit] for number, unit in parts))
