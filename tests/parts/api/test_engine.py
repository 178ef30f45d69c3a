"""The door for workers, and what an executor says of itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientConnectorError, ClientSession
from prometheus_client.parser import text_string_to_metric_families

from mvmci.api import serve_http
from mvmci.engines import open_embedded
from mvmci.engines.remote import RunRequest
from mvmci.engines.server import Executor
from mvmci.jobs.allow import Allow
from mvmci.jobs.journal import Lease
from mvmci.journals.reader import load
from mvmci.stores.nats import dial_cluster
from tests.conftest import CLUSTER_BYTES
from tests.harness.broker import ensure
from tests.harness.broker import serve as serve_broker
from tests.harness.memory import open_memory
from tests.harness.ports import own_port
from tests.harness.waiting import LONG_S
from tests.parts.api.conftest import Face, Open

RUN = "/api/engine/run"


def order(job: str) -> bytes:
    return msgspec.json.encode(RunRequest(job=job, worker="w1"))


async def submitted(face: Face, job: str, guest: str = "hello", *args: str) -> str:
    assert (await face.start(guest, id=job, args=args)).status == 200
    return job


async def metrics(face: Face) -> dict[str, float]:
    """By name; of those with an outcome, by `name:outcome`."""
    text = (await face.get("/metrics")).body.decode()
    return {
        sample.name + (f":{sample.labels['outcome']}" if "outcome" in sample.labels else ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_an_order_is_answered_with_its_words_each_when_it_is_known(face: Face) -> None:
    await submitted(face, "j", "sleeper", "20")
    async with face.session.post(face.url + RUN, data=order("j")) as answer:
        assert (answer.status, answer.content_type) == (200, "application/x-ndjson")
        taken = json.loads(await answer.content.readline())
        assert not (await load(face.store, "j")).state.ended
        assert (taken["reply"], taken["unit"]) == ("accepted", "x1")
        await face.post("/api/workflow/j/cancel")
        assert json.loads(await answer.content.readline()) == {
            "reply": "finished",
            "kind": "ended",
            "until": 0,
        }
        assert await answer.read() == b""
    lease = (await load(face.store, "j")).state.lease
    assert lease is not None
    assert (lease.unit, lease.worker) == ("x1", "w1")


async def test_what_is_no_job_is_told_in_a_word(face: Face) -> None:
    (failed,) = (await face.post(RUN, order("nobody"))).body.splitlines()
    assert json.loads(failed)["reply"] == "failed"
    assert json.loads(failed)["why"] == "not-found"


async def test_without_a_free_slot_an_order_is_refused_at_once_and_the_executor_is_still_healthy(
    open_face: Open,
) -> None:
    face = await open_face(open_memory("x1"), slots=1)
    await submitted(face, "long", "sleeper", "20")
    await submitted(face, "other")
    async with face.session.post(face.url + RUN, data=order("long")) as answer:
        await answer.content.readline()
        found = await face.post(RUN, order("other"))
        assert found.error == (503, "there is no free slot")
        assert found.headers["Retry-After"] == "1"
        healthy = await face.get("/health")
        assert (healthy.status, healthy.json) == (200, {"status": "ready", "slots": 1, "free": 0})
        counted = await metrics(face)
        assert (counted["mvmci_slots"], counted["mvmci_slots_busy"]) == (1, 1)
        await face.post("/api/workflow/long/cancel")
        await answer.read()
    counted = await metrics(face)
    assert (counted["mvmci_slots_busy"], counted["mvmci_runs_total:ended"]) == (0, 1)
    assert (counted["mvmci_jobs_taken_total"], counted["mvmci_jobs_refused_total"]) == (1, 1)


async def test_a_job_goes_on_when_its_worker_goes_away_and_who_asks_again_follows_it(face: Face) -> None:
    await submitted(face, "j", "sleeper", "20")
    async with face.session.post(face.url + RUN, data=order("j")) as answer:
        await answer.content.readline()
        answer.close()
    async with asyncio.timeout(LONG_S):
        while '"499"' not in (await face.get("/metrics")).body.decode():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert face.executor.free == 1
    async with face.session.post(face.url + RUN, data=order("j")) as again:
        await again.content.readline()
        await face.post("/api/workflow/j/cancel")
        assert json.loads(await again.content.readline())["kind"] == "ended"
    journal = await load(face.store, "j")
    assert sum(isinstance(record, Lease) for record in journal.records) == 1


async def test_an_executor_that_drains_or_is_without_its_broker_is_not_healthy(open_face: Open) -> None:
    reasons = [""]
    face = await open_face(open_memory("x1"), away=lambda: reasons[0])
    assert (await face.get("/health")).status == 200
    reasons[0] = "the broker is away"
    assert (await face.get("/health")).error == (503, "the broker is away")
    reasons[0] = ""
    await face.executor.drain()
    assert (await face.get("/health")).error == (503, "this executor is draining")
    await submitted(face, "j")
    assert (await face.post(RUN, order("j"))).error == (503, "this executor is draining")
    face.executor.resume()
    assert (await face.get("/health")).status == 200


async def test_the_face_of_a_cluster_says_when_its_broker_is_away(tmp_path: Path, host_root: Path) -> None:
    async with contextlib.AsyncExitStack() as broker, ClientSession() as session:
        url = await broker.enter_async_context(serve_broker(tmp_path / "broker"))
        await ensure(url, "demo", store_bytes=CLUSTER_BYTES)
        cluster = await dial_cluster(url, "demo", "x1", maintains=True)
        engine = open_embedded(cluster.store, host_root, allow=Allow, slots=1)
        executor = Executor(engine, cluster.store, slots=1)
        port = own_port()
        serving = asyncio.create_task(serve_http(executor, cluster, "127.0.0.1", port))

        async def healthy(status: int) -> Any:
            async with asyncio.timeout(LONG_S):
                while True:
                    with contextlib.suppress(ClientConnectorError):
                        async with session.get(f"http://127.0.0.1:{port}/health") as answer:
                            if answer.status == status:
                                return await answer.json()
                    await asyncio.sleep(0.02)

        assert await healthy(200) == {"status": "ready", "slots": 1, "free": 1}
        await broker.aclose()
        assert (await healthy(503))["error"]["message"] == "the broker is away"
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await engine.close()
        await cluster.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"job": "j"}',
        b'{"job": "A b", "worker": "w"}',
        b"\xff",
    ],
)
async def test_what_is_no_order_is_refused(face: Face, body: bytes) -> None:
    status, message = (await face.post(RUN, body)).error
    assert status == 400
    assert message.startswith("the body is no request")
    assert face.executor.free == 2


async def test_requests_are_counted_by_route_and_by_nothing_that_who_asks_can_choose(face: Face) -> None:
    for path in ("/api/workflow/a", "/api/workflow/b", "/x", "/y"):
        await face.get(path)
    await face.ask("PROPFIND", "/x")
    text = (await face.get("/metrics")).body.decode()
    counted: dict[Any, float] = {
        (sample.labels["method"], sample.labels["route"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "mvmci_http_request_duration_seconds_count"
    }
    assert counted[("GET", "/api/workflow/{id}", "404")] == 2
    assert counted[("GET", "none", "404")] == 2
    assert counted[("other", "none", "404")] == 1
    assert (await face.get("/metrics")).headers["Content-Type"].startswith("text/plain")


async def test_stopping_does_not_wait_for_those_who_listen(face: Face) -> None:
    """A worker that follows a job is let go; the job is the executor's."""
    await submitted(face, "j", "sleeper", "20")
    async with asyncio.timeout(LONG_S), face.session.post(face.url + RUN, data=order("j")) as answer:
        await answer.content.readline()
        await face.stop()
        with pytest.raises(Exception, match=r"(?i)payload|closed|disconnected"):
            await answer.read()
    assert not (await load(face.store, "j")).state.ended
