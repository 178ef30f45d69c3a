"""The state of the model: everything at one moment, as values that can be compared."""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

from mvmci.jobs.journal import AnyRecord, Entry, records_of
from tests.model.log import Log
from tests.model.rules import Budget

HintName = Literal["spec", "ready"]
HINTS: tuple[HintName, ...] = ("spec", "ready")
CLIENT = 0  # its messages carry the number of no run


class Sent(NamedTuple):
    """A message on its way to the broker."""

    run: int
    expect: int
    data: bytes

    @property
    def records(self) -> tuple[AnyRecord, ...]:
        return _records(self.data)


@cache
def _records(data: bytes) -> tuple[AnyRecord, ...]:
    return records_of(Entry(seq=0, data=data))


class Run(NamedTuple):
    """One holder's run of the job, from the hint that it took."""

    number: int  # from 1; its name in the lease
    epoch: int
    hint: HintName | None  # that it has in hand; None once it was replaced, or acknowledged by another
    known: Log
    phase: Literal["guest", "sent", "unsure", "over"] = "guest"
    view: tuple[str, ...] = ()  # the answers that its workflow has had
    waiting: tuple[AnyRecord, ...] = ()  # records that it does not know to be on disk
    writes: int = 0
    sent: Sent | None = None  # its last message

    @property
    def leased(self) -> bool:
        """Whether it knows its lease to be on disk, and of none after it."""
        lease = self.known.state.lease
        return lease is not None and lease.run == str(self.number)


class Deed(NamedTuple):
    """An effect that happened: something changed outside. `args` are the answers that it was made from."""

    index: int
    run: int
    args: tuple[str, ...]
    stray: bool  # the job had another holder, or had ended
    knowing: bool  # and whoever did it had read that


class World(NamedTuple):
    """Everything at one moment."""

    log: Log
    budget: Budget
    spec_hint: Literal["", "new", "delivered"] = "new"
    ready_hint: bool = False
    timer_ms: int = 0  # when it says `ready`; 0 for none
    now_ms: int = 0
    runs: tuple[Run, ...] = ()
    air: frozenset[Sent] = frozenset()
    deeds: frozenset[Deed] = frozenset()
    seq: int = 1  # the newest that the broker gave to a message
    taken: int = 0  # runs that there have been
    kills: int = 0  # holders that the guest took with it
    left: frozenset[int] = frozenset()  # runs that are no more while their process stays
    ended: str = ""  # how the job ended, for whoever looked first

    def put(self, run: Run) -> World:
        """With `run` as it is now."""
        others = [other for other in self.runs if other.number != run.number]
        return self._replace(runs=tuple(sorted((*others, run), key=lambda one: one.number)))

    def drop(self, run: Run) -> World:
        """Without `run`."""
        return self._replace(runs=tuple(other for other in self.runs if other.number != run.number))

    def spend(self, fault: str) -> World:
        """With one fault of that kind less to come."""
        return self._replace(budget=self.budget._replace(**{fault: getattr(self.budget, fault) - 1}))

    def with_log(self, log: Log) -> World:
        """With another journal, at which somebody looks."""
        return self._replace(log=log, seq=max(self.seq, log.tail), ended=self.ended or log.ended)

    def waiter(self, sent: Sent) -> Run | None:
        """The run that waits for the answer to `sent`."""
        return next((run for run in self.runs if run.phase == "sent" and run.sent == sent), None)

    def acknowledge(self, hint: HintName | None) -> World:
        """The hint is used up, whoever else has it in hand."""
        if hint is None:
            return self
        runs = tuple(run._replace(hint=None) if run.hint == hint else run for run in self.runs)
        if hint == "spec":
            return self._replace(runs=runs, spec_hint="")
        return self._replace(runs=runs, ready_hint=False)

    def say_ready(self) -> World:
        """A new word takes the place of the one before, which somebody may be working on."""
        return self.acknowledge("ready")._replace(ready_hint=True)
