"""Constant folding: nodes whose inputs are all constant, and If with a constant condition.

Weights are folded too (a transposed or cast weight costs nothing at run time), under a size policy: the
result may have at most 1 MB, or twice the bytes of its inputs. Random operators, operators with subgraphs and
DequantizeLinear are never folded: the last would undo quantization.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant
from optc.passes.rewrite import ANY, Miss, Ops, Outcome, Rewrite, RewritePass, rule, subgraphs
from optc.passes.simplify import evaluate

MAX_BYTES = 1 << 20
MAX_GROWTH = 2

# Identity remains only where it names a graph output, and would be made anew.
_NEVER = frozenset(
    {
        "Identity",
        "Bernoulli",
        "Constant",
        "DequantizeLinear",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)


@rule("op(constants) => constant", ANY)
def fold(node: oir.Node, ops: Ops) -> Outcome:
    """Evaluate the node now."""
    if node.op_type in _NEVER or subgraphs(node):
        return None
    arrays: list[np.ndarray | None] = []
    for value in node.inputs:
        if value is not None and not (value.is_initializer() and not value.is_graph_input()):
            return None
        array = constant(value) if value is not None and _foldable(value.dtype) else None
        if value is not None and array is None:
            return None
        arrays.append(array)
    if not all(_foldable(v.dtype) for v in node.outputs):
        return None
    limit = max(MAX_BYTES, MAX_GROWTH * sum(a.nbytes for a in arrays if a is not None))
    # Before the work, from the inferred shapes; after it, from the results.
    if sum(_bytes(v) for v in node.outputs) > limit:
        return Miss(f"the result would be larger than {limit} bytes")
    if node.op_type == "Range" and not _range_is_small(arrays, limit):
        return Miss(f"the result would be larger than {limit} bytes")
    try:
        results = evaluate.evaluate(node, arrays, limit=limit, opset=ops.opset)
    except evaluate.EvaluationError as error:
        return Miss(str(error))
    if sum(r.nbytes for r in results) > limit:
        return Miss(f"the result is larger than {limit} bytes")
    return Rewrite([ops.constant(r, hint="folded") for r in results])


@rule("if(constant) => branch", "If")
def inline_branch(node: oir.Node, ops: Ops) -> Outcome:
    """Move the nodes of the branch that is always taken into the place of the If."""
    condition = constant(node.inputs[0])
    if condition is None or condition.size != 1:
        return None
    branch = node.attributes["then_branch" if condition.reshape(()) else "else_branch"].as_graph()
    values = list(branch.outputs)
    nodes = list(branch)
    branch.outputs.clear()
    branch.remove(nodes)
    ops.nodes.extend(nodes)
    return Rewrite(values)


def _foldable(dtype: oir.DataType | None) -> bool:
    """Numbers of whole bytes: strings are data, packed 4-bit types would lose their packing."""
    if dtype is None or dtype in (oir.DataType.STRING, oir.DataType.UNDEFINED):
        return False
    return dtype.bitwidth >= 8


def _bytes(value: oir.Value) -> int:
    """Return the size of a value where its shape is known, else 0."""
    if value.shape is None or not value.shape.is_static() or value.dtype is None:
        return 0
    return math.prod(int(d) for d in value.shape.numpy()) * value.dtype.bitwidth // 8


def _range_is_small(arrays: list[np.ndarray | None], limit: int) -> bool:
    start, stop, step = (float(a.reshape(())) if a is not None else 0.0 for a in arrays)
    return step == 0 or (stop - start) / step * 8 <= limit


PASS = RewritePass("fold-constants", [fold, inline_branch])
