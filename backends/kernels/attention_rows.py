"""Attention of few queries, as when text is generated: keys and values pass by once per query and head.

    for (batch, head):                             parallel
        for each query:
            weights[keys] = softmax(mask(query . key))     vectors along d, several keys at a time
            out[d] = sum over keys of weights * values     vectors along d

Memory holds one row of scores. All time is spent on reading keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from optc.backends.kernels import loops, register_tile
from optc.backends.kernels.attention_operands import LOWEST, Operands
from optc.backends.kernels.loops import bind, load, loop, sequence, store
from optc.backends.kernels.vector_math import exp_nonpositive, maximum

SUMS = register_tile.IN_FLIGHT
"""Vectors of the weighted sum in registers."""


def limit(operands: Operands) -> int:
    """Return up to how many queries this is faster than filling vectors with queries."""
    return max(1, operands.lanes // 2)


class Rows:
    """Writes the loop nest for few queries."""

    def __init__(self, operands: Operands) -> None:
        self.o = operands
        self.lanes = operands.lanes
        # Keys whose products with the query are summed at the same time, and whose weights make whole vectors.
        self.keys = max(register_tile.IN_FLIGHT, self.lanes)

    def body(self) -> Any:
        """Return the loops."""
        o = self.o

        def head(b: Any, h: Any, _: Any) -> Any:
            weight, allocate = loops.scratch("weight", loops.ceildiv(o.keys, self.keys) * self.keys, o.dtype)

            def row(i: Any) -> Any:
                return bind(
                    "start",
                    o.start(b, i),
                    lambda s: bind("stop", o.stop(b, i), lambda e: self._row(b, h, i, s, e, weight)),
                )

            return sequence(allocate, loop("i", o.rows, row))

        return o.tasks(1, head)

    def _row(self, b: Any, h: Any, i: Any, start: Any, stop: Any, weight: Any) -> Any:
        o, size = self.o, self.keys
        groups = loops.ceildiv(tirx.max(loops.index(0), loops.index(stop - start)), size)
        (top, make_top), (total, make_total), (best, make_best) = (
            loops.scratch(n, size, o.dtype) for n in ("top", "total", "best")
        )

        def each(make: Callable[[Any], Any]) -> Any:
            return o.reader.lanewise(size, make)

        def compare(g: Any, lane: Any) -> Any:
            return store(top, lane, maximum(load(top, lane), load(weight, g * size + lane)))

        def weigh(g: Any, lane: Any) -> Any:
            return store(weight, g * size + lane, exp_nonpositive(load(weight, g * size + lane) - load(best, 0)))

        def fold(buffer: Any, combine: Callable[[Any, Any], Any]) -> list[Any]:
            return [store(buffer, 0, combine(load(buffer, 0), load(buffer, k))) for k in range(1, size)]

        return sequence(
            make_top,
            make_total,
            make_best,
            each(lambda lane: store(top, lane, o.const(LOWEST))),
            each(lambda lane: store(total, lane, o.const(0.0))),
            loop(
                "g",
                groups,
                lambda g: sequence(self._scores(b, h, i, start, stop, g, weight), each(lambda lane: compare(g, lane))),
            ),
            *fold(top, maximum),
            store(best, 0, o.peak(load(top, 0))),
            loop(
                "g",
                groups,
                lambda g: sequence(
                    each(lambda lane: weigh(g, lane)),
                    each(lambda lane: store(total, lane, load(total, lane) + load(weight, g * size + lane))),
                ),
            ),
            *fold(total, lambda a, b: a + b),
            store(total, 0, o.share(load(total, 0))),
            self._values(b, h, i, start, stop, weight, total),
        )

    def _scores(self, b: Any, h: Any, i: Any, start: Any, stop: Any, g: Any, weight: Any) -> Any:
        """Return the masked scores of one group of keys; those beyond the last are minus infinity."""
        o, lanes, size = self.o, self.lanes, self.keys
        acc, allocate = loops.tile("acc", size, lanes, o.dtype)
        raw, allocate_raw = loops.scratch("raw", size, o.dtype)
        whole = o.depth // lanes
        rows = [tirx.Var(f"j{k}", "int64") for k in range(size)]
        first = start + g * size
        bindings = [tirx.Bind(row, loops.index(loops.smaller(first + k, stop - 1))) for k, row in enumerate(rows)]

        def update(k: int, c: Any) -> Any:
            def element(lane: Any) -> Any:
                d = c * lanes + lane
                product = o.query(b, h, i, d) * o.key(b, h, rows[k], d)
                return store(acc[k], lane, load(acc[k], lane) + product)

            return o.reader.lanewise(lanes, element)

        def total(k: int) -> Any:
            terms = [load(acc[k], lane) for lane in range(lanes)]
            terms += [
                o.query(b, h, i, loops.index(d)) * o.key(b, h, rows[k], loops.index(d))
                for d in range(whole * lanes, o.depth)
            ]
            while len(terms) > 1:
                terms = [x + y for x, y in zip(terms[::2], terms[1::2], strict=False)] + (
                    [terms[-1]] if len(terms) % 2 else []
                )
            return store(raw, k, terms[0])

        def put(k: Any) -> Any:
            return store(weight, g * size + k, o.mask(load(raw, k), b, h, i, first + k))

        def partial() -> Any:
            inside = loops.index(stop - first)

            def lowest(k: Any) -> Any:
                return store(weight, g * size + k, o.const(LOWEST))

            return loop("k", size, lambda k: tirx.IfThenElse(k < inside, put(k), lowest(k)))

        return sequence(
            *bindings,
            *allocate,
            allocate_raw,
            *(o.reader.lanewise(lanes, lambda lane, k=k: store(acc[k], lane, o.const(0.0))) for k in range(size)),
            *([loop("c", whole, lambda c: sequence(*(update(k, c) for k in range(size))))] if whole else []),
            *(total(k) for k in range(size)),
            tirx.IfThenElse(loops.index(first + size) <= loops.index(stop), o.reader.lanewise(size, put), partial()),
        )

    def _values(self, b: Any, h: Any, i: Any, start: Any, stop: Any, weight: Any, total: Any) -> Any:
        """Return the weighted sum of values, a run of columns in registers at a time."""
        statements, first = [], 0
        while first < self.o.width:
            left = self.o.width - first
            lanes = min(self.lanes, 1 << (left.bit_length() - 1))
            vectors = min(SUMS, left // lanes)
            statements.append(self._columns(b, h, i, start, stop, weight, total, first, vectors, lanes))
            first += vectors * lanes
        return sequence(*statements)

    def _columns(
        self,
        b: Any,
        h: Any,
        i: Any,
        start: Any,
        stop: Any,
        weight: Any,
        total: Any,
        first: int,
        vectors: int,
        lanes: int,
    ) -> Any:
        o, span = self.o, vectors * lanes
        # Few sums: several keys at a time. Weights are zero up to a multiple of the keys in a group.
        sets = 1 << ((SUMS // vectors).bit_length() - 1)
        acc, allocate = loops.scratch("sums", sets * span, o.dtype)
        slots = [(s, v) for s in range(sets) for v in range(0, span, lanes)]

        def each(make: Callable[[int, Any], Any]) -> list[Any]:
            return [o.reader.lanewise(lanes, lambda lane, s=s, v=v: make(s, v + lane)) for s, v in slots]

        def step(k: Any) -> Any:
            keys = [tirx.Var(f"j{s}", "int64") for s in range(sets)]
            places = [loops.smaller(start + k * sets + s, stop - 1) if s else start + k * sets for s in range(sets)]
            bindings = [tirx.Bind(key, loops.index(place)) for key, place in zip(keys, places, strict=True)]

            def update(s: int, v: Any) -> Any:
                product = load(weight, k * sets + s) * o.value(b, h, keys[s], first + v)
                return store(acc, s * span + v, load(acc, s * span + v) + product)

            return sequence(*bindings, *each(update))

        def put(v: int) -> Any:
            def element(lane: Any) -> Any:
                parts = [load(acc, s * span + v + lane) for s in range(sets)]
                while len(parts) > 1:
                    parts = [x + y for x, y in zip(parts[::2], parts[1::2], strict=True)]
                return o.store(b, h, i, first + v + lane, parts[0] * load(total, 0))

            return o.reader.lanewise(lanes, element)

        steps = loops.ceildiv(tirx.max(loops.index(0), loops.index(stop - start)), sets)
        return sequence(
            allocate,
            *each(lambda s, v: store(acc, s * span + v, o.const(0.0))),
            loop("k", steps, step),
            *(put(v) for v in range(0, span, lanes)),
        )
