"""The description says what is there, all of it, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
from aiohttp import web
from openapi_spec_validator import validate

from mvmci.api.app import OPEN, make_app
from mvmci.api.openapi import describe
from mvmci.stores import open_memory
from tests.parts.api.conftest import Face, Open

PATHS = describe()["paths"]


def routes(app: web.Application) -> set[tuple[str, str]]:
    """Method and path of every route; aiohttp answers HEAD where there is GET."""
    found = ((route.method, route.resource) for route in app.router.routes())
    return {(method, resource.canonical) for method, resource in found if resource and method != "HEAD"}


async def test_the_description_and_the_routes_are_the_same(open_face: Open) -> None:
    face = await open_face(open_memory("x1"))
    there = routes(make_app(face.api))
    assert there == {(method.upper(), path) for path, methods in PATHS.items() for method in methods}


def test_the_description_is_valid() -> None:
    validate(describe())


def test_every_route_that_asks_for_a_token_says_so() -> None:
    for path, methods in PATHS.items():
        for route in methods.values():
            assert ("401" in route["responses"]) == (path not in OPEN)
            assert (route.get("security") == []) == (path in OPEN)


def schema_of(answer: dict[str, Any]) -> dict[str, Any]:
    (content,) = answer["content"].values()
    return {**content["schema"], "components": describe()["components"]}


async def test_it_is_served_and_what_is_answered_is_what_it_describes(face: Face) -> None:
    assert (await face.get("/openapi.json")).json == describe()
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
    for route in PATHS[path].values():
        (described,) = (one for one in route["parameters"] if one["in"] == "path")
        assert re.search(described["schema"]["pattern"], "a-job-1")
        assert not re.search(described["schema"]["pattern"], "A job")
