"""100, 500 and 1,000 jobs at once, on each access: nothing is lost, and nothing is done twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator

import pytest

from mvmci.bench.client import Client
from mvmci.bench.load import flood
from mvmci.bench.profiles import PROFILES, prepare
from mvmci.jobs.journal import Done, Journal

WORKERS = "workers: {count: 3, slots: 2}\n"
ACCESSES = {
    "per-worker": f"access: per-worker\n{WORKERS}",
    "peer": f"access: peer\nexecutors: {{slots: 4}}\n{WORKERS}",
    "pool": f"access: pool\nexecutors: {{count: 2, slots: 2}}\n{WORKERS}",
    "shared": f"access: shared\nexecutors: {{slots: 4}}\n{WORKERS}",
}
AT_ONCE = (100, 500, 1000)


@pytest.fixture(scope="module", params=ACCESSES)
def access(request: pytest.FixtureRequest) -> str:
    return ACCESSES[request.param]


async def test_of_so_many_jobs_at_once_each_has_one_end(client: Client, service: str) -> None:
    work = await prepare(PROFILES["mixed"], client, service)
    for jobs in AT_ONCE:
        found = await flood(client, work, jobs)
        print(found)
        assert (found.succeeded, found.failed, found.lost, found.twice) == (jobs, 0, 0, 0)
    ends = Counter([status async for status in ends_of_journals(client)])
    assert ends == {("succeeded", 1): sum(AT_ONCE)}


async def ends_of_journals(client: Client) -> AsyncIterator[tuple[str, int]]:
    """How each job ended, and how many ends its whole journal has: counted by whoever reads journals."""
    async for job, entries in client.cluster.journals.newest():
        if job.startswith("b-"):
            journal = Journal(job)
            journal.absorb(entries)
            assert journal.state.done is not None and journal.state.corrupt is None
            ends = [record for record in journal.records if isinstance(record, Done)]
            ignored = [one for one in journal.ignored if one.origin is not None and one.origin.kind == "done"]
            yield journal.state.done.status, len(ends) + len(ignored)
