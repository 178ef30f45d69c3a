"""What describes the routes: openapi.json beside this file, with the schemas of what is read and written."""

from __future__ import annotations

import importlib.resources
from functools import cache
from typing import Any

import msgspec

from mvmci import __version__
from mvmci.api.jobs import StartRequest
from mvmci.engines.remote import Reply, RunRequest
from mvmci.jobs.summary import Summary


@cache
def openapi() -> dict[str, Any]:
    """The description, in OpenAPI 3.1."""
    data = importlib.resources.files("mvmci.api").joinpath("openapi.json").read_bytes()
    description: dict[str, Any] = msgspec.json.decode(data)
    (reply, *_), schemas = msgspec.json.schema_components(
        (Reply, RunRequest, StartRequest, Summary), ref_template="#/components/schemas/{name}"
    )
    description["info"]["version"] = __version__
    description["components"]["schemas"] |= schemas | {"Reply": reply}
    return description
