"""A release job: asks a server for a build number, checks the files, and reports what it found.

Input:  {"url": "http://127.0.0.1:8000", "files": ["notes.txt"], "pause_ms": 300}
Output: {"build", "checksums", "reported", "published", "took_ms"}

Everything it does outside of itself goes through `host`. If whatever runs this dies in the middle, it
is run again from the start elsewhere, gets the recorded answers to what it had already asked for, and
goes on from there. So it may do nothing that differs from run to run, and needs no code for crashes,
except for one decision: what to do when nobody knows whether an effect has happened (see `report`).
"""

import json
import linecache
import traceback

from componentize_py_types import Err
from wit_world.imports import host

# A traceback must not look for source files: there is no file system at run time.
linecache.updatecache = lambda filename, module_globals=None: []

TIMEOUT_MS = 120_000
ATTEMPTS_MAX = 3


def say(message):
    host.log(host.Level.INFO, message)


def request(method, url, body="", *, idempotent):
    """The body of an answer of 2xx. Other answers are the end of the job."""
    headers = [host.Header("content-type", "application/json")] if body else []
    answer = host.http(host.Request(method, url, headers, body, TIMEOUT_MS, idempotent))
    if not 200 <= answer.status < 300:
        raise Err(f"{method} {url} answered {answer.status}")
    return answer.body


def fetch_build(url):
    """Reading changes nothing, so it may be done again: after a crash (`idempotent`) and after a failure."""
    for attempt in range(1, ATTEMPTS_MAX + 1):
        try:
            return json.loads(request("GET", f"{url}/build", idempotent=True))["number"]
        except Err as error:
            if not isinstance(error.value, (host.EffectError_Lost, host.EffectError_Failed)):
                raise
            say(f"attempt {attempt}: {describe(error.value)}")
            host.sleep(200 * attempt)
    raise Err(f"{url}/build did not answer {ATTEMPTS_MAX} times")


def checksum(name):
    """A native program on a file of the workspace. It may run again: it only reads."""
    done = host.exec(host.Command(["cksum", name], [], "", TIMEOUT_MS, True))
    if done.code != 0:
        raise Err(f"cksum {name} ended with {done.code}: {done.stderr.strip()}")
    return int(done.stdout.split()[0])


def report(url, text):
    """Posted at most once: two reports would be worse than none.

    `interrupted` says that our predecessor died in between, `timed-out` and `lost` that no answer came.
    The report may have arrived; a job that must know would ask the server now. This one says so and goes on.
    """
    try:
        request("POST", f"{url}/reports", text, idempotent=False)
        return "yes"
    except Err as error:
        if isinstance(
            error.value, (host.EffectError_Interrupted, host.EffectError_TimedOut, host.EffectError_Lost)
        ):
            say(f"the report may have arrived: {describe(error.value)}")
            return "unknown"
        raise


def describe(error):
    """An effect's error in words: `Lost: connection reset`."""
    kind = type(error).__name__.removeprefix("EffectError_")
    return f"{kind}: {error.value}" if hasattr(error, "value") else kind


def release(job):
    url, pause_ms, files = job["url"], job.get("pause_ms", 300), job.get("files", [])
    began_ms = host.now()
    steps = len(files) + 3
    build = fetch_build(url)
    say(f"build {build}")
    host.progress(1, steps, "fetched")
    checksums = {}
    for done, name in enumerate(files, start=2):
        host.sleep(pause_ms)
        checksums[name] = checksum(name)
        say(f"checked {name}: {checksums[name]}")
        host.progress(done, steps, f"checked {name}")
    host.sleep(pause_ms)
    reported = report(url, json.dumps({"build": build, "checksums": checksums}))
    say(f"reported: {reported}")
    host.progress(steps - 1, steps, "reported")
    host.sleep(pause_ms)
    # Putting the same thing to the same place twice is the same as once; a repetition carries the same
    # Idempotency-Key.
    request("PUT", f"{url}/builds/{build}", json.dumps({"state": "checked"}), idempotent=True)
    say("published")
    host.progress(steps, steps, "published")
    took_ms = host.now() - began_ms
    return {
        "build": build,
        "checksums": checksums,
        "reported": reported,
        "published": True,
        "took_ms": took_ms,
    }


class WitWorld:
    def run(self, input: str) -> str:
        try:
            return json.dumps(release(json.loads(input)))
        except Err as error:
            raise Err(
                error.value if isinstance(error.value, str) else f"an effect: {describe(error.value)}"
            ) from None
        # Without these lines the text of an uncaught exception is lost: the module has no stderr.
        except Exception:
            raise Err(traceback.format_exc()) from None
