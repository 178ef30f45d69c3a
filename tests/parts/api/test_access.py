"""Who may ask: with a token whoever has it, without one this machine and no page in its browser."""

from __future__ import annotations

import logging

import pytest

from mvmci.api.openapi import openapi
from mvmci.errors import Usage
from mvmci.trust.certificate import run_token
from tests.harness.memory import open_memory
from tests.parts.api.conftest import TOKEN, Open

OPEN = ("/version", "/health")
ROUTES = [
    (method.upper(), path.replace("{id}", "j"))
    for path, methods in openapi()["paths"].items()
    for method in methods
]
WRONG = {
    "none": {},
    "empty": {"Authorization": "Bearer "},
    "another": {"Authorization": f"Bearer {TOKEN}!"},
    "a beginning": {"Authorization": f"Bearer {TOKEN[:-1]}"},
    "another scheme": {"Authorization": f"Basic {TOKEN}"},
    "no scheme": {"Authorization": TOKEN},
    "no ASCII": {"Authorization": "Bearer tök€n"},
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
async def test_without_the_token_nothing_is_answered_but_who_is_there(
    open_face: Open, headers: dict[str, str]
) -> None:
    face = await open_face(open_memory("x1"), token=TOKEN)
    for method, path in [*ROUTES, ("GET", "/nowhere")]:
        found = await face.ask(method, path, headers=headers)
        if path in OPEN:
            assert found.status == 200
        else:
            assert found.error == (401, "the token is missing, or it is another one")
            assert found.headers["WWW-Authenticate"] == "Bearer"


async def test_with_the_token_all_is_answered_and_it_is_never_logged(
    open_face: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    face = await open_face(open_memory("x1"), token=TOKEN)
    for scheme in ("Bearer", "bearer"):
        for method, path in ROUTES:
            found = await face.ask(method, path, headers={"Authorization": f"{scheme} {TOKEN}"})
            assert found.status not in (401, 403, 500)
    assert TOKEN not in caplog.text


async def test_who_has_the_token_of_workers_may_have_jobs_run_and_nothing_else(open_face: Open) -> None:
    face = await open_face(open_memory("x1"), token=TOKEN)
    shown = {"Authorization": f"Bearer {run_token(TOKEN)}"}
    for method, path in ROUTES:
        found = await face.ask(method, path, headers=shown)
        assert (found.status == 401) == (path not in (*OPEN, "/api/engine/run")), path


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://example.com"},
        {"Origin": "null"},
        {"Host": "rebound.example.com"},
        {"Host": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
async def test_without_a_token_a_page_in_a_browser_cannot_ask(
    open_face: Open, headers: dict[str, str]
) -> None:
    face = await open_face(open_memory("x1"))
    assert (await face.get("/metrics", headers=headers)).error[0] == 403
    assert (await face.post("/api/workflow/start", b"{}", headers=headers)).error[0] == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:27288", "127.0.0.2:1", "[::1]:27288"])
async def test_without_a_token_programs_on_this_machine_may_ask(open_face: Open, host: str) -> None:
    face = await open_face(open_memory("x1"))
    assert (await face.get("/metrics", headers={"Host": host})).status == 200


async def test_a_port_that_is_taken_is_one_sentence(open_face: Open) -> None:
    from mvmci.api.app import serve_api

    face = await open_face(open_memory("x1"))
    with pytest.raises(Usage, match=f"127.0.0.1:{face.port} cannot be listened at: Address already in use"):
        async with serve_api(face.api, "127.0.0.1", face.port):
            pass
