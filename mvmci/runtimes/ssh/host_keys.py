"""Whether a host may have the key that it shows, judged before we say who we are.

It may if its `host_key:` is that, or a file of known hosts says so; or if nothing is known of it and new keys
are to be recorded. A key that is revoked it may never have.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from mvmci.errors import HostRefused, Usage
from mvmci.runtimes.ssh import known_hosts
from mvmci.runtimes.ssh.known_hosts import HostKeys, KeyLine, fingerprint, key_type
from mvmci.runtimes.ssh.target import Target

# What servers may prove themselves with: ssh's own, without those that end with SHA-1.
_ALGORITHMS = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}
_OF_CERTIFICATES = "-cert-v01@openssh.com"


class Judge:
    """Says whether a host may have the key that it shows."""

    def __init__(
        self, target: Target, keys: HostKeys, *, pinned: bool = False, record_in: Path | None = None
    ) -> None:
        self._target = target
        self.keys = keys
        self._pinned = pinned
        self._record_in = record_in
        self.takes_certificates = bool(keys.authorities)

    def algorithms(self) -> list[str]:
        """With what the host is to prove itself: by keys of the types that are known, before all others."""
        known = [key_type(blob) for blob in (*self.keys.known, *self.keys.elsewhere)]
        types = [name for name in dict.fromkeys(known) if name in _ALGORITHMS]
        if not self._pinned or not types:
            types += [name for name in _ALGORITHMS if name not in types]
        plain = [algorithm for name in types for algorithm in _ALGORITHMS[name]]
        signed = [name + _OF_CERTIFICATES for name in plain] if self.takes_certificates else []
        return signed + plain

    def refusal(self, blob: bytes) -> HostRefused | None:
        """Why it may not have the key `blob`."""
        shown, keys = f"{self._target} shows the key {fingerprint(blob)}", self.keys
        if blob in keys.revoked:
            return HostRefused(f"{shown}, which {keys.revoked[blob].where} revokes", hint="give it another")
        if keys.trusts(blob) or (self._record_in is not None and not keys.known):
            return None
        if self._pinned:
            wanted = ", ".join(map(fingerprint, keys.known))
            return HostRefused(
                f"{shown}, and its `host_key:` is another: {wanted}",
                hint="nothing was sent; if the host was set up anew, write its new key into the cluster file",
            )
        place = known_hosts.host_name(self._target.address, self._target.port)
        if keys.known:
            line = next(
                (line for known, line in keys.known.items() if key_type(known) == key_type(blob)), None
            )
            where = (line or next(iter(keys.known.values()))).where
            return HostRefused(
                f"{shown}, which is not the one that is known for it ({where})",
                hint="nothing was sent; somebody may listen in. If the host was set up anew: "
                f"ssh-keygen -R '{place}' -f {shlex.quote(where.rpartition(':')[0])}",
            )
        return HostRefused(
            f"{shown}, and nothing is known of it",
            hint="nothing was sent; compare it with what `ssh-keygen -lf` says on the host, then repeat this "
            "with --accept-new-host-keys, or write it into the cluster file as `host_key:`",
        )

    def note(self, blob: bytes) -> bool:
        """The host has proved that it has the key: record it, if it is to be. Raises Usage."""
        if self._record_in is None or self.keys.trusts(blob):
            return False
        try:
            known_hosts.record(self._record_in, self._target.address, self._target.port, blob)
        except OSError as error:
            raise Usage(f"{self._record_in} cannot be written: {error.strerror}") from None
        return True


def pinned(target: Target) -> HostKeys:
    """The one key that it may have. Raises Usage."""
    assert target.host_key is not None
    try:
        blob = known_hosts.parse_key(target.host_key)
    except ValueError:
        raise Usage(
            f"the `host_key:` of {target.name} is no public key",
            hint="as `ssh-keyscan` prints it behind the name: ssh-ed25519 AAAA…",
        ) from None
    return HostKeys(known={blob: KeyLine("host_key:", "", target.address, blob)})
