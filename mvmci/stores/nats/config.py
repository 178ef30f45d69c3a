"""What a cluster is and allows: a small key-value bucket, written by compare-and-set.

settings          `mvmci.store.ClusterSettings`
ticket.<id>       a ticket that was made: what it is for, and who used it
unit.<name>       a unit that enrolled: its key, role and queues
account.<name>    the token of an account on the broker, which only the operator can sign
program.<machine> the program that is offered to machines that joined (`mvmci.trust.program`)
drain.<name>      a unit that is to take no new work
witness           `Witness`: what must be in the streams
loss              `Loss`: what is not, while nobody has accepted it
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import msgspec

from mvmci.cluster.witness import Loss, Witness
from mvmci.errors import Conflict, StoreUnavailable
from mvmci.store import ClusterSettings
from mvmci.stores.nats.append import CONFLICTS
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import ApiError, Link, Stored, Unsubscribe
from mvmci.stores.nats.parser import Incoming
from mvmci.wire import Level, Leveled

SETTINGS = "settings"
WITNESS = "witness"
LOSS = "loss"
_settings = msgspec.json.Decoder(ClusterSettings)
_leveled = msgspec.json.Decoder(Leveled)
_witness = msgspec.json.Decoder(Witness)
_loss = msgspec.json.Decoder(Loss)
_OPERATION = "KV-Operation"
DELETED = b"NATS/1.0\r\nKV-Operation: DEL\r\n\r\n"


class Setting(msgspec.Struct, frozen=True):
    """A value, and the revision that a write over it must expect."""

    value: bytes
    revision: int


class Config:
    """The bucket CONFIG of one cluster."""

    def __init__(self, link: Link, layout: Layout, level: Level) -> None:
        self._link = link
        self._layout = layout
        self._level = level

    async def get(self, key: str) -> Setting | None:
        """Raises StoreUnavailable."""
        stored = await self._link.last(self._layout.config, self._layout.setting(key))
        return None if stored is None or deleted(stored) else Setting(stored.data, stored.seq)

    async def settings(self) -> ClusterSettings | None:
        """What the cluster is and allows, if anybody has said it. From then on its level is spoken here.

        Raises StoreUnavailable, VersionsDiffer for a level that this build does not understand.
        """
        return self._read(await self.get(SETTINGS))

    def _read(self, found: Setting | None) -> ClusterSettings | None:
        if found is None:
            return None
        try:
            self._level.learn(_leveled.decode(found.value).wire, "the cluster")  # first: the rest may be new
            return _settings.decode(found.value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise StoreUnavailable(
                "the settings of the cluster cannot be read", hint="`mvmci up` with its file writes them anew"
            ) from None

    async def put_settings(self, settings: ClusterSettings) -> None:
        """Say it, if that is news. The cluster's level stays what it is, or becomes a higher one.

        Raises StoreUnavailable, VersionsDiffer.
        """
        while True:
            there = await self.get(SETTINGS)
            with suppress(StoreUnavailable):  # what cannot be read is written anew
                self._read(there)
            wanted = msgspec.structs.replace(settings, wire=max(settings.wire, self._level.spoken))
            data = msgspec.json.encode(wanted)
            if there is not None and there.value == data:
                return
            with suppress(Conflict):
                await self.put(SETTINGS, data, expect=there.revision if there is not None else None)
                return

    async def raise_level(self, wire: int) -> bool:
        """Let all write at level `wire` from now on; whether this call was it. Raises as `put_settings`."""
        there = await self.get(SETTINGS)
        settings = self._read(there)
        if there is None or settings is None or settings.wire >= wire:
            return False
        try:
            raised = msgspec.json.encode(msgspec.structs.replace(settings, wire=wire))
            await self.put(SETTINGS, raised, expect=there.revision)
        except Conflict:
            return False  # somebody else wrote something: it is looked at again
        self._level.learn(wire, "the cluster")
        return True

    async def tell(self) -> None:
        """Have every unit look at CONFIG now, as if the settings had changed. Raises StoreUnavailable."""
        there = await self.get(SETTINGS)
        if there is not None:
            with suppress(Conflict):  # then somebody else has had them look
                await self.put(SETTINGS, there.value, expect=there.revision)

    async def witness(self) -> tuple[Witness | None, int]:
        """What must be in the streams, and the revision of that. Raises StoreUnavailable."""
        found = await self.get(WITNESS)
        return (None, 0) if found is None else (_witness.decode(found.value), found.revision)

    async def put_witness(self, witness: Witness, *, expect: int) -> int:
        """Write it over that revision, and return the new one. Raises Conflict, StoreUnavailable."""
        return await self.put(WITNESS, msgspec.json.encode(witness), expect=expect)

    async def loss(self) -> Loss | None:
        """What the cluster lost and nobody has accepted. Raises StoreUnavailable."""
        found = await self.get(LOSS)
        return None if found is None else _loss.decode(found.value)

    async def put(self, key: str, value: bytes, *, expect: int | None = None) -> int:
        """Write `value` if the key's revision is `expect` (0: it is not there), and return the new one.

        Raises Conflict, StoreUnavailable.
        """
        headers = {} if expect is None else {"Nats-Expected-Last-Subject-Sequence": str(expect)}
        return await self._write(key, value, headers)

    async def delete(self, key: str) -> None:
        """Raises StoreUnavailable."""
        await self._write(key, b"", {_OPERATION: "DEL"})

    async def all(self, prefix: str) -> dict[str, bytes]:
        """Every key that begins with `prefix.`, and its value. Raises StoreUnavailable."""
        found = {}
        async for stored in self._link.read(self._layout.config, self._layout.setting(f"{prefix}.>")):
            if not deleted(stored):
                found[self._layout.setting_of(stored.subject)] = stored.data
        return found

    async def watch(self, pattern: str, changed: Callable[[str], None]) -> Unsubscribe:
        """Call `changed(key)` when a key that fits `pattern` was written. A word may be lost."""

        def hear(word: Incoming) -> None:
            changed(self._layout.setting_of(word.subject))

        return await self._link.subscribe(self._layout.setting(pattern), hear)

    async def _write(self, key: str, value: bytes, headers: dict[str, str]) -> int:
        # A record without headers could lose a bit that no hash of the server covers: see blocks.
        headers = headers | {"Nats-Expected-Stream": self._layout.config}
        try:
            answer = await self._link.request(self._layout.setting(key), value, headers=headers)
        except ApiError as refused:
            if refused.code in CONFLICTS:
                raise Conflict(f"{key} was changed by somebody else") from None
            raise
        return int(answer["seq"])


def deleted(stored: Stored) -> bool:
    """Whether a message says that its key is no more."""
    return _OPERATION in stored.headers
