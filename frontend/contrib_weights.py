"""Operators of com.microsoft on weights of a few bits: a constant under DequantizeLinear is their canonical form.

The definitions are those of onnxruntime's schemas (``docs/ContribOperators.md`` there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as oir

from optc.frontend.contrib_node import ContribEdit
from optc.frontend.upgrade import Refused

_BITS = (4, 8)


def matmul_nbits(edit: ContribEdit) -> None:
    """MatMulNBits => MatMul(A, DequantizeLinear(B, scales, zero points)) + bias.

    ``accuracy_level`` allows to round A to 8 bits and is not used.
    """
    bits, block = edit.integer("bits", 4), edit.integer("block_size")
    depth, columns = edit.integer("K"), edit.integer("N")
    if bits not in _BITS:
        raise Refused(f"weights of {bits} bits; 4 and 8 are supported")
    if edit.integer("weight_prepacked", 0):
        raise Refused("the weights are packed for a GPU")
    if edit.optional(4) is not None:
        raise Refused("g_idx, an order of the rows, is not supported")
    if block < 16 or block & (block - 1):
        raise edit.invalid(f"block_size is {block}, not a power of two of at least 16")
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
    bias = edit.optional(5)
    product = edit.op("MatMul", edit.input(0), weight)
    edit.replace(product if bias is None else edit.op("Add", product, bias))


def gather_block_quantized(edit: ContribEdit) -> None:
    """GatherBlockQuantized => Gather(DequantizeLinear(data, scales, zero points), indices)."""
    data = edit.input(0)
    bits, block = edit.integer("bits", 4), edit.integer("block_size", 128)
    array = edit.array(0, "data")
    kinds = (oir.DataType.INT4, oir.DataType.UINT4, oir.DataType.UINT8)
    if data.dtype not in kinds or (data.dtype == oir.DataType.UINT8 and bits not in _BITS):
        raise Refused(f"a table of {data.dtype} with {bits} bits")
    zero = None if edit.optional(3) is None else edit.array(3, "zero_points")
    if data.dtype == oir.DataType.UINT8:
        array = _fields(array, bits)
        middle = 1 << (bits - 1)
        kind = ml_dtypes.uint4 if bits == 4 else np.uint8
        scales = edit.array(2, "scales")
        zero = np.full(scales.shape, middle) if zero is None else _fields(zero, bits)[..., : scales.shape[-1]]
        array, zero = array.astype(kind), zero.astype(kind)
    rank = array.ndim
    along, across = edit.integer("quantize_axis", 1) % rank, edit.integer("gather_axis", 0) % rank
    shape = tuple(-(-d // block) if axis == along else d for axis, d in enumerate(array.shape))
    table = _dequantized(edit, array, _constant(edit, 2, "scales", shape), zero, axis=along, block=block)
    edit.replace(edit.op("Gather", table, edit.input(1), axis=across))


def _dequantized(
    edit: ContribEdit, values: np.ndarray, scales: np.ndarray, zero: np.ndarray | None, *, axis: int, block: int
) -> oir.Value:
    if zero is not None and zero.shape != scales.shape:
        raise edit.invalid(f"zero points of shape {list(zero.shape)} for scales of shape {list(scales.shape)}")
    constants = [edit.constant(np.ascontiguousarray(values), "weight"), edit.constant(scales.copy(), "scale")]
    if zero is not None:
        constants.append(edit.constant(np.ascontiguousarray(zero), "zero_point"))
    return edit.op("DequantizeLinear", *constants, axis=axis, block_size=block)


def _fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """Return the unsigned integers in bytes ``[..., n]``: ``[..., n * 8 / bits]``, lower bits first."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _zero_points(edit: ContribEdit, bits: int, columns: int, blocks: int) -> np.ndarray | None:
    """Return zero points ``[columns, blocks]``; None for the default."""
    value = edit.optional(3)
    if value is None:
        return None
    if value.dtype == oir.DataType.UINT8:
        return _fields(_constant(edit, 3, "zero_points", (columns, -(-blocks * bits // 8))), bits)[:, :blocks]
    given = _constant(edit, 3, "zero_points", (columns, blocks)).astype(np.float32)
    if not ((given == np.rint(given)) & (given >= 0) & (given < 1 << bits)).all():
        raise Refused("zero points that are no integers of the type of the weights")
    return given


def _constant(edit: ContribEdit, index: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """Return a constant input as an array of ``shape``; older models have them flat."""
    array = edit.array(index, name)
    if array.size != np.prod(shape, dtype=np.int64):
        raise edit.invalid(f"{name} has the shape {list(array.shape)}, expected {list(shape)}")
    return array.reshape(shape)


OPERATORS: dict[str, Callable[[ContribEdit], None]] = {
    "GatherBlockQuantized": gather_block_quantized,
    "MatMulNBits": matmul_nbits,
}
"""How each operator is expanded, by its name."""
