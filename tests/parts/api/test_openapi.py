"""The description says what is there, all of it, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
from aiohttp import web
from openapi_spec_validator import validate

from mvmci.api.app import OPEN, make_app
from mvmci.api.jobs import STREAMS, WAIT_MS, WAIT_MS_MAX, StartRequest
from mvmci.api.openapi import openapi
from mvmci.jobs.job import ID_PATTERN
from tests.harness.memory import open_memory
from tests.parts.api.conftest import Face, Open

PATHS = openapi()["paths"]


def routes(app: web.Application) -> set[tuple[str, str]]:
    """Method and path of every route; aiohttp answers HEAD where there is GET."""
    found = ((route.method, route.resource) for route in app.router.routes())
    return {(method, resource.canonical) for method, resource in found if resource and method != "HEAD"}


async def test_the_description_and_the_routes_are_the_same(open_face: Open) -> None:
    face = await open_face(open_memory("x1"))
    there = routes(make_app(face.api))
    assert there == {(method.upper(), path) for path, methods in PATHS.items() for method in methods}


def test_the_description_is_valid() -> None:
    validate(openapi())


def test_every_route_that_asks_for_a_token_says_so() -> None:
    for path, methods in PATHS.items():
        for route in methods.values():
            assert ("401" in route["responses"]) == (path not in OPEN)
            assert (route.get("security") == []) == (path in OPEN)


def resolved(value: dict[str, Any]) -> dict[str, Any]:
    """What `value` refers to, or itself."""
    if "$ref" not in value:
        return value
    found: Any = openapi()
    for name in value["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return resolved(found)


def schema_of(answer: dict[str, Any]) -> dict[str, Any]:
    (content,) = resolved(answer)["content"].values()
    return {**content["schema"], "components": openapi()["components"]}


def parameters(path: str) -> dict[str, Any]:
    (route,) = PATHS[path].values()
    return {one["name"]: resolved(one["schema"]) for one in map(resolved, route["parameters"])}


def test_what_parameters_may_be_is_described_as_it_is_checked() -> None:
    assert parameters("/api/workflow/{id}/logs")["stream"]["enum"] == list(STREAMS)
    assert parameters("/api/workflow/{id}/wait")["timeout"]["default"] == WAIT_MS / 1000
    assert WAIT_MS_MAX == 3_600_000  # the description says an hour
    start = openapi()["components"]["schemas"]["StartRequest"]
    assert set(start["properties"]) == set(StartRequest.__struct_fields__)
    assert start["required"] == ["module", "version"]
    assert start["additionalProperties"] is False
    assert start["properties"]["version"]["pattern"] == "^[0-9a-f]{64}$"
    assert start["properties"]["id"]["pattern"] == f"^{ID_PATTERN}$"


async def test_it_is_served_and_what_is_answered_is_what_it_describes(face: Face) -> None:
    assert (await face.get("/openapi.json")).json == openapi()
    await face.start("echo", id="j")
    asked = {
        ("GET", "/version"): {},
        ("GET", "/health"): {},
        ("POST", "/api/workflow/start"): {"value": {**await face.deployed("echo"), "id": "j"}},
        ("GET", "/api/workflow/{id}"): {},
        ("GET", "/api/workflow/{id}/wait"): {"params": {"timeout": "0"}},
        ("POST", "/api/workflow/{id}/cancel"): {},
        ("POST", "/api/workflow/send-msg/{id}"): {},
        ("POST", "/api/engine/run"): {"value": {}},
    }
    for (method, path), options in asked.items():
        ask = face.post if method == "POST" else face.get
        found = await ask(path.replace("{id}", "j"), **options)
        described = PATHS[path][method.lower()]["responses"][str(found.status)]
        jsonschema.validate(found.json, schema_of(described))


@pytest.mark.parametrize("path", [path for path in PATHS if "{id}" in path])
def test_an_id_in_a_path_is_described_as_it_is_checked(path: str) -> None:
    described = parameters(path)["id"]["pattern"]
    assert described == f"^{ID_PATTERN}$"
    assert re.search(described, "a-job-1")
    assert not re.search(described, "A job")
