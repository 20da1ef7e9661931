"""Operators of onnxruntime's own domain, ``com.microsoft``, that have an equal in ONNX: those of quantization.

The canonical form of a quantized weight is a constant under DequantizeLinear. The definitions are those of
onnxruntime's schemas (``docs/ContribOperators.md`` there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as oir

from optc.errors import InvalidModelError, UnsupportedModelError
from optc.frontend import contrib_quantized
from optc.frontend.names import Names
from optc.frontend.upgrade import Edit, Refused
from optc.ir import provenance

DOMAIN = "com.microsoft"
_BITS = (4, 8)


def expand(model: oir.Model, values: Names, nodes: Names) -> None:
    """Replace nodes of ``com.microsoft`` that have an equal in ONNX, in place; the others stay.

    Constants are initializers, and names are unique.

    Raises:
        InvalidModelError: weights whose shapes contradict the attributes.
        UnsupportedModelError: names every node whose form of quantization has no equal.
    """
    refused = []
    for node in list(model.graph.all_nodes()):
        function = _OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
        if function is None:
            continue
        try:
            function(Edit(model, node, values, nodes))
        except Refused as reason:
            refused.append(f"{provenance.describe(node)}: {reason}")
    if refused:
        raise UnsupportedModelError(
            "nodes of onnxruntime's own domain that have no equal in ONNX:\n  " + "\n  ".join(refused),
            hint="quantize the model again, to DequantizeLinear in front of MatMul (QDQ)",
        )
    if not any(node.domain == DOMAIN for node in model.graph.all_nodes()):
        model.opset_imports.pop(DOMAIN, None)


def matmul_nbits(edit: Edit) -> None:
    """MatMulNBits => MatMul(A, DequantizeLinear(B, scales, zero points)) + bias.

    ``accuracy_level`` allows to round A to 8 bits and is not used.
    """
    bits, block = _integer(edit, "bits", 4), _integer(edit, "block_size")
    depth, columns = _integer(edit, "K"), _integer(edit, "N")
    if bits not in _BITS:
        raise Refused(f"weights of {bits} bits; 4 and 8 are supported")
    if _integer(edit, "weight_prepacked", 0):
        raise Refused("the weights are packed for a GPU")
    if _optional(edit, 4) is not None:
        raise Refused("g_idx, an order of the rows, is not supported")
    if block < 16 or block & (block - 1):
        raise _invalid(edit, f"block_size is {block}, not a power of two of at least 16")
    blocks = -(-depth // block)
    packed = _constant(edit, 1, "B", (columns, blocks, block * bits // 8))
    fields = _fields(packed, bits).reshape(columns, blocks * block)[:, :depth]
    scales = _constant(edit, 2, "scales", (columns, blocks))
    zero = _zero_points(edit, bits, columns, blocks)
    if zero is None:
        # The default is the middle: signed integers need no zero point.
        kind = ml_dtypes.int4 if bits == 4 else np.int8
        fields = (fields.astype(np.int16) - (1 << (bits - 1))).astype(kind)
    else:
        kind = ml_dtypes.uint4 if bits == 4 else np.uint8
        fields, zero = fields.astype(kind), zero.astype(kind)
    weight = _dequantized(edit, fields.T, scales.T, None if zero is None else zero.T, axis=0, block=block)
    bias = _optional(edit, 5)
    product = edit.op("MatMul", edit.input(0), weight)
    edit.replace(product if bias is None else edit.op("Add", product, bias))


def gather_block_quantized(edit: Edit) -> None:
    """GatherBlockQuantized => Gather(DequantizeLinear(data, scales, zero points), indices)."""
    data = edit.input(0)
    bits, block = _integer(edit, "bits", 4), _integer(edit, "block_size", 128)
    array = _array(edit, 0, "data")
    kinds = (oir.DataType.INT4, oir.DataType.UINT4, oir.DataType.UINT8)
    if data.dtype not in kinds or (data.dtype == oir.DataType.UINT8 and bits not in _BITS):
        raise Refused(f"a table of {data.dtype} with {bits} bits")
    zero = None if _optional(edit, 3) is None else _array(edit, 3, "zero_points")
    if data.dtype == oir.DataType.UINT8:
        array = _fields(array, bits)
        middle = 1 << (bits - 1)
        kind = ml_dtypes.uint4 if bits == 4 else np.uint8
        scales = _array(edit, 2, "scales")
        zero = np.full(scales.shape, middle) if zero is None else _fields(zero, bits)[..., : scales.shape[-1]]
        array, zero = array.astype(kind), zero.astype(kind)
    rank = array.ndim
    along, across = _integer(edit, "quantize_axis", 1) % rank, _integer(edit, "gather_axis", 0) % rank
    shape = tuple(-(-d // block) if axis == along else d for axis, d in enumerate(array.shape))
    table = _dequantized(edit, array, _constant(edit, 2, "scales", shape), zero, axis=along, block=block)
    edit.replace(edit.op("Gather", table, edit.input(1), axis=across))


_OPERATORS: dict[str, Callable[[Edit], None]] = {
    **contrib_quantized.OPERATORS,
    "MatMulNBits": matmul_nbits,
    "GatherBlockQuantized": gather_block_quantized,
}


def _dequantized(
    edit: Edit, values: np.ndarray, scales: np.ndarray, zero: np.ndarray | None, *, axis: int, block: int
) -> oir.Value:
    if zero is not None and zero.shape != scales.shape:
        raise _invalid(edit, f"zero points of shape {list(zero.shape)} for scales of shape {list(scales.shape)}")
    constants = [edit.constant(np.ascontiguousarray(values), "weight"), edit.constant(scales.copy(), "scale")]
    if zero is not None:
        constants.append(edit.constant(np.ascontiguousarray(zero), "zero_point"))
    return edit.op("DequantizeLinear", *constants, axis=axis, block_size=block)


def _fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """Return the unsigned integers in bytes ``[..., n]``: ``[..., n * 8 / bits]``, lower bits first."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _zero_points(edit: Edit, bits: int, columns: int, blocks: int) -> np.ndarray | None:
    """Return zero points ``[columns, blocks]``; None for the default."""
    value = _optional(edit, 3)
    if value is None:
        return None
    if value.dtype == oir.DataType.UINT8:
        return _fields(_constant(edit, 3, "zero_points", (columns, -(-blocks * bits // 8))), bits)[:, :blocks]
    given = _constant(edit, 3, "zero_points", (columns, blocks)).astype(np.float32)
    if not ((given == np.rint(given)) & (given >= 0) & (given < 1 << bits)).all():
        raise Refused("zero points that are no integers of the type of the weights")
    return given


def _integer(edit: Edit, name: str, default: int | None = None) -> int:
    attribute = edit.node.attributes.get(name)
    if attribute is None:
        if default is None:
            raise _invalid(edit, f"attribute '{name}' is missing")
        return default
    if attribute.type != oir.AttributeType.INT:
        raise _invalid(edit, f"attribute '{name}' is no integer")
    return attribute.as_int()


def _optional(edit: Edit, index: int) -> oir.Value | None:
    return edit.node.inputs[index] if index < len(edit.node.inputs) else None


def _array(edit: Edit, index: int, name: str) -> np.ndarray:
    value = _optional(edit, index)
    if value is None:
        raise _invalid(edit, f"input {name} is missing")
    if not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        raise Refused(f"{name} is not constant")
    return value.const_value.numpy()


def _constant(edit: Edit, index: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """Return a constant input as an array of ``shape``; older models have them flat."""
    array = _array(edit, index, name)
    if array.size != np.prod(shape, dtype=np.int64):
        raise _invalid(edit, f"{name} has the shape {list(array.shape)}, expected {list(shape)}")
    return array.reshape(shape)


def _invalid(edit: Edit, reason: str) -> InvalidModelError:
    return InvalidModelError(f"{provenance.describe(edit.node)}: {reason}")
