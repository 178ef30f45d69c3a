"""The routes about jobs: what `curl` alone can do, and what is said of everything that cannot be done."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mvmci.cli.batch import read_batch
from mvmci.cli.request import RequestFiles
from mvmci.errors import StoreFull, StoreUnavailable
from mvmci.jobs.job import Limits
from mvmci.journals.reader import load
from mvmci.journals.request import JobRequest
from mvmci.journals.status import summary_of
from mvmci.store import UNNAMED_BLOB_S, Store
from tests.harness.memory import open_memory
from tests.harness.places import GUESTS
from tests.harness.waiting import LONG_S
from tests.parts.api.conftest import TOKEN, Face, Open

START = "/api/workflow/start"


async def curl(*args: str | Path, token: str = TOKEN) -> tuple[int, bytes]:
    """The status and the body that `curl` gets."""
    options = ["--silent", "--show-error", "--max-time", "30", "--write-out", "%{stderr}%{http_code}"]
    process = await asyncio.create_subprocess_exec(
        "curl",
        *options,
        *("--header", f"Authorization: Bearer {token}"),
        *map(str, args),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err
    return int(err), out


@pytest.mark.parametrize("place", ["memory", "jetstream"], indirect=True)  # where there are hints
async def test_curl_alone_deploys_a_module_starts_it_waits_for_it_and_reads_its_logs(
    store: Store, open_face: Open
) -> None:
    face = await open_face(store, token=TOKEN)
    async with face.worker():
        module = GUESTS / "hello.wasm"
        status, body = await curl("--form", f"module=@{module}", f"{face.url}/api/module/deploy")
        version = hashlib.sha256(module.read_bytes()).hexdigest()
        deployed = {"name": "hello", "version": version, "kept_s": UNNAMED_BLOB_S}
        assert (status, json.loads(body)) == (200, {"ok": deployed})
        order = {"module": "hello", "version": version, "args": ["one"], "id": "curl-1"}
        status, body = await curl("--data", json.dumps(order), face.url + START)
        assert (status, json.loads(body)) == (200, {"ok": {"id": "curl-1", "response": None}})
        status, body = await curl(f"{face.url}/api/workflow/curl-1/wait?timeout=30")
        assert (status, json.loads(body)["status"]) == (200, "succeeded")
        for stream, printed in [("stdout", b"arg hello.wasm\narg one\n"), ("stderr", b"hello on stderr\n")]:
            assert await curl(f"{face.url}/api/workflow/curl-1/logs?stream={stream}") == (200, printed)


async def test_a_workflow_is_given_its_input_as_json_text_and_its_result_is_json(face: Face) -> None:
    async with face.worker():
        started = await face.start("echo", workflow="run", input='{"build": 7}')
        assert set(started.json["ok"]) == {"id", "response"}
        ended = await face.get(f"/api/workflow/{started.json['ok']['id']}/wait")
    assert (ended.json["status"], ended.json["result"]) == ("succeeded", {"build": 7})


async def test_a_started_job_is_the_one_that_the_command_line_would_submit(
    face: Face, tmp_path: Path
) -> None:
    line = {
        "id": "same",
        "queue": "q",
        "args": ["a"],
        "env": {"K": "v"},
        "artifact": "*.txt",
        "timeout": "5m",
    }
    line |= {"memory": "64MiB", "output_limit": 4096, "disk": "1MiB", "attempts": 2}
    assert (await face.start("hello", **line)).status == 200
    spec = (await load(face.store, "same")).state.spec
    assert spec is not None
    assert spec.limits == Limits(
        timeout_ms=300_000, memory_bytes=64 << 20, output_bytes=4096, workspace_bytes=1 << 20, attempts=2
    )
    files, batch = RequestFiles(), tmp_path / "batch.jsonl"
    batch.write_text(json.dumps({**line, "module": str(GUESTS / "hello.wasm")}))
    [read] = read_batch(str(batch), JobRequest(), files)
    await files.keep(face.store)
    other = await files.spec(read.checked, "same", face.store)
    ours = {name: getattr(spec, name) for name in spec.__struct_fields__ if name not in ("at", "by", "seed")}
    assert ours == {name: getattr(other, name) for name in ours}
    assert spec.by == "127.0.0.1 through x1"


async def test_the_status_is_the_object_that_the_command_line_prints(face: Face) -> None:
    job = (await face.start("hello")).json["ok"]["id"]
    found = await face.get(f"/api/workflow/{job}")
    summary = await summary_of(face.store, await load(face.store, job))
    assert found.json == {name: getattr(summary, name) for name in summary.__struct_fields__}
    assert found.json["reason"] == "waiting: no worker takes from queue default"


async def test_the_same_request_with_the_same_id_is_the_same_job_and_another_one_is_refused(
    face: Face,
) -> None:
    for _ in range(2):
        assert (await face.start("hello", id="j", args=["a"])).json["ok"]["id"] == "j"
    assert len((await load(face.store, "j")).records) == 1
    assert (await face.start("hello", id="j", args=["b"])).error == (409, "the id j is taken by another job")


async def test_the_early_response_of_a_job_that_was_there_already_is_answered(face: Face) -> None:
    from mvmci.jobs.job import Payload
    from mvmci.jobs.journal import Journal, Lease, Response

    assert (await face.start("echo", id="j")).json["ok"]["response"] is None
    journal: Journal = await load(face.store, "j")
    lease = Lease(at=1, epoch=1, unit=face.store.presence.unit, incarnation="i", run="r", why="first")
    data = journal.encode([lease, Response(at=1, value=Payload(text='{"early": true}'))], "m")
    await face.store.journals.append("j", "run", "default", data, expect=journal.tail)
    assert (await face.start("echo", id="j")).json["ok"] == {"id": "j", "response": {"early": True}}


async def test_waiting_hears_of_the_end_and_never_hangs(face: Face) -> None:
    job = (await face.start("hello")).json["ok"]["id"]
    path = f"/api/workflow/{job}/wait"
    assert (await face.get(f"{path}?timeout=50ms")).error == (504, f"after 50ms, {job} has not ended")
    assert (await face.get(f"{path}?timeout=0")).status == 504
    waiting = asyncio.create_task(face.get(f"{path}?timeout=30"))
    async with face.worker():
        assert (await waiting).json["status"] == "succeeded"
    assert (await face.get(f"{path}?timeout=0")).json["status"] == "succeeded"


async def test_a_job_that_nobody_runs_is_cancelled_at_once_and_a_running_one_soon(face: Face) -> None:
    waiting = (await face.start("hello", id="waits")).json["ok"]["id"]
    found = await face.post(f"/api/workflow/{waiting}/cancel")
    assert (found.json["status"], found.json["reason"]) == (
        "cancelled",
        "cancelled by 127.0.0.1 through x1",
    )
    async with face.worker():
        await face.start("sleeper", id="runs", args=["20"])
        async with face.session.get(f"{face.url}/api/workflow/runs/logs?follow=1") as logs:
            await logs.content.readline()  # it has begun
            assert (await face.post("/api/workflow/runs/cancel")).status == 200
            await logs.read()  # ends with the job
        assert (await face.get("/api/workflow/runs")).json["status"] == "cancelled"
    assert (await face.post("/api/workflow/runs/cancel")).json["status"] == "cancelled"


async def test_logs_are_streamed_as_they_come_and_without_follow_are_what_there_is(face: Face) -> None:
    async with face.worker():
        await face.start("sleeper", id="j", args=["20"])
        async with face.session.get(f"{face.url}/api/workflow/j/logs?follow=1") as logs:
            assert logs.headers["Content-Type"] == "text/plain; charset=utf-8"
            first = await logs.content.readline()
            assert not (await load(face.store, "j")).state.ended
            so_far = (await face.get("/api/workflow/j/logs")).body
            assert (await face.post("/api/workflow/j/cancel")).status == 200
            printed = first + await logs.read()
    assert printed == b"".join(b"tick %d\n" % n for n in range(printed.count(b"\n")))
    assert so_far.startswith(b"tick 0\n") and printed.startswith(so_far)
    assert (await face.get("/api/workflow/j/logs?attempt=1&stream=stdout")).body == printed
    assert (await face.get("/api/workflow/j/logs?attempt=2")).body == b""
    assert (await face.get("/api/workflow/j/logs?stream=stderr")).body == b""


async def test_who_goes_away_is_not_followed_for_any_longer(face: Face) -> None:
    await face.start("hello", id="j")
    async with face.session.get(f"{face.url}/api/workflow/j/logs?follow=1") as logs:
        assert logs.status == 200
        (following,) = (task for task in asyncio.all_tasks() if "Watch._follow" in repr(task))
        logs.close()
        async with asyncio.timeout(LONG_S):
            await asyncio.wait([following])


# ---- What cannot be done

GOOD = {"module": "m", "version": "0" * 64}
BAD_STARTS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "it is no JSON object"),
    "no UTF-8": (b'{"module": "\xff"}', "`module`: 'utf-8' codec"),
    "deep": (b"[" * 100_000, "it is no JSON object"),
    "a list": ([], "it is no JSON object"),
    "no module": ({"version": "0" * 64}, "there is no `module`"),
    "no version": ({"module": "m"}, "there is no `version`"),
    "a version that is none": ({**GOOD, "version": "1.0"}, "`version`: '1.0' is no version"),
    "a name that is a path": ({**GOOD, "module": "a\x00b"}, "cannot be the name of a module's file"),
    "an unknown key": ({**GOOD, "time-out": 1}, "unknown key `time-out`"),
    "a file of ours": ({**GOOD, "dir": "/etc"}, "unknown key `dir`"),
    "input that is no text": ({**GOOD, "input": {}}, "`input`: Expected `str | null`, got `object`"),
    "a bad duration": ({**GOOD, "timeout": "soon"}, "`timeout`: `soon` is not a duration"),
    "too many attempts": ({**GOOD, "attempts": 0}, "`attempts`: 0 is not from 1 to 1000"),
}


@pytest.mark.parametrize("name", BAD_STARTS)
async def test_a_bad_start_is_one_sentence(face: Face, name: str) -> None:
    body, words = BAD_STARTS[name]
    status, message = (await face.post(START, body)).error
    assert status == 400
    assert words in message


BAD_FOR_A_MODULE: dict[str, tuple[str, dict[str, Any], str]] = {
    "a bad id": ("hello", {"id": "A b"}, "'A b' cannot be a job id"),
    "a bad queue": ("hello", {"queue": "no.way"}, "cannot be a queue"),
    "input for a command": ("hello", {"input": "1"}, "is a command and takes no --input"),
    "a workflow of a command": ("hello", {"workflow": "run"}, "hello is a command and has no workflow"),
    "arguments for a workflow": ("echo", {"args": ["a"]}, "is a workflow and takes no arguments"),
    "another workflow": ("echo", {"workflow": "main"}, "echo has no workflow 'main'"),
    "input that is no JSON": ("echo", {"input": "{"}, "--input is not JSON"),
    "a file of ours as input": ("echo", {"input": "@/etc/passwd"}, "is not JSON"),
    "a bad pattern": ("hello", {"artifact": "../x"}, "cannot be an artifact pattern"),
    "half a character": ("hello", {"args": ["\ud800"]}, "no JSON object"),
}


@pytest.mark.parametrize("name", BAD_FOR_A_MODULE)
async def test_what_a_module_does_not_take_is_one_sentence(face: Face, name: str) -> None:
    guest, more, words = BAD_FOR_A_MODULE[name]
    status, message = (await face.start(guest, **more)).error
    assert status == 400
    assert words in message
    assert not [job async for job in face.store.journals.jobs()]


async def test_a_module_that_nobody_deployed_is_not_found_and_a_blob_that_is_none_is_refused(
    face: Face,
) -> None:
    assert (await face.post(START, GOOD)).error == (404, f"there is no module m of version {'0' * 64}")
    digest = await face.store.blobs.put(b"text")
    status, message = (await face.post(START, {**GOOD, "version": digest[7:]})).error
    assert (status, message) == (400, "m is not WebAssembly")
    assert not list(face.api.folder.iterdir())


async def test_a_queue_that_the_executor_may_not_write_to_is_refused_at_once(open_face: Open) -> None:
    face = await open_face(open_memory("x1"), queues=("mine", "ours"))
    refused = (403, "this executor's credential is not for queue other")
    assert (await face.start("hello", queue="other")).error == refused
    assert (await face.start("hello", queue="ours", id="j")).status == 200
    assert (await face.post("/api/workflow/j/cancel")).status == 200
    other = await open_face(face.store, queues=("other",))
    assert (await other.post("/api/workflow/j/cancel")).status == 403
    assert (await other.get("/api/workflow/j")).status == 200


async def test_any_executor_starts_what_another_was_given(face: Face) -> None:
    digest = await face.store.blobs.put_file(GUESTS / "hello.wasm")
    assert (await face.post(START, {"module": "tool", "version": digest[7:], "id": "j"})).status == 200
    assert (await load(face.store, "j")).state.spec.name == "tool.wasm"  # type: ignore[union-attr]
    assert not list(face.api.folder.iterdir())


@pytest.mark.parametrize("path", ["", "/wait", "/logs", "/cancel"])
async def test_a_job_that_is_not_there_is_not_found(face: Face, path: str) -> None:
    method = "POST" if path == "/cancel" else "GET"
    assert (await face.ask(method, f"/api/workflow/nobody{path}")).error == (404, "there is no job nobody")
    assert (await face.ask(method, f"/api/workflow/No-ID{path}")).error == (
        400,
        "'No-ID' cannot be a job id",
    )


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("wait?timeout=soon", "`soon` is not a duration"),
        ("wait?timeout=-1", "`-1` is not a duration"),
        ("wait?timeout=2h", "`2h` is out of bounds"),
        ("logs?stream=stdin", "there is no stream 'stdin'"),
        ("logs?follow=yes", "`follow` is 'yes'"),
        ("logs?attempt=0", "`attempt` is '0'"),
    ],
)
async def test_a_bad_question_is_one_sentence(face: Face, query: str, words: str) -> None:
    await face.start("hello", id="j")
    assert (await face.get(f"/api/workflow/j/{query}")).error == (400, words)


async def test_a_message_cannot_be_sent_and_the_reason_is_told(face: Face) -> None:
    status, message = (await face.post("/api/workflow/send-msg/j", {"type": "t", "data": "1"})).error
    assert status == 501
    assert "cannot be sent a message" in message


async def test_what_is_no_route_is_told_as_json(face: Face) -> None:
    assert (await face.get("/nowhere")).error == (404, "there is no such route")
    wrong = await face.post("/version")
    assert wrong.error == (405, "the route does not take this method")
    assert "GET" in wrong.headers["Allow"]


async def test_a_store_that_is_full_or_away_has_a_status_of_its_own(
    face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = await face.deployed("hello")

    async def full(*_: Any, **__: Any) -> int:
        raise StoreFull("no room is left", hint="make some")

    async def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("the broker cannot be reached")

    monkeypatch.setattr(face.store.journals, "append", full)
    assert (await face.post(START, order)).error == (507, "no room is left")
    monkeypatch.setattr(face.store.journals, "read", away)
    found = await face.get("/api/workflow/j")
    assert found.error == (503, "the broker cannot be reached")
    assert found.headers["Retry-After"]


async def test_a_bug_is_told_without_its_traceback(
    face: Face, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a secret of ours")

    monkeypatch.setattr(face.store.journals, "read", broken)
    found = await face.get("/api/workflow/j")
    assert found.error == (500, "something is wrong with this executor")
    assert b"secret" not in found.body
    assert "a secret of ours" in caplog.text
