"""Weights of 8 or 4 bits with a scale for each block of the depth: nearest rounding, GPTQ, and AdaRound's objective.

A matrix here is ``[depth, columns]``. Blocks are ``block`` rows of a column; 0 is one block for the whole depth. The
``gram`` matrix ``[depth, depth]`` is the mean of ``x^T x`` over calibration data, for rows ``x`` that the matrix is
multiplied with: the squared error of the product is the trace of ``E^T gram E`` for an error E of the weights.
"""

from __future__ import annotations

import numpy as np

from optc.passes.quantize.encoding import DTYPES, limits
from optc.passes.quantize.weights import Integers

_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_DAMPING = 0.01
_PANEL = 128
_SWEEPS = 3


def nearest(matrix: np.ndarray, dtype: str, block: int = 0) -> Integers:
    """Round to nearest. Unsigned types have a zero point for each block.

    Of a few ranges for each block, the one with the least squared error is taken.
    """
    blocks = _split(matrix, block)
    best = np.full((blocks.shape[0], blocks.shape[2]), np.inf)
    scale, zero = np.ones_like(best), np.zeros_like(best)
    for clip in _CLIPS:
        for s, z in _parameters(blocks, dtype, clip):
            error = ((_round(blocks, s[:, None], z[:, None], dtype) - blocks) ** 2).sum(1)
            better = error < best
            best, scale, zero = (np.where(better, a, b) for a, b in ((error, best), (s, scale), (z, zero)))
    return _integers(matrix, scale, zero, dtype, block)


def gptq(matrix: np.ndarray, dtype: str, gram: np.ndarray, block: int = 0) -> Integers:
    """Round row by row; what rounding a row leaves is made up for by the rows behind it.

    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022: the
    inverse of the gram matrix by Cholesky, in panels, with scales fixed before (those of ``nearest``).
    """
    start = nearest(matrix, dtype, block)
    scale, zero = _expanded(start, matrix.shape)
    upper = _inverse_factor(gram)
    work, rounded = matrix.astype(np.float64), np.empty(matrix.shape)
    for first in range(0, len(work), _PANEL):
        last = min(first + _PANEL, len(work))
        errors = np.zeros((last - first, work.shape[1]))
        for row in range(first, last):
            rounded[row] = _round(work[row], scale[row], zero[row], dtype)
            errors[row - first] = (work[row] - rounded[row]) / upper[row, row]
            work[row:last] -= np.outer(upper[row, row:last], errors[row - first])
        work[last:] -= upper[first:last, last:].T @ errors
    return _keep_better(matrix, start, _quotients(start, rounded, scale, zero, dtype), gram)


def adaround(matrix: np.ndarray, dtype: str, gram: np.ndarray, block: int = 0) -> Integers:
    """Choose for each weight whether to round up or down, so that the squared error of the product is least.

    The objective is that of Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020
    (equation 9, a quadratic form in what is rounded); here it is minimized by coordinate descent from nearest rounding:
    in each sweep a weight takes the other neighbour if that makes the error smaller.
    """
    start = nearest(matrix, dtype, block)
    scale, zero = _expanded(start, matrix.shape)
    low, high = limits(dtype)
    exact = matrix / scale + zero
    floor = np.clip(np.floor(exact), low, high)
    ceiling = np.clip(floor + 1, low, high)
    chosen = start.values.astype(np.float64)
    error = (chosen - zero) * scale - matrix
    slope = gram @ error
    for _ in range(_SWEEPS):
        changed = False
        for row in range(len(matrix)):
            other = np.where(chosen[row] == floor[row], ceiling[row], floor[row])
            step = (other - chosen[row]) * scale[row]
            gain = 2 * step * slope[row] + step**2 * gram[row, row]
            step = np.where(gain < 0, step, 0.0)
            if step.any():
                changed = True
                chosen[row] = np.where(gain < 0, other, chosen[row])
                slope += np.outer(gram[:, row], step)
        if not changed:
            break
    found = Integers(chosen.astype(DTYPES[dtype]), start.scale, start.zero, start.axis, start.block)
    return _keep_better(matrix, start, found, gram)


def loss(matrix: np.ndarray, found: Integers, gram: np.ndarray) -> float:
    """Return the mean squared error of the product, summed over its columns."""
    error = found.dequantized().astype(np.float64) - matrix
    return float((error * (gram @ error)).sum())


def _keep_better(matrix: np.ndarray, start: Integers, found: Integers, gram: np.ndarray) -> Integers:
    return found if loss(matrix, found, gram) <= loss(matrix, start, gram) else start


def _split(matrix: np.ndarray, block: int) -> np.ndarray:
    """Return ``[blocks, rows of a block, columns]``; the last block is filled up with zeros, which round to zero."""
    size = block or len(matrix)
    padded = np.pad(matrix, [(0, -len(matrix) % size), (0, 0)])
    return padded.reshape(-1, size, matrix.shape[1]).astype(np.float64)


def _parameters(blocks: np.ndarray, dtype: str, clip: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return scales and zero points ``[blocks, columns]`` to try for a range that is ``clip`` of the whole."""
    least, largest = limits(dtype)
    low, high = np.minimum(blocks.min(1), 0) * clip, np.maximum(blocks.max(1), 0) * clip
    if dtype.startswith("u"):
        scale = _positive((high - low) / (largest - least))
        return [(scale, np.clip(np.rint(-low / scale), least, largest))]
    zero = np.zeros_like(low)
    # The end that reaches further may use -8 of 4 bits: then scales are negative where that end is positive.
    further = np.where(-low > high, low, high)
    wide = np.where(np.abs(further) < np.finfo(np.float32).tiny * 16, 1.0, further / least)
    return [(_positive(np.maximum(-low, high) / largest), zero), *([(wide, zero)] if largest < 100 else [])]


def _positive(scale: np.ndarray) -> np.ndarray:
    scale = np.asarray(scale, np.float32).astype(np.float64)
    return np.where(scale < float(np.finfo(np.float32).tiny), 1.0, scale)


def _round(values: np.ndarray, scale: np.ndarray, zero: np.ndarray, dtype: str) -> np.ndarray:
    low, high = limits(dtype)
    return np.asarray((np.clip(np.rint(values / scale) + zero, low, high) - zero) * scale)


def _integers(matrix: np.ndarray, scale: np.ndarray, zero: np.ndarray, dtype: str, block: int) -> Integers:
    scale = scale.astype(np.float32)
    size = block or len(matrix)
    low, high = limits(dtype)
    rows = np.arange(len(matrix)) // size
    values = np.clip(np.rint(matrix / scale[rows].astype(np.float64)) + zero[rows], low, high).astype(DTYPES[dtype])
    zeros = zero.astype(DTYPES[dtype]) if dtype.startswith("u") else None
    if block:
        return Integers(values, scale, zeros, 0, block)
    return Integers(values, scale[0], None if zeros is None else zeros[0], 1)


def _expanded(found: Integers, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and zero points for every weight, as float64."""
    rows = np.arange(shape[0]) // (found.block or shape[0])
    scale = np.atleast_2d(found.scale).astype(np.float64)[rows]
    zero = np.zeros(shape) if found.zero is None else np.atleast_2d(found.zero).astype(np.float64)[rows]
    return scale, zero


def _quotients(like: Integers, rounded: np.ndarray, scale: np.ndarray, zero: np.ndarray, dtype: str) -> Integers:
    values = np.rint(rounded / scale + zero).astype(DTYPES[dtype])
    return Integers(values, like.scale, like.zero, like.axis, like.block)


def _inverse_factor(gram: np.ndarray) -> np.ndarray:
    """Return the upper Cholesky factor of the inverse of ``gram``, damped so that it has one."""
    damped = gram.astype(np.float64).copy()
    mean = float(np.diag(damped).mean())
    damped[np.diag_indices_from(damped)] += _DAMPING * mean + (mean == 0)
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T)
