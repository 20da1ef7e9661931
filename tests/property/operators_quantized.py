"""Cases of integer operators: results are exact, or off by the one rounding that follows the sum."""

from __future__ import annotations

from typing import Any

import numpy as np
from operator_case import Case, Draw

_BYTES = ("int8", "uint8")
_STORED = ("int8", "uint8", "int16", "uint16")


def _parameters(d: Draw, shape: list[int], dtype: str, kinds: tuple[str, ...]) -> tuple[list[Any], dict[str, Any]]:
    """Return scale and zero point for a tensor of ``shape``, and attributes: per tensor, per axis or blocked."""
    kind = d.pick(["tensor", "axis", "block"]) if shape and min(shape) > 0 else "tensor"
    attributes: dict[str, Any] = {}
    if kind == "tensor":
        sizes = []
    else:
        axis = d.axis(len(shape))
        attributes["axis"] = axis
        sizes = [shape[axis]]
        if kind == "block":
            attributes["block_size"] = d.pick([b for b in (1, 2, 3, 8, 16) if b <= shape[axis]])
            sizes = list(shape)
            sizes[axis] = -(-shape[axis] // attributes["block_size"])
    zero = d.array(d.pick(kinds), sizes) if d.integer(0, 3) else None
    return [d.array(dtype, sizes, 0.01, 0.5), zero], attributes


def quantize(d: Draw) -> Case:
    dtype = d.pick(("float32", "float32", "float16"))
    x = d.array(dtype, d.shape(0, 4), -40, 40)
    (scale, zero), attributes = _parameters(d, list(x.shape), dtype, _STORED)
    output = "uint8" if zero is None else zero.dtype.name
    arrays = [x, scale, zero][: 2 if zero is None else 3]
    constants = frozenset([1, 2]) if d.integer(0, 3) else frozenset()
    case = Case("QuantizeLinear", arrays, [output], attributes, constants, d.symbols(arrays, {0: range(x.ndim)}))
    case.wide = False
    if "axis" in attributes or not constants:
        case.symbolic = {}

    def reference(_: Case) -> list[np.ndarray]:
        info = np.iinfo(output)
        steps = x.astype(np.float32) / _spread(scale, x, attributes).astype(np.float32)
        total = np.rint(steps) + (0 if zero is None else _spread(zero, x, attributes).astype(np.float32))
        return [np.clip(total, info.min, info.max).astype(output)]

    case.reference = reference
    return case


def dequantize(d: Draw) -> Case:
    dtype = d.pick(("float32", "float16", "bfloat16"))
    shape = d.shape(0, 4)
    (scale, zero), attributes = _parameters(d, shape, dtype, _STORED)
    x = d.array(zero.dtype.name if zero is not None else d.pick((*_STORED, "int32")), shape, -(2**20), 2**20)
    arrays = [x, scale, zero][: 2 if zero is None else 3]
    constants = frozenset(d.pick([[1, 2], [0, 1, 2], []]))
    symbolic = {} if "axis" in attributes or not constants else d.symbols(arrays, {0: range(x.ndim)})
    case = Case("DequantizeLinear", arrays, [dtype], attributes, constants, symbolic, roundings=1)

    def reference(_: Case) -> list[np.ndarray]:
        values = x.astype(np.float64) - (0 if zero is None else _spread(zero, x, attributes).astype(np.float64))
        return [values * _spread(scale, x, attributes).astype(np.float64)]

    case.reference = reference
    return case


def _spread(parameter: np.ndarray, x: np.ndarray, attributes: dict[str, Any]) -> np.ndarray:
    if parameter.ndim == 0:
        return parameter
    axis = attributes["axis"] % x.ndim
    if "block_size" in attributes:
        return np.repeat(parameter, attributes["block_size"], axis).take(range(x.shape[axis]), axis)
    return parameter.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def dynamic(d: Draw) -> Case:
    x = d.array("float32", d.shape(0, 4, empty=False))
    case = Case("DynamicQuantizeLinear", [x], ["uint8", "float32", "uint8"], symbolic=d.all_symbols(x))
    case.wide, case.off_by = False, 1
    return case


def matmul_integer(d: Draw) -> Case:
    m, k, n = d.pick([1, 2, 5, 17, 40]), d.pick([1, 3, 16, 33, 100]), d.pick([1, 2, 8, 24, 33])
    batch = [d.integer(1, 3)] if d.flag() else []
    a, b = d.array(d.pick(_BYTES), [*batch, m, k]), d.array(d.pick(_BYTES), [k, n])
    zeros = [d.array(a.dtype.name, []), d.array(b.dtype.name, d.pick([[], [n]]))]
    arrays = [a, b, *zeros[: d.integer(0, 2)]]
    constants = frozenset(d.pick([[1, 3], [1, 2, 3], []]))
    return Case("MatMulInteger", arrays, ["int32"], {}, constants, d.symbols(arrays, {0: range(a.ndim)}), wide=False)


def _convolution(d: Draw) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    rank = d.pick([1, 2, 2, 2])
    kernel = [d.pick([1, 2, 3, 3]) for _ in range(rank)]
    groups, each, outputs = d.pick([(1, 3, 5), (1, 16, 16), (2, 8, 8), (1, 1, 7), (16, 1, 1), (19, 1, 1)])
    sizes = [k + d.pick([0, 1, 3, 6, 9]) for k in kernel]
    x = d.array(d.pick(_BYTES), [d.integer(1, 2), groups * each, *sizes])
    w = d.array(d.pick(_BYTES), [groups * outputs, each, *kernel])
    attributes = {"group": groups, "kernel_shape": kernel, "strides": [d.pick([1, 1, 2]) for _ in kernel]}
    attributes["pads"] = [d.integer(0, k - 1) for _ in range(2) for k in kernel]
    return x, w, attributes


def conv_integer(d: Draw) -> Case:
    x, w, attributes = _convolution(d)
    arrays = [x, w, *[d.array(x.dtype.name, []), d.array(w.dtype.name, d.pick([[], [len(w)]]))][: d.integer(0, 2)]]
    constants = frozenset(d.pick([[1, 2, 3], [1, 2, 3], []]))
    case = Case("ConvInteger", arrays, ["int32"], attributes, constants, d.symbols(arrays, {0: [0]}), wide=False)
    case.reference = lambda c: [_sums(c.arrays, attributes)]
    return case


def _sums(arrays: list[Any], attributes: dict[str, Any]) -> np.ndarray:
    """Return the exact sums of a ConvInteger."""
    x, w = (a.astype(np.int64) for a in arrays[:2])
    if len(arrays) > 2:
        x = x - arrays[2].astype(np.int64)
    if len(arrays) > 3:
        w = w - arrays[3].astype(np.int64).reshape(-1, *[1] * (w.ndim - 1))
    rank, groups = w.ndim - 2, attributes["group"]
    pads = attributes["pads"]
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], tuple(range(2, rank + 2)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in attributes["strides"]))]
    outputs = []
    for part, weights in zip(np.split(windows, groups, axis=1), np.split(w, groups), strict=True):
        taps = tuple(range(2 + rank, 2 + 2 * rank))
        outputs.append(np.moveaxis(np.tensordot(part, weights, ([1, *taps], [1, *range(2, 2 + rank)])), -1, 1))
    return np.concatenate(outputs, axis=1).astype(np.int32)


def _rescaled(sums: np.ndarray, factor: np.ndarray, zero: np.ndarray) -> np.ndarray:
    info = np.iinfo(zero.dtype)
    return np.clip(np.rint(sums * factor) + int(zero), info.min, info.max).astype(zero.dtype)


def qlinear_conv(d: Draw) -> Case:
    x, w, attributes = _convolution(d)
    each = d.pick([[], [len(w)]])
    terms = int(np.prod(w.shape[1:]))
    y_zero = d.array(d.pick(_BYTES), [])
    x_scale, w_scale = d.array("float32", [], 0.01, 0.1), d.array("float32", each, 0.01, 0.1)
    y_scale = np.float32(x_scale * 0.05 * 128 * np.sqrt(terms)) * np.ones([], np.float32)
    arrays = [x, x_scale, d.array(x.dtype.name, []), w, w_scale, d.array(w.dtype.name, each), y_scale, y_zero]
    if d.flag():
        arrays.append(d.array("int32", [len(w)], -5000, 5000))
    constants = frozenset(range(1, 9))
    symbolic = d.symbols(arrays, {0: [0]})
    case = Case("QLinearConv", arrays, [y_zero.dtype.name], attributes, constants, symbolic, off_by=1)

    def reference(_: Case) -> list[np.ndarray]:
        sums = _sums([x, w, arrays[2], arrays[5]], attributes).astype(np.float64)
        column = [1, -1, *[1] * (w.ndim - 2)]
        if len(arrays) > 8:
            sums = sums + arrays[8].reshape(column)
        factor = x_scale.astype(np.float64) * w_scale.astype(np.float64) / y_scale
        return [_rescaled(sums, factor.reshape(column) if each else factor, y_zero)]

    case.reference = reference
    return case


def qlinear_matmul(d: Draw) -> Case:
    m, k, n = d.pick([1, 2, 5, 17]), d.pick([1, 3, 16, 33, 100]), d.pick([1, 2, 8, 24, 33])
    a, b = d.array(d.pick(_BYTES), [m, k]), d.array(d.pick(_BYTES), [k, n])
    each = d.pick([[], [n]])
    a_scale, b_scale = d.array("float32", [], 0.01, 0.1), d.array("float32", each, 0.01, 0.1)
    y_scale = np.float32(a_scale * 0.05 * 128 * np.sqrt(k)) * np.ones([], np.float32)
    y_zero = d.array(d.pick(_BYTES), [])
    arrays = [a, a_scale, d.array(a.dtype.name, []), b, b_scale, d.array(b.dtype.name, each), y_scale, y_zero]
    constants = frozenset(range(1, 8)) if d.flag() else frozenset([1, 2, 4, 5, 6, 7])
    case = Case("QLinearMatMul", arrays, [y_zero.dtype.name], {}, constants, d.symbols(arrays, {0: [0]}), off_by=1)

    def reference(_: Case) -> list[np.ndarray]:
        sums = (a.astype(np.int64) - arrays[2].astype(np.int64)) @ (b.astype(np.int64) - arrays[5].astype(np.int64))
        return [_rescaled(sums.astype(np.float64), a_scale.astype(np.float64) * b_scale / y_scale, y_zero)]

    case.reference = reference
    return case


def matmul_nbits(d: Draw) -> Case:
    """Weights of 4 or 8 bits in blocks of rows; the last block may be cut off."""
    bits, block = d.pick([4, 8]), d.pick([16, 32, 64])
    rows, depth, columns = d.pick([1, 2, 7, 40]), d.pick([16, 33, 70, 128]), d.pick([1, 5, 16, 33])
    blocks = -(-depth // block)
    x = d.array("float32", [2, rows, depth] if d.flag() else [rows, depth])
    stored = d.array("uint8", [columns, blocks, block * bits // 8])
    scales = d.array("float32", [columns, blocks], 0.01, 0.2)
    zero = d.pick([None, "packed", "whole"])
    if zero == "packed":
        zero = d.array("uint8", [columns, -(-blocks * bits // 8)])
    elif zero == "whole":
        zero = d.array("float32", [columns, blocks], 0, (1 << bits) - 1).round()
    arrays = [x, stored, scales, zero, None, d.array("float32", [columns]) if d.flag() else None]
    attributes = {"K": depth, "N": columns, "bits": bits, "block_size": block}
    case = Case("MatMulNBits", arrays, ["float32"], attributes, frozenset(range(1, 6)), domain="com.microsoft")
    case.symbolic = d.symbols(arrays, {0: range(x.ndim - 1)})
    fields = np.stack([stored & 15, stored >> 4], -1) if bits == 4 else stored
    unpacked = zero if zero is None or zero.dtype != np.uint8 or bits == 8 else np.stack([zero & 15, zero >> 4], -1)

    def reference(_: Case) -> list[np.ndarray]:
        zeros = 1 << (bits - 1) if unpacked is None else unpacked.reshape(columns, -1)[:, :blocks, None]
        weights = (fields.reshape(columns, blocks, block).astype(np.float64) - zeros) * scales[..., None]
        y = x.astype(np.float64) @ weights.reshape(columns, -1)[:, :depth].T
        return [y if arrays[5] is None else y + arrays[5]]

    case.reference, case.roundings = reference, 16
    return case


FAMILIES = (quantize, dequantize, dynamic, matmul_integer, conv_integer, qlinear_conv, qlinear_matmul, matmul_nbits)
