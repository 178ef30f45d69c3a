"""The ledger: what of the cluster's trust only who has its keys may say, and CONFIG can therefore not.

    keys/ledger     plane <unit> <its key> <the key with which it signs>
                    revoked <account> <key>

A line for each, added and synced, never changed: the last one about a control plane counts, and what was
revoked stays so. It holds public keys alone, and decides what the accounts' tokens say. A control plane
writes to CONFIG, so what stands there is believed no more than a control plane is; and what it or its host
gives out as a key may be text with lines in it, so nothing is written that is no key.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from mvmci.system import keys
from mvmci.system.files import private_folder, private_opener

FILE = "ledger"


class Plane(msgspec.Struct, frozen=True):
    """The public keys of a control plane: its own, and that with which it signs."""

    key: str
    signer: str


class Ledger:
    """The one in the folder of the keys."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE

    def planes(self) -> dict[str, Plane]:
        """The control planes that there are, by name; also those that were revoked."""
        return {unit: Plane(key, signer) for unit, key, signer in self._lines("plane", 3)}

    def revoked(self, account: str) -> frozenset[str]:
        """The keys that are believed no more in an account. Of `signers`: those that sign no more."""
        return frozenset(key for where, key in self._lines("revoked", 2) if where == account)

    def signers(self) -> frozenset[str]:
        """The keys of control planes that sign for who enrols."""
        return frozenset(plane.signer for plane in self.planes().values()) - self.revoked("signers")

    def add_plane(self, unit: str, plane: Plane) -> None:
        """Have it sign from now on, and no other of its name. Raises keys.BadKey."""
        if not (keys.is_public_key(plane.key, "user") and keys.is_public_key(plane.signer, "account")):
            raise keys.BadKey("these are no keys of a control plane")
        if self.planes().get(unit) != plane:
            self._add(f"plane {unit} {plane.key} {plane.signer}")

    def revoke(self, account: str, *revoked: str) -> None:
        """Believe these keys no more. What is none was never believed, and is passed over."""
        kind: keys.KeyKind = "account" if account == "signers" else "user"
        for key in sorted({*revoked} - self.revoked(account)):
            if keys.is_public_key(key, kind):
                self._add(f"revoked {account} {key}")

    def _lines(self, kind: str, count: int) -> list[list[str]]:
        try:
            lines = self._file.read_text(errors="replace").split("\n")
        except FileNotFoundError:
            return []
        words = [line.split(" ") for line in lines if line.endswith(" .")]  # one that was cut short has none
        return [line[1:-1] for line in words if line[0] == kind and len(line) == count + 2]

    def _add(self, line: str) -> None:
        """Several may add at a time; one that was killed while it did leaves a line that does not count."""
        private_folder(self._file.parent)
        with open(self._file, "ab", opener=private_opener) as file:
            file.write(f"\n{line} .".encode())
            file.flush()
            os.fsync(file.fileno())
