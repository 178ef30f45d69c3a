"""What is written down here of a cluster's hosts: `hosts.json`, before anything is done on one of them.

It knows hosts that the cluster's file no longer names, and those that nobody can ask any more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from mvmci.cluster.deployment import RoleName
from mvmci.cluster.topology import HostSection
from mvmci.errors import Usage
from mvmci.system.files import write_private

T = TypeVar("T")


class HostRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A host on which something of the cluster may be: how it is reached, and its units by name.

    `directory` is that of what mvmci keeps there, once it was seen. `last` are the units that were started
    there and nowhere else since: what it has of another is out of date. `keys` are what `public_of` says of
    the keys that units have, or had, there. One whose section says so was given up, and has no units.
    """

    section: HostSection
    directory: str = ""
    units: dict[str, RoleName] = {}
    last: tuple[str, ...] = ()
    keys: dict[str, str] = {}


class HostRecords(Mapping[str, HostRecord]):
    """The records of a cluster's hosts, by name. What is changed is on disk when the change returns."""

    def __init__(self, file: Path) -> None:
        """Raises Usage."""
        self._file = file
        self._records = read_by_name(file, HostRecord)

    def __getitem__(self, host: str) -> HostRecord:
        return self._records[host]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def units(self, host: str) -> Mapping[str, RoleName]:
        """The units that may be on a host; none where nothing is known of it."""
        return self[host].units if host in self else {}

    def know(
        self,
        host: str,
        section: HostSection,
        directory: str = "",
        *,
        units: Mapping[str, RoleName] = {},
        gone: Collection[str] = (),
        keys: Mapping[str, str] = {},
    ) -> None:
        """That something may be on a host: these units and keys too, and those that are `gone` no more."""
        was = self.get(host) or HostRecord(section=section)
        there = {name: role for name, role in (was.units | dict(units)).items() if name not in gone}
        now = msgspec.structs.replace(
            was,
            section=section,
            directory=directory or was.directory,
            units=there,
            keys=was.keys | dict(keys),
        )
        if self.get(host) != now:
            self._records[host] = now
            self._write()

    def move(self, units: Collection[str], to: str) -> None:
        """That these units are started on `to`, if they were on another host before."""
        for host, one in self.items():
            last = {*one.last, *units} if host == to else {*one.last}.difference(units)
            self._records[host] = msgspec.structs.replace(one, last=tuple(sorted(last)))
        self._write()

    def clear(self, host: str, section: HostSection, directory: str) -> None:
        """That of all that was on a host, nothing counts any more."""
        self._records[host] = HostRecord(section=section, directory=directory)
        self._write()

    def remove(self, host: str) -> None:
        """That nothing of the cluster is there. Nothing happens if nothing is known of it."""
        if self._records.pop(host, None) is not None:
            self._write()

    def _write(self) -> None:
        write_private(self._file, msgspec.json.encode(self._records))


def read_by_name(file: Path, kind: type[T]) -> dict[str, T]:
    """What is in a file of ours, by name; nothing where there is none. Raises Usage: to take what cannot be
    read for nothing would leave hosts as they are, and tell nobody."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, kind])  # type: ignore[valid-type]
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is damaged, or of a newer mvmci"
        raise Usage(f"{file} cannot be read: {why}", hint="use the mvmci that wrote it") from None
