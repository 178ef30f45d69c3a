"""An explicit-state model of one job: its journal, its hints, its holders, and all that may happen to them.

A `World` is everything at one moment; `Model.moves` gives every world that may be next. What a row of
messages means (the fold, the chain, what a replay is told, what a refused write comes to, what the
reconciler does) is mvmci's own code, called here. What the model adds is the order of things: writes in
the air, answers that do not come, holders that are slow, wrongly suspected or gone (docs/protocol.md §2, §3).

It is simpler than the program:

- A holder's reading and the write that follows are one step. What comes in between may as well come before
  that write lands: compare-and-set refuses it alike.
- Looks at the journal between writes are left out. They only hasten what the next write finds.
- Deadlines, output, responses and progress are left out. No other write depends on them.
- A client's cancel and a control plane's `done` are one step: refused, they are made anew.
- A hint that is put off, because a live holder is at work, is no move: nothing is changed by it.
- A message that nobody waits for, and that can never be stored any more, is gone from the air at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from mvmci.jobs.job import End
from mvmci.jobs.journal import (
    AnyRecord,
    Cancel,
    Done,
    Entry,
    Intent,
    Lease,
    Message,
    Origin,
    Released,
    Result,
    State,
    Verdict,
    kind_of,
    verdict,
)
from mvmci.roles.reconciler import TIMER_GRACE_MS, needs
from tests.model.log import FORGER, QUEUE, SLEEP_MS, Believing, Log, digest, spec, view_of
from tests.model.rules import Rules, Setting
from tests.model.world import CLIENT, HINTS, Deed, HintName, Run, Sent, World

HOLDERS_MAX = 2  # at once
ATTEMPTS_USED_UP = "attempts"  # the reason of that end


class Move(NamedTuple):
    """What happens, and what is then. `fault`: it need never happen."""

    what: str
    world: World
    fault: bool = False


class Model:
    """All that may happen in one setting, under some of the rules."""

    def __init__(self, setting: Setting, rules: Rules) -> None:
        self.setting = setting
        self.rules = rules
        self.nothing = Log() if rules.misfits_are_ignored else Log(reader=Believing)
        self._submit = self.nothing.journal.encode([spec(setting.attempts)], "submit")

    def start(self) -> World:
        """The job was accepted, and nobody has looked at it yet."""
        log = self.nothing.append(_entry(1, "spec", "client", self._submit))
        copies = [Sent(CLIENT, 0, self._submit)] if self.setting.sent_twice else []
        return World(log, self.setting.budget, air=frozenset(copies))

    def moves(self, world: World) -> Iterator[Move]:
        """Everything that may happen next."""
        for hint in HINTS:
            yield from self._take(world, hint)
        for sent in sorted(world.air):
            yield from self._arrive(world, sent)
        if not self.rules.one_message_of_a_job_in_a_batch:
            yield from self._batch(world)
        for run in world.runs:
            yield from self._hold(world, run)
        yield from self._reconcile(world)
        yield from self._outside(world)

    def settle(self, world: World) -> World:
        """`world` without messages that nobody waits for and that can never be stored."""
        if not world.air or self.setting.budget.forget or not self.rules.writes_are_compare_and_set:
            return world
        tail = world.log.tail
        kept = [sent for sent in world.air if sent.expect >= tail or world.waiter(sent)]
        return world._replace(air=frozenset(kept)) if len(kept) < len(world.air) else world

    # ---- a hint, and who takes it

    def _take(self, world: World, hint: HintName) -> Iterator[Move]:
        """A worker is handed a hint, and looks at the journal; at a new spec it has that in hand."""
        if not (world.spec_hint if hint == "spec" else world.ready_hint):
            return
        new = hint == "spec" and world.spec_hint == "new"
        log = self.nothing.append(world.log.entries[0]) if new else world.log
        followed = self.rules.a_live_holder_is_followed and self._live(world, log)
        kept = any(run.hint == hint for run in world.runs)
        fault = "suspicion" if followed else "lapse" if kept else ""
        if fault and not getattr(world.budget, fault):
            return
        world = world.spend(fault) if fault else world
        why = self._nothing_to_do(log, world.now_ms)
        if why:
            yield Move(f"{hint}: {why}, acknowledged", world.acknowledge(hint), bool(fault))
        elif len(world.runs) < HOLDERS_MAX:
            yield self._begin(world, hint, log, new=new)._replace(fault=bool(fault))

    def _nothing_to_do(self, log: Log, now_ms: int) -> str:
        """Why a hint for `log` has done its work; empty if it has not."""
        rules, state = self.rules, log.state
        if state.done is not None or state.corrupt is not None:
            return "ended" if rules.takers_look_for_the_end else ""
        if state.spec is None:
            return "no such job" if rules.takers_look_for_the_spec else ""
        if state.ended and rules.takers_look_for_a_cancel:
            return "cancelled"
        if state.released is not None and state.released.until > now_ms and rules.takers_look_at_the_time:
            return "asleep"
        return ""

    def _live(self, world: World, log: Log) -> bool:
        """Whether presence says that the holder in `log` is at work."""
        lease = log.state.lease
        if lease is None or not log.state.held:
            return False
        number = int(lease.run)
        return number in world.left or any(run.number == number for run in world.runs)

    def _begin(self, world: World, hint: HintName, log: Log, *, new: bool) -> Move:
        """A holder of the next epoch begins: with its lease, an end, or (where it is the first) the guest."""
        state, rules, number = log.state, self.rules, world.taken + 1
        name = str(number)
        why: Any = "first" if state.lease is None else "resumed" if state.released else "recovered"
        lease = Lease(at=0, epoch=state.epoch + 1, unit=name, incarnation=name, run=name, why=why)
        run = Run(number, lease.epoch, hint, log, waiting=(lease,))
        world = world._replace(taken=number, spec_hint="delivered" if new else world.spec_hint)
        if not rules.hints_are_acknowledged_after_the_end:
            world, run = world.acknowledge(hint), run._replace(hint=None)
        what = f"{hint}: run {number} begins at epoch {lease.epoch}"
        if state.cancel is not None and state.done is None and rules.takers_look_for_a_cancel:
            return Move(f"{what}, cancelled", self._write(world, run, _done("cancelled")))
        if self._attempts(state) >= self.setting.attempts:
            return Move(f"{what}, too often", self._write(world, run, _done("errored", ATTEMPTS_USED_UP)))
        if state.lease is None and (new or not rules.a_later_delivery_leases_at_once):
            return Move(f"{what}, its lease deferred", world.put(run))
        return Move(what, self._write(world, run))

    def _attempts(self, state: State) -> int:
        """How many have failed, for one who is about to take the job."""
        if not self.rules.only_lost_holders_are_attempts:
            return state.epoch
        return state.lost + 1 if state.held else 0

    # ---- a holder

    def _hold(self, world: World, run: Run) -> Iterator[Move]:
        if world.budget.crash:
            gone = world.spend("crash").drop(run)
            if not self.rules.presence_is_per_job:
                gone = gone._replace(left=gone.left | {run.number})
            yield Move(f"run {run.number} is gone", gone, fault=True)
        match run.phase:
            case "guest":
                yield from self._guest(world, run)
            case "sent" if not self.rules.intents_are_awaited and self._may_act(run, run.waiting):
                yield self._act(world, run)
            case "unsure":
                yield self._resolve(world, run)
            case "over":
                yield Move(f"run {run.number} is over", self._leave(world, run))

    def _guest(self, world: World, run: Run) -> Iterator[Move]:
        """The workflow asks for its next effect, or ends."""
        if self.setting.deadly:
            killed = world._replace(kills=world.kills + 1).drop(run)
            yield Move(f"run {run.number} is killed by its guest", killed)
            return
        if self.setting.timed_writes and run.waiting:
            yield Move(f"run {run.number} writes what waits", self._write(world, run))
        index = len(run.view)
        if world.budget.drain and (run.leased or index < len(self.setting.effects)):
            drained = self._write(world.spend("drain"), run, Released(at=0, why="drain"))
            yield Move(f"run {run.number} drains", drained, fault=True)
        if index >= len(self.setting.effects):
            yield Move(f"run {run.number} ends", self._write(world, run, _done("succeeded")))
        elif self.setting.effects[index] == "S":
            yield self._sleep(world, run, index)
        elif self._may_act(run, run.known.journal.records):
            if run.waiting:
                yield Move(f"run {run.number} writes what waits", self._write(world, run))
            else:
                yield self._act(world, run)
        else:
            yield self._intend(world, run, index)

    def _may_act(self, run: Run, records: Sequence[AnyRecord]) -> bool:
        """Whether the intent of the next effect is among `records`."""
        return any(isinstance(one, Intent) and one.index == len(run.view) for one in records)

    def _intend(self, world: World, run: Run, index: int) -> Move:
        idempotent = self.setting.effects[index] == "I"
        intent = Intent(at=0, index=index, kind="http", digest=digest(run.view), idempotent=idempotent)
        what = f"run {run.number} writes its intent {index}"
        if not self.rules.intents_come_first:
            return self._act(world, run._replace(waiting=(*run.waiting, intent)))
        if not self.rules.results_come_before_the_next_effect:
            first = tuple(one for one in run.waiting if not isinstance(one, Result))
            rest = tuple(one for one in run.waiting if isinstance(one, Result))
            return Move(what, self._write(world, run._replace(waiting=first), intent, later=rest))
        return Move(what, self._write(world, run, intent))

    def _act(self, world: World, run: Run) -> Move:
        """The effect happens; its result waits for the next write."""
        index, state = len(run.view), world.log.state
        deposed = state.lease is not None and state.lease.run != str(run.number)
        knows = run.known.state.ended or (run.known.state.lease is not None and not run.leased)
        deed = Deed(index, run.number, run.view, stray=deposed or state.ended, knowing=knows)
        result = Result(at=0, index=index, blob=f"by {run.number}")
        run = run._replace(view=(*run.view, f"by {run.number}"), waiting=(*run.waiting, result))
        what = f"run {run.number} performs effect {index}" + (", though deposed" if deed.stray else "")
        return Move(what, world._replace(deeds=world.deeds | {deed}).put(run))

    def _sleep(self, world: World, run: Run, index: int) -> Move:
        """It counts from its intent, which rides with what is written next. The slot is freed, or not."""
        there = run.known.journal.records
        begun = [one for one in (*there, *run.waiting) if isinstance(one, Intent) and one.index == index]
        if not begun:
            now_ms, args = world.now_ms, digest(run.view)
            intent = Intent(at=now_ms, index=index, kind="sleep", digest=args, idempotent=True)
            fallen = run._replace(waiting=(*run.waiting, intent))
            return Move(f"run {run.number} falls asleep", world.put(fallen))
        until_ms = begun[0].at + SLEEP_MS
        woken = run.epoch > 1 and begun[0] in there
        if world.now_ms >= until_ms or (woken and not self.rules.sleeps_end_at_their_time):
            result = Result(at=world.now_ms, index=index, blob="slept")
            run = run._replace(view=(*run.view, "slept"), waiting=(*run.waiting, result))
            return Move(f"run {run.number} wakes", world.put(run))
        asleep = Released(at=0, why="sleep", until=until_ms)
        return Move(f"run {run.number} lets go until it is to wake", self._write(world, run, asleep))

    def _leave(self, world: World, run: Run) -> World:
        """Its last record is on disk: the hint has done its work, or is handed back by one who drains."""
        match _last(run):
            case Released(why="drain"):
                return world.drop(run)
            case Released(until=until_ms):
                world = world._replace(timer_ms=until_ms)
        return world.drop(run).acknowledge(run.hint)

    # ---- a write, and what becomes of it

    def _write(self, world: World, run: Run, *records: AnyRecord, later: tuple[AnyRecord, ...] = ()) -> World:
        """Send what waits, and `records` after it; `later` goes on waiting."""
        batch = (*run.waiting, *records)
        run = run._replace(waiting=(*batch, *later), writes=run.writes + 1)
        return self._send(world, run, batch)

    def _send(self, world: World, run: Run, batch: tuple[AnyRecord, ...]) -> World:
        journal = run.known.journal
        sent = Sent(run.number, journal.tail, journal.encode(batch, _message_id(run)))
        return world._replace(air=world.air | {sent}).put(run._replace(phase="sent", sent=sent))

    def _arrive(self, world: World, sent: Sent) -> Iterator[Move]:
        """The broker stores a message or refuses it, or its writer waits no longer."""
        waiter = world.waiter(sent)
        if sent.expect == world.log.tail or not (self.rules.writes_are_compare_and_set or sent.run == CLIENT):
            yield Move(f"stored: {_told(sent)}", self._store(world, sent))
        elif waiter is not None:
            refused = world._replace(air=world.air - {sent}).put(waiter._replace(phase="unsure"))
            yield Move(f"refused: {_told(sent)}", refused)
        if waiter is not None and world.budget.timeout:
            if self.rules.silence_is_answered_by_reading:
                waiter = waiter._replace(phase="unsure")
            else:
                waiter = self._accepted(waiter, waiter.known.tail + 1)
            yield Move(f"no answer: {_told(sent)}", world.spend("timeout").put(waiter), fault=True)

    def _store(self, world: World, sent: Sent) -> World:
        waiter = world.waiter(sent)
        seq = world.seq + 1
        log = world.log.append(_sent(sent, seq))
        world = world._replace(air=world.air - {sent}).with_log(log)
        if sent.run == CLIENT:
            world = world._replace(spec_hint="new")
        return world if waiter is None else world.put(self._accepted(waiter, seq))

    def _batch(self, world: World) -> Iterator[Move]:
        """Two members with one expectation are both stored: the server looks at each before it adds any."""
        for pair in combinations(sorted(world.air), 2):
            if all(sent.expect == world.log.tail for sent in pair):
                both = self._store(self._store(world, pair[0]), pair[1])
                yield Move(f"stored as one batch: {_told(pair[0])}, and {_told(pair[1])}", both)

    def _accepted(self, run: Run, seq: int) -> Run:
        """The writer hears that its message is on disk."""
        assert run.sent is not None
        landed = run.sent.records
        waiting = tuple(record for record in run.waiting if record not in landed)
        known = run.known.append(_sent(run.sent, seq))
        return self._on(run._replace(known=known, waiting=waiting))

    def _resolve(self, world: World, run: Run) -> Move:
        """Refused or unanswered: read on, and decide."""
        known, news = run.known.read_on(world.log)
        there = [record for message in news for record in message.records]
        if self.rules.own_records_are_recognised:
            run = run._replace(waiting=tuple(record for record in run.waiting if record not in there))
        run = run._replace(known=known)
        decision = self._decide(run, news)
        what = f"run {run.number} reads on: {decision}"
        if decision == "fenced":
            done = known.state.ended or not self.rules.the_fenced_leave_their_hint
            return Move(what, world.drop(run).acknowledge(run.hint if done else None))
        if decision == "reread":
            return Move(what, world.drop(run))
        cancelled = known.state.cancel is not None and known.state.done is None
        if cancelled and self.rules.after_a_cancel_only_cancelled and not _cancels(run.waiting):
            kept = tuple(record for record in run.waiting if not _overtaken(record))
            ended = self._write(world, run._replace(waiting=kept), _done("cancelled"))
            return Move(f"{what}, cancelled", ended)
        if not run.waiting or decision == "written":
            return Move(what, world.put(self._on(run)))
        return Move(what, self._send(world, run, run.waiting))

    def _decide(self, run: Run, news: list[Message]) -> Verdict:
        """`verdict`, without the rules that are left out."""
        journal, rules, name = run.known.journal, self.rules, str(run.number)
        message_id = _message_id(run)
        if not rules.runs_are_told_apart_by_name and journal.state.epoch == run.epoch:
            assert journal.state.lease is not None
            name = journal.state.lease.run
        if not rules.fencing_is_looked_at_first and message_id in journal.ids:
            return "written"
        found = verdict(journal, news, run=name, epoch=run.epoch, message_id=message_id)
        if found == "fenced" and run.leased and message_id in journal.ids and not rules.an_end_fences_too:
            return "written"
        if found == "reread" and not rules.refused_leases_read_afresh:
            return "retry"
        if found == "written" and not rules.own_records_are_recognised:
            return "retry"
        return found

    def _on(self, run: Run) -> Run:
        """`run` after all that it sent is known to be on disk. Its first lease begins the replay."""
        if isinstance(_last(run), Done | Released):
            return run._replace(phase="over")
        again = not self.rules.interrupted_is_not_done_again
        return run._replace(phase="guest", view=run.view or view_of(run.known.steps, again=again))

    # ---- everybody else

    def _reconcile(self, world: World) -> Iterator[Move]:
        """A control plane looks at the job, and may take a live holder for dead."""
        if not self.rules.somebody_reconciles:
            return
        state = world.log.state
        live = self._live(world, world.log)
        hinted = world.spec_hint == "new" or world.ready_hint or bool(world.runs)
        hinted = hinted and self.rules.the_reconciler_looks_for_hints
        now_ms = world.now_ms + TIMER_GRACE_MS
        need = needs(state, now_ms=now_ms, live=live, hinted=hinted)
        suspected = needs(state, now_ms=now_ms, live=False, hinted=True)
        if need == "ready":
            yield Move("a control plane says ready", world.say_ready())
        elif need == "cancelled":
            yield Move("a control plane writes the end", self._add(world, _done("cancelled")))
        elif suspected == "cancelled" and world.budget.suspicion:
            ended = self._add(world.spend("suspicion"), _done("cancelled"))
            yield Move("a control plane writes the end, though the holder is at work", ended, fault=True)

    def _outside(self, world: World) -> Iterator[Move]:
        """Clients, clocks, retention, and the loss of what may be lost."""
        state, budget = world.log.state, world.budget
        if world.timer_ms and world.now_ms >= world.timer_ms:
            yield Move("the timer says ready", world._replace(timer_ms=0).say_ready())
        begun = [*world.log.journal.records, *(record for run in world.runs for record in run.waiting)]
        if any(isinstance(one, Intent) and one.kind == "sleep" and one.at == world.now_ms for one in begun):
            yield Move("the time of a sleep goes by", world._replace(now_ms=world.now_ms + SLEEP_MS))
        if budget.loss and (world.timer_ms or world.ready_hint):
            lost = world.spend("loss").acknowledge("ready")._replace(timer_ms=0)
            yield Move("hints and timers are lost", lost, fault=True)
        if budget.cancel and state.spec is not None and not state.ended:
            cancelled = self._add(world.spend("cancel"), Cancel(at=0, by="client"))
            yield Move("a client cancels", cancelled, fault=True)
        if budget.forge:
            yield from self._forge(world)
        if budget.forget and state.done is not None:
            yield Move("retention goes by", self._forget(world.spend("forget")), fault=True)

    def _add(self, world: World, record: AnyRecord) -> World:
        """A message of somebody who holds no job, written on what is there."""
        return self._written(world, record, kind=kind_of([record]), unit="other")

    def _written(self, world: World, *records: AnyRecord, kind: str, unit: str, queue: str = QUEUE) -> World:
        data = world.log.journal.encode(records, f"other {world.seq + 1}") if records else b"no message"
        return world.with_log(world.log.append(_entry(world.seq + 1, kind, unit, data, queue)))

    def _forge(self, world: World) -> Iterator[Move]:
        """Somebody writes what he may not, where the broker lets him: it follows the chain all the same."""
        world, state = world.spend("forge"), world.log.state
        lease = Lease(at=0, epoch=state.epoch + 1, unit=FORGER, incarnation="i", run="0", why="first")
        end, result = _done("succeeded", FORGER), Result(at=0, index=0, blob=FORGER)
        client = {"unit": "client"}
        yield Move("forged: a spec", self._written(world, lease, end, kind="spec", **client), fault=True)
        yield Move("forged: a cancel", self._written(world, lease, end, kind="cancel", **client), fault=True)
        yield Move("forged: no cancel", self._written(world, kind="cancel", **client), fault=True)
        yield Move("forged: a result", self._written(world, result, kind="run", unit=FORGER), fault=True)
        yield Move("forged: an end", self._written(world, end, kind="done", unit=FORGER), fault=True)
        elsewhere = self._written(world, lease, end, kind="done", unit=FORGER, queue="elsewhere")
        yield Move("forged: a holder of another queue", elsewhere, fault=True)

    def _forget(self, world: World) -> World:
        """Only the `done` is kept, and the next time not even that."""
        last = next(entry for entry in world.log.entries if entry.seq == world.log.journal.end)
        kept = len(world.log.entries) > 1 and self.rules.tombstones_are_kept
        log = self.nothing.append(last) if kept else self.nothing
        return world._replace(log=log, spec_hint="")


def _last(run: Run) -> AnyRecord:
    assert run.sent is not None
    return run.sent.records[-1]


def _done(end: End, reason: str = "") -> Done:
    return Done(at=0, status=end, reason=reason)


def _cancels(waiting: tuple[AnyRecord, ...]) -> bool:
    return bool(waiting) and isinstance(waiting[-1], Done) and waiting[-1].status == "cancelled"


def _overtaken(record: AnyRecord) -> bool:
    """Whether a cancel keeps `record` from being written: another end, an effect that never began."""
    return isinstance(record, Done) or (isinstance(record, Intent) and record.kind != "sleep")


def _message_id(run: Run) -> str:
    return f"{run.number}.{run.writes}"


def _entry(seq: int, kind: str, unit: str, data: bytes, queue: str = QUEUE) -> Entry:
    return Entry(seq=seq, data=data, origin=Origin(kind, queue, unit))


def _sent(sent: Sent, seq: int) -> Entry:
    return _entry(seq, kind_of(sent.records), str(sent.run) if sent.run else "client", sent.data)


def _told(sent: Sent) -> str:
    words = " ".join(type(record).__name__.lower() for record in sent.records)
    return f"[{words}] of {f'run {sent.run}' if sent.run else 'the client'}"
