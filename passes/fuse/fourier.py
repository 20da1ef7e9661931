"""Fourier transforms of known length as products with constant matrices, which run at the speed of the machine.

* STFT of short frames is a convolution whose filters are windowed cosines and sines; long frames are copied.
* DFT is a product with the matrix of its roots of unity. Where the length n is a product ``a * b`` it is two smaller
  products (Cooley and Tukey, 1965): with t = i * b + j and k = p + a * q,

      y[k] = sum over j of root(n, j * k) * (sum over i of root(a, i * p) * x[t])

  so the second product has one matrix for each p, which holds the twiddle factors too: 4 n (a + b) products, not 4 n^2.

Complex numbers are pairs in the last axis, as in ONNX: a factor c + is is the matrix [[c, s], [-s, c]].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant, input_or_none, int_attribute, integers
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule

_LARGEST = 1 << 24
"""Elements of a matrix of roots, which becomes part of the artifact: 64 MiB in float32."""
_TWO_STEPS = 128
"""The length from which two smaller products and the transposes around them are faster than one."""
_FRAMES_TWO_STEPS = 512
"""The same for frames of a signal."""
_TYPES = (oir.DataType.FLOAT, oir.DataType.DOUBLE)


@rule("stft(x, step, window) => conv(x, window * roots)", "STFT")
def stft(node: oir.Node, ops: Ops) -> Outcome:
    """STFT-17 of real signals with known step, length and window."""
    x, window = node.inputs[0], input_or_none(node, 2)
    if x is None or x.shape is None or x.dtype not in _TYPES or len(x.shape) != 3 or x.shape[-1] != 1:
        return Miss("the signal is complex, or its type is not known")
    step = integers(node.inputs[1])
    factors = constant(window)
    stated = input_or_none(node, 3)
    length = integers(stated) if stated is not None or factors is None else factors.shape
    if step is None or length is None or (window is not None and factors is None):
        return Miss("the step, the length or the window is not constant")
    (n,) = length
    if n < 1 or step[0] < 1 or (factors is not None and factors.shape != (n,)):
        return Miss("the step, the length and the window do not fit each other")
    bins = n // 2 + 1 if int_attribute(node, "onesided", 1) else n
    size, factor = x.shape[1], _factor(n)
    if factor is not None and n >= _FRAMES_TWO_STEPS and n % step[0] == 0 and isinstance(size, int) and size >= n:
        frames = (size - n) // step[0] + 1
        return Rewrite([_frames(ops, x, frames, step[0], factors, (factor, n // factor), bins)])
    if 2 * n * bins > _LARGEST:
        return Miss(f"the filters for frames of {n} would be too large")
    roots = _roots(n, np.arange(n), np.arange(bins), -1)[:, 0]
    if factors is not None:
        roots = roots * factors[:, None, None]
    filters = roots.transpose(2, 1, 0).reshape(2 * bins, 1, n).astype(x.dtype.numpy())
    lines = ops("Transpose", x, perm=[0, 2, 1])
    parts = ops("Conv", lines, ops.constant(filters, "roots"), strides=[step[0]], kernel_shape=[n])
    split = ops("Reshape", parts, ops.constant(np.array([0, 2, bins, -1]), "shape"))
    return Rewrite([ops("Transpose", split, perm=[0, 3, 2, 1])])


@rule("dft(x) => matmul(x, roots)", "DFT")
def dft(node: oir.Node, ops: Ops) -> Outcome:
    """DFT-20 along a known axis of known length; at most one other dim may be symbolic."""
    x, axis_value, length_value = node.inputs[0], input_or_none(node, 2), input_or_none(node, 1)
    if x is None or x.shape is None or x.dtype not in _TYPES:
        return Miss("the type or the rank is not known")
    axes, lengths = integers(axis_value), integers(length_value)
    if (axis_value is not None and axes is None) or (length_value is not None and lengths is None):
        return Miss("the axis or the length is not constant")
    rank = len(x.shape)
    axis = axes[0] % rank if axes else rank - 2
    given, complex_parts = x.shape[axis], x.shape[-1]
    others = [d if isinstance(d, int) else -1 for i, d in enumerate(x.shape[:-1]) if i != axis]
    if not isinstance(given, int) or not isinstance(complex_parts, int) or others.count(-1) > 1 or 0 in others:
        return Miss("the sizes are not known")
    inverse, onesided = (bool(int_attribute(node, name, 0)) for name in ("inverse", "onesided"))
    back = inverse and onesided
    n = lengths[0] if lengths else 2 * (given - 1) if back else given
    if n < 1 or given < 1:
        return Miss("the transform is empty")
    used = min(given, n // 2 + 1 if back else n)
    bins = n // 2 + 1 if onesided and not inverse else n
    first = [i for i in range(rank - 1) if i != axis]
    moved = ops("Transpose", x, perm=[*first, axis, rank - 1])
    step = _factor(n)
    dtype = x.dtype.numpy()
    whole = used == given == n and not back
    if whole and step is not None and n >= _TWO_STEPS:
        result = _two_steps(ops, moved, others, (step, n // step), complex_parts, bins, inverse, dtype)
    else:
        if 2 * given * complex_parts * bins > _LARGEST:
            return Miss(f"the matrix for a length of {n} would be too large")
        roots = _roots(n, np.arange(given), np.arange(bins), 1 if inverse else -1)
        if back:
            # The half that is not given mirrors this one; only the ends have no mirror image.
            ends = np.isin(np.arange(given), (0, n / 2))
            roots = np.where(ends, 1, 2)[:, None, None, None] * roots[..., :1]
        roots[used:] = 0
        matrix = roots[:, :complex_parts].reshape(given * complex_parts, -1) / (n if inverse else 1)
        rows = ops("Reshape", moved, _shape(ops, [*others, matrix.shape[0]]))
        product = ops("MatMul", rows, ops.constant(matrix.astype(dtype), "roots"))
        result = ops("Reshape", product, _shape(ops, [*others, bins, 1 if back else 2]))
    order = [*first, axis, rank - 1]
    return Rewrite([ops("Transpose", result, perm=[order.index(i) for i in range(rank)])])


def _factor(n: int) -> int | None:
    """Return the divisor for two steps, at most the root of ``n``; None if there is none or matrices are too large."""
    factor = next((a for a in range(math.isqrt(n), 3, -1) if n % a == 0), None)
    return factor if factor is not None and 4 * n * n // factor <= _LARGEST else None


def _frames(
    ops: Ops,
    x: oir.Value,
    count: int,
    step: int,
    window: np.ndarray | None,
    sizes: tuple[int, int],
    bins: int,
) -> oir.Value:
    """Return the transforms ``[b, count, bins, 2]`` of frames of ``x [b, t, 1]``, in two steps: a frame is a few pieces
    of ``step`` values.
    """
    assert x.dtype is not None and x.shape is not None
    dtype, n = x.dtype.numpy(), sizes[0] * sizes[1]
    batch = x.shape[0] if isinstance(x.shape[0], int) else -1
    parts = n // step

    def cut(value: oir.Value, begin: int, end: int) -> oir.Value:
        return ops("Slice", value, *(ops.constant(np.array([v]), "slice") for v in (begin, end, 1)))

    pieces = count + parts - 1
    lines = ops("Reshape", cut(x, 0, pieces * step), _shape(ops, [batch, pieces, step]))
    frames = ops("Concat", *(cut(lines, i, i + count) for i in range(parts)), axis=2)
    if window is not None:
        frames = ops("Mul", frames, ops.constant(window.astype(dtype), "window"))
    return _two_steps(ops, frames, [batch, count], sizes, 1, bins, False, dtype)


def _two_steps(
    ops: Ops,
    x: oir.Value,
    others: Sequence[int],
    sizes: tuple[int, int],
    parts: int,
    bins: int,
    inverse: bool,
    dtype: np.dtype,
) -> oir.Value:
    """Return the first ``bins`` of the transform of ``x [others, a * b, parts]``."""
    (a, b), r, sign = sizes, len(others), 1 if inverse else -1
    n, ahead = a * b, list(range(r))
    later = min(b, (bins - 1) // a + 1)
    one = _roots(a, np.arange(a), np.arange(a), sign)[:, :parts].reshape(a * parts, 2 * a)
    j, p, q = np.arange(b), np.arange(a)[:, None], np.arange(later)
    two = np.stack([_roots(n, j, k, sign) for k in p + a * q]) / (n if inverse else 1)
    grid = ops("Reshape", x, _shape(ops, [*others, a, b, parts]))
    columns = ops("Transpose", grid, perm=[*ahead, r + 1, r, r + 2])
    rows = ops("Reshape", columns, _shape(ops, [*others, b, a * parts]))
    inner = ops("MatMul", rows, ops.constant(one.astype(dtype), "roots"))
    pairs = ops("Reshape", inner, _shape(ops, [*others, b, a, 2]))
    batches = ops("Transpose", pairs, perm=[r + 1, *ahead, r, r + 2])
    count = -1 if -1 in others else math.prod(others)
    lines = ops("Reshape", batches, _shape(ops, [a, count, 2 * b]))
    outer = ops("MatMul", lines, ops.constant(two.reshape(a, 2 * b, 2 * later).astype(dtype), "roots"))
    found = ops("Reshape", outer, _shape(ops, [a, *others, later, 2]))
    order = ops("Transpose", found, perm=[*(i + 1 for i in ahead), r + 1, 0, r + 2])
    whole = ops("Reshape", order, _shape(ops, [*others, later * a, 2]))
    if later * a == bins:
        return whole
    begin, end, axes = (ops.constant(np.array([v]), "slice") for v in (0, bins, r))
    return ops("Slice", whole, begin, end, axes)


def _roots(n: int, times: np.ndarray, bins: np.ndarray, sign: int) -> np.ndarray:
    """Return ``[times, 2, bins, 2]``: the matrix of each factor ``exp(sign 2 pi i times bins / n)``, in float64."""
    angle = sign * 2 * np.pi * (np.outer(times, bins) % n) / n
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([c, s], -1), np.stack([-s, c], -1)], 1)


def _shape(ops: Ops, sizes: Sequence[int]) -> oir.Value:
    return ops.constant(np.array(sizes, np.int64), "shape")


def fourier_pass() -> RewritePass:
    """Return the pass."""
    return RewritePass("fourier", [stft, dft])
