"""What is run: eight profiles, each of which shows another part of a cluster, and work, which makes jobs.

waiting    shows what an executor can carry: hardly anything is computed
light      shows what the way to an engine costs
command    the same for the other kind of job
cpu        shows the processors, whatever the access
effects    shows what effects cost: written before and after, and a connection each
memory     shows memory
mixed      all but `tree`, in the proportions of MIXED
tree       shows what it costs to lay out a directory
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from mvmci.bench.client import Client
from mvmci.bench.guests import ACTIONS_WASM
from mvmci.errors import Usage
from mvmci.jobs import tree
from mvmci.jobs.job import Payload
from mvmci.jobs.journal import BENCH_BY, Spec
from mvmci.jobs.nothing import NOTHING
from mvmci.store import Store, digest_of

QUEUE = "default"
WAIT_MS = 100
ROUNDS = 120_000_000  # about 175 ms of a processor of 2024
EFFECTS = 5
TOUCH_MIB = 100
FILES, FILE_BYTES = 100, 20_000
MIXED = {"light": 10, "waiting": 5, "command": 3, "effects": 1, "cpu": 1, "memory": 1}  # in proportion
_SEED = 1  # of the bytes of files


class Work:
    """What is run on one cluster, a job after the other: each is one of `templates` under an id of its own.

    Of several, which is drawn by the number of the job: the same rows in every run.
    """

    def __init__(self, templates: Sequence[Spec], weights: Sequence[int] = ()) -> None:
        self._templates = templates
        self._weights = weights or [1] * len(templates)
        self._made = 0

    def next(self, job: str, at_ms: int) -> Spec:
        """The next job, under that id, submitted then (ms since 1970)."""
        number, self._made = self._made, self._made + 1
        return msgspec.structs.replace(self.template(number), id=job, at=at_ms, seed=number)

    def template(self, number: int) -> Spec:
        """What the job of that number does."""
        if len(self._templates) == 1:
            return self._templates[0]
        (drawn,) = random.Random(number).choices(self._templates, self._weights)  # noqa: S311 (no secret)
        return drawn


Make = Callable[[Store, str], Awaitable[Work]]


@dataclass(frozen=True)
class Profile:
    """What a job does, in a few words, and how it is made for a store: `make(store, service_url)` keeps what
    jobs need there. A module of the user's own is one, too.

    One that `needs_service` asks it over HTTP, and its cluster has to allow `<service_url>*`. `asked` are the
    options by which it is asked for, where not by its name.
    """

    about: str
    make: Make
    needs_service: bool = False
    asked: Sequence[str] = ()


async def prepare(profile: Profile, client: Client, service_url: str = "") -> Work:
    """The work of `profile` on the cluster of `client`. Raises Usage, StoreUnavailable."""
    if profile.needs_service and not service_url:
        raise Usage("this profile asks a service over HTTP, and there is none", hint="choose another profile")
    return await profile.make(client.store, service_url)


def _workflow(*actions: str) -> Spec:
    return Spec(
        at=0,
        id="template",
        queue=QUEUE,
        kind="workflow",
        module=digest_of(ACTIONS_WASM),
        name="actions.wasm",
        component=True,
        input=Payload(text=msgspec.json.encode(actions).decode()),
        seed=0,
        by=BENCH_BY,
    )


def _command(manifest: str | None = None) -> Spec:
    return Spec(
        at=0,
        id="template",
        queue=QUEUE,
        kind="command",
        module=digest_of(NOTHING),
        name="nothing.wasm",
        component=False,
        tree=manifest,
        seed=0,
        by=BENCH_BY,
    )


def _templates(service_url: str) -> dict[str, Spec]:
    """One job of each profile of MIXED."""
    return {
        "waiting": _workflow(f"sleep {WAIT_MS}"),
        "light": _workflow(),
        "command": _command(),
        "cpu": _workflow(f"count {ROUNDS}"),
        "effects": _workflow(*[f"get {service_url}"] * EFFECTS),
        "memory": _workflow(f"touch {TOUCH_MIB}"),
    }


async def _keep_modules(store: Store) -> None:
    await store.blobs.put(ACTIONS_WASM)
    await store.blobs.put(NOTHING)


def _single(name: str) -> Make:
    async def make(store: Store, service_url: str) -> Work:
        await _keep_modules(store)
        return Work([_templates(service_url)[name]])

    return make


async def _mixed(store: Store, service_url: str) -> Work:
    await _keep_modules(store)
    templates = _templates(service_url)
    return Work([templates[name] for name in MIXED], list(MIXED.values()))


async def _tree(store: Store, service_url: str) -> Work:
    del service_url
    await _keep_modules(store)
    dice = random.Random(_SEED)  # noqa: S311 (no secret)
    files = []
    for number in range(FILES):
        digest = await store.blobs.put(dice.randbytes(FILE_BYTES))
        path = f"{number % 10}/{number}"
        files.append(tree.TreeEntry(path=path, digest=digest, size=FILE_BYTES))
    manifest = await store.blobs.put(tree.encode_tree(tree.tree(files)))
    return Work([_command(manifest)])


PROFILES: dict[str, Profile] = {
    "waiting": Profile(f"a workflow that sleeps {WAIT_MS} ms in its slot", _single("waiting")),
    "light": Profile("a workflow of a few instructions", _single("light")),
    "command": Profile("the smallest command", _single("command")),
    "cpu": Profile("a workflow that computes for about 175 ms", _single("cpu")),
    "effects": Profile(
        f"a workflow with {EFFECTS} HTTP requests, each answered after 20 ms",
        _single("effects"),
        needs_service=True,
    ),
    "memory": Profile(f"a workflow that writes to {TOUCH_MIB} MiB of memory", _single("memory")),
    "mixed": Profile(
        ", ".join(f"{share} {name}" for name, share in MIXED.items()) + ", drawn by the job's number",
        _mixed,
        needs_service=True,
    ),
    "tree": Profile(f"the smallest command, given {FILES} files of {FILE_BYTES // 1000} kB", _tree),
}
