"""``optc.quantize``: a float32 model to one of integers, as portable ONNX with QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as oir

from optc import driver
from optc.compression import data
from optc.compression.observe import Inside, Progress, histograms
from optc.compression.options import CALIBRATED, Options
from optc.errors import UnsupportedModelError, UsageError
from optc.ir import serialize
from optc.passes.quantize import ranges
from optc.passes.quantize.encoding import Encoding
from optc.passes.quantize.products import Product, products
from optc.passes.quantize.static import Plan, StaticPass


@dataclass
class Quantized:
    """A quantized model and what was done."""

    model: oir.Model
    report: dict[str, Any]


def quantize(
    path_or_model: Any,
    options: Options | None = None,
    *,
    calibrate: Any = None,
    example_inputs: Sequence[Any] | None = None,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    dims: Mapping[str, int] | None = None,
    limit: int = data.LIMIT,
    target: str = "cpu",
    progress: Progress = lambda _: None,
) -> Quantized:
    """Quantize a float32 model.

    The graph passes run first, so batch normalizations are folded and activations are whole. The result can be saved
    with ``optc.ir.serialize.save``, run by any ONNX runtime, and compiled with ``optc.compile``.

    Args:
        path_or_model: see ``optc.capture``, and there for ``example_inputs``, ``input_shapes`` and ``dims``.
        options: what to do; int8 with the defaults of ``Options`` if left out.
        calibrate: calibration data, see ``optc.compression.data.load``.
        limit: how many calibration samples to use at most.
        target: where the float32 model runs while it is calibrated: a target that is this machine.
        progress: is told what is done.

    Raises:
        UsageError, InputError: wrong options or calibration data; before anything that takes long.
        UnsupportedModelError: nothing to quantize.
        AccuracyError: the float32 model itself computes values that are no finite numbers.
    """
    options = options or Options()
    if calibrate is None and options.kind in CALIBRATED:
        raise UsageError(
            f"{options.kind} needs calibration data", hint="--calibrate DIR, FILE.npz or package.module:function"
        )
    progress("optimizing the float32 model")
    model = driver.optimize(path_or_model, example_inputs, input_shapes=input_shapes, dims=dims)
    selected(model, options.exclude)
    samples = data.load(calibrate, driver.specs(model.graph.inputs), limit=limit)
    counts = count(model, samples, target, progress)
    return quantize_static(model, counts, options)


def count(
    model: oir.Model, samples: data.Samples, target: str = "cpu", progress: Progress = lambda _: None
) -> dict[str, ranges.Histogram]:
    """Count what the products of an optimized float32 model read while it runs on ``samples``, by value name."""
    names = list(dict.fromkeys(str(found.x.name) for found in selected(model)))
    progress("compiling the model to look inside")
    return histograms(Inside(model, names, target), names, samples, progress)


def quantize_static(model: oir.Model, counts: Mapping[str, ranges.Histogram], options: Options) -> Quantized:
    """Quantize an optimized float32 model by what was counted in it; the model itself is not changed."""
    chosen = selected(model, options.exclude)
    plan = Plan(
        frozenset(found.name for found in chosen),
        encodings(counts, options),
        bits=options.bits,
        per_channel=options.per_channel,
    )
    result = model.clone()
    StaticPass(plan).call(result)
    return Quantized(result, report(model, result, options, plan))


def report(before: oir.Model, after: oir.Model, options: Options, plan: Plan) -> dict[str, Any]:
    """Return what was done, as JSON."""
    layers = []
    for found in products(before):
        layer: dict[str, Any] = {"name": found.name, "operator": found.node.op_type, "weights": found.array().size}
        if found.name in plan.products:
            encoding = plan.encodings[str(found.x.name)]
            layer |= {"to": options.kind, "scale": encoding.scale, "zero": encoding.zero}
        else:
            layer["to"] = "float32"
        layers.append(layer)
    sizes = {"before": serialize.weight_bytes(before), "after": serialize.weight_bytes(after)}
    return {"kind": options.kind, "weight_bytes": sizes, "layers": layers}


def encodings(counts: Mapping[str, ranges.Histogram], options: Options) -> dict[str, Encoding]:
    """Return the encodings that the method of ``options`` chooses."""
    return {
        name: ranges.choose(histogram, options.method, options.activations, symmetric=options.symmetric)
        for name, histogram in counts.items()
    }


def selected(model: oir.Model, exclude: frozenset[str] = frozenset()) -> list[Product]:
    """Return the products to quantize.

    Raises:
        UnsupportedModelError: the model has none.
        UsageError: a name in ``exclude`` is not that of a product.
    """
    found = list(products(model))
    if not found:
        raise UnsupportedModelError(
            "nothing to quantize: the model has no Conv, MatMul or Gemm in float32 with constant weights"
        )
    if unknown := sorted(exclude - {p.name for p in found}):
        names = ", ".join(p.name for p in found[:10])
        raise UsageError(
            f"no product is called {unknown[0]!r}", hint=f"they are called {names}" + ", ..." * (len(found) > 10)
        )
    return [p for p in found if p.name not in exclude]
