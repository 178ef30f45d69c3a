"""A workflow that does what its input says: `{"steps": [{"http": {…}}, {"sleep": 10}, …]}`.

Returns the list of the steps' results: `{"status", "headers", "body", "base64"}` of an `http`,
`{"code", "stdout", "stderr"}` of an `exec`, a number of `now` and `random`, null of the rest. An
effect's error is `{"error": kind, "text": …}`: interrupted, timed-out, denied, lost, failed.
"""

import json
import linecache
import sys
import traceback

from componentize_py_types import Err
from wit_world.imports import host

# A traceback must not look for source files: there is no file system at run time.
linecache.updatecache = lambda filename, module_globals=None: []

KINDS = {
    host.EffectError_Interrupted: "interrupted",
    host.EffectError_TimedOut: "timed-out",
    host.EffectError_Denied: "denied",
    host.EffectError_Lost: "lost",
    host.EffectError_Failed: "failed",
}


def http(step):
    answer = host.http(
        host.Request(
            method=step.get("method", "GET"),
            url=step["url"],
            headers=pairs(step.get("headers", {})) + pairs(secrets(step)),
            body=step.get("body", ""),
            timeout_ms=step.get("timeout_ms", 10_000),
            idempotent=step.get("idempotent", False),
        )
    )
    headers = [[header.name, header.value] for header in answer.headers]
    return {"status": answer.status, "headers": headers, "body": answer.body, "base64": answer.base64}


def execute(step):
    answer = host.exec(
        host.Command(
            argv=step["argv"],
            env=pairs(step.get("env", {})),
            stdin=step.get("stdin", ""),
            timeout_ms=step.get("timeout_ms", 10_000),
            idempotent=step.get("idempotent", False),
        )
    )
    return {"code": answer.code, "stdout": answer.stdout, "stderr": answer.stderr}


def secrets(step):
    """Headers whose values stand backwards in the input, which so does not hold them."""
    return {name: value[::-1] for name, value in step.get("secrets", {}).items()}


def pairs(values):
    return [host.Header(name, value) for name, value in values.items()]


def log(text):
    """A text, or `[level, text]`."""
    level, message = ("info", text) if isinstance(text, str) else text
    host.log(host.Level[level.upper()], message)


def loop(_):
    while True:
        pass


def grow(_):
    """Real pages, until there are no more; what follows is a MemoryError."""
    held = []
    while True:
        held.append(bytearray(1 << 20))


def recurse(_):
    """Down the stack of the machine: through `max`, which is C, and without Python's own limit."""
    sys.setrecursionlimit(1 << 30)
    return max([None], key=recurse)


def fail(reason):
    raise Err(reason)


def throw(_):
    raise RuntimeError("raised by a step")


def trap(_):
    """A wrong argument type stops the generated code of the component with `unreachable`."""
    host.sleep("not a number")


STEPS = {
    "http": http,
    "exec": execute,
    "sleep": host.sleep,
    "log": log,
    "now": lambda _: host.now(),
    "random": lambda _: host.random(),
    "respond": lambda value: host.respond(json.dumps(value)),
    "progress": lambda step: host.progress(*step),
    "loop": loop,
    "grow": grow,
    "recurse": recurse,
    "fail": fail,
    "raise": throw,
    "trap": trap,
}


def perform(step):
    ((name, argument),) = step.items()
    try:
        return STEPS[name](argument)
    except Err as error:
        if type(error.value) not in KINDS:
            raise
        return {"error": KINDS[type(error.value)], "text": getattr(error.value, "value", "")}


class WitWorld:
    def run(self, input: str) -> str:
        try:
            return json.dumps([perform(step) for step in json.loads(input)["steps"]])
        except Err:
            raise
        except Exception:
            raise Err(traceback.format_exc()) from None
