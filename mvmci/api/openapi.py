"""What describes the routes: OpenAPI 3.1, with the schemas of the values that are really read and written."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from mvmci import __version__
from mvmci.api.answers import NDJSON
from mvmci.api.jobs import START, START_NEEDS, STREAMS, WAIT_MS, WAIT_MS_MAX
from mvmci.engines.remote import Reply, RunRequest
from mvmci.jobs.job import ID_PATTERN
from mvmci.jobs.summary import Summary

Json = dict[str, Any]
REF = "#/components/schemas/{name}"

_MEANINGS = {
    400: "What was asked for cannot be done.",
    401: "The token is missing, or it is another one.",
    403: "The executor has no token and this is not of its own machine, or it is not for that queue.",
    404: "There is no such job, or module.",
    408: "The body did not come in time.",
    409: "The id is taken by another job.",
    413: "The body is too large.",
    415: "The body is of another type, or compressed.",
    501: "Workflows hear no messages yet.",
    503: "Not now: no slot is free, the executor drains, or the store is away. Try again.",
    504: "The time of waiting is up, and the job has not ended. It goes on.",
    507: "The store, or this executor's disk, is full.",
}
_OF_BODIES = (400, 408, 413, 415)


@cache
def describe() -> Json:
    """The description."""
    (summary, order, word), schemas = msgspec.json.schema_components(
        (Summary, RunRequest, Reply), ref_template=REF
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mvmci executor",
            "version": __version__,
            "description": "Durable WebAssembly jobs. Every error is one sentence, and mostly a hint.",
        },
        "paths": {
            "/version": {"get": _open("version", "Who answers here.", _object(mvmci={"type": "string"}))},
            "/health": {"get": _health()},
            "/metrics": {"get": _route("metrics", "Counters, for Prometheus.", _text("Metrics."))},
            "/openapi.json": {
                "get": _route("describe", "This description.", _json("OpenAPI.", {"type": "object"}))
            },
            "/api/module/deploy": {"post": _deploy()},
            "/api/workflow/start": {"post": _start()},
            "/api/workflow/send-msg/{id}": {"post": _send_message()},
            "/api/workflow/{id}": {
                "get": _of_job("status", "How a job stands.", _json("The job.", summary)),
            },
            "/api/workflow/{id}/wait": {"get": _wait(summary)},
            "/api/workflow/{id}/logs": {"get": _logs()},
            "/api/workflow/{id}/cancel": {
                "post": _of_job("cancel", "Let a job end as cancelled.", _json("The job.", summary), 507),
            },
            "/api/engine/run": {"post": _run(order, word)},
        },
        "components": {
            "schemas": {**schemas, "Error": _error()},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }


# ---- Routes


def _health() -> Json:
    slots = {"type": "integer", "minimum": 0}
    ready = _object(status={"const": "ready"}, slots=slots, free=slots)
    return _open("health", "Whether the executor lives, also when no slot is free.", ready, 503)


def _deploy() -> Json:
    form = _object(module={"type": "string", "contentMediaType": "application/wasm"})
    return {
        **_route(
            "deploy",
            "Keep a module. Its version is the SHA-256 of its bytes.",
            _json("Kept.", _ok(name={"type": "string"}, version=_version())),
            *_OF_BODIES,
            503,
            507,
        ),
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
    }


def _start() -> Json:
    known: Json = {name: msgspec.json.schema(key.kind) for name, key in START.items()}
    known["input"]["description"] = "JSON, as text."
    body = {
        "type": "object",
        "properties": {**known, "version": _version(), "id": _id()},
        "required": list(START_NEEDS),
        "additionalProperties": False,
    }
    answer = _ok(id=_id(), response={"description": "The early answer of a workflow that was there already."})
    return {
        **_route(
            "start",
            "Submit a job. The same request with the same id is the same job.",
            _json("Submitted.", answer),
            *_OF_BODIES,
            404,
            409,
            503,
            507,
        ),
        "requestBody": _body(body),
    }


def _send_message() -> Json:
    return {**_of_job("send-msg", "Not there yet.", None, 501)}


def _wait(summary: Json) -> Json:
    timeout = {
        "name": "timeout",
        "in": "query",
        "description": f"Seconds, or a number with ms, s, m or h; at most {WAIT_MS_MAX // 1000} s.",
        "schema": {"type": ["number", "string"], "default": WAIT_MS // 1000},
    }
    return _with(_of_job("wait", "Wait for a job's end.", _json("It has ended.", summary), 504), timeout)


def _logs() -> Json:
    stream = {"name": "stream", "in": "query", "schema": {"enum": list(STREAMS)}}
    follow = {"name": "follow", "in": "query", "schema": {"enum": [0, 1], "default": 0}}
    attempt = {"name": "attempt", "in": "query", "schema": {"type": "integer", "minimum": 1}}
    route = _of_job("logs", "What a job printed; `follow` goes on until it has ended.", _text("Its bytes."))
    return _with(route, stream, follow, attempt)


def _run(order: Json, word: Json) -> Json:
    words = {"200": {"description": "Words, one a line.", "content": {NDJSON: {"schema": word}}}}
    route = _route("run", "The door for workers: see to a job.", words, *_OF_BODIES, 503)
    return {**route, "requestBody": _body(order)}


# ---- Their parts


def _route(name: str, summary: str, answer: Json | None, *errors: int) -> Json:
    """A route that asks for the token. `errors` are besides those that every route has."""
    responses = {**(answer or {}), **_errors(401, 403, *errors)}
    return {"operationId": name, "summary": summary, "responses": responses}


def _open(name: str, summary: str, value: Json, *errors: int) -> Json:
    """A route that asks for no token."""
    responses = {**_json("Yes.", value), **_errors(*errors)}
    return {"operationId": name, "summary": summary, "responses": responses, "security": []}


def _of_job(name: str, summary: str, answer: Json | None, *errors: int) -> Json:
    route = _route(name, summary, answer, 400, *(() if answer is None else (404, 503)), *errors)
    return _with(route, {"name": "id", "in": "path", "required": True, "schema": _id()})


def _with(route: Json, *parameters: Json) -> Json:
    return {**route, "parameters": [*route.get("parameters", ()), *parameters]}


def _errors(*statuses: int) -> Json:
    return {
        str(status): {
            "description": _MEANINGS[status],
            "content": {"application/json": {"schema": {"$ref": REF.format(name="Error")}}},
        }
        for status in sorted(statuses)
    }


def _error() -> Json:
    return _object(error=_object(message={"type": "string"}, hint={"type": ["string", "null"]}))


def _json(description: str, schema: Json) -> Json:
    return {"200": {"description": description, "content": {"application/json": {"schema": schema}}}}


def _text(description: str) -> Json:
    return {"200": {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}}


def _body(schema: Json) -> Json:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _ok(**properties: Json) -> Json:
    return _object(ok=_object(**properties))


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _id() -> Json:
    return {"type": "string", "pattern": f"^{ID_PATTERN}$"}


def _version() -> Json:
    return {"type": "string", "pattern": "^[0-9a-f]{64}$"}
