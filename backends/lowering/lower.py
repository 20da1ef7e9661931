"""Lowers a canonical model to one Relax function, node by node, in topological order.

Integers that describe shapes never become tensors if they can be helped: a value whose elements are known, as
numbers or as expressions of symbolic dimensions, is kept as a NumPy object array in ``integers`` and evaluated
symbolically (``shape_values.py``); a kernel is emitted for it only when some node wants it as a tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as oir
import tvm
from tvm import relax, te, tirx

from optc.backends.base import Target
from optc.backends.kernels.decisions import Tuning
from optc.backends.lowering import branches, layout, shape_values
from optc.backends.lowering import emit as emission
from optc.backends.lowering.known import TABLES, Dequantized, Known
from optc.backends.lowering.site import Impossible, Poisoned, Unsupported
from optc.backends.lowering.table import Lower, outputs
from optc.errors import UnsupportedModelError
from optc.ir import provenance

INLINE_CONSTANT_BYTES = 64
"""Constants up to this size live in the code (so that kernels can be specialized); larger ones are weights."""

_LOWEST, _LARGEST = -(2**40), 2**40
"""No size or position of a legal model is outside of these."""

_DTYPES = {
    oir.DataType.FLOAT: "float32",
    oir.DataType.DOUBLE: "float64",
    oir.DataType.FLOAT16: "float16",
    oir.DataType.BFLOAT16: "bfloat16",
    oir.DataType.INT8: "int8",
    oir.DataType.INT16: "int16",
    oir.DataType.INT32: "int32",
    oir.DataType.INT64: "int64",
    oir.DataType.UINT8: "uint8",
    oir.DataType.UINT16: "uint16",
    oir.DataType.UINT32: "uint32",
    oir.DataType.UINT64: "uint64",
    oir.DataType.BOOL: "bool",
}

_Table = Mapping[tuple[str, str], Lower]


@dataclass
class Lowered:
    """A Relax module with function ``main(inputs..., weights...)`` returning a tuple of the outputs."""

    module: Any
    weights: dict[str, np.ndarray]
    input_names: list[str]
    output_names: list[str]
    kernels: dict[str, list[str]] = field(default_factory=dict)
    """IR node names by the hint their kernels were emitted under."""


def lower(
    model: oir.Model, table: _Table, target: Target, without: Collection[str] = (), tuning: Tuning | None = None
) -> Lowered:
    """Lower ``model``; raises UnsupportedModelError naming every node that cannot be lowered, and why.

    Weights are packed as the kernels of ``target`` read them. ``without`` names algorithms to leave out, and
    ``tuning`` may know better layouts of operands than the analytic ones.
    """
    return Lowerer(model, table, target, without, tuning).run()


class Lowerer:
    """The state of one lowering: builder, lowered values, known integers, weights, symbolic dimensions."""

    def __init__(
        self, model: oir.Model, table: _Table, target: Target, without: Collection[str], tuning: Tuning | None
    ) -> None:
        self.model = model
        self.table = table
        self.target = target
        self.without = frozenset(without)
        self.tuning = tuning
        self.builder = relax.BlockBuilder()
        self.tensors: dict[oir.Value, Any] = {}
        self.channels_last: dict[oir.Value, Any] = {}
        self.integers: dict[oir.Value, np.ndarray] = {}
        self.constants: dict[oir.Value, np.ndarray] = {}
        self.sequences: dict[oir.Value, tuple[Known, ...]] = {}
        self.dequantized: dict[oir.Value, Dequantized] = {}
        self.weight_vars: dict[str, Any] = {}
        self.weights: dict[str, np.ndarray] = {}
        self.symbols: dict[Any, None] = {}
        self.dims: dict[str, Any] = {}
        self.refused: dict[str, bool] = {}
        """Why nodes cannot be lowered; True for those that no run can reach, which a branch may hold."""
        self.poisoned: set[oir.Value] = set()
        self.made_last: set[oir.Value] = set()
        """Values with a channels-last form that was made from the other one."""
        self.read: set[Any] = set()
        self.fork_depth = 0
        self.analyzer = tvm.sym.Analyzer()

    def run(self) -> Lowered:
        """Lower the whole model."""
        graph = self.model.graph
        inputs = [self._input(value) for value in graph.inputs if self._fits(value, "input")]
        for value in graph.outputs:
            self._fits(value, "output")
        if self.refused:
            raise self._error()
        with self.builder.function("main", pure=False):
            self.graph(graph)
            if self.refused:
                self.builder.emit_func_output(relax.Tuple([]), params=[])
                raise self._error()
            results = relax.Tuple([self.tensor(value) for value in graph.outputs])
            output = self.builder.emit(results)
            self.builder.emit_func_output(output, params=[*inputs, *self.weight_vars.values()])
        return Lowered(
            self.builder.get(),
            self.weights,
            [str(v.name) for v in graph.inputs],
            [str(v.name) for v in graph.outputs],
        )

    def graph(self, graph: oir.Graph) -> None:
        """Lower the nodes of a graph or subgraph into the current block."""
        self.work(graph, graph.outputs)

    def work(self, items: Iterable[oir.Node | Callable[[], None]], results: Sequence[oir.Value]) -> None:
        """Lower nodes, and run what is no node, in order, until all ``results`` are known."""
        rest = deque(items)
        while rest:
            item = rest.popleft()
            if not isinstance(item, oir.Node):
                item()
                continue
            try:
                self._node(item)
            except branches.Inline as inline:
                rest.extendleft(reversed(inline.items(self)))
            except branches.Fork as fork:
                fork.lower(self, rest, results)
                return

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is lowered inside is unknown outside, where it may never run; so are shapes learned inside."""
        saved = {name: dict(getattr(self, name)) for name in TABLES}
        try:
            yield
        finally:
            for name, entries in saved.items():
                setattr(self, name, entries)

    def subgraph(self, graph: oir.Graph) -> list[Any]:
        """Lower a subgraph into the current block; returns its outputs."""
        self.graph(graph)
        return [self.tensor(value) for value in graph.outputs]

    def known(self, value: oir.Value) -> Known:
        """Return what is known about a value, to hand it to another one."""
        if value in self.sequences:
            return Known(sequence=self.sequences[value])
        if value in self.integers:
            return Known(self.tensors.get(value), integers=self.integers[value])
        if self.is_last(value):
            return Known(last=self.channels_last[value])
        array = self.constant(value)
        return Known(self.tensor(value), constant=array)

    def bind_tensor(self, value: oir.Value, tensor: Any) -> None:
        """Let ``value`` be ``tensor``."""
        self.define(value, Known(tensor))

    def define(self, value: oir.Value, known: Known) -> None:
        """Let ``value`` be what is ``known``."""
        self.made_last.discard(value)
        for name, field_name in TABLES.items():
            table, entry = getattr(self, name), getattr(known, field_name)
            table.pop(value, None)
            if entry is not None:
                table[value] = entry

    def _node(self, node: oir.Node) -> None:
        if any(value in self.poisoned for value in node.inputs if value is not None):
            self.poisoned.update(node.outputs)
            return
        try:
            known = shape_values.evaluate(node, self)
            if known is not None:
                self.integers[node.outputs[0]] = known
                return
            function = self.table.get((node.domain, node.op_type))
            if function is None:
                raise Unsupported("the operator is not supported")
            site = layout.site_for(self, node)
            results = outputs(function(site))
        except Poisoned:
            self.poisoned.update(node.outputs)
            return
        except Unsupported as refusal:
            self.refuse(node, refusal)
            return
        for value, result in zip(node.outputs, results, strict=False):
            if isinstance(result, Known):
                self.define(value, result)
            elif result is not None:
                self.define(value, Known(last=result) if isinstance(site, layout.LastSite) else Known(result))

    def refuse(self, node: oir.Node, refusal: Unsupported) -> None:
        """Note why ``node`` cannot be lowered; what depends on it is not looked at."""
        self.refused.setdefault(f"{provenance.describe(node)}: {refusal}", isinstance(refusal, Impossible))
        self.poisoned.update(node.outputs)

    def _error(self) -> UnsupportedModelError:
        listing = "\n".join(f"  - {line}" for line in self.refused)
        return UnsupportedModelError(
            f"{len(self.refused)} node(s) cannot be compiled:\n{listing}",
            hint="`optc check MODEL` lists everything unsupported without compiling",
        )

    def _fits(self, value: oir.Value, role: str) -> bool:
        """Tell whether ``value`` can cross the border of the model; refuse it otherwise."""
        dense = isinstance(value.type, oir.TensorType) and value.dtype in _DTYPES
        if not dense or (role == "input" and value.shape is None):
            line = f"{role} '{value.name}': type {value.type}, shape {value.shape} cannot be an {role}"
            self.refused[line] = False
            return False
        return True

    def _input(self, value: oir.Value) -> Any:
        assert value.shape is not None
        dims = [emission.as_index(d if isinstance(d, int) else self.dim(str(d.value))) for d in value.shape]
        var = relax.Var(emission.identifier(value.name), relax.TensorType(dims, self.dtype(value)))
        self.tensors[value] = var
        return var

    def dim(self, name: str) -> Any:
        """Return the symbolic dimension called ``name``."""
        if name not in self.dims:
            self.dims[name] = self.symbol(name)
        return self.dims[name]

    def symbol(self, hint: str, *, size: bool = True) -> Any:
        """Return a fresh symbolic dimension (known to be >= 0), or any integer if not a ``size``."""
        taken = {str(v.name) for v in self.symbols}
        stem = emission.identifier(hint)
        name, count = stem, 0
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        var = tirx.Var(name, "int64")
        self.symbols[var] = None
        self.analyzer.update(var, tvm.sym.ConstIntBound(0 if size else _LOWEST, _LARGEST))
        return var

    def dtype(self, value: oir.Value) -> str:
        """Return TVM's name of the element type of ``value``; refuses types that kernels do not have."""
        name = _DTYPES.get(value.dtype) if value.dtype is not None else None
        if name is None:
            raise Unsupported(f"values of type {value.type} are not supported (value '{value.name}')")
        return name

    def constant(self, value: oir.Value) -> np.ndarray | None:
        """Return the array of an initializer, a dequantized one, or known integers without symbols, else None."""
        if value.is_initializer() and value.const_value is not None:
            return value.const_value.numpy()
        if value in self.constants:
            return self.constants[value]
        if value in self.dequantized:
            return self.dequantized[value].dense
        known = self.integers.get(value)
        numbers = None if known is None else [shape_values.number(v) for v in known.flat]
        if known is None or numbers is None or None in numbers:
            return None
        return np.array(numbers, self.dtype(value)).reshape(known.shape)

    def tensor(self, value: oir.Value) -> Any:
        """Return ``value`` as a Relax tensor, emitting what is needed to make it one."""
        found = self.tensors.get(value)
        if found is not None:
            return found
        if value in self.channels_last:
            last = self.channels_last[value]
            self.tensors[value] = self.transpose(last, layout.channels_first(len(emission.shape_of(last))))
        elif value in self.integers:
            array = self.constant(value)
            made = self.materialize(self.integers[value], self.dtype(value)) if array is None else None
            self.tensors[value] = made if made is not None else self._inline_or_weight(array, value)
        elif value in self.dequantized:
            return self.dequantized[value].make()
        elif (array := self.constant(value)) is not None:
            self.dtype(value)
            self.tensors[value] = self._inline_or_weight(array, value)
        elif value in self.poisoned:
            raise Poisoned
        else:
            raise Unsupported(f"value '{value.name}' of type {value.type} is no tensor that is known here")
        return self.tensors[value]

    def is_last(self, value: oir.Value) -> bool:
        """Tell whether ``value`` was computed channels-last."""
        return value in self.channels_last and value not in self.made_last

    def last(self, value: oir.Value) -> Any:
        """Return ``value [N, C, *S]`` as a Relax tensor ``[N, *S, C]``."""
        found = self.channels_last.get(value)
        if found is None:
            tensor = self.tensor(value)
            found = self.transpose(tensor, layout.channels_last(len(emission.shape_of(tensor))))
            self.channels_last[value] = found
            self.made_last.add(value)
        return found

    def shape(self, value: oir.Value) -> list[Any]:
        """Return the dimensions of ``value``: Python ints or symbolic expressions."""
        if value in self.integers:
            return list(self.integers[value].shape)
        if value in self.dequantized:
            return list(self.dequantized[value].values.shape)
        if value in self.channels_last:
            shape = emission.shape_of(self.channels_last[value])
            return layout.permuted(shape, layout.channels_first(len(shape)))
        return emission.shape_of(self.tensor(value))

    def rank(self, value: oir.Value) -> int | None:
        """Return the number of dimensions of ``value`` if it is a tensor that is known here."""
        if value in self.tensors:
            return len(emission.shape_of(self.tensors[value]))
        if value in self.channels_last:
            return len(emission.shape_of(self.channels_last[value]))
        if value in self.integers:
            return self.integers[value].ndim
        if value in self.dequantized:
            return self.dequantized[value].values.ndim
        array = self.constant(value)
        return None if array is None else array.ndim

    def transpose(self, tensor: Any, order: Sequence[int]) -> Any:
        """Return ``tensor`` with its axes in the given order: a view where no element moves."""
        shape = emission.shape_of(tensor)
        if list(order) == list(range(len(shape))):
            return tensor
        if layout.moves_nothing(shape, order):
            return self.reshape(tensor, layout.permuted(shape, order))
        inverse = [list(order).index(axis) for axis in range(len(order))]

        def compute(a: Any) -> Any:
            return te.compute([a.shape[p] for p in order], lambda *i: a(*[i[p] for p in inverse]), "transpose")

        return emission.emit(self.builder, compute, [tensor], "transpose", self.symbols)

    def _inline_or_weight(self, array: Any, value: oir.Value) -> Any:
        if array.nbytes <= INLINE_CONSTANT_BYTES and array.dtype.kind in "fiub" and array.size:
            return relax.const(np.ascontiguousarray(array).reshape(array.shape), self.dtype(value))
        return self.weight(array, str(value.name))

    def weight(self, array: np.ndarray, name: str) -> Any:
        """Return a parameter of ``main`` that the artifact binds to ``array``."""
        stem, count = name, 0
        while name in self.weights:
            known = self.weights[name]
            if known is array or (known.dtype == array.dtype and np.array_equal(known, array)):
                return self.weight_vars[name]
            count += 1
            name = f"{stem}.{count}"
        self.weights[name] = array
        dtype = array.dtype.name
        self.weight_vars[name] = relax.Var(emission.identifier(name), relax.TensorType(array.shape, dtype))
        return self.weight_vars[name]

    def materialize(self, known: np.ndarray, dtype: str) -> Any:
        """Return an array of ints and expressions as a tensor, computed by a kernel."""
        flat = [
            v.expression(dtype) if isinstance(v, shape_values.Ratio) else emission.as_index(v)
            for v in known.reshape(-1)
        ]

        def compute() -> Any:
            def element(*index: Any) -> Any:
                position: Any = tirx.IntImm("int64", 0)
                for i, extent in zip(index, known.shape, strict=True):
                    position = position * extent + i
                result = flat[-1]
                for k in range(len(flat) - 2, -1, -1):
                    result = tirx.Select(position == k, flat[k], result)
                return result.astype(dtype)

            return te.compute(known.shape, element, "shape_values")

        return emission.emit(self.builder, compute, [], "shape_values", self.symbols)

    def elements(self, value: oir.Value) -> np.ndarray:
        """Return the elements of an integer tensor as an object array of ints and expressions."""
        if value in self.integers:
            return self.integers[value]
        array = self.constant(value)
        if array is None:
            tensor = self.tensor(value)
            shape = emission.shape_of(tensor)
            if len(shape) == 1 and not isinstance(shape[0], int) and self.always(shape[0] <= 1):
                # No element is what a position outside of a tensor gives: the run stops there.
                shape, whole = [1], self.reshape(tensor, shape)
                tensor = self.builder.match_cast(whole, relax.TensorType(shape, tensor.ty.dtype))
            if len(shape) > 1 or any(not isinstance(d, int) for d in shape):
                raise Unsupported(f"the length of '{value.name}' must be known while compiling")
            if not shape:
                tensor = self.reshape(tensor, [1])
            known = np.array(self.bind_shape(tensor, str(value.name), size=False), dtype=object)
            self.read.update(known)
            self.integers[value] = known.reshape(shape)
        else:
            self.integers[value] = np.array([int(v) for v in array.reshape(-1)], dtype=object).reshape(array.shape)
        return self.integers[value]

    def bind_shape(self, tensor: Any, hint: str, *, size: bool = True) -> list[Any]:
        """Read a 1-D integer tensor of known length at run time into fresh symbols (``symbol``)."""
        (length,) = emission.shape_of(tensor)
        if not length:
            return []
        if str(tensor.ty.dtype) != "int64":

            def widen(a: Any) -> Any:
                return te.compute(a.shape, lambda i: a[i].astype("int64"), "widen")

            tensor = emission.emit(self.builder, widen, [tensor], "cast", self.symbols)
        # Called as an impure function because it has to be a barrier: FuseOps orders the kernels of a dataflow block
        # by the tensors that they read, and may put one above the binding of a symbol that it needs.
        read = relax.ExternFunc("vm.builtin.tensor_to_shape")
        shape = self.builder.emit(relax.Call(read, [tensor], ty_args=[relax.ShapeType(ndim=length)]))
        symbols = [self.symbol(hint, size=size) for _ in range(length)]
        self.builder.match_cast(shape, relax.ShapeType(symbols))
        return symbols

    def reshape(self, tensor: Any, shape: Sequence[Any]) -> Any:
        """Return a view of ``tensor`` with another shape."""
        dims = [emission.as_index(d) for d in shape]
        if any(isinstance(d, int) and d == 0 for d in shape):
            # Relax takes the number 0 for "as before".
            zero = tirx.const(0, tensor.ty.dtype)
            return emission.emit(
                self.builder, lambda: te.compute(dims, lambda *_: zero, "empty"), [], "empty", self.symbols
            )
        return self.builder.emit(relax.op.reshape(tensor, dims))

    def is_read(self, value: Any) -> bool:
        """Tell whether ``value`` involves an element read at run time by ``elements``."""
        return not self.read.isdisjoint(self.free(value))

    def free(self, value: Any) -> set[Any]:
        """Return the symbols in a dimension."""
        return set() if isinstance(value, int) else set(tirx.analysis.undefined_vars(value))

    def settle(self, dims: Sequence[Any]) -> list[Any]:
        """Bind every expression of elements read at run time to a fresh symbol; other dimensions stay."""
        dims = [self.simplify(d) for d in dims]
        loose = [i for i, d in enumerate(dims) if self.is_read(d) and not isinstance(d, tvm.ir.Var)]
        if loose:
            # A kernel computes them: in its own expressions Relax assumes that every symbol is a size, thus >= 0.
            values = np.array([dims[i] for i in loose], dtype=object)
            for i, symbol in zip(loose, self.bind_shape(self.materialize(values, "int64"), "n"), strict=True):
                most = self.analyzer.const_int_bound(emission.as_index(dims[i])).max_value
                self.analyzer.update(symbol, tvm.sym.ConstIntBound(0, min(most, _LARGEST)), override=True)
                dims[i] = symbol
        return dims

    def nonnegative(self, value: Any) -> bool:
        """Tell whether ``value`` is at least 0 for every legal size."""
        if isinstance(value, int):
            return value >= 0
        return bool(self.analyzer.can_prove(value >= 0))

    def always(self, condition: Any) -> bool:
        """Tell whether a condition holds for every legal size."""
        return bool(self.analyzer.can_prove(condition))

    def implies(self, condition: Any, conclusion: Any) -> bool:
        """Tell whether ``conclusion`` holds for every legal size for which ``condition`` does."""
        with self.analyzer.constraint_scope(condition):
            return bool(self.analyzer.can_prove(conclusion))

    def simplify(self, value: Any) -> Any:
        """Return a simpler equal expression, an int where it is one."""
        return value if isinstance(value, int) else emission.plain(self.analyzer.simplify(value))

    def prove_equal(self, a: Any, b: Any) -> bool:
        """Tell whether two dimensions are equal for every legal size."""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return bool(self.analyzer.can_prove_equal(emission.as_index(a), emission.as_index(b)))
