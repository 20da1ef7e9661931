"""The cost model: operations and bytes per node, in closed form over symbolic dimensions, and peak memory.

Bytes are what a node must move when nothing stays in a cache: each operand once. Views (Reshape, Squeeze, ...) move
nothing, Gather and Slice read as much as they write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as oir

from optc.errors import IRError
from optc.ir import dims, operations
from optc.ir.graph import reads
from optc.ir.sizes import evaluate, total, value_bytes

if TYPE_CHECKING:
    from optc.ir.sizes import Amount

__all__ = ["NodeCost", "estimate", "evaluate", "peak_activation_bytes", "totals"]

_AMOUNTS = ("flops", "bytes_read", "bytes_written", "parameter_bytes", "activation_bytes")


@dataclass(frozen=True)
class NodeCost:
    """What a node costs: ints, sympy expressions over the dimensions, or None where shapes are unknown.

    ``parameter_bytes`` are the initializers that it reads, ``activation_bytes`` the memory its outputs need.
    """

    name: str
    op: str
    flops: Amount
    bytes_read: Amount
    bytes_written: Amount
    parameter_bytes: Amount
    activation_bytes: Amount

    def at(self, sizes: Mapping[str, int]) -> NodeCost:
        """Return the cost for given dimensions. Raises IRError naming a dimension that ``sizes`` lacks."""
        return NodeCost(self.name, self.op, *(evaluate(getattr(self, a), sizes) for a in _AMOUNTS))


def estimate(model: oir.Model) -> list[NodeCost]:
    """Return the cost of each node of the outermost graph, in order; a control-flow node costs what its bodies do."""
    return [_node(node) for node in model.graph]


def totals(costs: Iterable[NodeCost]) -> NodeCost:
    """Return the sum of costs, as the cost of a node named ``total``; None where one node is unknown.

    An initializer that several nodes read counts once per reader.
    """
    costs = list(costs)
    return NodeCost("total", "", *(total(getattr(cost, a) for cost in costs) for a in _AMOUNTS))


def _node(node: oir.Node) -> NodeCost:
    parameters = total(value_bytes(v) for v in dict.fromkeys(reads(node)) if v.is_initializer())
    outputs = total(value_bytes(v) for v in node.outputs if v.name)
    view = node.op_type in operations.VIEWS and node.domain == ""
    bodies = dims.subgraphs(node)
    if bodies:
        flops, read, written = _control_flow(node, bodies)
    else:
        flops, read, written = operations.count(node), _bytes_read(node), 0 if view else outputs
    return NodeCost(
        name=node.name or "",
        op=node.op_type,
        flops=flops,
        bytes_read=0 if view else read,
        bytes_written=written,
        parameter_bytes=parameters,
        activation_bytes=0 if view else outputs,
    )


def _bytes_read(node: oir.Node) -> Amount:
    if node.op_type in ("Shape", "Size"):
        return 0
    if node.op_type in ("Gather", "GatherElements", "GatherND", "Slice"):
        return total([value_bytes(node.outputs[0]), *(value_bytes(v) for v in node.inputs[1:])])
    return total(value_bytes(v) for v in dict.fromkeys(node.inputs))


def _control_flow(node: oir.Node, bodies: list[oir.Graph]) -> tuple[Amount, Amount, Amount]:
    """If costs its dearer branch, Loop and Scan their body times the trips (unknown where data decides)."""
    per_body = [totals(map(_node, body)) for body in bodies]
    columns = [[getattr(cost, amount) for cost in per_body] for amount in ("flops", "bytes_read", "bytes_written")]
    if node.op_type == "If":
        flops, read, written = map(_largest, columns)
        return flops, read, written
    trips = _trips(node)
    flops, read, written = (None if trips is None or column[0] is None else trips * column[0] for column in columns)
    return flops, read, written


def _largest(amounts: list[Amount]) -> Amount:
    known = [a for a in amounts if a is not None]
    if len(known) < len(amounts):
        return None
    if all(isinstance(a, int) for a in known):
        return max(known)
    import sympy

    return sympy.Max(*known)


def _trips(node: oir.Node) -> Amount:
    if node.op_type == "Scan":
        scanned = node.attributes["num_scan_inputs"].as_int()
        axes = node.attributes.get("scan_input_axes")
        axis = axes.as_ints()[0] if axes is not None and axes.as_ints() else 0
        sequence = node.inputs[len(node.inputs) - scanned]
        if sequence is None or sequence.shape is None:
            return None
        size = sequence.shape[axis]
        return size if isinstance(size, int) else dims.to_expr(size)
    limit = oir.convenience.get_const_tensor(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    return int(limit.numpy().reshape(())) if node.op_type == "Loop" and limit is not None else None


def peak_activation_bytes(model: oir.Model, sizes: Mapping[str, int] | None = None) -> int:
    """Return the most bytes that inputs, intermediate values and outputs take at any moment of one run.

    Nodes run in graph order, a value lives until its last reader has run, graph inputs and outputs included; views
    share the memory of what they view. A control-flow node adds the larger peak of its bodies.

    Raises IRError for a value whose size is unknown, or for a dimension that ``sizes`` lacks.
    """
    return _peak(model.graph, sizes or {}, count_inputs=True)


def _peak(graph: oir.Graph, sizes: Mapping[str, int], *, count_inputs: bool) -> int:
    nodes = list(graph)
    owner: dict[oir.Value, oir.Value] = {}
    for node in nodes:
        source = node.inputs[0] if node.inputs else None
        for value in node.outputs:
            is_view = node.domain == "" and node.op_type in operations.VIEWS and source is not None
            owner[value] = owner.get(source, source) if is_view and source is not None else value
    own = {*owner.values()} & {v for node in nodes for v in node.outputs} | set(graph.inputs)
    last: dict[oir.Value, int] = {}
    for index, node in enumerate(nodes):
        for value in (*reads(node), *node.outputs):
            last[owner.get(value, value)] = index
    for value in graph.outputs:
        last[owner.get(value, value)] = len(nodes)
    dying: dict[int, list[oir.Value]] = {}
    for value, index in last.items():
        dying.setdefault(index, []).append(value)

    def size(value: oir.Value) -> int:
        amount = evaluate(value_bytes(value), sizes)
        if amount is None:
            raise IRError(f"the size of value {value.name!r} is unknown", hint="its shape depends on data")
        return amount

    held = {v: size(v) for v in graph.inputs} if count_inputs else {}
    live = peak = sum(held.values())
    for index, node in enumerate(nodes):
        for value in node.outputs:
            if value in own and owner[value] is value and value.name:
                held[value] = size(value)
                live += held[value]
        inner = max((_peak(body, sizes, count_inputs=False) for body in dims.subgraphs(node)), default=0)
        peak = max(peak, live + inner)
        for value in dying.get(index, ()):
            live -= held.pop(value, 0)
    return peak
