"""Quantized weights stay what the user made of them: nothing here or elsewhere turns them into floats.

They take less memory that way, and a product with few rows takes as long as it takes to read them. So constant folding
leaves DequantizeLinear alone, and what stands between a weight and its product is done to the integers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant, input_or_none, int_attribute, producer
from optc.passes.rewrite import Ops, Outcome, Rewrite, RewritePass, rule
from optc.passes.simplify.transposes import permutation


@rule("transpose(dq(constant)) => dq(transposed)", "Transpose")
def transposed(node: oir.Node, ops: Ops) -> Outcome:
    """Transpose integers, and scales where they have as many axes."""
    source = producer(node.inputs[0], "DequantizeLinear")
    perm = permutation(node)
    if source is None or perm is None:
        return None
    inputs = [input_or_none(source, i) for i in range(3)]
    arrays = [constant(value) for value in inputs]
    if any(value is not None and array is None for value, array in zip(inputs, arrays, strict=True)):
        return None
    rank = len(perm)
    moved = [
        None if array is None else ops.constant(_moved(array, perm, rank), name)
        for array, name in zip(arrays, ("transposed", "scale", "zero"), strict=True)
    ]
    axis = int_attribute(source, "axis", 1)
    if -rank <= axis < rank:
        axis = perm.index(axis % rank)
    result = ops(
        "DequantizeLinear",
        *(moved if moved[2] is not None else moved[:2]),
        like=node.outputs[0],
        axis=axis,
        block_size=int_attribute(source, "block_size", 0),
        output_dtype=int_attribute(source, "output_dtype", 0),
    )
    return Rewrite([result])


def _moved(array: np.ndarray, perm: tuple[int, ...], rank: int) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(perm)) if array.ndim == rank and rank > 1 else array


def weights_pass() -> RewritePass:
    """Return the pass that brings quantized weights next to their products."""
    return RewritePass("quantized_weights", [transposed])
