"""The operands of an attention kernel at given positions, taken from its annotated stages."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.attention import MASKED, SCORES, START, STOP
from optc.backends.kernels.fused import Axes, Fused, Reader, bits
from optc.backends.kernels.vector_math import bind

LOWEST = float("-inf")


class Operands:
    """Reads queries, keys and values, applies the mask and stores results; sizes are named for addresses."""

    def __init__(self, fused: Fused, target: Target) -> None:
        self.reader = Reader(fused)
        self.fused = fused = self.reader.fused
        stages = fused.stages
        self.scores, self.masked = stages[SCORES], stages[MASKED]
        self.starts, self.stops = stages.get(START), stages.get(STOP)
        *self.at, self.inner = [v.var for v in self.scores.iter_vars]
        self.order = [int(i) for i in fused.core.annotations["optc.axes"]]
        extents = [v.dom.extent for v in self.scores.iter_vars]
        self.batch, self.heads, self.rows, self.keys = (self.reader.size(e) for e in extents[:4])
        self.depth = int(extents[4])
        self.width = int(fused.spatial.extents[self.order[3]])
        self.dtype = str(fused.accumulator.dtype)
        self.target = target
        self.lanes = target.lanes(bits(self.dtype))

    def query(self, b: Any, h: Any, i: Any, d: Any) -> Any:
        """Return the query's element in the accumulators' type."""
        return self._read(self.scores.body.value.b.a, self.at[:3], (b, h, i), d)

    def key(self, b: Any, h: Any, j: Any, d: Any) -> Any:
        """Return the key's element."""
        at = self.at
        return self._read(self.scores.body.value.b.b, [at[0], at[1], at[3]], (b, h, j), d)

    def _read(self, expression: Any, variables: Any, position: Any, d: Any) -> Any:
        places = dict(zip(variables, position, strict=True))
        return self.reader.value(expression, {**places, self.inner: d})

    def value(self, b: Any, h: Any, j: Any, d: Any) -> Any:
        """Return the value's element."""
        axes = [self.fused.spatial.variables[i] for i in self.order]
        places = {axes[0]: b, axes[1]: h, axes[3]: d, self.fused.reduced.variables[0]: j}
        return self.reader.value(self.fused.core.body.value.b.b, places)

    def mask(self, score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        """Return the score that counts for a raw one."""
        own = [v.var for v in self.masked.iter_vars]
        given = {self.scores.body.buffer: score}
        for stage in (self.starts, self.stops):
            if stage is not None:
                given[stage.body.buffer] = self._bound(stage, b, i)
        return self.reader.value(self.masked.body.value, dict(zip(own, (b, h, i, j), strict=True)), given=given)

    def _bound(self, stage: Any, b: Any, i: Any) -> Any:
        own = [v.var for v in stage.iter_vars]
        return self.reader.value(stage.body.value, dict(zip(own, (b, i), strict=True)))

    def start(self, b: Any, i: Any) -> Any:
        """Return the first key that query i may look at."""
        zero = loops.index(0)
        return 0 if self.starts is None else tirx.max(zero, self._bound(self.starts, b, i))

    def stop(self, b: Any, i: Any) -> Any:
        """Return the end of the keys that query i may look at."""
        return self.keys if self.stops is None else loops.smaller(self._bound(self.stops, b, i), self.keys)

    def store(self, b: Any, h: Any, i: Any, d: Any, result: Any) -> Any:
        """Return the store of the epilogue of ``result``."""
        axes = [self.fused.spatial.variables[k] for k in self.order]
        return self.reader.store(dict(zip(axes, (b, h, i, d), strict=True)), [], result)

    def tasks(self, inner: Any, body: Any) -> Any:
        """Return the parallel loop over batch, heads and ``inner``."""
        axes = Axes(["b", "h", "t"], [self.batch, self.heads, inner])

        def task(position: Any) -> Any:
            at = list(axes.at(position).values())
            return loops.bind(
                "b", at[0], lambda b: loops.bind("h", at[1], lambda h: loops.bind("t", at[2], lambda t: body(b, h, t)))
            )

        return loops.loop("task", axes.total, task, "parallel")

    def const(self, value: float) -> Any:
        """Return a number of the accumulators' type."""
        return tirx.const(value, self.dtype)

    def peak(self, top: Any) -> Any:
        """Return what is subtracted before the exponential: the maximum, 0 where every key is masked."""
        return bind(top, lambda t: tirx.Select(t == self.const(LOWEST), self.const(0.0), t))

    def share(self, total: Any) -> Any:
        """Return the factor of the weighted sum of values: 0 where every key is masked."""
        one, zero = self.const(1.0), self.const(0.0)
        return bind(total, lambda t: tirx.Select(t == zero, zero, one / t))
