"""Every failure that mvmci expects, one class each, with the exit code that a script may rely on.

A message is one sentence that says what was wrong and where; `hint` says what to do about it. The
command line prints both and nothing else. A programmer's error is an `assert`, not one of these.
"""

from __future__ import annotations

EXIT_FAILED = 1  # the job failed or was cancelled, whatever code the guest gave
EXIT_USAGE = 2
EXIT_CHANGES = 3  # `plan --exit-code` found some
EXIT_PARTLY = 4  # partly applied
EXIT_LOCKED = 5
EXIT_UNREACHABLE = 6
EXIT_REFUSED = 7  # a ticket or a credential
EXIT_VERSIONS = 8
EXIT_TIMED_OUT = 124
EXIT_INTERNAL = 125  # ours, not the job's
FOR_GOOD = (EXIT_REFUSED, EXIT_VERSIONS)  # a unit ends so again, under the same program and key


class MvmciError(Exception):
    """Base of all expected failures."""

    exit_code = EXIT_INTERNAL

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Usage(MvmciError):
    """What the user asked for cannot be done: a bad option, a bad file, an unknown id."""

    exit_code = EXIT_USAGE


class BadModule(Usage):
    """Not WebAssembly, or it imports something that is not offered."""


class BadWorkspace(Usage):
    """A directory that cannot be a workspace: links that leave it, devices, names, too many files."""


class NotFound(Usage):
    """There is no such job, blob or artifact."""


class IdTaken(Usage):
    """The id belongs to another job, or to one that has ended and was forgotten."""


class LockHeld(MvmciError):
    """Another process is at work on the same thing."""

    exit_code = EXIT_LOCKED


class TicketRefused(MvmciError):
    """A ticket or a credential that the cluster does not take, or that is none."""

    exit_code = EXIT_REFUSED


class VersionsDiffer(MvmciError):
    """Two parts that must understand each other are of versions that do not."""

    exit_code = EXIT_VERSIONS


class PartlyApplied(MvmciError):
    """A change was begun and could not be finished. Doing it again goes on."""

    exit_code = EXIT_PARTLY


class StoreUnavailable(MvmciError):
    """The store does not answer; nobody can say whether the last write landed."""

    exit_code = EXIT_UNREACHABLE


class StoreFull(StoreUnavailable):
    """The store refuses writes for lack of room. Nothing was written."""


class StoreLost(MvmciError):
    """The store lacks records that it had, and its owner has not accepted that yet."""


class EngineAway(MvmciError):
    """The engine of this cluster cannot be reached from here. Its jobs wait."""


class HostAway(MvmciError):
    """A host of the cluster does not answer, or no more. It may again."""

    exit_code = EXIT_UNREACHABLE


class HostRefused(MvmciError):
    """A host of the cluster does not prove who it is, or does not let us in. Nothing was done on it."""

    exit_code = EXIT_REFUSED


class HostFull(MvmciError):
    """This machine has no room for what a job needs. Another may have."""


class Conflict(MvmciError):
    """A compare-and-set was refused: the job has a message after the one that was expected."""


class NoAnswer(StoreUnavailable):
    """A write was sent and its answer did not come: it may have landed, or land later."""


class NotYet(MvmciError):
    """The time of waiting is up, and a job has not ended. It goes on."""

    exit_code = EXIT_TIMED_OUT


class Fenced(MvmciError):
    """Another run holds the job, or it has ended: stop, kill, write nothing, acknowledge nothing."""


class JournalCorrupt(MvmciError):
    """The bytes of a journal are not what its writers wrote."""


class Nondeterminism(MvmciError):
    """A workflow asked for something else than it had asked for when the journal was written."""


class HostUnfit(MvmciError):
    """This host can run no guest at all now; another may."""


class JobUnfit(MvmciError):
    """This host cannot run this job, through no fault of the job's; another may."""


class IsolationUnavailable(MvmciError):
    """This host cannot give the isolation that was demanded."""
