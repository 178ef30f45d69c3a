"""What sentences about a host are made of: what it says, cut to what fits one, and that it is lost."""

from __future__ import annotations

from mvmci.errors import HostAway
from mvmci.system.text import one_line

WORDS_CHARS_MAX = 300


def lost(name: str, error: BaseException | None = None) -> HostAway:
    """The connection to the host `name` has ended, by `error` where something tells why."""
    why = f": {words(error)}" if error is not None and words(error) else ""
    return HostAway(f"the connection to {name} is lost{why}", hint="try again when the host is back")


def words(error: BaseException) -> str:
    """What the library, or the other side, says."""
    return shown(getattr(error, "reason", None) or str(error))


def shown(text: str) -> str:
    """The beginning of `text`, as one line."""
    return one_line(text)[:WORDS_CHARS_MAX]
