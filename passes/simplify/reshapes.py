"""Chains of Reshape, Squeeze, Unsqueeze and Flatten: only the first input and the last shape matter."""

from __future__ import annotations

import onnx_ir as oir

from optc.passes.match import int_attribute, integers, producer, same_shape
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule
from optc.passes.simplify.shape_vector import shape_vector

_OPS = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


@rule("reshape(reshape(x)) => reshape(x)", *_OPS)
def chain(node: oir.Node, ops: Ops) -> Outcome:
    """Reshape at once, or not at all where the shape of the beginning comes back."""
    inner = producer(node.inputs[0], *_OPS)
    if inner is None or inner.inputs[0] is None:
        return None
    x, y = inner.inputs[0], node.outputs[0]
    if same_shape(x, y):
        return Rewrite([x])
    vector = shape_vector(x.shape, y.shape)
    if vector is not None:
        return Rewrite([ops("Reshape", x, ops.constant(vector, hint="shape"))])
    if node.op_type == "Reshape" and not int_attribute(node, "allowzero", 0):
        target = integers(node.inputs[1])
        # Without a copied size the vector does not refer to the input's shape.
        if target is not None and 0 not in target:
            return Rewrite([ops("Reshape", x, node.inputs[1])])
    return Miss("the shapes between cannot be written as one constant")


PASS = RewritePass("reshapes", [chain])
