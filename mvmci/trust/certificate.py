"""The certificates of executors: how one gets its own, keeps it and serves with it, and who signs it.

    <unit>/tls.key   made there, and never sent
    <unit>/tls.pem   for that key: under the name that all executors have, that of the host and its addresses;
                     then the certificate of the control plane that signed it, which the cluster's CA signed

It is asked for, and renewed, together with the unit's token (`mvmci.trust.enrol`). It is good for ninety
days, and another one is asked for when half of that is over, or when the host has other addresses. New
connections are served with the newest; those that there are go on.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from mvmci.cluster.identity import ENGINE_TLS_NAME
from mvmci.system import keys
from mvmci.system.files import write_private
from mvmci.system.ports import is_address

DAYS = 90
NAMES_MAX = 64  # names and addresses of one host
_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63}){0,8}")
_OURS = re.compile(r"(.*\.)?mvmci", re.IGNORECASE)  # what only we give out

log = logging.getLogger(__name__)


class CertificateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an executor asks for: a certificate for its public key, in PEM."""

    key: str
    names: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()


class Certificate:
    """That of an executor, whose files are in `folder`. `addresses` says which its host has now."""

    def __init__(self, folder: Path, names: Sequence[str], addresses: Callable[[], Sequence[str]]) -> None:
        self._key, self._file = folder / "tls.key", folder / "tls.pem"
        self._names = tuple(name for name in dict.fromkeys(names) if _is_given(name))
        self._addresses = addresses
        self.there = asyncio.Event()  # set once there is one to serve with
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        if self._key.exists() and self._file.exists():
            self._load()

    def wanted(self, now: float | None = None) -> CertificateRequest | None:
        """What to ask for; None while there is one that is good. `now` is in s since 1970."""
        if not self._key.exists():
            write_private(self._key, keys.new_tls_key().encode())
        public = keys.public_tls_key(self._key.read_text())
        names, addresses = self._names[:NAMES_MAX], tuple(self._addresses())[:NAMES_MAX]
        kept = self._file.read_text() if self.there.is_set() else ""
        fits = keys.is_certificate_for(
            kept,
            public,
            names=(ENGINE_TLS_NAME, *names),
            addresses=addresses,
            now=time.time() if now is None else now,
        )
        return None if fits else CertificateRequest(key=public, names=names, addresses=addresses)

    def keep(self, chain: str) -> None:
        """Serve with what a control plane signed."""
        write_private(self._file, chain.encode())
        self._load()

    def _load(self) -> None:
        try:
            self.context.load_cert_chain(self._file, self._key)
        except ssl.SSLError as error:
            log.warning("the certificate in %s cannot be used, and is asked for anew: %s", self._file, error)
        else:
            self.there.set()


@dataclass(frozen=True, kw_only=True)
class Certifier:
    """A control plane's part: `ca` is its certificate, `key` its key, both in PEM. Secret."""

    key: str = field(repr=False)
    ca: str

    def certificate(self, asked: CertificateRequest, now: float) -> str:
        """The chain for who asks. Empty for what is no request, or not ours to give."""
        fine = len(asked.names) <= NAMES_MAX and len(asked.addresses) <= NAMES_MAX
        if not fine or not all(map(_is_given, asked.names)) or not all(map(is_address, asked.addresses)):
            return ""
        named = (ENGINE_TLS_NAME, *asked.names)
        try:
            signed = keys.sign_certificate(
                self.key, self.ca, asked.key, names=named, addresses=asked.addresses, now=now, days=DAYS
            )
        except ValueError:  # it is no key, or our own certificate has long expired
            return ""
        return signed + self.ca


def _is_given(name: str) -> bool:
    """Whether a host may have that name: none of those by which the cluster's own are known."""
    return _NAME.fullmatch(name) is not None and _OURS.fullmatch(name) is None


def client_context(ca: str) -> ssl.SSLContext:
    """Whom a client of executors trusts: who has a certificate of the cluster's CA, in PEM."""
    context = ssl.create_default_context(cadata=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def run_token(token: str) -> str:
    """What a worker shows instead of the executors' `token`: it may have jobs run, and nothing else."""
    return hmac.digest(token.encode(), b"run", "sha256").hex()
