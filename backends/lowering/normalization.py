"""Normalization layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import reduction
from optc.backends.kernels import vector_math as vm
from optc.backends.kernels.vector_math import convert
from optc.backends.lowering import broadcasting
from optc.backends.lowering.pointwise import compute_dtype
from optc.backends.lowering.reductions import merge_index, over_axes
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()


def _product(dims: Sequence[Any]) -> Any:
    total: Any = 1
    for dim in dims:
        total = total * dim
    return total


def _count(dims: Sequence[Any], dtype: str) -> Any:
    return convert(tirx.IntImm("int64", 1) * _product(dims), dtype)


def _inverse_root(variance: Any, epsilon: float) -> Any:
    dtype = vm.dtype_of(variance)
    return tirx.const(1, dtype) / tirx.sqrt(variance + tirx.const(epsilon, dtype))


def _moments(
    read: reduction.Read, rows: Sequence[Any], extents: Sequence[Any], work: str, contiguous: bool
) -> tuple[Any, Any]:
    """Return mean and population variance, in two passes: one pass would cancel."""
    total = reduction.reduce(reduction.addition(work), read, rows, extents, contiguous=contiguous, name="sum")
    mean = te.compute(rows, lambda *i: total(*i) / _count(extents, work), "mean")

    def square(outer: Any, inner: Any) -> Any:
        return vm.bind(read(outer, inner) - mean(*outer), lambda d: d * d)

    squares = reduction.reduce(reduction.addition(work), square, rows, extents, contiguous=contiguous, name="squares")
    return mean, te.compute(rows, lambda *i: squares(*i) / _count(extents, work), "variance")


def _converted(tensor: Any, dtype: str, name: str) -> Any:
    return te.compute(tensor.shape, lambda *i: convert(tensor(*i), dtype), name)


@TABLE.lowers("LayerNormalization")
def layer_normalization(site: Site) -> Any:
    """LayerNormalization-17 with its outputs Mean and InvStdDev; computes in float32 or wider."""
    shape, axis = site.shape(0), site.attr("axis", -1) % site.rank(0)
    dtype, epsilon = site.dtype(0), site.attr("epsilon", 1e-5)
    stash = site.output_dtype(1) if site.output_count > 1 else "float32"
    work = "float64" if dtype == "float64" else "float32"
    rows, extents, x, affine, shapes = _row_view(site, shape, axis, [1, 2])

    def compute(x: Any, *parameters: Any) -> Any:
        def read(outer: Any, inner: Any) -> Any:
            return convert(x(*outer, *inner), work)

        mean, variance = _moments(read, rows, extents, work, contiguous=True)
        inverse = te.compute(rows, lambda *i: _inverse_root(variance(*i), epsilon), "inverse")

        def element(*index: Any) -> Any:
            outer = index[: len(rows)]
            value = (convert(x(*index), work) - mean(*outer)) * inverse(*outer)
            terms = [
                convert(p(*broadcasting.read_index(site, s, [*rows, *extents], index)), work)
                for p, s in zip(parameters, shapes, strict=True)
            ]
            value = value * terms[0]
            return convert(value + terms[1] if len(terms) > 1 else value, dtype)

        results = [te.compute(x.shape, element, "layernormalization")]
        for number, tensor in ((1, mean), (2, inverse)):
            if site.wants(number):
                results.append(_converted(tensor, stash, f"stash{number}"))
        return results

    outputs = iter(site.emit(compute, x, *affine))
    first = site.reshape(next(outputs), shape)
    reduced = [*shape[:axis], *[1] * (len(shape) - axis)]
    rest = [site.reshape(next(outputs), reduced) if site.wants(i) else None for i in (1, 2)]
    return [first, *rest]


@TABLE.lowers("RMSNormalization")
def rms_normalization(site: Site) -> Any:
    """RMSNormalization-23; computes in float32 or wider."""
    shape, axis = site.shape(0), site.attr("axis", -1) % site.rank(0)
    dtype, epsilon = site.output_dtype(), site.attr("epsilon", 1e-5)
    work = "float64" if site.dtype(0) == "float64" else "float32"
    rows, extents, x, affine, shapes = _row_view(site, shape, axis, [1])

    def compute(x: Any, scale: Any) -> Any:
        def square(outer: Any, inner: Any) -> Any:
            return vm.bind(convert(x(*outer, *inner), work), lambda v: v * v)

        total = reduction.reduce(reduction.addition(work), square, rows, extents, contiguous=True)
        inverse = te.compute(rows, lambda *i: _inverse_root(total(*i) / _count(extents, work), epsilon), "inverse")

        def element(*index: Any) -> Any:
            factor = scale(*broadcasting.read_index(site, shapes[0], [*rows, *extents], index))
            value = convert(x(*index), work) * inverse(*index[: len(rows)])
            return convert(value * convert(factor, work), dtype)

        return te.compute(x.shape, element, "rmsnormalization")

    return site.reshape(site.emit(compute, x, *affine), shape)


def _row_view(site: Site, shape: list[Any], axis: int, parameters: list[int]) -> Any:
    """View input 0 with its normalized axes as one, if the parameters cover exactly those axes.

    Returns rows, extents, the tensor, the parameter tensors and their shapes.
    """
    numbers = [i for i in parameters if site.has(i)]
    rows, extents = shape[:axis], shape[axis:]
    shapes = [site.shape(i) for i in numbers]
    covered = all(
        len(s) == len(extents) and all(site.prove_equal(a, b) for a, b in zip(s, extents, strict=True)) for s in shapes
    )
    tensors = [site.tensor(i) for i in numbers]
    x = site.tensor(0)
    if len(extents) > 1 and covered:
        extents = [_product(extents)]
        x = site.reshape(x, [*rows, *extents])
        tensors = [site.reshape(t, extents) for t in tensors]
        shapes = [extents for _ in shapes]
    else:
        broadcasting.broadcast_shapes(site, shape, *shapes)
        tensors = [broadcasting.checked(site, t, s, shape) for t, s in zip(tensors, shapes, strict=True)]
    return rows, extents, x, tensors, shapes


@TABLE.lowers("InstanceNormalization", "GroupNormalization")
def group_normalization(site: Site) -> Any:
    """InstanceNormalization-22 and GroupNormalization-21: statistics per sample and group of channels."""
    shape, dtype, epsilon = site.shape(0), site.dtype(0), site.attr("epsilon", 1e-5)
    work = compute_dtype(dtype)
    channels = shape[1]
    groups = site.attr("num_groups") if site.op == "GroupNormalization" else channels
    if isinstance(channels, int) and isinstance(groups, int):
        width: Any = channels // groups
        if width * groups != channels:
            site.unsupported(f"{channels} channels do not divide into {groups} groups")
    elif site.op == "InstanceNormalization":
        width = 1
    else:
        return site.unsupported("the number of channels must be known while compiling")
    spatial = _product(shape[2:])
    extent = width * spatial
    flat = site.reshape(site.tensor(0), [shape[0], groups, extent])
    grouped = site.reshape(site.tensor(0), [shape[0], groups, width, spatial])

    def compute(x: Any, view: Any, scale: Any, bias: Any) -> Any:
        def read(outer: Any, inner: Any) -> Any:
            return convert(x(*outer, *inner), work)

        rows = [shape[0], groups]
        mean, variance = _moments(read, rows, [extent], work, contiguous=True)
        inverse = te.compute(rows, lambda *i: _inverse_root(variance(*i), epsilon), "inverse")

        def element(n: Any, g: Any, c: Any, s: Any) -> Any:
            channel = g * width + c
            value = (convert(view(n, g, c, s), work) - mean(n, g)) * inverse(n, g)
            return convert(value * convert(scale(channel), work) + convert(bias(channel), work), dtype)

        return te.compute([*rows, width, spatial], element, site.op.lower())

    return site.reshape(site.emit(compute, flat, grouped, site.tensor(1), site.tensor(2)), shape)


@TABLE.lowers("BatchNormalization")
def batch_normalization(site: Site) -> Any:
    """BatchNormalization-15; while training also the updated running mean and variance."""
    if site.attr("training_mode", 0):
        return _batch_normalization_training(site)
    epsilon = site.attr("epsilon", 1e-5)
    dtype, work = site.dtype(0), compute_dtype(site.dtype(0))
    known = [site.constant(i) for i in range(1, 5)]
    if all(array is not None for array in known):
        scale, bias, mean, variance = (np.asarray(a).astype(np.float64) for a in known)
        factor = scale / np.sqrt(variance + epsilon)
        folded = [site.weight(factor.astype(work), "factor")]
        folded.append(site.weight((bias - mean * factor).astype(work), "addend"))

        def affine(x: Any, factor: Any, addend: Any) -> Any:
            return te.compute(
                x.shape,
                lambda *i: convert(convert(x(*i), work) * factor(_channel(i)) + addend(_channel(i)), dtype),
                "batchnormalization",
            )

        return site.emit(affine, site.tensor(0), *folded)

    def compute(x: Any, *parameters: Any) -> Any:
        return te.compute(x.shape, lambda *i: _normalized(x, parameters, i, epsilon, work, dtype), "batchnormalization")

    return site.emit(compute, *(site.tensor(i) for i in range(5)))


def _channel(index: Sequence[Any]) -> Any:
    return index[1] if len(index) > 1 else tirx.IntImm("int64", 0)


def _normalized(x: Any, parameters: Sequence[Any], i: Any, epsilon: float, work: str, dtype: str) -> Any:
    scale, bias, mean, variance = (convert(p(_channel(i)), work) for p in parameters)
    value = (convert(x(*i), work) - mean) * _inverse_root(variance, epsilon)
    return convert(value * scale + bias, dtype)


def _batch_normalization_training(site: Site) -> Any:
    shape, dtype = site.shape(0), site.dtype(0)
    epsilon, momentum = site.attr("epsilon", 1e-5), site.attr("momentum", 0.9)
    work = compute_dtype(dtype)
    axes = [i for i in range(len(shape)) if i != 1]
    rows, extents = over_axes(shape, axes)

    def compute(x: Any, scale: Any, bias: Any, *running: Any) -> Any:
        def read(outer: Any, inner: Any) -> Any:
            return convert(x(*merge_index(len(shape), axes, outer, inner)), work)

        moments = _moments(read, rows, extents, work, contiguous=len(shape) > 2)
        results = [
            te.compute(
                shape,
                lambda *i: _normalized(x, [scale, bias, *moments], i, epsilon, work, dtype),
                "batchnormalization",
            )
        ]
        for number, (old, new) in enumerate(zip(running, moments, strict=True), 1):
            if site.wants(number):
                results.append(_blend(old, new, momentum, site.output_dtype(number), f"running{number}"))
        return results

    outputs = iter(site.emit(compute, *(site.tensor(i) for i in range(5))))
    return [next(outputs), *(next(outputs) if site.wants(i) else None for i in (1, 2))]


def _blend(old: Any, new: Any, momentum: float, dtype: str, name: str) -> Any:
    work = str(new.dtype)
    keep, take = tirx.const(momentum, work), tirx.const(1.0 - momentum, work)
    return te.compute(new.shape, lambda c: convert(convert(old(c), work) * keep + new(c) * take, dtype), name)


@TABLE.lowers("LpNormalization")
def lp_normalization(site: Site) -> Any:
    """LpNormalization-22: divides by the 1- or 2-norm along an axis; a norm of 0 gives 0."""
    shape, dtype = site.shape(0), site.dtype(0)
    axis, p = site.attr("axis", -1) % len(shape), site.attr("p", 2)
    work = compute_dtype(dtype)
    rows, extents = over_axes(shape, [axis])
    magnitude: Callable[[Any], Any] = tirx.abs if p == 1 else (lambda v: vm.bind(v, lambda v: v * v))

    def compute(x: Any) -> Any:
        def read(outer: Any, inner: Any) -> Any:
            return magnitude(convert(x(*merge_index(len(shape), [axis], outer, inner)), work))

        contiguous = axis == len(shape) - 1
        total = reduction.reduce(reduction.addition(work), read, rows, extents, contiguous=contiguous)
        norm = te.compute(rows, lambda *i: total(*i) if p == 1 else tirx.sqrt(total(*i)), "norm")

        def element(*index: Any) -> Any:
            divisor = norm(*index[:axis], *index[axis + 1 :])
            zero = tirx.const(0, work)
            return convert(tirx.Select(divisor == zero, zero, convert(x(*index), work) / divisor), dtype)

        return te.compute(shape, element, "lpnormalization")

    return site.emit(compute, site.tensor(0))


@TABLE.lowers("LRN")
def local_response_normalization(site: Site) -> Any:
    """LRN-13: divides by a power of the mean square over neighbouring channels."""
    shape, dtype = site.shape(0), site.dtype(0)
    work = compute_dtype(dtype)
    size, bias = site.attr("size"), site.attr("bias", 1.0)
    alpha, beta = site.attr("alpha", 1e-4), site.attr("beta", 0.75)
    before = (size - 1) // 2

    def compute(x: Any) -> Any:
        offset = te.reduce_axis((0, size), "offset")

        def squares(n: Any, c: Any, *s: Any) -> Any:
            channel = c + offset.var - before
            inside = tirx.And(channel >= 0, channel < shape[1])
            # Not a Select, which would read outside.
            value = tirx.if_then_else(inside, convert(x(n, channel, *s), work), tirx.const(0, work))
            return te.sum(vm.bind(value, lambda v: v * v), axis=offset)

        total = te.compute(shape, squares, "squares")

        def element(*i: Any) -> Any:
            base = tirx.const(bias, work) + tirx.const(alpha / size, work) * total(*i)
            return convert(convert(x(*i), work) * vm.exp(tirx.const(-beta, work) * vm.log(base)), dtype)

        return te.compute(shape, element, "lrn")

    return site.emit(compute, site.tensor(0))
