"""Scaled-dot-product attention as one kernel: tensor expressions that ``attention_schedule.py`` knows.

    scores[b, h, i, j] = sum over d of query[b, h, i, d] * key[b, h, j, d]
    masked = mask(scores), minus infinity outside of start[b, i] <= j < stop[b, i]
    output[b, h, i, d] = sum over j of softmax(masked)[b, h, i, j] * value[b, h, j, d]

A row without any key is zeros. The stages are annotated; the template keeps none of them in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import vector_math

TEMPLATE = "attention"
SCORES, MASKED, START, STOP = "scores", "masked", "start", "stop"
Read = Callable[[Any, Any, Any, Any], Any]
Bound = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Attention:
    """What is computed: sizes, and functions that read the operands and change the scores.

    ``query``, ``key`` and ``value`` read at (batch, head of the query, position, element) and give ``dtype``, the type
    of the accumulators. ``mask(score, b, h, i, j)`` returns the score that counts. ``start`` and ``stop`` bound the
    keys of query i; they must not decrease with i. The output is ``[b, i, h, d]`` if ``rows_first``, else
    ``[b, h, i, d]``.
    """

    batch: Any
    heads: Any
    rows: Any
    keys: Any
    depth: int
    width: int
    dtype: str
    query: Read
    key: Read
    value: Read
    mask: Callable[[Any, Any, Any, Any, Any], Any]
    start: Bound | None
    stop: Bound | None
    rows_first: bool


def attention(a: Attention) -> Any:
    """Return the output as a te tensor of ``a.dtype``."""
    shape = (a.batch, a.heads, a.rows, a.keys)
    minus = tirx.const(-np.inf, a.dtype)
    depth = te.reduce_axis((0, a.depth), "d")

    def product(b: Any, h: Any, i: Any, j: Any) -> Any:
        return te.sum(a.query(b, h, i, depth) * a.key(b, h, j, depth), axis=depth)

    scores = te.compute(shape, product, SCORES, attrs=_stage(SCORES))
    start, stop = _bound(a, a.start, START), _bound(a, a.stop, STOP)

    def masked(b: Any, h: Any, i: Any, j: Any) -> Any:
        inside = ([start(b, i) <= j] if start is not None else []) + ([j < stop(b, i)] if stop is not None else [])
        value = a.mask(scores(b, h, i, j), b, h, i, j)
        return tirx.Select(tirx.all(*inside), value, minus) if inside else value

    weights = _softmax(te.compute(shape, masked, MASKED, attrs=_stage(MASKED)))
    position = te.reduce_axis((0, a.keys), "j")

    def total(b: Any, h: Any, i: Any, d: Any) -> Any:
        return te.sum(weights(b, h, i, position) * a.value(b, h, position, d), axis=position)

    if a.rows_first:
        extents, order = (a.batch, a.rows, a.heads, a.width), [0, 2, 1, 3]
        result = te.compute(extents, lambda b, i, h, d: total(b, h, i, d), TEMPLATE, attrs=_core(order))
    else:
        extents, order = (a.batch, a.heads, a.rows, a.width), [0, 1, 2, 3]
        result = te.compute(extents, total, TEMPLATE, attrs=_core(order))
    if isinstance(a.keys, int):
        return result
    # What a sum over no keys leaves in memory depends on its schedule.
    zero = tirx.const(0, a.dtype)
    return te.compute(extents, lambda *at: tirx.Select(a.keys == 0, zero, result(*at)), "attention_or_zero")


def _core(order: list[int]) -> dict[str, Any]:
    """Annotate the last stage; ``order`` says where batch, head, row and element are among its axes."""
    return {"optc.template": TEMPLATE, "optc.axes": order}


def _stage(name: str) -> dict[str, Any]:
    return {"optc.stage": name}


def _bound(a: Attention, bound: Bound | None, name: str) -> Any:
    return None if bound is None else te.compute((a.batch, a.rows), bound, name, attrs=_stage(name))


def _softmax(x: Any) -> Any:
    """Return the softmax along the last axis; rows of minus infinity become zeros."""
    *rows, length = x.shape
    dtype = str(x.dtype)
    along = te.reduce_axis((0, length), "k"), te.reduce_axis((0, length), "k")
    top = te.compute(rows, lambda *i: te.max(x(*i, along[0]), axis=along[0]), "top", attrs=_stage("top"))

    def power(*i: Any) -> Any:
        peak = top(*i[:-1])
        peak = tirx.Select(peak == tirx.const(-np.inf, dtype), tirx.const(0, dtype), peak)
        return vector_math.exp(x(*i) - peak)

    powers = te.compute(x.shape, power, "powers", attrs=_stage("powers"))
    total = te.compute(rows, lambda *i: te.sum(powers(*i, along[1]), axis=along[1]), "total", attrs=_stage("total"))

    def share(*i: Any) -> Any:
        whole = total(*i[:-1])
        return powers(*i) / tirx.Select(whole == tirx.const(0, dtype), tirx.const(1, dtype), whole)

    return te.compute(x.shape, share, "shares", attrs=_stage("shares"))
