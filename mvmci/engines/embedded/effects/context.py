"""What an effect is performed with, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass

from mvmci.engines.embedded import workspace
from mvmci.engines.embedded.command import fill
from mvmci.engines.embedded.host import Host
from mvmci.engines.embedded.slots import Slot
from mvmci.jobs import effect, tree
from mvmci.jobs.journal import Intent, Spec


class Effect(effect.Request, frozen=True, kw_only=True):
    """Base of the requests of all kinds."""

    async def perform(self, context: Context) -> effect.Value:
        """The answer, or an `effect.Error`. What ends the job is raised: LimitReached, Suspended."""
        raise NotImplementedError


class Suspended(Exception):
    """The workflow let go: it sleeps until `until` (ms since 1970), or drains (0)."""

    def __init__(self, until: int) -> None:
        super().__init__()
        self.until = until


class Files:
    """The workspace of a workflow, laid out when an effect first uses it, as the last one left it."""

    def __init__(self, host: Host, slot: Slot, tree: str | None) -> None:
        self.tree = tree  # its digest; the caller keeps it up to date while it replays
        self._host = host
        self._slot = slot
        self._lies: workspace.Snapshot | None = None
        self._used = False  # since it was last kept

    async def use(self) -> None:
        """Lay it out, if it is not yet."""
        if self._lies is None:
            self._lies = await fill(self._host, self._slot, self.tree)
        self._used = True

    async def keep(self) -> str | None:
        """Store it as it is now, and return the digest of its tree; None if it was not used."""
        if not self._used:
            return None
        blobs = self._host.store.blobs
        self._lies = await workspace.scan(self._slot.directory, blobs, previous=self._lies, strict=False)
        self.tree, self._used = await blobs.put(tree.encode_tree(self._lies.tree)), False
        return self.tree


@dataclass(frozen=True)
class Context:
    """One effect of one job, in one slot. `key` is its idempotency key, where it is idempotent."""

    host: Host
    spec: Spec
    slot: Slot
    files: Files
    intent: Intent
    key: str | None
