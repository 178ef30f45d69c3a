"""What a supervisor is asked and tells, and the files in which it keeps it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mvmci.cluster.changes import Observed
from mvmci.cluster.deployment import UnitConfig
from mvmci.errors import Usage
from mvmci.runtime import GRACE_S
from mvmci.system.files import write_private
from mvmci.system.processes import Known

LINE_BYTES_MAX = 64 << 20  # of a request or report, which holds every unit


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """Keep these running. One that runs, and was started with the same, is left alone.

    Behind `program` a unit's role and options are put; if it is empty, behind the supervisor's own.
    """

    units: tuple[UnitConfig, ...]
    program: tuple[str, ...] = ()


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """Stop these, or all, and want them no more. Where all are asked while they leave, they get no more
    grace."""

    names: tuple[str, ...] | None = None
    grace_s: float = GRACE_S


class Watch(msgspec.Struct, frozen=True, kw_only=True, tag="watch"):
    """Tell how they are, for as long as somebody listens."""


class Replace(msgspec.Struct, frozen=True, kw_only=True, tag="replace"):
    """Become `program`, which has this digest, unless that is what the supervisor is. Units go on.

    It waits until no unit is leaving, and is refused, by the report's `error`, by one that does not run here.
    """

    program: tuple[str, ...]
    digest: str


SupervisorRequest = Start | Stop | Watch | Replace


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a supervisor tells; also `units.json`. `error`: why it did not do what was asked."""

    units: list[Observed]
    error: str = ""


class SupervisorProcess(Known, frozen=True, kw_only=True):
    """`supervisor.json`: the process, and the digest of the program that it is. One of a build that could
    not be replaced has none."""

    digest: str = ""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A unit that is to run, and the program that it is to be."""

    config: UnitConfig
    program: tuple[str, ...]


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """`desired.json`: all that was asked for and not stopped since. It holds no secret."""

    units: tuple[Wanted, ...] = ()


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A unit as one program of the supervisor hands it to the next."""

    wanted: Wanted
    seen: Observed
    crashes: int = 0
    began: float = 0.0  # on the monotonic clock
    said_before: dict[str, int] = {}


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """All that a supervisor's next program is told; `lock` is the descriptor that holds its lock."""

    units: tuple[Running, ...]
    lock: int


class SupervisorFiles:
    """Where the supervisor of a cluster keeps what."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.supervisor = folder / "supervisor.json"
        self.socket = folder / "supervisor.sock"
        self.units = folder / "units.json"
        self.desired = folder / "desired.json"
        self.lock = folder / "supervisor.lock"
        self.own_log = folder / "supervisor.log"
        self.boot_script = folder / "boot.sh"
        self.logs = folder / "units"

    def log(self, name: str) -> Path:
        """What the unit printed. `log.1` beside it is what came before."""
        return self.logs / name / "log"

    def config(self, name: str) -> Path:
        """What the unit is given; see `mvmci.trust.provision`."""
        return self.logs / name / "config.json"


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """`path` as the address of a socket, which may have 107 bytes only, however deep the folder is."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def write(path: Path, value: Any) -> None:
    """Write `value` as JSON. No power cut is to be survived: with the processes, it would mean nothing."""
    write_private(path, msgspec.json.encode(value), synced=False)


def read_desired(files: SupervisorFiles) -> Desired:
    """What was asked for and not stopped since. Raises Usage where that cannot be read."""
    try:
        return msgspec.json.decode(files.desired.read_bytes(), type=Desired)
    except FileNotFoundError:
        return Desired()
    except (OSError, msgspec.DecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise Usage(f"{files.desired} cannot be read: {why}", hint="`mvmci up` makes it anew") from None


def keep_desired(files: SupervisorFiles, desired: Desired) -> None:
    """Have a boot find `desired`: a power cut leaves it. Raises OSError."""
    if desired.units:
        write_private(files.desired, msgspec.json.encode(desired))
    else:
        files.desired.unlink(missing_ok=True)


def desired_by(start: Start, program: Sequence[str]) -> Desired:
    """What a supervisor, which is `program`, begins with that is told `start`."""
    by = start.program or tuple(program)
    return Desired(units=tuple(Wanted(config=config, program=by) for config in start.units))
