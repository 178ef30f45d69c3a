"""The one integer by which builds of mvmci know what they may say to each other (docs/protocol.md §8).

A cluster speaks at a *level*: that of its settings, and everybody writes at it. A build reads every level
from `OLDEST` to `WIRE`, and can write each of them. So builds that have a level in common work together;
the level is raised when all understand the next, and it is never lowered.

    level 0     what was before there were levels: no message says its own
    level 1     messages say their level, also those of journals

Within a level nothing that is written takes on another meaning. Subjects, streams and permissions are only
added to, and so are fields, which whoever does not know them passes over. A new kind of record, request or
reply is a new level.
"""

from __future__ import annotations

import msgspec

from mvmci import __version__
from mvmci.errors import VersionsDiffer

WIRE = 1  # the newest level that this build reads and writes
OLDEST = 0  # the oldest that it does
LEVEL_CHARS_MAX = 9
HINT = (
    "use the program of the cluster here: `mvmci upgrade` fetches it where a ticket was used, else copy it; "
    "`mvmci version` tells one from another"
)


class Leveled(msgspec.Struct, frozen=True):
    """All that is read of a message before it is known at which level it was written."""

    wire: int = 0


class Level:
    """At which level is written in one place, a cluster or a folder. It only grows."""

    def __init__(self, spoken: int = OLDEST) -> None:
        self.spoken = spoken

    def learn(self, wire: int, what: str) -> None:
        """`what` says that the level is `wire` now. Raises VersionsDiffer for one that is not known here."""
        check(wire, what)
        self.spoken = max(self.spoken, wire)


def is_understood(wire: int) -> bool:
    """Whether this build reads what was written at level `wire`."""
    return OLDEST <= wire <= WIRE


def check(wire: int, what: str) -> None:
    """Raises VersionsDiffer where `what` was written at a level that this build does not read."""
    if not is_understood(wire):
        raise VersionsDiffer(difference(wire, what), hint=HINT)


def difference(wire: int, what: str) -> str:
    """That `what` is of a level which this build does not read."""
    than = "newer" if wire > WIRE else "older"
    known = str(WIRE) if OLDEST == WIRE else f"{OLDEST} to {WIRE}"
    return f"{what} is {than} than this mvmci {__version__}: it is of level {wire}, and {known} is known here"


def mark(wire: int, message_id: str) -> str:
    """The id of a message of a journal that is written at level `wire`."""
    return f"{wire}:{message_id}" if wire else message_id


def level_of(message_id: str) -> int:
    """The level at which a message with that id was written."""
    level, colon, _ = message_id.partition(":")
    is_level = colon and level.isascii() and level.isdigit() and len(level) <= LEVEL_CHARS_MAX
    return int(level) if is_level else 0
