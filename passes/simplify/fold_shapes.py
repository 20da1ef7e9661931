"""Shape arithmetic: what ``Shape -> Gather -> ... -> Concat`` chains compute is used where it is needed.

Known contents become constants. Operators that take a shape get a constant one where at most the sizes that they
can deduce themselves are symbolic (0 and -1 of Reshape, 1 of Expand, the open end of Slice). Of equal symbolic
contents that are still needed, the first is kept; a part of an input's shape is read off the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from optc.passes.base import Pass, PassResult
from optc.passes.rewrite import ANY, Miss, Ops, Outcome, Rewrite, RewritePass, rule
from optc.passes.simplify.contents import Contents, Element, dim_expr, same

_OPEN_END = np.iinfo(np.int64).max


class FoldShapes(Pass):
    """See the module. The contents of all values are evaluated once per call."""

    name = "fold-shapes"

    def call(self, model: oir.Model) -> PassResult:
        """Run on a canonical model whose shapes are inferred."""
        return RewritePass(self.name, _Rules(model).all()).call(model)


class _Rules:
    def __init__(self, model: oir.Model) -> None:
        self.model = model
        self.contents = Contents(model)
        self.first: dict[tuple[object, ...], oir.Value] = {}

    def all(self) -> list:  # type: ignore[type-arg]
        return [
            rule("shape arithmetic => constant", ANY)(self.constant),
            rule("reshape(x, dims) => reshape(x, constant)", "Reshape")(self.reshape),
            rule("expand(x, dims) => x or expand(x, constant)", "Expand")(self.expand),
            rule("slice(x, 0, dim) => slice(x, constant)", "Slice")(self.slice),
            rule("resize(x, sizes = k * dims) => resize(x, scales = k)", "Resize")(self.resize),
            rule("equal shape arithmetic => the first", ANY)(self.merge),
        ]

    def constant(self, node: oir.Node, ops: Ops) -> Outcome:
        """Replace a node whose outputs hold known integers or booleans."""
        arrays = []
        for value in node.outputs:
            array = self.contents.get(value)
            if array is None or value.dtype is None or not all(isinstance(e, int) for e in array.reshape(-1)):
                return None
            arrays.append(array.astype(value.dtype.numpy()))
        if node.op_type == "Identity":
            return None
        return Rewrite([ops.constant(array, hint="shape") for array in arrays])
