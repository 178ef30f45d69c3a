"""What the broker of a cluster is to be, and whom it believes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

import msgspec

_STORE_BYTES = 20 << 30  # more than the streams of a cluster take
PAYLOAD_BYTES_MAX = (1 << 20) + (16 << 10)  # a message of the largest size, and its headers
BATCH_MESSAGES_MAX = 256  # of an atomic batch
BATCHES_OPEN_MAX = 16  # of a stream: what they hold lies on the disk beside the streams and their bounds
LOOPBACK = "127.0.0.1"
ANY_PORT = -1


class BrokerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a broker is to be. `name` is the server's; `synced` is off under `durability: relaxed`."""

    name: str = ""
    listen: str = LOOPBACK
    port: int = ANY_PORT
    store_bytes: int = _STORE_BYTES
    synced: bool = True


class Guard(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a broker believes. The accounts' tokens are for one that has none yet; `files` are laid down
    before it starts, and may be its key and its certificate."""

    operator: str  # its token
    signer: str  # its public key
    system_account: str  # a public key
    accounts: Mapping[str, str]  # tokens, by public key
    certificate: PurePath
    key: PurePath
    files: Mapping[str, str] = {}


def url_of(settings: BrokerSettings, *, tls: bool) -> str:
    """Where its own machine dials a broker of ours."""
    any_address = settings.listen in ("0.0.0.0", "::")  # noqa: S104 (it is only compared)
    address = LOOPBACK if any_address else settings.listen
    return f"{'tls' if tls else 'nats'}://{f'[{address}]' if ':' in address else address}:{settings.port}"
