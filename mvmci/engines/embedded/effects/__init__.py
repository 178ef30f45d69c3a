"""What a workflow may ask of the outside world. A kind of effect is one file here and one line in `KINDS`.

A kind is the function of its name in `mvmci/wit/workflow.wit`; its file says what the rest of the program
has to know:

    the request      a Struct whose tag is the function's name and whose fields are the function's
                     parameters, or those of the one record that it takes
    the answer       a Struct whose fields are those of the record that the function returns, or `value`
    `perform`        the handler: request and context in, an answer or an Error out

The slot turns what the guest passes into fields and fields into what the guest gets, by the types in the
WIT: `-` becomes `_`, and a `header` is a pair. The engine records the intent and the result, answers a
replay, and counts an effect that was cut off as `interrupted` unless its request is idempotent.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any, cast

import msgspec

from mvmci.engines.embedded.effects.context import Effect
from mvmci.engines.embedded.effects.exec import Exec
from mvmci.engines.embedded.effects.http import Http
from mvmci.engines.embedded.effects.sleep import Sleep
from mvmci.jobs import effect
from mvmci.jobs.journal import Intent
from mvmci.jobs.replay import clip

KINDS: tuple[type[Effect], ...] = (Http, Exec, Sleep)

_any: Any = reduce(or_, KINDS)


def request_of(fields: effect.Fields) -> Effect:
    """Raises msgspec.ValidationError for what is no request."""
    return cast(Effect, msgspec.convert(fields, _any))


def show(intent: Intent) -> str:
    """One line about a recorded request; only its kind, if it was too large or is not known any more."""
    try:
        return clip(request_of(intent.request or {}).line())
    except msgspec.ValidationError:
        return intent.kind
