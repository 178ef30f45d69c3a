"""After a loss: what is missing as far as it can be known, and the owner's word to go on without it.

Nothing here brings a record back. What the broker's own check kept aside lies in its folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from mvmci.cluster.witness import JOBS_MAX, Witness
from mvmci.errors import StoreUnavailable
from mvmci.jobs.job import is_id
from mvmci.jobs.journal import Journal
from mvmci.roles.broker import DAMAGE, FOLDER
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.blocks import Damage
from mvmci.stores.nats.config import LOSS
from mvmci.system.clock import wall_clock_ms


class Missing(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a loss, as `mvmci recover --json` prints it.

    `gaps` are the ranges of sequences that JOBS has not, of which `removed` messages went on purpose;
    `jobs` are ids of which nothing is left, `damaged` those of which a part is. Lists end at `JOBS_MAX`.
    """

    at: int
    what: tuple[str, ...]
    gaps: list[tuple[int, int]]
    removed: int
    jobs: list[str]
    damaged: dict[str, str]


async def missing(cluster: Cluster, damage: Sequence[Damage] = ()) -> Missing | None:
    """What `cluster` lacks; None where nothing is. `damage` is what its broker found before it started.

    Raises StoreUnavailable.
    """
    loss = await cluster.config.loss()
    if loss is None:
        return None
    witness, _ = await cluster.config.witness()
    there, damaged = await _read(cluster)
    lost = {job: one.seq for one in damage if (job := _lost_job(cluster, one)) is not None}
    heard_of = {*loss.jobs, *await cluster.mentioned(), *lost}
    for job in lost.keys() & there - damaged.keys():
        damaged[job] = f"the record {lost[job]} of it was lost"
    return Missing(
        at=loss.at,
        what=loss.what,
        gaps=await cluster.journals.gaps(loss.last),
        removed=witness.removed_max if witness is not None else 0,
        jobs=sorted(heard_of - there)[:JOBS_MAX],
        damaged=dict(list(damaged.items())[:JOBS_MAX]),
    )


def _lost_job(cluster: Cluster, damage: Damage) -> str | None:
    """The job of which a record could not be mended, if it says so itself."""
    if damage.mended or damage.stream != cluster.layout.jobs:
        return None
    job = damage.subject.removeprefix(f"{cluster.layout.cluster}.job.").partition(".")[0]
    return job if is_id(job) else None


def read_damage(folder: Path) -> list[Damage]:
    """What the broker of the cluster in `folder` found, where it ran on this machine."""
    try:
        return msgspec.json.decode((folder / FOLDER / DAMAGE).read_bytes(), type=list[Damage])
    except (OSError, msgspec.DecodeError):
        return []


async def _read(cluster: Cluster) -> tuple[set[str], dict[str, str]]:
    """Every job that has a journal, and what is wrong with those that are not whole."""
    there: set[str] = set()
    damaged: dict[str, str] = {}
    open_ones: dict[str, Journal] = {}
    async for job, entry in cluster.store.journals.all():
        there.add(job)
        journal = open_ones.pop(job, None) or Journal(job)
        journal.absorb([entry])
        if journal.state.corrupt is not None:
            damaged[job] = journal.state.corrupt
        elif not journal.state.ended:
            open_ones[job] = journal  # what has ended need not be kept in memory
    damaged |= {job: "its beginning is missing" for job, one in open_ones.items() if one.state.spec is None}
    return there, damaged


async def accept(cluster: Cluster) -> None:
    """Let the cluster go on with what there is. Raises StoreUnavailable, Conflict."""
    jobs, blobs = await cluster.look("jobs"), await cluster.look("blobs")
    if jobs is None or blobs is None:
        raise StoreUnavailable("the streams are not there yet", hint="a control plane makes them: try again")
    there, revision = await cluster.config.witness()
    accepted = max(wall_clock_ms(), (there.accepted if there is not None else 0) + 1)
    witness = Witness(jobs=jobs, blobs=blobs, accepted=accepted)
    await cluster.config.put_witness(witness, expect=revision)
    await cluster.config.delete(LOSS)
    await cluster.config.tell()
