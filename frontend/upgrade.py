"""Upgrade of the default domain from old opsets to the canonical opset, by a table of adapters.

An adapter is registered for an operator and the opset that changed it (``@until(13, "Squeeze")``): it
rewrites a node of an older version into nodes with the meaning of that opset. A node runs through its
adapters in ascending order. Operators without adapter kept their meaning: newer versions only added types or
attributes whose default is the old behaviour (checked against ``onnx.defs`` by the tests).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as oir

from optc.errors import UnsupportedModelError
from optc.frontend.names import Names
from optc.ir import provenance, schemas

AttributeValue = int | float | str | Sequence[int] | Sequence[float] | oir.Graph
Adapter = Callable[["Edit"], None]
_ADAPTERS: dict[str, list[tuple[int, Adapter]]] = {}
# Attributes of a deprecated operator stay what they were: its adapters apply at any version.
ALWAYS = 10_000


class Refused(Exception):  # noqa: N818 (control flow between an adapter and upgrade)
    """An adapter cannot express its node in the canonical opset; the text says why."""


def until(version: int, *op_types: str) -> Callable[[Adapter], Adapter]:
    """Register an adapter for nodes of ``op_types`` whose opset is older than ``version``."""

    def register(adapter: Adapter) -> Adapter:
        for op_type in op_types:
            _ADAPTERS.setdefault(op_type, []).append((version, adapter))
            _ADAPTERS[op_type].sort(key=lambda entry: entry[0])
        return adapter

    return register


def adapters(op_type: str, version: int) -> list[Adapter]:
    """Return what a node of opset ``version`` runs through, in order."""
    return [adapter for limit, adapter in _ADAPTERS.get(op_type, ()) if version < limit]


class Edit:
    """What an adapter works with: its node, and ways to change the graph around it."""

    def __init__(self, model: oir.Model, node: oir.Node, values: Names, nodes: Names) -> None:
        assert node.graph is not None
        assert node.version is not None
        self.node = node
        self.graph = node.graph
        self.version = node.version
        self._root = model.graph
        self._values = values
        self._nodes = nodes

    def value_name(self, hint: str) -> str:
        """Return an unused name for a value."""
        return self._values.fresh(f"{self.node.name}_{hint}")

    def node_name(self, op_type: str) -> str:
        """Return an unused name for a node."""
        return self._nodes.fresh(f"{self.node.name}/{op_type}")

    def input(self, index: int) -> oir.Value:
        """Return a required input."""
        value = self.node.inputs[index]
        assert value is not None
        return value

    def rank(self, index: int) -> int:
        """Return the rank of a required input."""
        shape = self.input(index).shape
        if shape is None:
            raise Refused(f"the rank of input {index} is not known")
        return len(shape)

    def take(self, name: str) -> oir.Attr | None:
        """Remove an attribute and return it, or None if the node has none of that name."""
        return self.node.attributes.pop(name, None)

    def take_ints(self, name: str) -> list[int] | None:
        """Remove an attribute that is a list of integers and return it."""
        attribute = self.take(name)
        return None if attribute is None else list(attribute.as_ints())

    def set(self, name: str, value: AttributeValue) -> None:
        """Set an attribute."""
        self.node.attributes[name] = oir.convenience.convert_attribute(name, value)

    def set_inputs(self, *values: oir.Value | None) -> None:
        """Replace all inputs of the node; missing ones at the end are left out."""
        while values and values[-1] is None:
            values = values[:-1]
        self.node.resize_inputs(len(values))
        for index, value in enumerate(values):
            self.node.replace_input_with(index, value)

    def constant(self, array: np.ndarray, hint: str) -> oir.Value:
        """Add an initializer to the outermost graph."""
        tensor = oir.tensor(array)
        value = oir.Value(
            name=self.value_name(hint),
            shape=oir.Shape(array.shape),
            type=oir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._root.initializers.add(value)
        return value

    def ints(self, numbers: Sequence[int], hint: str) -> oir.Value:
        """Add a vector of int64."""
        return self.constant(np.asarray(numbers, np.int64).reshape(-1), hint)

    def scalar_like(self, number: float, like: oir.Value, hint: str) -> oir.Value:
        """Add a scalar of the type of ``like``, by a CastLike node where that is not known yet."""
        if like.dtype is not None:
            return self.constant(np.asarray(number).astype(like.dtype.numpy()), hint)
        return self.op("CastLike", self.constant(np.asarray(number, np.float32), hint), like)

    def op(self, op_type: str, *inputs: oir.Value | None, **attributes: AttributeValue) -> oir.Value:
        """Insert a node with one output before the node that is upgraded."""
        return self.insert(op_type, inputs, 1, attributes)[0]

    def insert(
        self,
        op_type: str,
        inputs: Sequence[oir.Value | None],
        outputs: int,
        attributes: dict[str, AttributeValue],
    ) -> Sequence[oir.Value]:
        """Insert a node with any number of outputs before the node that is upgraded."""
        node = oir.node(op_type, list(inputs), attributes=dict(attributes), num_outputs=outputs)
        node.name = self.node_name(op_type)
        for value in node.outputs:
            value.name = self._values.fresh(f"{node.name}_output")
        provenance.inherit(node, [self.node], made_by="opset upgrade")
        self.graph.insert_before(self.node, node)
        return node.outputs

    def replace(self, *values: oir.Value | None) -> None:
        """Let ``values``, which this adapter made, take over the outputs of the node, and remove the node.

        None stands for an output that nobody reads.
        """
        for old, new in zip(self.node.outputs, values, strict=True):
            if new is None:
                continue
            new.shape, new.type = old.shape, old.type
            new.name, old.name = old.name, new.name
            oir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)


def upgrade(model: oir.Model, target: int, values: Names, nodes: Names) -> None:
    """Bring every node of the default domain to opset ``target``, in place.

    Each such node states its opset in ``node.version``; names are unique, functions inlined.

    Raises:
        UnsupportedModelError: names every node that has no equivalent in the canonical opset.
    """
    refused = []
    for node in list(model.graph.all_nodes()):
        if node.domain != "" or node.version is None:
            continue
        try:
            for adapter in adapters(node.op_type, node.version):
                adapter(Edit(model, node, values, nodes))
                if node.graph is None:
                    break
        except Refused as reason:
            refused.append(f"{provenance.describe(node)} of opset {node.version}: {reason}")
            continue
        found = schemas.find("", node.op_type, target) if node.graph is not None else None
        if found is not None and found.deprecated:
            refused.append(f"{provenance.describe(node)}: the operator is deprecated without an equivalent")
        node.version = None
    if refused:
        raise UnsupportedModelError(
            f"nodes that cannot be brought to opset {target}:\n  " + "\n  ".join(refused),
            hint="export the model again with a newer opset",
        )
    model.opset_imports[""] = target
