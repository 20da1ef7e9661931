"""Code that measures how long each call of a kernel takes, if the caller of the model asks for it."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from optc.backends.kernels import loops

_MONOTONIC = 1  # CLOCK_MONOTONIC of Linux


class Clock:
    """The clock of one segment; ``times`` is its parameter, an int64 buffer of (nanoseconds, calls) or empty."""

    def __init__(self) -> None:
        self._count = tirx.Var("clock_size", "int64")
        self.times = tirx.decl_buffer([self._count], "int64", "clock", data_alignment=8)
        self._instant, allocate_instant = loops.scratch("instant", 2, "int64")
        self._last, allocate_last = loops.scratch("last", 1, "int64")
        self._allocate = [allocate_instant, allocate_last]

    def start(self) -> list[Any]:
        """Return the statements before the first call."""
        return [*self._allocate, self._if_wanted(self._read(), loops.store(self._last, 0, self._now()))]

    def add(self, number: int) -> Any:
        """Return the statement behind call ``number`` of the model: add the time since the last one."""
        now, place = tirx.Var("now", "int64"), 2 * number
        passed = loops.load(self.times, place) + now - loops.load(self._last, 0)
        return self._if_wanted(
            self._read(),
            tirx.Bind(now, self._now()),
            loops.store(self.times, place, passed),
            loops.store(self.times, place + 1, loops.load(self.times, place + 1) + 1),
            loops.store(self._last, 0, now),
        )

    def _if_wanted(self, *statements: Any) -> Any:
        return tirx.IfThenElse(self._count > 0, loops.sequence(*statements), None)

    def _read(self) -> Any:
        return tirx.Evaluate(tirx.call_extern("int32", "clock_gettime", _MONOTONIC, self._instant.data))

    def _now(self) -> Any:
        return loops.load(self._instant, 0) * 1_000_000_000 + loops.load(self._instant, 1)
