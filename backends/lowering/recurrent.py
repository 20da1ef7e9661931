"""RNN, GRU and LSTM: one matrix product of all steps with the input weights, then one kernel with the time loop.

The recurrent weights are packed in panels of ``width`` gate columns, ``[panels, hidden, width]``, so that a step
keeps one panel of sums in registers while it reads the state once: a vector-matrix product at the speed of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import register_tile
from optc.backends.kernels import vector_math as vm
from optc.backends.kernels.fused import bits
from optc.backends.lowering import imperative
from optc.backends.lowering import index_math as im
from optc.backends.lowering.emit import as_index
from optc.backends.lowering.imperative import Cells, loop, variable
from optc.backends.lowering.matmul import packed, product
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()

_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_ALPHA = {"LeakyRelu": 0.01, "Elu": 1.0, "HardSigmoid": 0.2, "ThresholdedRelu": 1.0, "Affine": 1.0, "ScaledTanh": 1.0}
_BETA = {"HardSigmoid": 0.5, "Affine": 0.0, "ScaledTanh": 1.0}

Activation = Callable[[Any], Any]


@dataclass
class _Cell:
    """What the kernel needs to know: sizes, dtypes, activations by direction, and which operands there are."""

    site: Site
    directions: list[bool]
    batch_first: bool
    steps: Any
    batch: Any
    hidden: int
    gates: int
    lanes: int
    width: int
    compute: str
    activations: list[list[Activation]]
    operands: dict[str, int]

    @property
    def columns(self) -> int:
        """Number of gate columns, padded to whole panels."""
        return -(-self.gates * self.hidden // self.width) * self.width

    def read(self, ins: Sequence[Cells], name: str, index: tuple[Any, ...]) -> Any:
        """Return an element of an operand as the type that is computed in, 0 if the operand is absent."""
        if name not in self.operands:
            return tirx.const(0, self.compute)
        return vm.convert(ins[self.operands[name]][index], self.compute)

    def clip(self, value: Any) -> Any:
        """Limit what enters an activation."""
        limit = self.site.attr("clip")
        if limit is None:
            return value
        bound = tirx.const(limit, self.compute)
        return tirx.max(tirx.min(value, bound), tirx.const(-limit, self.compute))


@dataclass
class _State:
    """Scratch of the kernel: recurrent sums, hidden state, cell state (of a GRU: reset state), update gate."""

    sums: Cells
    h: Cells
    second: Cells
    update: Cells

    @classmethod
    def allocate(cls, cell: _Cell) -> _State:
        """Allocate the scratch of one kernel."""
        shapes = [
            [cell.batch, cell.columns],
            [cell.batch, cell.hidden],
            [cell.batch, cell.hidden],
            [cell.hidden],
        ]
        return cls(*(imperative.cells(shape, cell.compute, scope="global") for shape in shapes))


@TABLE.lowers("RNN", "GRU", "LSTM")
def recurrent(site: Site) -> Any:
    """RNN-22, GRU-22, LSTM-22: all directions, layouts, activations, clip, peepholes, sequence lengths."""
    ranks = {0: 3, 1: 3, 2: 3, 3: 2, 4: 1, 5: 3, 6: 3, 7: 2}
    if any(site.has(k) and site.rank(k) != rank for k, rank in ranks.items()):
        site.impossible("an input has the wrong rank")
    batch_first = site.attr("layout", 0) == 1
    first, second, features = site.shape(0)
    expected = site.shape(1)[2]
    if not site.prove_equal(features, expected) and im.known(features, expected):
        site.impossible(f"the input has {features} features, its weights {expected}")
    steps, batch = (second, first) if batch_first else (first, second)
    hidden, gates = site.shape(2)[-1], _GATES[site.op]
    if not isinstance(hidden, int):
        site.unsupported("the hidden size must be known while compiling")
    direction = site.attr("direction", "forward")
    backward = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    compute = "float64" if site.dtype(0) == "float64" else "float32"
    lanes = site.target.lanes(bits(compute))
    widths = (lanes * vectors for vectors in (register_tile.IN_FLIGHT, 4, 2))
    cell = _Cell(
        site=site,
        directions=backward,
        batch_first=batch_first,
        steps=steps,
        batch=batch,
        hidden=hidden,
        gates=gates,
        lanes=lanes,
        width=next((w for w in widths if gates * hidden >= w), lanes),
        compute=compute,
        activations=_activations(site, len(backward)),
        operands={},
    )
    x = site.reshape(site.check_equal(site.tensor(0), [first, second, expected]), [steps * batch, expected])
    tensors = [_project(site, x, len(backward) * gates * hidden, expected), _pack(cell)]
    cell.operands = {"projected": 0, "weights": 1}
    state = [batch, len(backward), hidden] if batch_first else [len(backward), batch, hidden]
    for name, index, shape in (
        ("bias", 3, [len(backward), 2 * gates * hidden]),
        ("lengths", 4, [batch]),
        ("h", 5, state),
        ("c", 6, state),
        ("peephole", 7, [len(backward), 3 * hidden]),
    ):
        if site.has(index):
            cell.operands[name] = len(tensors)
            tensors.append(site.check_equal(site.tensor(index), shape))
    return _emit(cell, tensors)


def _project(site: Site, x: Any, columns: int, features: Any) -> Any:
    """Multiply all steps with the input weights of all directions."""
    constant = site.constant(1)
    if constant is not None:
        return packed(site, x, constant.reshape(columns, -1).T, name="input_projection")
    weights = site.reshape(site.tensor(1), [columns, features])
    return product(site, x, weights, transpose_b=True, name="input_projection")


def _pack(cell: _Cell) -> Any:
    """Return the recurrent weights ``[D, G*H, H]`` as panels ``[D, panels, H, width]``, zero-padded."""
    site, width, rows = cell.site, cell.width, cell.gates * cell.hidden
    constant = site.constant(2)
    shape = [len(cell.directions), cell.columns // width, cell.hidden, width]
    if constant is not None:
        whole = np.zeros((shape[0], cell.columns, cell.hidden), constant.dtype)
        whole[:, :rows] = constant
        panels = whole.reshape(shape[0], shape[1], width, cell.hidden).swapaxes(2, 3)
        return site.weight(np.ascontiguousarray(panels), "recurrent")

    def compute(r: Any) -> Any:
        def element(d: Any, panel: Any, k: Any, j: Any) -> Any:
            row = panel * width + j
            return tirx.if_then_else(row < rows, r[d, row, k], tirx.const(0, str(r.dtype)))

        return te.compute([as_index(v) for v in shape], element, "pack")

    return site.emit(compute, site.tensor(2), name="pack")


def _activations(site: Site, directions: int) -> list[list[Activation]]:
    """Return the activations of each direction; alphas and betas go, in order, to those that take one."""
    names = [str(n) for n in site.attr("activations", _DEFAULTS[site.op] * directions)]
    alphas, betas = list(site.attr("activation_alpha", [])), list(site.attr("activation_beta", []))
    functions = []
    for name in names:
        title = next((n for n in _FUNCTIONS if n.lower() == name.lower()), None)
        if title is None:
            site.unsupported(f"unknown activation '{name}'")
        alpha = alphas.pop(0) if title in _ALPHA and alphas else _ALPHA.get(title, 0.0)
        beta = betas.pop(0) if title in _BETA and betas else _BETA.get(title, 0.0)
        functions.append(_bound(_FUNCTIONS[title], alpha, beta))
    per = len(_DEFAULTS[site.op])
    # The schema's default for a one-directional RNN names two.
    if len(functions) < per * directions:
        site.unsupported(f"{len(functions)} activations given, {per * directions} needed")
    return [functions[d * per : (d + 1) * per] for d in range(directions)]


def _bound(function: Callable[[Any, Any, Any], Any], alpha: float, beta: float) -> Activation:
    def apply(x: Any) -> Any:
        dtype = vm.dtype_of(x)
        return function(x, tirx.const(alpha, dtype), tirx.const(beta, dtype))

    return apply


def _zero(x: Any) -> Any:
    return tirx.const(0, vm.dtype_of(x))


def _one(x: Any) -> Any:
    return tirx.const(1, vm.dtype_of(x))


_FUNCTIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "Sigmoid": lambda x, a, b: vm.sigmoid(x),
    "Tanh": lambda x, a, b: vm.tanh(x),
    "Relu": lambda x, a, b: tirx.max(x, _zero(x)),
    "Affine": lambda x, a, b: a * x + b,
    "LeakyRelu": lambda x, a, b: tirx.Select(x < _zero(x), a * x, x),
    "ThresholdedRelu": lambda x, a, b: tirx.Select(x > a, x, _zero(x)),
    "ScaledTanh": lambda x, a, b: a * vm.tanh(b * x),
    "HardSigmoid": lambda x, a, b: tirx.max(tirx.min(a * x + b, _one(x)), _zero(x)),
    "Elu": lambda x, a, b: tirx.Select(x < _zero(x), a * vm.expm1_negative(x), x),
    "Softsign": lambda x, a, b: x / (_one(x) + tirx.abs(x)),
    "Softplus": lambda x, a, b: vm.softplus(x),
}


def _emit(cell: _Cell, tensors: Sequence[Any]) -> Any:
    site, count = cell.site, len(cell.directions)
    dtype = site.dtype(0)
    last = [cell.batch, count, cell.hidden] if cell.batch_first else [count, cell.batch, cell.hidden]
    if cell.batch_first:
        sequence = [cell.batch, cell.steps, count, cell.hidden]
    else:
        sequence = [cell.steps, count, cell.batch, cell.hidden]
    outputs = [(sequence, dtype), (last, dtype)] + [(last, dtype)] * (site.op == "LSTM")

    def body(ins: list[Cells], outs: list[Cells]) -> None:
        state = _State.allocate(cell)
        for direction, backward in enumerate(cell.directions):
            _run_direction(cell, ins, outs, direction, backward, state)

    def compute(*a: Any) -> Any:
        return list(imperative.procedure(a, outputs, body, site.op.lower()))

    return site.emit(compute, *tensors)[: site.output_count]


def _run_direction(
    cell: _Cell, ins: list[Cells], outs: list[Cells], direction: int, backward: bool, state: _State
) -> None:
    """Write the loop over time of one direction."""
    h, second = state.h, state.second
    lstm = cell.site.op == "LSTM"
    step_of = {"RNN": _rnn, "GRU": _gru, "LSTM": _lstm}[cell.site.op]

    def at_state(b: Any, j: Any) -> tuple[Any, ...]:
        return (b, direction, j) if cell.batch_first else (direction, b, j)

    def at_sequence(t: Any, b: Any, j: Any) -> tuple[Any, ...]:
        return (b, t, direction, j) if cell.batch_first else (t, direction, b, j)

    def store(target: Cells, index: tuple[Any, ...], value: Any) -> None:
        target[index] = vm.convert(value, target.dtype)

    with loop(cell.batch, cell.hidden) as (b, j):
        h[b, j] = cell.read(ins, "h", at_state(b, j))
        second[b, j] = cell.read(ins, "c", at_state(b, j)) if lstm else tirx.const(0, cell.compute)
    with loop(cell.steps) as (s,):
        _multiply(cell, ins, direction, h, state.sums, 0)
        with loop(cell.batch) as (b,):
            length = as_index(cell.steps)
            if "lengths" in cell.operands:
                length = ins[cell.operands["lengths"]][b].astype("int64")
            t = variable("int64", length - 1 - s if backward else s)
            with imperative.when(s < length):
                row = b * cell.steps + t[0] if cell.batch_first else t[0] * cell.batch + b
                step_of(cell, ins, direction, b, row, state)
                with _elements(cell) as j:
                    store(outs[0], at_sequence(t[0], b, j), h[b, j])
            with imperative.when(s >= length), loop(cell.hidden) as (j,):
                store(outs[0], at_sequence(s, b, j), tirx.const(0, cell.compute))
    with loop(cell.batch, cell.hidden) as (b, j):
        store(outs[1], at_state(b, j), h[b, j])
        if lstm:
            store(outs[2], at_state(b, j), second[b, j])


@contextmanager
def _elements(cell: _Cell) -> Iterator[Any]:
    """Loop over the hidden elements, in vectors if they fill them."""
    if cell.hidden % cell.lanes:
        with loop(cell.hidden) as (j,):
            yield j
    else:
        with loop(cell.hidden // cell.lanes) as (outer,), loop(cell.lanes, kind="vectorized") as (inner,):
            yield outer * cell.lanes + inner


def _multiply(
    cell: _Cell,
    ins: list[Cells],
    direction: int,
    state: Cells,
    sums: Cells,
    first_gate: int,
    only: Any = None,
) -> None:
    """Set ``sums`` of ``first_gate`` and the gates after it, for all batch entries or ``only`` one.

    Whole panels are written, also the columns before ``first_gate`` in its first panel.
    """
    width, lanes, weights = cell.width, cell.lanes, ins[cell.operands["weights"]]
    begin = first_gate * cell.hidden // width
    with loop(cell.columns // width - begin, cell.batch if only is None else 1) as (offset, entry):
        panel = offset + begin
        b = entry if only is None else only
        total = imperative.cells([width], cell.compute)
        with loop(width // lanes, kind="unroll") as (u,), loop(lanes, kind="vectorized") as (v,):
            total[u * lanes + v] = 0
        with loop(cell.hidden) as (k,):
            with loop(width // lanes, kind="unroll") as (u,), loop(lanes, kind="vectorized") as (v,):
                j = u * lanes + v
                weight = vm.convert(weights[direction, panel, k, j], cell.compute)
                total[j] = total[j] + state[b, k] * weight
        with loop(width // lanes, kind="unroll") as (u,), loop(lanes, kind="vectorized") as (v,):
            sums[b, panel * width + u * lanes + v] = total[u * lanes + v]


def _inputs(cell: _Cell, ins: list[Cells], direction: int, gate: int, row: Any, j: Any) -> Any:
    """Return the projected input of a gate with its input bias."""
    size = cell.gates * cell.hidden
    column = gate * cell.hidden + j
    value = cell.read(ins, "projected", (row, direction * size + column))
    return value + cell.read(ins, "bias", (direction, column)) if "bias" in cell.operands else value


def _recurrent_bias(cell: _Cell, ins: list[Cells], direction: int, gate: int, j: Any) -> Any:
    return cell.read(ins, "bias", (direction, (cell.gates + gate) * cell.hidden + j))


def _gate(cell: _Cell, ins: list[Cells], direction: int, gate: int, b: Any, row: Any, sums: Cells, j: Any) -> Any:
    """Return what enters the activation of a gate, before peepholes and clipping."""
    value = _inputs(cell, ins, direction, gate, row, j) + sums[b, gate * cell.hidden + j]
    return value + _recurrent_bias(cell, ins, direction, gate, j)


def _rnn(cell: _Cell, ins: list[Cells], direction: int, b: Any, row: Any, state: _State) -> None:
    (f,) = cell.activations[direction]
    with _elements(cell) as j:
        state.h[b, j] = f(cell.clip(_gate(cell, ins, direction, 0, b, row, state.sums, j)))


def _lstm(cell: _Cell, ins: list[Cells], direction: int, b: Any, row: Any, state: _State) -> None:
    """Gates i, o, f, c; the output gate sees the new cell state through its peephole."""
    f, g, last = cell.activations[direction]
    sums, h, c = state.sums, state.h, state.second
    one = tirx.const(1, cell.compute)
    coupled = bool(cell.site.attr("input_forget", 0))

    def peephole(number: int, j: Any, value: Any) -> Any:
        if "peephole" not in cell.operands:
            return tirx.const(0, cell.compute)
        return cell.read(ins, "peephole", (direction, number * cell.hidden + j)) * value

    with _elements(cell) as j:

        def gate(number: int, extra: Any = None) -> Any:
            value = _gate(cell, ins, direction, number, b, row, sums, j)
            return cell.clip(value if extra is None else value + extra)

        # The sums of a gate make room for its activation, because a vector loop has no variables.
        sums[b, j] = f(gate(0, peephole(0, j, c[b, j])))
        forget = (b, 2 * cell.hidden + j)
        sums[forget] = one - sums[b, j] if coupled else f(gate(2, peephole(2, j, c[b, j])))
        c[b, j] = sums[forget] * c[b, j] + sums[b, j] * g(gate(3))
        h[b, j] = f(gate(1, peephole(1, j, c[b, j]))) * last(c[b, j])


def _gru(cell: _Cell, ins: list[Cells], direction: int, b: Any, row: Any, state: _State) -> None:
    """Gates z, r, h; without ``linear_before_reset`` the reset state is multiplied with the weights again."""
    f, g = cell.activations[direction]
    linear = bool(cell.site.attr("linear_before_reset", 0))
    sums, h, reset, update = state.sums, state.h, state.second, state.update
    with _elements(cell) as j:
        r = f(cell.clip(_gate(cell, ins, direction, 1, b, row, sums, j)))
        if linear:
            reset[b, j] = r * (sums[b, 2 * cell.hidden + j] + _recurrent_bias(cell, ins, direction, 2, j))
        else:
            reset[b, j] = r * h[b, j]
        # Kept aside, because the second product may overwrite the sums of this gate.
        update[j] = f(cell.clip(_gate(cell, ins, direction, 0, b, row, sums, j)))
    if not linear:
        _multiply(cell, ins, direction, reset, sums, 2, only=b)
    with _elements(cell) as j:
        value = _inputs(cell, ins, direction, 2, row, j)
        if linear:
            value = value + reset[b, j]
        else:
            value = value + sums[b, 2 * cell.hidden + j] + _recurrent_bias(cell, ins, direction, 2, j)
        candidate = g(cell.clip(value))
        h[b, j] = (tirx.const(1, cell.compute) - update[j]) * candidate + update[j] * h[b, j]
