"""What mvmci promises of a job, asked of one world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from mvmci.jobs.journal import AnyRecord, Done, Lease, Released, Result
from tests.model.model import ATTEMPTS_USED_UP, Model
from tests.model.world import World

TWICE = "an effect that may happen at most once happened twice"
TWO_REQUESTS = "two requests under one idempotency key"
LOST_RESULT = "an effect was made from a result that was lost"
TWO_STRAYS = "a deposed holder did two effects"
KNOWING = "a holder acted though it had read that it was deposed"
END_TAKEN_BACK = "an end was taken back"
NO_ATTEMPTS_LEFT = "attempts were used up, and no holder lost"
UNCOUNTED = "a guest killed more holders than are counted"
STRANDED = "a job stays behind for ever"

# What costs something, and no promise.
TAKEN_ASLEEP = "a sleeping job was taken before its time"
SENT_FOR_TWICE = "two holders were sent for, and nothing had gone wrong"


def broken(model: Model, world: World) -> Iterator[str]:
    """The promises that do not hold in `world`. Whether it can come to its end is `search`'s to say."""
    yield from world.log.faults
    if world.deeds:
        yield from _outside(model, world)
    if world.ended and world.log.entries and world.log.ended != world.ended:
        yield END_TAKEN_BACK
    if world.kills > model.setting.attempts + 1:  # the first lease may be deferred
        yield UNCOUNTED
    done = world.log.state.done
    if isinstance(done, Done) and done.reason == ATTEMPTS_USED_UP:
        budget, left = model.setting.budget, world.budget
        faults = budget.crash + budget.suspicion - left.crash - left.suspicion + world.kills
        if min(faults, _lost(world.log.journal.records)) < model.setting.attempts:
            yield NO_ATTEMPTS_LEFT


def _lost(records: Sequence[AnyRecord]) -> int:
    """Holders that neither let go nor ended, in a row without a result."""
    lost, held = 0, False
    for record in records:
        match record:
            case Lease():
                lost, held = lost + held, True
            case Released():
                held = False
            case Result():
                lost = 0
    return lost


def _outside(model: Model, world: World) -> Iterator[str]:
    """What can be seen from outside: the effects that happened."""
    recorded = world.log.view
    times = Counter(deed.index for deed in world.deeds)
    requests = {(deed.index, deed.args) for deed in world.deeds}
    for index, effect in enumerate(model.setting.effects):
        if effect == "A" and times[index] > 1:
            yield TWICE
        if effect == "I" and sum(1 for one, _ in requests if one == index) > 1:
            yield TWO_REQUESTS
    if any(deed.args[: len(recorded)] != recorded[: len(deed.args)] for deed in world.deeds):
        yield LOST_RESULT
    if any(count > 1 for count in Counter(deed.run for deed in world.deeds if deed.stray).values()):
        yield TWO_STRAYS
    if any(deed.knowing for deed in world.deeds):
        yield KNOWING


def wasted(model: Model, world: World) -> Iterator[str]:
    """What was done in vain in `world`."""
    for run in world.runs:
        released = run.known.state.released
        if released is not None and released.until > world.now_ms and not run.leased:
            yield TAKEN_ASLEEP
    if len(world.runs) > 1 and world.budget == model.setting.budget:
        yield SENT_FOR_TWICE
