"""Inserts nodes and constants into the outermost graph of a canonical model, so that it stays canonical."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from optc.ir import provenance, schemas
from optc.passes.rewrite import Namer, is_unused_initializer


class Edit:
    """The graph of a model, and names that are free in it. ``made_by`` is the pass, for the provenance."""

    def __init__(self, model: oir.Model, made_by: str) -> None:
        self.graph, self.namer, self.made_by = model.graph, Namer(model), made_by

    def node(
        self,
        op: str,
        inputs: Sequence[oir.Value | None],
        like: oir.Value,
        *,
        before: oir.Node | None = None,
        dtype: oir.DataType | None = None,
        outputs: int = 1,
        **attributes: int,
    ) -> oir.Value:
        """Insert a node and return its first output, which has the shape of ``like``, and its type unless given.

        It stands before ``before``, else behind the node that makes ``like``, else first.
        """
        node = oir.node(op, list(inputs), attributes, name=self.namer.fresh(f"{like.name}/{op}"), num_outputs=outputs)
        schemas.state_defaults(node, self.graph.opset_imports[""])
        for output in node.outputs:
            output.name = self.namer.fresh(f"{like.name}.{op}")
        first, maker = node.outputs[0], like.producer()
        first.shape, first.type = like.shape, like.type if dtype is None else oir.TensorType(dtype)
        near = before or maker
        provenance.inherit(node, [near] if near is not None else [], made_by=self.made_by)
        if before is not None:
            self.graph.insert_before(before, [node])
        elif maker is not None:
            self.graph.insert_after(maker, [node])
        else:
            self.graph.insert_before(self.graph[0], [node])
        return first

    def constant(self, array: np.ndarray, name: str) -> oir.Value:
        """Return a new initializer."""
        tensor = oir.tensor(np.ascontiguousarray(array).reshape(array.shape))
        value = oir.Value(
            name=self.namer.fresh(name),
            shape=oir.Shape(array.shape),
            type=oir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.initializers.add(value)
        return value

    def discard(self, value: oir.Value | None) -> None:
        """Remove an initializer that nothing reads any more."""
        if value is not None and is_unused_initializer(value):
            self.graph.initializers.pop(str(value.name))
