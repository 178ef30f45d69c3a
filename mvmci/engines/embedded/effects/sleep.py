"""The effect `sleep`: a pause to the moment that its intent names, however often it is begun."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from mvmci.engines.embedded.effects.context import Context, Effect, Suspended
from mvmci.jobs import effect

IN_SLOT_MS = 10_000  # a longer one frees the slot


class Slept(effect.Value, frozen=True, kw_only=True, tag="slept"):
    """The end of a `Sleep`."""


class Sleep(Effect, frozen=True, kw_only=True, tag="sleep"):
    """A pause of `ms` milliseconds from the moment that its intent names."""

    ms: int

    outside: ClassVar[bool] = False

    @property
    def idempotent(self) -> bool:
        """A pause that was cut short is gone on with, to the same moment."""
        return True

    def line(self) -> str:
        return f"sleep {self.ms} ms"

    async def perform(self, context: Context) -> Slept:
        """Raises Suspended when it is long, and when the engine drains."""
        until = context.intent.at + self.ms
        left_ms = until - context.host.now_ms()
        if left_ms > IN_SLOT_MS:
            raise Suspended(until)
        try:
            async with asyncio.timeout(max(left_ms, 0) / 1000):
                await context.host.draining.wait()
        except TimeoutError:
            return Slept()
        raise Suspended(0)
