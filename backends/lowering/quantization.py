"""Quantization: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import reduction
from optc.backends.kernels import vector_math as vm
from optc.backends.kernels.vector_math import convert
from optc.backends.lowering.pointwise import compute_dtype, immediate
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()

_INTEGERS = ("int8", "uint8", "int16", "uint16")


def saturate(value: Any, zero_point: Any, dtype: str) -> Any:
    """Return ``round_half_even(value) + zero_point`` (int32, or None for 0) clamped to ``dtype``."""
    info = np.iinfo(dtype)
    work = vm.dtype_of(value)
    low, high = (tirx.const(float(bound), work) for bound in (info.min, info.max))
    if zero_point is not None:
        low, high = low - zero_point.astype(work), high - zero_point.astype(work)
    # Clamped before it is rounded to an integer, between integers: what does not fit int32 would be undefined.
    total = tirx.nearbyint(tirx.min(tirx.max(value, low), high)).astype("int32")
    return (total if zero_point is None else total + zero_point).astype(dtype)


class _Parameter:
    """Scale or zero point: one value, one per position of an axis, or one per block of an axis."""

    def __init__(self, site: Site, number: int) -> None:
        self.site = site
        self.shape = site.shape(number)
        self.dtype = site.dtype(number)
        self.immediate = immediate(site, number)
        self.tensors = [] if self.immediate is not None else [site.tensor(number)]
        rank = site.rank(0)
        self.axis = site.attr("axis", 1) % max(rank, 1)
        self.block = site.attr("block_size", 0)

    def read(self, tensor: Any, index: Sequence[Any]) -> Any:
        """Return the value for element ``index``, in its own type."""
        if self.immediate is not None:
            return self.immediate
        if self.block:
            position = [tirx.floordiv(i, self.block) if axis == self.axis else i for axis, i in enumerate(index)]
            return tensor(*position)
        if not self.shape:
            return tensor()
        if len(self.shape) == 1 and self.shape[0] == 1:
            return tensor(0)
        return tensor(index[self.axis])

    def check(self, data: Sequence[Any]) -> None:
        """Refuse shapes that do not fit ``data``; those known only at run time are checked there."""
        if self.immediate is not None:
            return
        expected = list(data)
        if self.block:
            expected[self.axis] = tirx.floordiv(expected[self.axis] + (self.block - 1), self.block)
            if isinstance(data[self.axis], int):
                expected[self.axis] = -(-data[self.axis] // self.block)
        elif self.shape in ([], [1]):
            return
        else:
            expected = [data[self.axis]]
        if len(expected) != len(self.shape):
            self.site.unsupported(f"a scale of shape {self.shape} does not fit data of shape {list(data)}")
        if not all(self.site.prove_equal(a, b) for a, b in zip(expected, self.shape, strict=True)):
            if all(isinstance(d, int) for d in [*expected, *self.shape]):
                self.site.unsupported(f"a scale of shape {self.shape} does not fit data of shape {list(data)}")
            self.tensors = [self.site.check_equal(t, expected) for t in self.tensors]


def _parameters(site: Site) -> list[_Parameter]:
    parameters = [_Parameter(site, i) for i in (1, 2) if site.has(i)]
    for parameter in parameters:
        parameter.check(site.shape(0))
    return parameters


@TABLE.lowers("QuantizeLinear")
def quantize(site: Site) -> Any:
    """QuantizeLinear-25 to 8- and 16-bit integers: per tensor, per axis, or per block of an axis."""
    dtype = site.output_dtype()
    if dtype not in _INTEGERS:
        site.unsupported(f"quantization to {dtype} is not supported")
    parameters = _parameters(site)
    wide = "float64" in (site.dtype(0), site.dtype(1))
    work = "float64" if wide else "float32"

    def compute(x: Any, *tensors: Any) -> Any:
        def element(*index: Any) -> Any:
            scale, *zero = _read(parameters, tensors, index)
            ratio = convert(x(*index), work) / convert(scale, work)
            return saturate(ratio, convert(zero[0], "int32") if zero else None, dtype)

        return te.compute(x.shape, element, "quantize")

    return site.emit(compute, site.tensor(0), *(t for p in parameters for t in p.tensors))


def _read(parameters: Sequence[_Parameter], tensors: Sequence[Any], index: Sequence[Any]) -> list[Any]:
    given = iter(tensors)
    return [p.read(next(given) if p.tensors else None, index) for p in parameters]


@TABLE.lowers("DequantizeLinear")
def dequantize(site: Site) -> Any:
    """DequantizeLinear-25 from 8-, 16- and 32-bit integers: per tensor, per axis, or per block of an axis."""
    source, dtype = site.dtype(0), site.output_dtype()
    if source not in (*_INTEGERS, "int32"):
        site.unsupported(f"dequantization of {source} is not supported")
    parameters = _parameters(site)
    work = compute_dtype(site.dtype(1))

    def compute(x: Any, *tensors: Any) -> Any:
        def element(*index: Any) -> Any:
            scale, *zero = _read(parameters, tensors, index)
            value = convert(x(*index), "int32")
            if zero:
                value = value - convert(zero[0], "int32")
            return convert(convert(value, work) * convert(scale, work), dtype)

        return te.compute(x.shape, element, "dequantize")

    return site.emit(compute, site.tensor(0), *(t for p in parameters for t in p.tensors))


@TABLE.lowers("DynamicQuantizeLinear")
def dynamic_quantize(site: Site) -> Any:
    """DynamicQuantizeLinear-11: uint8 over the range of the data and 0, with its scale and zero point."""
    shape = site.shape(0)
    total: Any = 1
    for dim in shape:
        total = total * dim
    flat = site.reshape(site.tensor(0), [total])

    def compute(x: Any) -> Any:
        def read(_: Any, inner: Any) -> Any:
            return x(*inner)

        zero = vm.f32(0.0)
        low = reduction.reduce(reduction.minimum("float32"), read, [], [total], contiguous=True, name="low")
        high = reduction.reduce(reduction.maximum("float32"), read, [], [total], contiguous=True, name="high")

        def step() -> Any:
            width = tirx.max(zero, high()) - tirx.min(zero, low())
            return tirx.Select(width == zero, vm.f32(1.0), width / vm.f32(255.0))

        scale = te.compute([], step, "scale")
        point = te.compute([], lambda: saturate((zero - tirx.min(zero, low())) / scale(), None, "uint8"), "point")
        values = te.compute([total], lambda i: saturate(x(i) / scale(), convert(point(), "int32"), "uint8"), "quantize")
        return [values, scale, point]

    values, scale, point = site.emit(compute, flat)
    return [site.reshape(values, shape), scale, point]
