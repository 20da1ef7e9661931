"""Models as text: a summary for people, and the ONNX text form with large tensors elided."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx
import onnx_ir as oir

from optc.errors import InvalidModelError, IRError
from optc.ir import cost, dims
from optc.ir.graph import statistics
from optc.ir.serialize import to_proto, weight_bytes
from optc.ir.sizes import Amount

_LONGEST_FORMULA = 100
_LONGEST_TENSOR = 16
_DATA_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def summary(model: oir.Model, sizes: Mapping[str, int] | None = None) -> str:
    """Return what a model is in a few lines: inputs, outputs, operators, weights, operations and memory.

    Amounts that depend on symbolic dimensions are given for ``sizes``, or as formulas where those are short.
    """
    sizes = dict(sizes or {})
    stats = statistics(model)
    costs = cost.totals(cost.estimate(model))
    parameters = sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None)
    versions = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in model.opset_imports.items())
    lines = [f"{model.graph.name or 'model'}: opset {versions}"]
    lines += [f"  input   {_value(value)}" for value in model.graph.inputs]
    lines += [f"  output  {_value(value)}" for value in model.graph.outputs]
    names = dims.dim_names(model)
    if names:
        lines.append(f"  dims    {', '.join(f'{n}={sizes[n]}' if n in sizes else n for n in names)}")
    lines.append(f"  nodes   {stats.nodes} (depth {stats.depth}, width {stats.width})")
    lines.append(f"  weights {parameters:,} elements, {binary(weight_bytes(model))}")
    lines.append(f"  compute {_amount(costs.flops, sizes, lambda n: f'{decimal(n)} operations')}")
    lines.append(f"  traffic {_amount(_traffic(costs), sizes, lambda n: f'{binary(n)} read and written')}")
    lines.append(f"  memory  {_peak(model, sizes)}")
    lines.append("  operators")
    width = max((len(op) for op in stats.operators), default=0)
    lines += [f"    {op:<{width}} {count:>5}" for op, count in stats.operators.items()]
    return "\n".join(lines)


def _traffic(costs: cost.NodeCost) -> Amount:
    if costs.bytes_read is None or costs.bytes_written is None:
        return None
    return costs.bytes_read + costs.bytes_written


def to_text(model: oir.Model) -> str:
    """Return the ONNX text form; the data of tensors with more than 16 elements is elided, so it is for reading."""
    proto = to_proto(model)
    for tensor in proto.graph.initializer:
        if math.prod(tensor.dims) > _LONGEST_TENSOR:
            for field in _DATA_FIELDS:
                tensor.ClearField(field)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="elided")
    return str(onnx.printer.to_text(proto))


def from_text(text: str) -> oir.Model:
    """Return the model that an ONNX text describes. Raises InvalidModelError where it does not parse."""
    try:
        return oir.serde.deserialize_model(onnx.parser.parse_model(text))
    except onnx.parser.ParseError as error:
        raise InvalidModelError(f"this is no ONNX text: {error}") from error


def _value(value: oir.Value) -> str:
    dtype = value.dtype.name.lower() if value.dtype is not None else str(value.type)
    shape = "[" + ", ".join(map(str, value.shape)) + "]" if value.shape is not None else "of unknown shape"
    return f"{value.name}: {dtype} {shape}"


def _amount(amount: Amount, sizes: Mapping[str, int], show: Callable[[int], str]) -> str:
    if amount is None:
        return "unknown: shapes depend on data"
    if isinstance(amount, int):
        return show(amount)
    names = sorted(str(symbol) for symbol in amount.free_symbols)
    if all(name in sizes for name in names):
        return show(dims.evaluate(amount, sizes))
    formula = str(amount.expand())
    return formula if len(formula) <= _LONGEST_FORMULA else f"depends on {', '.join(names)}"


def _peak(model: oir.Model, sizes: Mapping[str, int]) -> str:
    try:
        return f"{binary(cost.peak_activation_bytes(model, sizes))} of activations at the peak"
    except IRError as error:
        return f"unknown: {error.message}"


def decimal(number: int) -> str:
    """Return a count with a decimal prefix: ``8.18 G``."""
    return _scaled(number, 1000, ("", " k", " M", " G", " T", " P"))


def binary(number: int) -> str:
    """Return a number of bytes with a binary prefix: ``97.5 MiB``."""
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _scaled(number: int, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while power + 1 < len(units) and number >= base ** (power + 1):
        power += 1
    return f"{number / base**power:.3g}{units[power]}" if power else f"{number}{units[0]}"
