"""Products with constant matrices of 4 or 8 bits that stay packed in memory: layouts and computes.

A weight is ``(q - zero) * scale``, with one scale (and zero point) for each column and each block of ``block`` rows.
The kernel (``weight_only_rows.py`` for few rows, ``weight_only_schedule.py`` for many) reads it in registers:

    out[m, n] = sum over blocks g of scale[g, n] * (sum over k in g of a[m, k] * q[k, n] - zero[g, n] * sum of a[m, k])

Integers are exact in float32, and sums are cut after ``CHAIN`` terms at the latest. With u = 2^-24, chains of L terms
and C chains, the result is within (L + C + 4) * u * sum over k of |a[m, k]| * (|q[k, n]| + |zero|) * scale of the exact
one. Many rows use ``(q - zero) * scale``, rounded once as DequantizeLinear does, in a float32 product. Where a row
holds an infinity or NaN, its results are not finite.

Panels of ``width`` columns follow each other. Four bits lie in words of 32, row ``8 * i + j`` of a panel in bits
``4 * j`` to ``4 * j + 3`` of word ``[i, column]``: one AND makes a vector of ``q * 16^j``, and 16^-j is in the row
operand already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels.contraction import accumulator, pack_columns, widen

TEMPLATE = "weight_only"
FIELDS = 8
"""Weights of 4 bits in a word."""
CHAIN = 128
"""The most products that are summed before they are scaled: it bounds what zero points cancel."""


@dataclass(frozen=True)
class Packed:
    """A matrix ``[K, N]`` in panels: ``words``, ``scales`` and ``zeros`` are ``[panels, ..., width]``.

    ``words`` are int32 ``[panels, ceil(K/8), width]`` of unsigned fields for 4 bits, int8 ``[panels, K, width]`` for 8.
    ``scales`` are ``[panels, blocks, width]``, and so are ``zeros`` (uint8, those of 8 bits plus 128) where they
    differ; where they do not, ``zeros`` is None and ``zero`` is the value of all.
    """

    words: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    zero: int
    bits: int
    block: int
    columns: int


def pack(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray, *, bits: int, block: int, width: int) -> Packed:
    """Pack integers ``[K, N]`` with ``scales`` and ``zeros`` of shape ``[ceil(K/block), N]``.

    ``bits`` is 4 (values and zeros in 0..15) or 8 (in -128..127). ``block`` is a multiple of 8, or all of K.
    """
    depth, n = values.shape
    if bits == 4:
        padded = np.zeros((-(-depth // FIELDS) * FIELDS, n), np.uint32)
        padded[:depth] = values
        shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
        fields = padded.reshape(-1, FIELDS, n) << shifts
        integers = np.bitwise_or.reduce(fields, axis=1).view(np.int32)
    else:
        integers = values.astype(np.int8)
    same = zeros.size == 0 or bool((zeros == zeros.flat[0]).all())
    shift = 0 if bits == 4 else 128
    return Packed(
        words=pack_columns(integers, width),
        scales=pack_columns(scales, width),
        zeros=None if same else pack_columns((zeros.astype(np.int32) + shift).astype(np.uint8), width),
        zero=int(zeros.flat[0]) if same and zeros.size else 0,
        bits=bits,
        block=block,
        columns=n,
    )


def matmul(a: Any, packed: Packed, words: Any, scales: Any, zeros: Sequence[Any]) -> Any:
    """``a [..., M, K]`` times ``packed``, whose arrays are the given tensors: ``[..., M, N]``, in float32."""
    dtype = accumulator(str(a.dtype))
    k = te.reduce_axis((0, a.shape[-1]), "k")
    rank, width = len(a.shape), packed.words.shape[-1]

    def weight(k: Any, j: Any) -> Any:
        panel, lane = j // width, j % width
        if packed.bits == 4:
            q = (words(panel, k // FIELDS, lane) >> (k % FIELDS * 4).astype("int32")) & tirx.const(15, "int32")
        else:
            q = words(panel, k, lane).astype("int32")
        block = k // packed.block
        zero = tirx.const(packed.zero, "int32")
        if zeros:
            zero = zeros[0](panel, block, lane).astype("int32") - (0 if packed.bits == 4 else 128)
        return (q - zero).astype(dtype) * widen(scales(panel, block, lane), dtype)

    def element(*index: Any) -> Any:
        *rows, j = index
        return te.sum(widen(a(*rows, k), dtype) * weight(k, j), axis=k)

    attributes = {
        "optc.template": TEMPLATE,
        "optc.rows": list(range(rank - 1)),
        "optc.columns": [rank - 1],
        "optc.packed": 1,
        "optc.bits": packed.bits,
        "optc.block": packed.block,
        "optc.zero": packed.zero,
    }
    return te.compute((*a.shape[:-1], packed.columns), element, "weight_only", attrs=attributes)
