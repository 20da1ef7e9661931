"""Attention and RotaryEmbedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import attention as fused
from optc.backends.kernels import reduction, vector_math
from optc.backends.kernels.contraction import FUSIBLE, accumulator, annotate, narrow, widen
from optc.backends.lowering.emit import as_index, shape_of
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table

TABLE = Table()
_ELEMENTWISE = {"op_pattern": 0}


@dataclass(frozen=True)
class Heads:
    """A query, key or value tensor as ``[batch, head, position, size]``, however it lies in memory."""

    tensor: Any
    batch: Any
    heads: Any
    length: Any
    size: Any
    packed: bool

    def at(self, a: Any, b: Any, h: Any, s: Any, d: Any) -> Any:
        """Read the te tensor ``a`` of this layout."""
        return a(b, s, h * self.size + d) if self.packed else a(b, h, s, d)


def _heads(site: Site, index: int, count: str) -> Heads:
    x = site.tensor(index)
    shape = shape_of(x)
    if len(shape) == 4:
        batch, count_, length, size = shape
        return Heads(x, batch, count_, length, size, False)
    heads = site.attr(count)
    if not heads:
        site.unsupported(f"inputs of rank 3 need the attribute {count}")
    return Heads(x, shape[0], heads, shape[1], shape[2] // heads, packed=True)


@TABLE.lowers("Attention")
def attention(site: Site) -> Any:
    """Attention-23/24/25: scores, soft cap, masks, softmax, weighted values; ranks 3 and 4, grouped heads, caches.

    A row in which every key is masked gives zeros.
    """
    q, k, v = _heads(site, 0, "q_num_heads"), _heads(site, 1, "kv_num_heads"), _heads(site, 2, "kv_num_heads")
    past = site.shape(4)[2] if site.has(4) else 0
    if site.has(4):
        k, v = _append(site, k, 4), _append(site, v, 5)
    elif site.wants(1) or site.wants(2):
        k, v = _unpacked(site, k), _unpacked(site, v)
    mask = _mask(site, q, k, past)
    if site.wants(3) or not isinstance(q.size, int) or not isinstance(v.size, int):
        y, exposed = _in_steps(site, q, k, v, mask)
    else:
        y, exposed = _fused(site, q, k, v, mask), None
    present = [k.tensor if site.wants(1) else None, v.tensor if site.wants(2) else None]
    return [y, *present, exposed]


def _in_steps(site: Site, q: Heads, k: Heads, v: Heads, mask: _Mask) -> tuple[Any, Any]:
    """Emit attention with its scores in memory; returns the output and the scores that the node exposes."""
    dtype, wide = site.dtype(0), accumulator(site.dtype(0))
    raw = _scores(site, q, k, wide)
    cap = mask.cap
    capped = raw if cap <= 0 else _map(site, raw, lambda x: _capped(x, cap))
    biased = _biased(site, capped, mask)
    weights = _softmax(site, biased)
    y = _weighted(site, q, weights, v, dtype)
    scores = [raw, capped, biased, weights][site.attr("qk_matmul_output_mode", 0)]
    return y, _map(site, scores, lambda x: vector_math.convert(x, dtype)) if site.wants(3) else None


def _fused(site: Site, q: Heads, k: Heads, v: Heads, mask: _Mask) -> Any:
    """Emit attention as one kernel."""
    dtype, wide = site.dtype(0), accumulator(site.dtype(0))
    factor, group = _factor(site, q), _group(site, q, k)

    def compute(a: Any, c: Any, x: Any, *extra: Any) -> Any:
        def read(heads: Heads, tensor: Any, shared: int) -> fused.Read:
            return lambda b, h, s, d: widen(heads.at(tensor, b, h if shared == 1 else h // shared, s, d), wide)

        def score(value: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            scaled = value * scalar(factor, wide)
            return mask.added(extra, scaled if mask.cap <= 0 else _capped(scaled, mask.cap), b, h, i, j)

        return narrow(
            fused.attention(
                fused.Attention(
                    q.batch,
                    q.heads,
                    q.length,
                    k.length,
                    q.size,
                    v.size,
                    wide,
                    read(q, a, 1),
                    read(k, c, group),
                    read(v, x, group),
                    score,
                    mask.start(extra),
                    mask.stop(extra),
                    rows_first=q.packed,
                )
            ),
            dtype,
        )

    y = site.emit(compute, q.tensor, k.tensor, v.tensor, *mask.tensors, name="attention", attributes=FUSIBLE)
    return site.reshape(y, [q.batch, q.length, q.heads * v.size]) if q.packed else y


def _capped(x: Any, cap: float) -> Any:
    dtype = str(x.ty.dtype)
    return vector_math.tanh(x / scalar(cap, dtype)) * scalar(cap, dtype)


def _map(site: Site, x: Any, function: Callable[[Any], Any]) -> Any:
    return site.emit(
        lambda a: te.compute(a.shape, lambda *i: function(a(*i)), "scores"), x, name="scores", attributes=_ELEMENTWISE
    )


def _append(site: Site, x: Heads, index: int) -> Heads:
    """Emit the concatenation of the cache (input ``index``) and the new positions."""
    cache = site.tensor(index)
    length = site.shape(index)[2]
    total = length + x.length

    def compute(old: Any, new: Any) -> Any:
        def element(b: Any, h: Any, s: Any, d: Any) -> Any:
            first = as_index(length)
            return tirx.if_then_else(s < first, old(b, h, s, d), x.at(new, b, h, s - first, d))

        return te.compute((x.batch, x.heads, total, x.size), element, "present")

    present = site.emit(compute, cache, x.tensor, name="present")
    return Heads(present, x.batch, x.heads, total, x.size, packed=False)


def _unpacked(site: Site, x: Heads) -> Heads:
    if not x.packed:
        return x

    def compute(a: Any) -> Any:
        return te.compute((x.batch, x.heads, x.length, x.size), lambda b, h, s, d: x.at(a, b, h, s, d), "present")

    present = site.emit(compute, x.tensor, name="present")
    return Heads(present, x.batch, x.heads, x.length, x.size, packed=False)


def _scores(site: Site, q: Heads, k: Heads, wide: str) -> Any:
    """Emit ``scale * Q K^T`` as ``[batch, head, query, key]``."""
    factor, group = _factor(site, q), _group(site, q, k)

    def compute(a: Any, c: Any) -> Any:
        d = te.reduce_axis((0, q.size), "d")

        def element(b: Any, h: Any, s: Any, t: Any) -> Any:
            key = k.at(c, b, h if group == 1 else h // group, t, d)
            return te.sum(widen(q.at(a, b, h, s, d), wide) * widen(key, wide), axis=d)

        shape = (q.batch, q.heads, q.length, k.length)
        total = te.compute(shape, element, "scores", attrs=annotate([2], [3]))
        return te.compute(shape, lambda *i: total(*i) * scalar(factor, wide), "scaled")

    return site.emit(compute, q.tensor, k.tensor, name="attention_scores", attributes=FUSIBLE)


def _factor(site: Site, q: Heads) -> float:
    scale = site.attr("scale")
    if scale:
        return float(scale)
    if not isinstance(q.size, int):
        site.unsupported("the head size must be known while compiling")
    return 1.0 / math.sqrt(q.size)


def _group(site: Site, q: Heads, k: Heads) -> int:
    if not isinstance(q.heads, int) or not isinstance(k.heads, int):
        if not site.prove_equal(q.heads, k.heads):
            site.unsupported("the numbers of heads must be known while compiling")
        return 1
    return q.heads // k.heads


@dataclass(frozen=True)
class _Mask:
    """What is done to scaled scores. ``tensors`` are the mask and the valid lengths, those that are given."""

    cap: float
    causal: bool
    left: int
    right: int
    past: Any
    queries: Any
    keys: Any
    masked: bool
    tensors: list[Any]

    @property
    def padded(self) -> bool:
        """Tell whether lengths are given."""
        return len(self.tensors) > self.masked

    def added(self, tensors: Sequence[Any], value: Any, *at: Any) -> Any:
        """Return ``value`` with the mask applied."""
        if not self.masked:
            return value
        value, allowed = _apply(tensors[0], value, at, self.keys)
        return tirx.Select(tirx.all(*allowed), value, tirx.const(-np.inf, str(value.ty.dtype))) if allowed else value

    def _position(self, tensors: Sequence[Any], b: Any, i: Any) -> Any:
        """Return the position among the keys of query ``i``."""
        return i + (tensors[-1](b) - as_index(self.queries) if self.padded else as_index(self.past))

    def start(self, tensors: Sequence[Any]) -> fused.Bound | None:
        """Return the first key that a query sees, None for 0."""
        if self.left < 0:
            return None
        return lambda b, i: self._position(tensors, b, i) - self.left

    def stop(self, tensors: Sequence[Any]) -> fused.Bound | None:
        """Return the end of the keys that a query sees, None for all."""
        ahead = 0 if self.causal else self.right
        if ahead < 0 and not self.padded:
            return None

        def bound(b: Any, i: Any) -> Any:
            if ahead < 0:
                return tensors[-1](b)
            end = self._position(tensors, b, i) + (min(ahead, self.right) if self.right >= 0 else ahead) + 1
            return tirx.min(end, tensors[-1](b)) if self.padded else end

        return bound


def _mask(site: Site, q: Heads, k: Heads, past: Any) -> _Mask:
    tensors = ([site.tensor(3)] if site.has(3) else []) + ([site.tensor(6)] if site.has(6) else [])
    left, right = site.attr("left_window_size", -1), site.attr("right_window_size", -1)
    cap = float(site.attr("softcap", 0.0) or 0.0)
    causal = bool(site.attr("is_causal", 0))
    return _Mask(cap, causal, left, right, past, q.length, k.length, site.has(3), tensors)


def _biased(site: Site, scores: Any, mask: _Mask) -> Any:
    """Emit what the mask does to the scores."""
    start, stop = mask.start(mask.tensors), mask.stop(mask.tensors)
    if not mask.tensors and start is None and stop is None:
        return scores

    def compute(x: Any, *rest: Any) -> Any:
        minus = tirx.const(-np.inf, str(x.dtype))
        start, stop = mask.start(rest), mask.stop(rest)

        def element(b: Any, h: Any, i: Any, j: Any) -> Any:
            inside = ([start(b, i) <= j] if start is not None else []) + ([j < stop(b, i)] if stop is not None else [])
            value = mask.added(rest, x(b, h, i, j), b, h, i, j)
            return tirx.Select(tirx.all(*inside), value, minus) if inside else value

        return te.compute(x.shape, element, "masked")

    return site.emit(compute, scores, *mask.tensors, name="mask", attributes=_ELEMENTWISE)


def _apply(mask: Any, value: Any, at: Sequence[Any], length: Any) -> tuple[Any, list[Any]]:
    """Return ``value`` with a float mask added, and the conditions of a bool or short mask."""
    dims = list(mask.shape)
    tail = list(at)[4 - len(dims) :]
    key = tail[-1]
    conditions = []
    extent = dims[-1]
    if not _is(extent, length):
        conditions.append(key < extent)
        tail[-1] = tirx.min(key, extent - 1)
    index = [as_index(0) if _is(d, 1) else _clamped(i, d) for d, i in zip(dims[:-1], tail[:-1], strict=True)]
    index.append(tail[-1])
    if str(mask.dtype) == "bool":
        return value, [*conditions, mask(*index)]
    return value + vector_math.convert(mask(*index), str(value.ty.dtype)), conditions


def _clamped(index: Any, extent: Any) -> Any:
    """Return ``index``, or 0 where a symbolic ``extent`` turns out to be 1."""
    return index if isinstance(extent, tirx.IntImm) else tirx.min(index, extent - 1)


def _is(extent: Any, other: Any) -> bool:
    if isinstance(extent, tirx.IntImm):
        return isinstance(other, int) and int(extent) == other
    return not isinstance(other, int) and bool(extent.same_as(other))


def _softmax(site: Site, scores: Any) -> Any:
    """Emit the softmax over keys; rows of minus infinity become zeros."""

    def compute(x: Any) -> Any:
        *rows, length = x.shape
        dtype = str(x.dtype)
        top = reduction.reduce(
            reduction.maximum(dtype), lambda i, k: x(*i, *k), rows, [length], contiguous=True, name="top"
        )

        def power(*i: Any) -> Any:
            peak = top(*i[:-1])
            peak = tirx.Select(peak == tirx.const(-np.inf, dtype), tirx.const(0, dtype), peak)
            return vector_math.exp(x(*i) - peak)

        powers = te.compute(x.shape, power, "powers")
        total = reduction.reduce(
            reduction.addition(dtype), lambda i, k: powers(*i, *k), rows, [length], contiguous=True, name="total"
        )

        def share(*i: Any) -> Any:
            whole = total(*i[:-1])
            return powers(*i) / tirx.Select(whole == tirx.const(0, dtype), tirx.const(1, dtype), whole)

        return te.compute(x.shape, share, "softmax")

    return site.emit(compute, scores, name="attention_softmax")


def _weighted(site: Site, q: Heads, weights: Any, v: Heads, dtype: str) -> Any:
    """Emit the weighted sum of values, in the layout of the query."""
    group = _group(site, q, v)
    wide = accumulator(dtype)

    def compute(p: Any, c: Any) -> Any:
        t = te.reduce_axis((0, v.length), "t")

        def term(b: Any, h: Any, s: Any, d: Any) -> Any:
            value = v.at(c, b, h if group == 1 else h // group, t, d)
            return te.sum(p(b, h, s, t) * widen(value, wide), axis=t)

        if q.packed:
            shape = (q.batch, q.length, q.heads, v.size)
            y = te.compute(shape, lambda b, s, h, d: term(b, h, s, d), "attention", attrs=annotate([1], [3]))
        else:
            y = te.compute((q.batch, q.heads, q.length, v.size), term, "attention", attrs=annotate([2], [3]))
        return narrow(y, dtype)

    y = site.emit(compute, weights, v.tensor, name="attention", attributes=FUSIBLE)
    return site.reshape(y, [q.batch, q.length, q.heads * v.size]) if q.packed else y


@TABLE.lowers("RotaryEmbedding")
def rotary_embedding(site: Site) -> Any:
    """RotaryEmbedding-23: rotate pairs of elements by cached angles, whole or part of each head."""
    x = site.tensor(0)
    shape, dtype = shape_of(x), site.dtype(0)
    packed = len(shape) == 3
    heads = site.attr("num_heads", 0)
    if packed and not heads:
        site.unsupported("an input of rank 3 needs the attribute num_heads")
    size = shape[2] // heads if packed else shape[3]
    rotated = site.attr("rotary_embedding_dim", 0) or size
    half = rotated // 2
    interleaved = bool(site.attr("interleaved", 0))
    wide = accumulator(dtype)
    extra = [site.tensor(i) for i in (1, 2, 3) if site.has(i)]

    def compute(a: Any, cosine: Any, sine: Any, *positions: Any) -> Any:
        def element(*i: Any) -> Any:
            b, s = (i[0], i[1]) if packed else (i[0], i[2])
            base, d = ((i[2] // size) * size, i[2] % size) if packed else (None, i[3])

            def read(at: Any) -> Any:
                value = a(b, s, base + at) if packed else a(b, i[1], s, at)
                return widen(value, wide)

            angle = d // 2 if interleaved else d % half
            first = angle * 2 if interleaved else angle
            second = first + 1 if interleaved else first + half
            row = (positions[0](b, s),) if positions else (b, s)
            angle = tirx.min(angle, as_index(half) - 1)
            c, n = (widen(t(*row, angle), wide) for t in (cosine, sine))
            is_real = d % 2 == 0 if interleaved else d < half
            one, two = read(tirx.min(first, as_index(size) - 2)), read(tirx.min(second, as_index(size) - 1))
            turned = tirx.Select(is_real, c * one - n * two, n * one + c * two)
            if isinstance(rotated, int) and isinstance(size, int) and rotated == size:
                return vector_math.convert(turned, dtype)
            return vector_math.convert(tirx.Select(d < rotated, turned, read(d)), dtype)

        return te.compute(a.shape, element, "rotary_embedding")

    return site.emit(compute, x, *extra, name="rotary_embedding")
