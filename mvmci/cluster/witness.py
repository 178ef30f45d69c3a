"""What must be in a cluster's streams, as a witness outside of them remembers it. Pure.

JOBS deletes nothing singly: messages go by the purges of retention alone, and those are written down before
they are sent. So `last - messages`, the messages that were ever removed, is known at any time, and so is
the least that the last sequence can be. Whatever a stream lacks beyond that was lost.

    Seen        a stream as the broker tells of it now
    Witness     what is kept of it in CONFIG, and beside the control plane in a file
    losses      the difference, in sentences
    Loss        what the cluster says from then on, until its owner accepts it
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

RECOVER = "`mvmci recover` on the machine with its keys says what is missing, and goes on"
JOBS_MAX = 1_000  # of the ids that a `Loss` names


class Seen(msgspec.Struct, frozen=True):
    """A stream: when it was made (RFC 3339, the broker's), its last sequence, how many messages it has."""

    created: str
    last: int
    messages: int

    @property
    def removed(self) -> int:
        """How many messages were ever removed from it."""
        return self.last - self.messages


class Removal(msgspec.Struct, frozen=True):
    """The `count` messages of a job with a sequence below `before`, which are about to be purged."""

    job: str
    before: int
    count: int


class Witness(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was in the streams. `accepted` (ms since 1970): when the owner last accepted a loss.

    Of the CONFIG that keeps it, a witness knows nothing; the one in the file does.
    """

    jobs: Seen
    blobs: Seen | None = None
    config: Seen | None = None
    removals: tuple[Removal, ...] = ()  # purges of JOBS that were begun, and perhaps done
    sweeping: tuple[str, ...] = ()  # the units that may be removing messages of BLOBS
    accepted: int = 0

    @property
    def removed_max(self) -> int:
        """How many messages can be missing from JOBS."""
        return self.jobs.removed + sum(removal.count for removal in self.removals)


class Loss(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a cluster lacks, from when it was noticed (ms since 1970) until its owner accepts it."""

    at: int
    what: tuple[str, ...]
    jobs: tuple[str, ...] = ()  # of jobs that are gone, those whose ids are known
    last: int = 0  # the last sequence that JOBS is known to have had

    @property
    def sentence(self) -> str:
        """What is said to who wants something of the cluster."""
        return f"its store lacks records that it had, so it takes no jobs: {'; '.join(self.what)}"


def losses(
    before: Witness, after: Witness, jobs: Seen | None, blobs: Seen | None, names: Mapping[str, str]
) -> list[str]:
    """What JOBS and BLOBS lack of what a witness knew that was read `before` they were looked at.

    One that was read `after` that knows of every purge that was begun until then. None is a stream that is
    not there; `names` says what each is called.
    """
    told = _rolled_back(names["jobs"], before.jobs, jobs)
    if not told and jobs is not None and jobs.removed > after.removed_max:
        told.append(f"{names['jobs']} lacks {jobs.removed - after.removed_max} messages that nothing removed")
    if before.blobs is not None:
        there = _rolled_back(names["blobs"], before.blobs, blobs)
        if not there and blobs is not None and after.blobs is not None and not after.sweeping:
            gone = blobs.removed - after.blobs.removed
            there = [f"{names['blobs']} lacks {gone} messages that nothing removed"] if gone > 0 else []
        told += there
    return told


def config_losses(before: Seen, now: Seen | None, name: str) -> list[str]:
    """What CONFIG lacks of what was in it: no key is ever without its last message."""
    told = _rolled_back(name, before, now)
    if not told and now is not None and now.messages < before.messages:
        told.append(f"{name} lacks {before.messages - now.messages} keys that nothing removed")
    return told


def _rolled_back(name: str, before: Seen, now: Seen | None) -> list[str]:
    if now is None:
        return [f"{name} is gone, with {before.messages} messages"]
    if now.created != before.created:
        return [f"{name} was made anew at {now.created}: it had {before.messages} messages"]
    if now.last < before.last:
        return [f"{name} ends at sequence {now.last}, and had {before.last}"]
    return []
