"""What the expansions of com.microsoft work with: a node, its inputs and attributes read with care, and new nodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from optc.errors import InvalidModelError
from optc.frontend.names import Names
from optc.frontend.upgrade import AttributeValue, Edit, Refused
from optc.ir import provenance

Dim = int | oir.SymbolicDim


class Unsettled(Refused):
    """A shape or a type decides how the node is expanded, and is not known yet."""


class ContribEdit(Edit):
    """An edit of a node of com.microsoft.

    What the file says of shapes between nodes may be stale: before ``inferred`` only those of inputs and constants
    are believed.
    """

    def __init__(self, model: oir.Model, node: oir.Node, values: Names, nodes: Names, *, inferred: bool) -> None:
        super().__init__(model, node, values, nodes)
        self._inferred = inferred

    def optional(self, index: int) -> oir.Value | None:
        """Return an input, None for an absent one."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def refuse_inputs(self, **names: int) -> None:
        """Refuse a node that has one of the inputs, given by name and index.

        Raises:
            Refused: names the first of them.
        """
        for name, index in names.items():
            if self.optional(index) is not None:
                raise Refused(f"{name} is not supported")

    def refuse_attributes(self, **defaults: int) -> None:
        """Refuse a node one of whose integer attributes is not what it should be.

        Raises:
            Refused: names the first of them.
        """
        for name, default in defaults.items():
            if self.integer(name, default) != default:
                raise Refused(f"{name}={self.integer(name, default)} is not supported")

    def wants(self, index: int) -> bool:
        """Tell whether anybody reads an output."""
        if index >= len(self.node.outputs):
            return False
        value = self.node.outputs[index]
        return bool(value.uses()) or value.is_graph_output()

    def dims(self, value: oir.Value | None) -> list[Dim]:
        """Return the shape of a required input.

        Raises:
            Unsettled: it is not known (yet).
        """
        assert value is not None
        told = self._inferred or value.is_initializer() or value.is_graph_input()
        if value.shape is None or not told:
            raise Unsettled(f"the shape of {value.name} is not known")
        return list(value.shape)

    def size(self, value: oir.Value | None, axis: int) -> int:
        """Return a size that decides how a node is expanded.

        Raises:
            Refused: the size is not known while compiling.
            Unsettled: the shape is not known (yet).
        """
        size = self.dims(value)[axis]
        if not isinstance(size, int):
            raise Refused(f"dimension {axis} of {value.name if value is not None else ''} is not known: {size}")
        return size

    def settled(self, value: oir.Value) -> oir.DataType:
        """Return the element type of a value.

        Raises:
            Unsettled: it is not known (yet).
        """
        if value.dtype is None:
            raise Unsettled(f"the type of {value.name} is not known")
        return value.dtype

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer attribute.

        Raises:
            InvalidModelError: it has another type, or is missing and has no default.
        """
        attribute = self._attribute(name, oir.AttributeType.INT, "integer", missing=default is None)
        return attribute.as_int() if attribute is not None else default or 0

    def real(self, name: str, default: float) -> float:
        """Return an attribute that is a number.

        Raises:
            InvalidModelError: it has another type.
        """
        attribute = self._attribute(name, oir.AttributeType.FLOAT, "number")
        return attribute.as_float() if attribute is not None else default

    def text(self, name: str, default: str) -> str:
        """Return an attribute that is text.

        Raises:
            InvalidModelError: it has another type.
        """
        attribute = self._attribute(name, oir.AttributeType.STRING, "text")
        return attribute.as_string() if attribute is not None else default

    def _attribute(self, name: str, kind: oir.AttributeType, what: str, *, missing: bool = False) -> oir.Attr | None:
        attribute = self.node.attributes.get(name)
        if attribute is None:
            if missing:
                raise self.invalid(f"attribute '{name}' is missing")
            return None
        if attribute.type != kind:
            raise self.invalid(f"attribute '{name}' is no {what}")
        return attribute

    def kept(self, *names: str) -> dict[str, AttributeValue]:
        """Return those of the attributes that are given, to be those of another node."""
        return {name: self.node.attributes[name].value for name in names if name in self.node.attributes}

    def array(self, index: int, name: str) -> np.ndarray:
        """Return a constant input.

        Raises:
            InvalidModelError: it is missing.
            Refused: it is not constant.
        """
        value = self.optional(index)
        if value is None:
            raise self.invalid(f"input {name} is missing")
        array = constant(value)
        if array is None:
            raise Refused(f"{name} is not constant")
        return array

    def invalid(self, reason: str) -> InvalidModelError:
        """Return an error about the node."""
        return InvalidModelError(f"{provenance.describe(self.node)}: {reason}")

    def scalar(self, number: float, like: oir.Value) -> oir.Value:
        """Add a scalar of the type of ``like``.

        Raises:
            Unsettled: the type is not known (yet).
        """
        return self.constant(np.asarray(number).astype(self.settled(like).numpy()), "scalar")

    def plus(self, value: oir.Value, *others: oir.Value | None) -> oir.Value:
        """Return the sum of ``value`` and of those of the others that are given."""
        for other in others:
            value = value if other is None else self.op("Add", value, other)
        return value

    def length(self, value: oir.Value, axis: int) -> oir.Value:
        """Return a size as a vector of one int64."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def counted(self, length: oir.Value) -> oir.Value:
        """Return ``[0, 1, ..., length - 1]``; ``length`` is a vector of one int64."""
        zero, one = (self.constant(np.array(number, np.int64), "number") for number in (0, 1))
        return self.op("Range", zero, self.op("Squeeze", length), one)

    def split(self, value: oir.Value, sizes: Sequence[int], axis: int) -> Sequence[oir.Value]:
        """Cut ``value`` into pieces: a constant into constants."""
        array = constant(value)
        if array is None:
            return self.insert("Split", [value, self.ints(sizes, "sizes")], len(sizes), {"axis": axis})
        pieces = np.split(array, np.cumsum(sizes)[:-1], axis)
        return [self.constant(np.ascontiguousarray(piece), "piece") for piece in pieces]

    def finish(self, *values: oir.Value | None) -> None:
        """Put ``values`` in for the outputs.

        Raises:
            Refused: somebody reads an output that has no value.
        """
        given = [*values, *[None] * (len(self.node.outputs) - len(values))][: len(self.node.outputs)]
        for index, value in enumerate(given):
            if value is None and self.wants(index):
                raise Refused(f"output {index} is not supported")
        self.replace(*given)


def constant(value: oir.Value) -> np.ndarray | None:
    """Return what a constant holds; None for other values."""
    if not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    return value.const_value.numpy()
