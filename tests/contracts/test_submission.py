"""An id exists once, however often and by whomever it is submitted."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import msgspec
import pytest

from mvmci.errors import IdTaken, NoAnswer
from mvmci.holder import load
from mvmci.journal import Done, Journal, Lease, Spec
from mvmci.store import Store
from mvmci.submission import submit
from tests.conftest import OpenStore, Place


def spec(job: str = "j", **changes: Any) -> Spec:
    asked = Spec(
        at=1,
        id=job,
        queue="default",
        kind="command",
        module="sha256:" + "0" * 64,
        name="m.wasm",
        component=False,
        seed=1,
        by="me",
    )
    return msgspec.structs.replace(asked, **changes)


async def test_the_same_request_again_is_accepted_and_written_once(store: Store) -> None:
    assert await submit(store, spec())
    assert not await submit(store, spec(at=2, by="you", seed=2))
    journal = await load(store, "j")
    assert journal.records == [spec()]


@pytest.mark.parametrize("changes", [{"args": ("x",)}, {"queue": "other"}, {"kind": "workflow"}])
async def test_another_request_under_the_same_id_is_refused(store: Store, changes: dict[str, Any]) -> None:
    await submit(store, spec())
    with pytest.raises(IdTaken, match="taken by another job"):
        await submit(store, spec(**changes))


async def test_of_many_that_submit_the_same_id_at_once_one_is_new(open_store: OpenStore) -> None:
    stores = [await open_store(f"u{n}") for n in range(5)]
    new = await asyncio.gather(*(submit(store, spec(by=f"u{n}")) for n, store in enumerate(stores)))
    assert sum(new) == 1


async def test_the_tombstone_of_a_job_keeps_its_id(place: Place, store: Store) -> None:
    if place.kind != "jetstream":
        pytest.skip("only a cluster forgets jobs: elsewhere a first message that is no spec is corrupt")
    await submit(store, spec("other"))  # the sequence is the stream's: what was purged stood before
    lease = Lease(at=1, epoch=1, unit="w", incarnation="i", run="r", why="first")
    ended = Journal("j").encode([lease, Done(at=1, status="succeeded")], "m")
    await store.journals.append("j", "done", "default", ended, message_id="m", expect=0)
    with pytest.raises(IdTaken, match="has already ended"):
        await submit(store, spec())


@pytest.mark.parametrize("landed", [True, False])
async def test_a_submit_without_an_answer_is_sent_again_and_exists_once(store: Store, landed: bool) -> None:
    class Deaf:
        """Loses the answer to the first append, and maybe the append."""

        asked = 0

        async def append(self, *args: Any, **options: Any) -> int:
            self.asked += 1
            if self.asked == 1 and not landed:
                raise NoAnswer("lost")
            seq = await store.journals.append(*args, **options)
            if self.asked == 1:
                raise NoAnswer("lost")
            return seq

        def __getattr__(self, name: str) -> Any:
            return getattr(store.journals, name)

    deaf = Deaf()
    assert await submit(dataclasses.replace(store, journals=deaf), spec())
    assert deaf.asked == (1 if landed else 2)
    assert (await load(store, "j")).records == [spec()]
