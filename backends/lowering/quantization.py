"""Quantization: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as oir
from tvm import te, tirx

from optc.backends.kernels import reduction
from optc.backends.kernels import vector_math as vm
from optc.backends.kernels.vector_math import convert
from optc.backends.lowering.emit import as_index
from optc.backends.lowering.known import Dequantized, Known
from optc.backends.lowering.pointwise import compute_dtype, immediate
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()

_INTEGERS = ("int8", "uint8", "int16", "uint16")
_BELOW_ONE = 1 - 2.0**-24
"""The largest float32 below 1."""


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
        self.site, self.number = site, number
        self.shape = _shape(site, number)
        self.immediate = _immediate(site, number)
        self.tensors: list[Any] = []
        rank = len(_shape(site, 0))
        self.axis = site.attr("axis", 1) % max(rank, 1)
        self.block = site.attr("block_size", 0)

    def below_one(self) -> bool:
        """Tell whether these are several float32 values that are all known to be less than 1 from 0."""
        array = self.site.constant(self.number)
        if self.immediate is not None or array is None or array.dtype != np.float32:
            return False
        return bool((np.abs(array) < 1).all())

    def load(self) -> None:
        """Make the tensor that ``read`` reads."""
        self.tensors = [] if self.immediate is not None else [_widened(self.site, self.number)]

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
        parameter.load()
        parameter.check(_shape(site, 0))
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


def _four_bits(site: Site, number: int) -> bool:
    """Tell whether an input is a constant of 4 bits; other values of 4 bits are not supported."""
    return site.value(number).dtype in (oir.DataType.INT4, oir.DataType.UINT4) and site.constant(number) is not None


def _widened(site: Site, number: int) -> Any:
    """Return an input as a tensor, a constant of 4 bits as one of 8."""
    if not _four_bits(site, number):
        return site.tensor(number)
    return site.weight(site.constant(number).astype(np.int8), f"widened{number}")


def _immediate(site: Site, number: int) -> Any:
    """Return the immediate of an input that is a constant of one element, else None."""
    if not _four_bits(site, number):
        return immediate(site, number)
    array = site.constant(number).astype(np.int32)
    return tirx.const(int(array.reshape(-1)[0]), "int32") if array.size == 1 else None


def _shape(site: Site, number: int) -> list[Any]:
    """Return the shape of an input; constants do not become tensors for it."""
    array = site.constant(number)
    return site.shape(number) if array is None else list(array.shape)


@TABLE.lowers("DequantizeLinear")
def dequantize(site: Site) -> Any:
    """DequantizeLinear-25 from 4- (constants only), 8-, 16- and 32-bit integers: per tensor, axis, or block of an axis.

    Constants are dequantized where they are read, see ``known.Dequantized``.
    """
    packed = _four_bits(site, 0)
    if not packed and site.dtype(0) not in (*_INTEGERS, "int32"):
        site.unsupported(f"dequantization of {site.dtype(0)} is not supported")
    values, scale, zero = (site.constant(i) for i in range(3))
    if values is None or scale is None or (zero is None and site.has(2)):
        return _dequantize(site, packed=False)
    for number in (1, 2):
        if site.has(number):
            _Parameter(site, number).check(_shape(site, 0))
    axis = site.attr("axis", 1) % max(values.ndim, 1)
    return Known(
        dequantized=Dequantized(
            values,
            scale,
            zero,
            axis,
            site.attr("block_size", 0),
            parts=partial(_parts, site, packed=packed and values.ndim > 0),
            make=partial(_dequantize, site, packed=packed and values.ndim > 0),
        )
    )


def _dequantize(site: Site, *, packed: bool) -> Any:
    """Emit the kernel that dequantizes all of the first input."""
    shape = [as_index(d) for d in _shape(site, 0)]
    tensors, read = _parts(site, packed=packed)
    return site.emit(lambda *given: te.compute(shape, lambda *index: read(index, *given), "dequantize"), *tensors)


def _parts(site: Site, *, packed: bool) -> tuple[list[Any], Callable[..., Any]]:
    """Return tensors with integers, scales and zero points, and the function that computes an element from them."""
    dtype = site.output_dtype()
    parameters = _parameters(site)
    work = compute_dtype(site.dtype(1))
    bounded = site.value(0).dtype == oir.DataType.INT32 and parameters[0].below_one()
    signed = site.value(0).dtype == oir.DataType.INT4

    def read(index: Sequence[Any], x: Any, *tensors: Any) -> Any:
        scale, *zero = _read(parameters, tensors, index)
        value = _unpack(x, index, signed=signed) if packed else convert(x(*index), "int32")
        if zero:
            value = value - convert(zero[0], "int32")
        factor = convert(scale, work)
        if bounded:
            # Said in the expression, it spares the sum that is scaled the bounds of its conversion to an integer.
            factor = tirx.min(tirx.max(factor, vm.f32(-_BELOW_ONE)), vm.f32(_BELOW_ONE))
        return convert(convert(value, work) * factor, dtype)

    data = site.weight(_nibbles(site.constant(0)), "nibbles") if packed else _widened(site, 0)
    return [data, *(t for p in parameters for t in p.tensors)], read


def _nibbles(values: np.ndarray) -> np.ndarray:
    """Pack integers of 4 bits ``[..., n]`` into bytes ``[..., ceil(n/2)]``, the first of two in the lower bits."""
    fields = values.astype(np.int8).view(np.uint8) & 15
    if fields.shape[-1] % 2:
        fields = np.pad(fields, [(0, 0)] * (fields.ndim - 1) + [(0, 1)])
    packed: np.ndarray = fields[..., 0::2] | (fields[..., 1::2] << 4)
    return packed


def _unpack(x: Any, index: Sequence[Any], *, signed: bool) -> Any:
    """Return the integer that ``_nibbles`` put at ``index``, as int32."""
    *outer, i = index
    pair = convert(x(*outer, tirx.floordiv(i, 2)), "int32")
    field = (pair >> (tirx.floormod(i, 2) * 4).astype("int32")) & tirx.const(15, "int32")
    return (field ^ tirx.const(8, "int32")) - tirx.const(8, "int32") if signed else field


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
