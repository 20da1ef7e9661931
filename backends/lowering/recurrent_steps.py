"""The time loop of a recurrent layer as one kernel, whose threads start once for all steps.

    for each direction, step:
        for each product of the step:                                threads wait for each other at its end
            for each block of hidden elements:                       shared by threads
                sums[batch, gates, block] = state[batch, :] . weights[block, :, gates, :]         in registers
                gates, or new state, of the block's hidden elements

A block has the columns of all gates for its hidden elements, so that a thread goes from the product to the new state
alone. The states of two steps alternate in memory, because others may still read the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import register_tile
from optc.backends.kernels import vector_math as vm
from optc.backends.kernels.sharing import Product
from optc.backends.kernels.threads import LEAST_CYCLES
from optc.backends.lowering import imperative
from optc.backends.lowering.emit import as_index
from optc.backends.lowering.imperative import Cells, loop, variable

Activation = Callable[[Any], Any]

_MOST_ROWS = 4
"""Batch entries that are multiplied at once where only a run knows how many there are."""
_BLOCK_CYCLES = 250
"""Cycles that a block takes beside its product, mostly waiting for one activation after the other."""
_STREAM_BYTES = 32
"""Bytes of weights that come from the second cache in a cycle."""
_SHARES = 4
"""How much less work is worth a thread where it is only waited for, and not started."""
_WAIT_CYCLES = 600
"""Cycles until threads that wait for each other go on."""


@dataclass(frozen=True)
class Phase:
    """A product of every step: its gates, and how many blocks of ``width`` hidden elements it is cut into.

    ``rows`` batch entries are multiplied at once. ``cycles`` are those of one direction, for one thread.
    """

    gates: tuple[int, ...]
    blocks: int
    width: int
    rows: int
    cycles: float


def plan(gates: tuple[int, ...], hidden: int, batch: int | None, lanes: int, target: Target) -> Phase:
    """Return the fastest way to cut the product of a state with the weights of ``gates``.

    A step takes what its register tile does, or reading the weights; ``batch`` is None where only a run knows it.
    """
    entries = batch or 1
    bytes_ = target.vector_bits // 8

    def cut(vectors: int, rows: int) -> Phase:
        columns = vectors * len(gates)
        blocks = -(-hidden // (vectors * lanes))
        heights = [rows] * (entries // rows) + [entries % rows] * (entries % rows > 0)
        stream = columns * bytes_ / _STREAM_BYTES
        product = sum(hidden * max(stream, register_tile.cycles(height, columns, target)) for height in heights)
        return Phase(gates, blocks, vectors * lanes, rows, blocks * (product + entries * _BLOCK_CYCLES))

    def shared(phase: Phase) -> float:
        step = Product(1, 1, phase.blocks, 1.0, work=_SHARES * len(gates) * hidden * hidden * entries)
        return phase.cycles * step.cost(1, phase.blocks)

    most = max(1, (target.registers - 3) // len(gates))
    choices = []
    for vectors in range(1, min(most, -(-hidden // lanes)) + 1):
        tallest = min(batch or _MOST_ROWS, register_tile.most_rows(vectors * len(gates), target))
        choices += [cut(vectors, rows) for rows in (range(1, tallest + 1) if batch else [tallest])]
    return min(choices, key=shared)


@dataclass(frozen=True)
class Layer:
    """What the kernel needs to know: sizes, dtypes, activations by direction, and which operands there are."""

    op: str
    directions: list[bool]
    batch_first: bool
    steps: Any
    batch: Any
    hidden: int
    gates: int
    lanes: int
    compute: str
    phases: list[Phase]
    activations: list[list[Activation]]
    operands: dict[str, int]
    clip: float | None
    coupled: bool
    linear: bool

    @property
    def shared(self) -> bool:
        """Whether a step is worth the waiting of threads for each other, and all steps are worth their start."""
        steps = self.steps if isinstance(self.steps, int) else LEAST_CYCLES
        cycles = sum(phase.cycles for phase in self.phases)
        enough = cycles > 2 * _WAIT_CYCLES * len(self.phases) and cycles * steps * len(self.directions) > LEAST_CYCLES
        return enough and all(phase.blocks > 1 for phase in self.phases)


def steps_of(layer: Layer, ins: list[Cells], outs: list[Cells]) -> None:
    """Write the kernel of a layer: all states, the last ones, and of an LSTM the last cell states."""
    _Steps(layer, ins, outs).write()


class _Steps:
    """Writes the kernel. ``h`` are the states of two steps, ``second`` an LSTM's cell state or a GRU's reset state."""

    def __init__(self, layer: Layer, ins: list[Cells], outs: list[Cells]) -> None:
        self.layer, self.ins, self.outs = layer, ins, outs
        count, padded = len(layer.directions), max(phase.blocks * phase.width for phase in layer.phases)
        state = [count, layer.batch, layer.hidden]
        self.h = imperative.cells([2, *state], layer.compute, scope="global")
        self.second = imperative.cells(state, layer.compute, scope="global")
        self.sums = imperative.cells([count, layer.batch, layer.gates, padded], layer.compute, scope="global")

    def write(self) -> None:
        """Write the loops over steps, products, directions and blocks."""
        layer = self.layer
        element = {"RNN": _rnn, "GRU": _gru, "LSTM": _lstm}[layer.op]
        kind = "parallel" if layer.shared else "serial"
        if "lengths" in layer.operands:
            with loop(layer.batch) as (b,):
                length = self.length(b)
                with imperative.when(tirx.any(length < 0, length > as_index(layer.steps))):
                    imperative.fail("sequence_lens must be from 0 to the number of steps")
        with loop(len(layer.directions), layer.batch, layer.hidden) as (d, b, j):
            self.h[0, d, b, j] = self.read("h", self._at_state(d, b, j))
            self.second[d, b, j] = self.read("c", self._at_state(d, b, j))
        # A direction after the other: the weights of one may fit a cache that does not hold both.
        with imperative.all_threads() if layer.shared else nullcontext():
            for d in range(len(layer.directions)):
                with loop(layer.steps) as (s,):
                    for number, phase in enumerate(layer.phases):
                        end = imperative.wait_at_end() if layer.shared else nullcontext()
                        with end, loop(phase.blocks, kind=kind) as (block,):
                            part = _Part(self, number, d, block, s)
                            part.multiply()
                            part.each_entry(element)
        with loop(len(layer.directions), layer.batch, layer.hidden) as (d, b, j):
            place = self._at_state(d, b, j)
            self.store(1, place, self._ended(b, self.h[layer.steps % 2, d, b, j]))
            if layer.op == "LSTM":
                self.store(2, place, self._ended(b, self.second[d, b, j]))

    def _ended(self, b: Any, state: Any) -> Any:
        """Return a last state: 0, as onnxruntime has it, of an empty sequence."""
        if "lengths" not in self.layer.operands:
            return state
        return tirx.Select(self.length(b) > 0, state, tirx.const(0, self.layer.compute))

    def length(self, b: Any) -> Any:
        """Return the number of steps of a batch entry."""
        if "lengths" not in self.layer.operands:
            return as_index(self.layer.steps)
        return self.ins[self.layer.operands["lengths"]][b].astype("int64")

    def read(self, name: str, place: tuple[Any, ...]) -> Any:
        """Return an element of an operand as the type that is computed in, 0 if the operand is absent."""
        if name not in self.layer.operands:
            return tirx.const(0, self.layer.compute)
        return vm.convert(self.ins[self.layer.operands[name]][place], self.layer.compute)

    def store(self, output: int, place: tuple[Any, ...], value: Any) -> None:
        """Store an element of an output."""
        self.outs[output][place] = vm.convert(value, self.outs[output].dtype)

    def _at_state(self, d: Any, b: Any, j: Any) -> tuple[Any, ...]:
        return (b, d, j) if self.layer.batch_first else (d, b, j)


class _Part:
    """Writes one block of one direction in one product of step ``s``."""

    def __init__(self, steps: _Steps, number: int, direction: int, block: Any, s: Any) -> None:
        self.steps, self.layer, self.number = steps, steps.layer, number
        self.phase = steps.layer.phases[number]
        self.direction, self.block, self.s = direction, block, s
        self.activations = steps.layer.activations[direction]
        self.start = block * self.phase.width
        self.b: Any = None
        self.t: Any = None
        self.before: Any = None
        self.after: Any = None

    def multiply(self) -> None:
        """Set the sums of the block for all batch entries, a few at once."""
        batch, rows = self.layer.batch, self.phase.rows
        with loop(batch // rows) as (n,):
            self._tile(n * rows, rows)
        if isinstance(batch, int):
            if batch % rows:
                self._tile(batch // rows * rows, batch % rows)
        elif rows > 1:
            with loop(batch % rows) as (n,):
                self._tile(batch // rows * rows + n, 1)

    def _tile(self, first: Any, rows: int) -> None:
        layer, phase, lanes = self.layer, self.phase, self.layer.lanes
        weights = self.steps.ins[layer.operands[f"weights{self.number}"]]
        total = imperative.cells([rows, len(phase.gates), phase.width], layer.compute)

        @contextmanager
        def each() -> Iterator[tuple[Any, Any, Any]]:
            counts = (rows, len(phase.gates), phase.width // lanes)
            with loop(*counts, kind="unroll") as (i, g, u), loop(lanes, kind="vectorized") as (v,):
                yield i, g, u * lanes + v

        with each() as (i, g, j):
            total[i, g, j] = 0
        with loop(layer.hidden) as (k,), each() as (i, g, j):
            weight = vm.convert(weights[self.direction, self.block, k, g, j], layer.compute)
            total[i, g, j] = total[i, g, j] + self._multiplied(first + i, k) * weight
        with each() as (i, g, j):
            self.steps.sums[self.direction, first + i, phase.gates[0] + g, self.start + j] = total[i, g, j]

    def _multiplied(self, b: Any, k: Any) -> Any:
        """Return an element of what the weights are multiplied with: the state, or a GRU's reset state."""
        if self.number:
            return self.steps.second[self.direction, b, k]
        return self.steps.h[self.s % 2, self.direction, b, k]

    def each_entry(self, element: Callable[[_Part, Any], None]) -> None:
        """Write what follows the product for each batch entry; those that have ended keep their state."""
        layer, d = self.layer, self.direction
        with loop(layer.batch) as (b,):
            length = self.steps.length(b)
            self.b = b
            self.t = variable("int64", length - 1 - self.s if layer.directions[d] else self.s)[0]
            # Numbers from memory: TVM's elimination of common subexpressions loses some that depend on s.
            self.before = variable("int64", self.s % 2)[0]
            self.after = variable("int64", 1 - self.s % 2)[0]
            with imperative.when(self.s < length):
                self.each_element(lambda j: element(self, j))
            if "lengths" in layer.operands and self.number == len(layer.phases) - 1:
                with imperative.when(self.s >= length):
                    self.each_element(self._keep)

    def _keep(self, j: Any) -> None:
        self.steps.h[self.after, self.direction, self.b, j] = self.h(j)
        self.steps.store(0, self._at_sequence(self.s, j), tirx.const(0, self.layer.compute))

    def each_element(self, write: Callable[[Any], None]) -> None:
        """Write something for each of the block's hidden elements, in vectors as far as they reach."""
        layer, width, lanes = self.layer, self.phase.width, self.layer.lanes
        count: Any = as_index(width)
        if layer.hidden % width:
            count = tirx.min(count, layer.hidden - self.start)
        with loop(count // lanes) as (u,), loop(lanes, kind="vectorized") as (v,):
            write(self.start + u * lanes + v)
        if rest := layer.hidden % lanes:
            with imperative.when(self.block >= self.phase.blocks - 1):
                for part in (1 << bit for bit in range(rest.bit_length()) if rest >> bit & 1):
                    first = layer.hidden - rest % (2 * part)
                    with loop(part, kind="vectorized") as (v,):
                        write(first + v)

    def _at_sequence(self, t: Any, j: Any) -> tuple[Any, ...]:
        return (self.b, t, self.direction, j) if self.layer.batch_first else (t, self.direction, self.b, j)

    def h(self, j: Any) -> Any:
        """Return the state before the step."""
        return self.steps.h[self.before, self.direction, self.b, j]

    def set_h(self, j: Any, value: Any) -> None:
        """Set the state after the step."""
        after = (self.after, self.direction, self.b, j)
        self.steps.h[after] = value
        self.steps.store(0, self._at_sequence(self.t, j), self.steps.h[after])

    def sums(self, gate: int, j: Any) -> tuple[Any, ...]:
        """Return the place of a gate's sum, which makes room for its activation: a vector loop has no variables."""
        return (self.direction, self.b, gate, j)

    def second(self, j: Any) -> tuple[Any, ...]:
        """Return the place of the cell state, or reset state."""
        return (self.direction, self.b, j)

    def inputs(self, gate: int, j: Any) -> Any:
        """Return the projected input of a gate with its input bias."""
        layer = self.layer
        row = self.b * layer.steps + self.t if layer.batch_first else self.t * layer.batch + self.b
        column = gate * layer.hidden + j
        value = self.steps.read("projected", (row, self.direction * layer.gates * layer.hidden + column))
        return value + self.steps.read("bias", (self.direction, column)) if "bias" in layer.operands else value

    def recurrent_bias(self, gate: int, j: Any) -> Any:
        """Return the recurrent bias of a gate."""
        return self.steps.read("bias", (self.direction, (self.layer.gates + gate) * self.layer.hidden + j))

    def gate(self, gate: int, j: Any) -> Any:
        """Return what enters the activation of a gate, before peepholes and clipping."""
        value = self.inputs(gate, j) + self.steps.sums[self.sums(gate, j)]
        return value + self.recurrent_bias(gate, j)

    def clip(self, value: Any) -> Any:
        """Limit what enters an activation."""
        if self.layer.clip is None:
            return value
        bound = tirx.const(self.layer.clip, self.layer.compute)
        return tirx.max(tirx.min(value, bound), tirx.const(-self.layer.clip, self.layer.compute))


def _rnn(part: _Part, j: Any) -> None:
    (f,) = part.activations
    part.set_h(j, f(part.clip(part.gate(0, j))))


def _lstm(part: _Part, j: Any) -> None:
    """Gates i, o, f, c; the output gate sees the new cell state through its peephole."""
    f, g, last = part.activations
    sums, c = part.steps.sums, part.steps.second
    enter, forget, cell = part.sums(0, j), part.sums(2, j), part.second(j)

    def gate(number: int, peephole: int | None = None) -> Any:
        value = part.gate(number, j)
        if peephole is not None and "peephole" in part.layer.operands:
            place = (part.direction, peephole * part.layer.hidden + j)
            value = value + part.steps.read("peephole", place) * c[cell]
        return part.clip(value)

    sums[enter] = f(gate(0, peephole=0))
    one = tirx.const(1, part.layer.compute)
    sums[forget] = one - sums[enter] if part.layer.coupled else f(gate(2, peephole=2))
    c[cell] = sums[forget] * c[cell] + sums[enter] * g(gate(3))
    part.set_h(j, f(gate(1, peephole=1)) * last(c[cell]))


def _gru(part: _Part, j: Any) -> None:
    """Gates z, r, h; the reset gate acts on the state before its product with the weights of h, or on the product."""
    f, g = part.activations
    sums, second = part.steps.sums, part.steps.second
    update, reset = part.sums(0, j), part.second(j)
    if part.number == 0:
        sums[update] = f(part.clip(part.gate(0, j)))
        r = f(part.clip(part.gate(1, j)))
        if not part.layer.linear:
            second[reset] = r * part.h(j)
            return
        second[reset] = r * (sums[part.sums(2, j)] + part.recurrent_bias(2, j))
        value = part.inputs(2, j) + second[reset]
    else:
        value = part.gate(2, j)
    one = tirx.const(1, part.layer.compute)
    part.set_h(j, (one - sums[update]) * g(part.clip(value)) + sums[update] * part.h(j))
