"""Which keys a host may have, as files of known hosts say it: what OpenSSH makes of them.

The library has a reader of its own, which knows addresses beside names, ends at a line that it cannot read,
and does not say which line it was. A key is compared by its *blob*, which is what is in base64 on a line.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mvmci.system.files import private_folder, private_opener

SSH_PORT = 22
_HASHED = "|1|"
_MARKERS = {"@revoked", "@cert-authority"}
_SYSTEM_WIDE = Path("/etc/ssh/ssh_known_hosts")
_FILE_BYTES_MAX = 16 << 20


@dataclass(frozen=True)
class KeyLine:
    """A key on a line of a file: `patterns` say whose it is, `marker` what it means there."""

    where: str  # FILE:LINE
    marker: str
    patterns: str
    blob: bytes

    def names(self, name: str) -> bool:
        """Whether this is about `name`, which is in lower case."""
        if self.patterns.startswith(_HASHED):
            return _is_hash_of(self.patterns, name)
        return is_named(self.patterns.split(","), name)


@dataclass
class HostKeys:
    """What is known of the keys of one host: the lines by the keys' blobs.

    `elsewhere` are those of its name alone, where it is dialled at a port of its own.
    """

    known: dict[bytes, KeyLine] = field(default_factory=dict)
    authorities: dict[bytes, KeyLine] = field(default_factory=dict)
    revoked: dict[bytes, KeyLine] = field(default_factory=dict)
    elsewhere: dict[bytes, KeyLine] = field(default_factory=dict)

    def trusts(self, blob: bytes) -> bool:
        """Whether the host may have this key."""
        return blob not in self.revoked and (
            blob in self.known or (not self.known and blob in self.elsewhere)
        )


def is_named(patterns: Iterable[str], name: str) -> bool:
    """Whether `name`, which is in lower case, is among `patterns`, and not among those with a `!`."""
    found = False
    for pattern in patterns:
        if _matches(pattern.lower().removeprefix("!"), name):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def user_files() -> tuple[Path, ...]:
    """The files in which OpenSSH looks for this user."""
    folder = Path("~/.ssh").expanduser()
    return folder / "known_hosts", folder / "known_hosts2", _SYSTEM_WIDE


def read_lines(files: Iterable[Path]) -> list[KeyLine]:
    """The lines of all `files` that are there. One that makes no sense counts for nothing, as with ssh."""
    return [line for file in files for line in _lines_of(file)]


def look_up(lines: Iterable[KeyLine], host: str, port: int) -> HostKeys:
    """What `lines` say of the keys of `host` at `port`.

    With a port of its own a host has a name of its own. One that is not known by that may still be known
    by its name alone; no key is wrong because of that.
    """
    lines = list(lines)
    found = _named(lines, host_name(host, port))
    if port != SSH_PORT:
        plain = _named(lines, host_name(host, SSH_PORT))
        found.elsewhere = plain.known
        found.authorities = found.authorities or plain.authorities
        found.revoked |= plain.revoked
    return found


def host_name(host: str, port: int) -> str:
    """What a host at a port is called in the files."""
    return host.lower() if port == SSH_PORT else f"[{host.lower()}]:{port}"


def record(file: Path, host: str, port: int, blob: bytes) -> None:
    """Add a key of `host` to `file`, which is ours. Raises OSError."""
    private_folder(file.parent)
    line = f"{host_name(host, port)} {key_type(blob)} {base64.b64encode(blob).decode()}\n"
    with open(file, "a", opener=private_opener) as opened:
        opened.write(line)  # one write, to the end: lines of two processes do not mix


def key_type(blob: bytes) -> str:
    """The type of a key, as `ssh-ed25519`. Raises ValueError for what is no key."""
    length = int.from_bytes(blob[:4], "big")
    if not 0 < length <= len(blob) - 4:
        raise ValueError("no key of ssh")
    return blob[4 : 4 + length].decode("ascii")


def fingerprint(blob: bytes) -> str:
    """A key as people compare it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def parse_key(text: str) -> bytes:
    """The blob of a public key, `ssh-ed25519 AAAA…`. Raises ValueError."""
    name, encoded = text.split()[:2]
    blob = base64.b64decode(encoded, validate=True)
    if key_type(blob) != name:
        raise ValueError("the key is of another type than is written before it")
    return blob


def _named(lines: Iterable[KeyLine], name: str) -> HostKeys:
    keys = HostKeys()
    kinds = {"": keys.known, "@cert-authority": keys.authorities, "@revoked": keys.revoked}
    for line in lines:
        if line.names(name):
            kinds[line.marker].setdefault(line.blob, line)
    return keys


def _lines_of(file: Path) -> Iterator[KeyLine]:
    try:
        with open(file, "rb") as opened:
            text = opened.read(_FILE_BYTES_MAX).decode(errors="replace")
    except OSError:
        return
    shown = str(file).replace(os.path.expanduser("~/"), "~/", 1)
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
        if len(fields) < 3 or fields[0].startswith("#") or (marker and marker not in _MARKERS):
            continue
        try:
            yield KeyLine(f"{shown}:{number}", marker, fields[0], parse_key(" ".join(fields[1:3])))
        except (ValueError, binascii.Error):
            continue


def _is_hash_of(entry: str, name: str) -> bool:
    try:
        salt, digest = (base64.b64decode(part) for part in entry.removeprefix(_HASHED).split("|"))
    except (ValueError, binascii.Error):
        return False
    return hmac.compare_digest(hmac.digest(salt, name.encode(), "sha1"), digest)


def _matches(pattern: str, name: str) -> bool:
    wild = "".join({"*": ".*", "?": "."}.get(char, re.escape(char)) for char in pattern)
    return re.fullmatch(wild, name) is not None
