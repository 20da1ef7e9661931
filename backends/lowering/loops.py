"""Loop and Scan: unrolled when the number of iterations is known and small, else a tree of Relax functions.

Relax has no loop. A function runs the body once: it takes the iteration number, whether to go on, the carried tensors
and what the iterations gave so far, and returns them anew. A function of the next level calls it up to ``BRANCHING``
times, as long as the condition allows, and so on; unlike recursion this needs no stack that grows with the iterations.
Sizes that differ from one iteration to the next become symbols that each call binds anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir
from tvm import relax, te, tirx

from optc.backends.lowering import imperative
from optc.backends.lowering import index_math as im
from optc.backends.lowering.branches import block, outline
from optc.backends.lowering.emit import as_index, shape_of
from optc.backends.lowering.known import Known
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table

TABLE = Table()

UNROLL_LIMIT = 64
"""Loops of more iterations become functions, so that code does not grow with the trip count."""


BRANCHING, LEVELS = 16, 8
"""A loop of an unknown number of iterations ends after BRANCHING ** LEVELS of them, years later."""


@TABLE.lowers("Loop")
def loop(site: Site) -> Any:
    """Loop-25."""
    body = site.attr("body")
    carried = [site.value(k) for k in range(2, site.input_count)]
    condition = site.constant(1) if site.has(1) else np.array(True)
    if condition is not None and not condition.reshape(-1)[0]:
        return _no_iterations(site, body, carried)
    trips: Any = site.constant(0) if site.has(0) else None
    small = trips is not None and int(trips.reshape(-1)[0]) <= UNROLL_LIMIT
    if small and condition is not None and _goes_on(body):
        return _unroll(site, body, carried, max(0, int(trips.reshape(-1)[0])))
    return _run_loop(site, body, carried)


def _goes_on(body: oir.Graph) -> bool:
    """Tell whether the condition that ``body`` gives is the one it got, or always true."""
    value: Any = body.outputs[0]
    while (node := value.producer()) is not None and node.op_type == "Identity":
        (value,) = node.inputs
    if value is body.inputs[1]:
        return True
    constant = oir.convenience.get_const_tensor(value)
    return constant is not None and bool(constant.numpy().reshape(-1)[0])


def _no_iterations(site: Site, body: oir.Graph, carried: Sequence[oir.Value]) -> list[Any]:
    results: list[Any] = [site.lowerer.known(value) for value in carried]
    for value in body.outputs[1 + len(carried) :]:
        dims = value.shape
        if dims is None or not all(isinstance(d, int) for d in dims):
            site.unsupported("the shape of an output is unknown because no iteration runs")
        results.append(_empty(site, [0, *dims], site.lowerer.dtype(value)))
    return results


def _empty(site: Site, shape: Sequence[Any], dtype: str) -> Any:
    return site.emit(
        lambda: te.compute([as_index(d) for d in shape], lambda *_: scalar(0, dtype), "empty"), name="empty"
    )


def _unroll(site: Site, body: oir.Graph, carried: Sequence[oir.Value], trips: int) -> list[Any]:
    lowerer = site.lowerer
    if not trips:
        return _no_iterations(site, body, carried)
    state = [lowerer.known(value) for value in carried]
    scanned: list[list[Any]] = [[] for _ in body.outputs[1 + len(state) :]]
    for trip in range(trips):
        with lowerer.scope():
            lowerer.define(body.inputs[0], Known(integers=np.array(trip, dtype=object)))
            lowerer.define(body.inputs[1], Known(relax.const(True, "bool"), constant=np.array(True)))
            for value, known in zip(body.inputs[2:], state, strict=True):
                lowerer.define(value, known)
            lowerer.graph(body)
            state = [lowerer.known(value) for value in body.outputs[1 : 1 + len(state)]]
            for parts, value in zip(scanned, body.outputs[1 + len(state) :], strict=True):
                parts.append(lowerer.tensor(value))
    return [*state, *(stack(site, parts, 0) for parts in scanned)]


def stack(site: Site, parts: Sequence[Any], axis: int) -> Any:
    """Join tensors of one shape along a new axis."""
    shape = shape_of(parts[0])
    parts = [parts[0], *(site.check_equal(p, shape) for p in parts[1:])]
    result = [*shape[:axis], len(parts), *shape[axis:]]

    def body(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        for number, part in enumerate(ins):
            with imperative.loop(*shape) as index:
                outs[0][(*index[:axis], number, *index[axis:])] = part[index]

    return site.emit(
        lambda *a: imperative.procedure(a, [(result, str(a[0].dtype))], body, "stack"), *parts, name="stack"
    )


@TABLE.lowers("Scan")
def scan(site: Site) -> Any:
    """Scan-25: scan inputs are read along their axis, forwards or backwards, scan outputs joined likewise."""
    body, count = site.attr("body"), site.attr("num_scan_inputs")
    states = site.input_count - count
    outputs = len(body.outputs) - states
    directions = site.attr("scan_input_directions", [0] * count)
    out_directions = site.attr("scan_output_directions", [0] * outputs)
    axes = [im.axis_of(a, site.rank(states + k)) for k, a in enumerate(site.attr("scan_input_axes", [0] * count))]
    out_axes = site.attr("scan_output_axes", [0] * outputs)
    trips = site.shape(states)[axes[0]]
    carried = [site.value(k) for k in range(states)]
    sources = [site.tensor(states + k) for k in range(count)]
    lowerer = site.lowerer

    def bind(trip: Any) -> None:
        for value, source, axis, backward in zip(body.inputs[states:], sources, axes, directions, strict=True):
            lowerer.define(value, Known(_element(site, source, axis, trip, trips, bool(backward))))

    if isinstance(trips, int) and 0 < trips <= UNROLL_LIMIT:
        state = [lowerer.known(value) for value in carried]
        parts: list[list[Any]] = [[] for _ in range(outputs)]
        for trip in range(trips):
            with lowerer.scope():
                for value, known in zip(body.inputs[:states], state, strict=True):
                    lowerer.define(value, known)
                bind(trip)
                lowerer.graph(body)
                state = [lowerer.known(value) for value in body.outputs[:states]]
                for part, value in zip(parts, body.outputs[states:], strict=True):
                    part.append(lowerer.tensor(value))
        joined = [
            stack(site, part[::-1] if backward else part, im.axis_of(axis, len(shape_of(part[0])) + 1))
            for part, axis, backward in zip(parts, out_axes, out_directions, strict=True)
        ]
        return [*state, *joined]
    plan = _Plan(
        site=site,
        carried=[lowerer.tensor(value) for value in carried],
        inputs=list(body.inputs[:states]),
        outputs=list(body.outputs[:states]),
        scanned=list(body.outputs[states:]),
        scanned_backward=[bool(d) for d in out_directions],
        condition=None,
        number=None,
        prepare=bind,
        body=body,
        trips=trips if isinstance(trips, int) else None,
    )
    limit = lowerer.materialize(np.array([trips], dtype=object), "int64")
    results = plan.run(limit, relax.const(np.array([True]), "bool"))
    return [
        *results[:states],
        *(
            _move_axis(site, r, im.axis_of(axis, len(shape_of(r))))
            for r, axis in zip(results[states:], out_axes, strict=True)
        ),
    ]


def _element(site: Site, source: Any, axis: int, trip: Any, trips: Any, backward: bool) -> Any:
    """Read entry ``trip`` (a number, or a tensor that holds it) of ``source`` along ``axis``."""

    def compute(a: Any, *t: Any) -> Any:
        number = t[0][0] if t else as_index(trip)
        place = as_index(trips) - 1 - number if backward else number
        return te.compute([*a.shape[:axis], *a.shape[axis + 1 :]], lambda *i: a(*i[:axis], place, *i[axis:]))

    if isinstance(trip, int):
        return site.emit(compute, source, name="scan_input")
    return site.emit(compute, source, trip, name="scan_input")


def _int64(value: int) -> Any:
    return relax.const(np.array([value], "int64"), "int64")


def _move_axis(site: Site, tensor: Any, axis: int) -> Any:
    """Move axis 0 to ``axis``."""
    if axis == 0:
        return tensor
    shape = shape_of(tensor)
    result = [as_index(d) for d in [*shape[1 : axis + 1], shape[0], *shape[axis + 1 :]]]
    return site.emit(
        lambda a: te.compute(result, lambda *i: a(i[axis], *i[:axis], *i[axis + 1 :])),
        tensor,
        name="scan_output",
    )


def _run_loop(site: Site, body: oir.Graph, carried: Sequence[oir.Value]) -> list[Any]:
    lowerer = site.lowerer
    count = len(carried)
    plan = _Plan(
        site=site,
        carried=[lowerer.tensor(value) for value in carried],
        inputs=list(body.inputs[2:]),
        outputs=list(body.outputs[1 : 1 + count]),
        scanned=list(body.outputs[1 + count :]),
        scanned_backward=[False] * (len(body.outputs) - 1 - count),
        condition=body.outputs[0],
        number=body.inputs[0],
        prepare=lambda _: lowerer.define(body.inputs[1], Known(relax.const(True, "bool"))),
        body=body,
    )
    limit = site.reshape(site.tensor(0), [1]) if site.has(0) else _int64(2**62)
    start = site.reshape(site.tensor(1), [1]) if site.has(1) else relax.const(np.array([True]), "bool")
    return plan.run(limit, start)


@dataclass
class _Plan:
    """A loop that runs as a function: what it carries, and how its body is lowered."""

    site: Site
    carried: list[Any]
    inputs: list[oir.Value]
    outputs: list[oir.Value]
    scanned: list[oir.Value]
    scanned_backward: list[bool]
    condition: oir.Value | None
    number: oir.Value | None
    prepare: Callable[[Any], None]
    body: oir.Graph
    trips: int | None = None

    def run(self, limit: Any, start: Any) -> list[Any]:
        """Emit the function and the call of it; returns the final carried tensors and the joined outputs."""
        site = self.site
        shapes = [shape_of(t) for t in self.carried]
        while True:
            # Sizes that an iteration changes are open; the first try finds out which these are.
            found, elements = self._shapes_after(shapes)
            wider = [
                [x if x is not None and y is not None and site.prove_equal(x, y) else None
                 for x, y in zip(a, b, strict=True)]
                for a, b in zip(shapes, found, strict=True)
            ]  # fmt: skip
            if all(a.count(None) == b.count(None) for a, b in zip(shapes, wider, strict=True)):
                break
            shapes = wider
        dtypes = [str(t.ty.dtype) for t in self.carried]
        joined = [([None, *s], site.lowerer.dtype(v)) for s, v in zip(elements, self.scanned, strict=True)]
        self.state = [([1], "int64"), ([], "bool"), *zip(shapes, dtypes, strict=True), *joined]
        number = _int64(0)
        # Sizes of elements that only an iteration knows are 0 before the first one.
        empty = [_empty(site, [0, *(d if d is not None else 0 for d in shape[1:])], dtype) for shape, dtype in joined]
        values = [number, self._goes_on(number, limit, start), *self.carried, *empty]
        call = self._step(limit)
        for level in range(LEVELS):
            if self.trips is not None and BRANCHING**level >= self.trips:
                break
            call = self._repeat(call)
        return self._if_going(call, values)[2:]

    def _types(self) -> list[Any]:
        return [
            relax.TensorType(None, dtype, ndim=len(shape))
            if None in shape
            else relax.TensorType([as_index(d) for d in shape], dtype)
            for shape, dtype in self.state
        ]

    def _parameters(self) -> list[Any]:
        return [relax.Var("state", self._type(shape, dtype)) for shape, dtype in self.state]

    def _if_going(self, call: Callable[[Sequence[Any]], Any], values: Sequence[Any]) -> list[Any]:
        """Emit a call if the state says to go on, else leave the state as it is."""
        builder = self.site.lowerer.builder
        result = builder.emit(relax.If(values[1], call(values), relax.Tuple(list(values))))
        return [
            builder.match_cast(relax.TupleGetItem(result, i), self._type(shape, dtype))
            for i, (shape, dtype) in enumerate(self.state)
        ]

    def _repeat(self, call: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], Any]:
        """Emit a function that makes ``call`` up to BRANCHING times."""
        parameters = self._parameters()

        def body() -> list[Any]:
            values: list[Any] = list(parameters)
            for _ in range(BRANCHING):
                values = self._if_going(call, values)
            return values

        return outline(self.site.lowerer, "loop", body, parameters, self._types())[0]

    def _type(self, shape: Sequence[Any], dtype: str) -> Any:
        dims = [self.site.symbol("n") if d is None else as_index(d) for d in shape]
        return relax.TensorType(dims, dtype)

    def _goes_on(self, number: Any, limit: Any, condition: Any) -> Any:
        def compute(i: Any, n: Any, c: Any) -> Any:
            return te.compute((), lambda: tirx.all(i[0] < n[0], c[0]), "goes_on")

        return self.site.emit(compute, number, limit, condition, name="goes_on")

    def _lower(self, number: Any, state: Sequence[Any]) -> tuple[list[Any], list[Any], Any]:
        """Lower the body once; returns the carried tensors, the outputs, and the condition, after it."""
        lowerer = self.site.lowerer
        for value, tensor in zip(self.inputs, state, strict=True):
            lowerer.define(value, Known(tensor))
        if self.number is not None:
            lowerer.define(self.number, Known(self.site.reshape(number, [])))
        self.prepare(number)
        lowerer.graph(self.body)
        condition = relax.const(np.array([True]), "bool")
        if self.condition is not None:
            condition = self.site.reshape(lowerer.tensor(self.condition), [1])
        after = [lowerer.tensor(v) for v in self.outputs]
        return after, [lowerer.tensor(v) for v in self.scanned], condition

    def _shapes_after(self, shapes: Sequence[Sequence[Any]]) -> tuple[list[list[Any]], list[list[Any]]]:
        lowerer = self.site.lowerer
        outside = set(lowerer.symbols)
        state = [
            relax.Var("state", self._type(shape, str(t.ty.dtype)))
            for shape, t in zip(shapes, self.carried, strict=True)
        ]
        found: list[list[Any]] = []

        def trial() -> list[Any]:
            after, scanned, _ = self._lower(_int64(0), state)
            for value, tensor in zip([*self.outputs, *self.scanned], [*after, *scanned], strict=True):
                declared = list(value.shape) if value.shape is not None else [None] * tensor.ty.ndim
                found.append(
                    [
                        d if lowerer.free(d) <= outside else n if isinstance(n, int) else None
                        for d, n in zip(shape_of(tensor), declared, strict=True)
                    ]
                )
            return []

        with lowerer.scope():
            block(lowerer, trial)
        if any(len(a) != len(b) for a, b in zip(found, shapes, strict=False)):
            self.site.unsupported("the rank of a carried tensor changes from one iteration to the next")
        return found[: len(shapes)], found[len(shapes) :]

    def _step(self, limit: Any) -> Callable[[Sequence[Any]], Any]:
        """Emit the function that runs one iteration."""
        parameters = self._parameters()
        number, _, *rest = parameters
        count = len(self.carried)

        def body() -> list[Any]:
            after, scanned, condition = self._lower(number, rest[:count])
            joined = [
                self._join(old, new, backward)
                for old, new, backward in zip(rest[count:], scanned, self.scanned_backward, strict=True)
            ]
            following = self.site.emit(lambda i: te.compute(i.shape, lambda k: i[k] + 1, "next"), number, name="next")
            kept = [
                self.site.check_equal(t, [d if d is not None else x for d, x in zip(s, shape_of(t), strict=True)])
                for t, (s, _) in zip(after, self.state[2:], strict=False)
            ]
            return [following, self._goes_on(following, limit, condition), *kept, *joined]

        return outline(self.site.lowerer, "iteration", body, parameters, self._types())[0]

    def _join(self, old: Any, new: Any, backward: bool) -> Any:
        """Append ``new`` to the entries of ``old``, or put it before them."""
        length, *shape = shape_of(old)
        found = shape_of(new)
        differ = [
            tirx.NE(as_index(a), as_index(b))
            for a, b in zip(shape, found, strict=True)
            if not self.site.prove_equal(a, b)
        ]

        def body(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
            if differ:
                with imperative.when(tirx.all(as_index(length) > 0, tirx.any(*differ))):
                    imperative.fail("the iterations of a loop output tensors of different shapes")
            with imperative.loop(length, *found) as (k, *rest):
                outs[0][(k + 1 if backward else k, *rest)] = ins[0][(k, *rest)]
            with imperative.loop(*found) as rest:
                outs[0][(0 if backward else length, *rest)] = ins[1][rest]

        return self.site.emit(
            lambda a, b: imperative.procedure([a, b], [([length + 1, *found], str(a.dtype))], body, "join"),
            old,
            new,
            name="join",
        )
