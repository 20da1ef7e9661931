"""``optc.quantize``: a float32 model in fewer bits, as portable ONNX with QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir

from optc import driver
from optc.compression import data
from optc.compression.budget import Goal, Trial, search
from optc.compression.observe import Divided, Inside, Look, Progress, histograms, observe
from optc.compression.options import Options
from optc.compression.speed import layer_times
from optc.compression.statistics import ChannelMean, ChannelRanges, Extremes, Gram
from optc.compression.switchboard import Mixture
from optc.errors import UnsupportedModelError, UsageError
from optc.ir import serialize
from optc.passes.base import Pass
from optc.passes.match import constant
from optc.passes.quantize import bias, blocks, equalization, half, ranges, smoothing, static, weight_only
from optc.passes.quantize.dynamic import DynamicPass
from optc.passes.quantize.encoding import Encoding
from optc.passes.quantize.products import Product, products
from optc.passes.quantize.weights import Integers

_EXPONENTS = (0.0, 0.25, 0.5, 0.75)
"""Exponents that AWQ's scaling tries for each group of matrices."""


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
    goal: Goal | None = None,
    only_paying: bool = False,
    evaluation: Any = None,
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
        goal: an accuracy budget; then only the layers are quantized that pay and fit, found by a search.
        evaluation: data to evaluate with, like ``calibrate``, which is taken where this is left out.
        only_paying: leave a layer in float32 where it is not faster quantized, by itself, on ``target``.
        target: what the speed of layers is measured for if it is this machine, else modelled. Models that are
            calibrated and evaluated run on this machine.
        progress: is told what is done.

    Raises:
        UsageError, InputError: wrong options or calibration data; before anything that takes long.
        UnsupportedModelError: nothing to quantize.
        AccuracyError: the float32 model itself computes values that are no finite numbers, or nothing can be
            quantized within the budget.
    """
    options = options or Options()
    if only_paying and goal is not None:
        raise UsageError("a search within a budget quantizes only what pays by itself")
    if calibrate is None and (options.needs_data or only_paying or goal is not None):
        raise UsageError(
            f"{options.kind}{' with this rounding' if options.kind != 'int8' else ''} needs calibration data",
            hint="--calibrate DIR, FILE.npz or package.module:function",
        )
    if calibrate is not None and goal is None:
        options = options.with_data()
    progress("optimizing the float32 model")
    model = driver.optimize(path_or_model, example_inputs, input_shapes=input_shapes, dims=dims)
    selected(model, options.exclude)
    samples = None
    specs = driver.specs(model.graph.inputs)
    if calibrate is not None:
        samples = data.load(calibrate, specs, limit=limit)
    quantizer = Quantizer(model, samples, progress)
    if only_paying:
        return quantizer.run_paying(options, target)
    if goal is None:
        return quantizer.run(options)
    judged = samples if evaluation is None else data.load(evaluation, specs, limit=limit)
    trial = quantizer.trial(options, goal, judged)
    result, searched = search(trial, goal, quantizer.shapes(), target, progress)
    chosen = {name: row for name, row in searched["layers"].items() if row["why"] == "quantized"}
    return Quantized(result, report(model, result, options, chosen) | {"search": searched})


class Quantizer:
    """Quantizes one optimized float32 model, in several ways if need be: what calibration finds is kept."""

    def __init__(
        self,
        model: oir.Model,
        samples: data.Samples | None = None,
        progress: Progress = lambda _: None,
    ) -> None:
        self.model, self.samples, self.progress = model, samples, progress
        self._inside: dict[str, Look] = {}
        self._counts: dict[str, dict[str, ranges.Histogram]] = {}

    def run(self, options: Options) -> Quantized:
        """Return the model quantized as ``options`` say; the float32 model is not changed."""
        chosen = selected(self.model, options.exclude)
        model, key = self._rescaled(options)
        names = frozenset(p.name for p in chosen)
        details: dict[str, dict[str, Any]] = {}
        work: Pass
        if options.kind == "int8":
            plan = self.plan(model, key, options, names)
            work = static.StaticPass(plan)
            for p in products(model):
                if p.name in names:
                    encoding = plan.encodings[str(p.x.name)]
                    details[p.name] = {"scale": encoding.scale, "zero": encoding.zero}
        elif options.kind == "int8-dynamic":
            work, details = DynamicPass(names, options.bits), {name: {} for name in names}
        elif options.packs_weights:
            packed = self._packed(model, key, options, names)
            work, details = weight_only.WeightOnlyPass(packed), {name: {} for name in packed}
        else:
            work = half.HalfPass(options.kind, self._large(model), options.exclude)
            details = {p.name: {} for p in chosen if work.island(p.node) is None}
        result = model.clone()
        work.call(result)
        return Quantized(result, report(self.model, result, options, details))

    def trial(self, options: Options, goal: Goal, samples: data.Samples | None = None) -> Trial:
        """Return what evaluates mixtures of layers quantized as ``options`` say; on the calibration data by default.

        Raises UsageError as ``mixture`` and ``Goal.score`` do.
        """
        _require_mixable(options)
        samples = samples or self.samples
        if samples is None:
            raise UsageError("there is no data to evaluate with", hint="give calibration data")
        # Wrong labels are found before anything takes long.
        goal.score(samples, self.model.graph.outputs)
        return Trial(self.mixture(options), samples, goal, options, self.progress)

    def mixture(self, options: Options) -> Mixture:
        """Return the layers quantized as ``options`` say, to be taken one by one.

        Raises UsageError for a kind whose layers cannot be mixed with float32 ones.
        """
        _require_mixable(options)
        names = frozenset(p.name for p in selected(self.model, options.exclude))
        model, key = self._rescaled(options)
        if options.kind == "int8":
            return Mixture(model, self.plan(model, key, options, names))
        packed = self._packed(model, key, options, names)
        matrices = {p.name for p in products(model)}
        return Mixture(model, None, {name: array for name, array in packed.items() if name in matrices})

    def run_paying(self, options: Options, target: str) -> Quantized:
        """Return the model with those layers quantized that are faster so, each by itself."""
        mixture = self.mixture(options)
        times = layer_times(mixture, self.shapes(), target, self.progress)
        details = {name: {"before": a, "after": b} for name, (a, b) in times.items() if b < a}
        result = mixture.with_layers(frozenset(details))
        slower = {name: {"before": a, "after": b} for name, (a, b) in times.items() if b >= a}
        return Quantized(result, report(self.model, result, options, details) | {"does not pay": slower})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what products read in the first sample, by the product's name."""
        inside, samples = self._look(self.model, "")
        values = inside(samples.calls[0])
        return {p.name: values[str(p.x.name)].shape for p in products(self.model)}

    def plan(self, model: oir.Model, key: str, options: Options, names: frozenset[str]) -> static.Plan:
        """Return the plan of static quantization."""
        counts = self.counts(model, key)
        found = encodings(counts, options)
        rounded: dict[str, Integers] = {}
        if not options.nearest:
            chosen = [p for p in products(model) if p.name in names and Gram.takes(p)]
            grams = self._grams(model, key, chosen)
            for number, p in enumerate(chosen):
                self.progress(f"rounding {number + 1} of {len(chosen)}: {p.name}")
                array = weight_only.rounded(p.matrix().T, "int8", 0, options.rounding, grams[p.name])
                values = array.values if p.channels == 1 else array.values.T.reshape(p.array().shape)
                rounded[p.name] = Integers(np.ascontiguousarray(values), array.scale, None, p.channels)
        plan = static.Plan(names, found, rounded, bits=options.bits, per_channel=options.per_channel)
        return self._corrected(model, key, plan) if options.correct_bias else plan

    def counts(self, model: oir.Model, key: str = "") -> dict[str, ranges.Histogram]:
        """Count what the products of the model read while it runs on the samples, by value name."""
        if key not in self._counts:
            inside, samples = self._look(model, key)
            self._counts[key] = histograms(inside, _read(model), samples, self.progress)
        return self._counts[key]

    def _look(self, model: oir.Model, key: str) -> tuple[Look, data.Samples]:
        assert self.samples is not None
        if key not in self._inside:
            self.progress("compiling the model to look inside")
            self._inside[key] = Inside(model, _read(model))
        return self._inside[key], self.samples

    def _rescaled(self, options: Options) -> tuple[oir.Model, str]:
        """Return the model with its ranges evened out, and a name for what that depends on."""
        names = frozenset(p.name for p in selected(self.model, options.exclude))
        model, key = self.model, ""
        if options.equalize:
            model, key = self.model.clone(), "equalized"
            equalization.equalize(model)
        if options.scale_weights:
            factors = self._factors_for_weights(model, key, options, names)
        elif options.smooths:
            factors = self._factors(model, key, options, names)
        else:
            return model, key
        result = model.clone()
        changed = smoothing.scale_inputs(result, factors, names)
        depends = (options.smooth, options.bits, sorted(options.exclude), options.scale_weights and options)
        scaled = f"{key} {depends}"
        if scaled not in self._inside:
            self._inside[scaled] = Divided(self._look(model, key)[0], changed)
        return result, scaled

    def _factors(self, model: oir.Model, key: str, options: Options, names: frozenset[str]) -> dict[str, np.ndarray]:
        """Return what SmoothQuant divides values by."""
        groups = smoothing.readers(model, names)
        inside, samples = self._look(model, key)
        seen = {name: ChannelRanges(group.axis) for name, group in groups.items()}
        observe(inside, {name: [r] for name, r in seen.items()}, samples, self.progress)
        factors: dict[str, np.ndarray] = {}
        for name, group in groups.items():
            found, weights = seen[name], group.weights()
            if isinstance(options.smooth, float):
                chosen: np.ndarray | None = smoothing.smooth_factors(found.reach, weights, options.smooth)
            else:
                worth = smoothing.worth(group)
                chosen = smoothing.best_factors(
                    found.low, found.high, found.power, weights, worth=worth, bits=options.bits
                )
            if chosen is not None:
                factors[name] = chosen
        return factors

    def _factors_for_weights(
        self, model: oir.Model, key: str, options: Options, names: frozenset[str]
    ) -> dict[str, np.ndarray]:
        """Return what AWQ divides values by."""
        groups = smoothing.readers(model, names, convolutions=False)
        grams = self._grams(model, key, [group.members[0] for group in groups.values()])
        return {
            name: _best_factors([p.matrix().T for p in group.members], grams[group.members[0].name], options)
            for name, group in groups.items()
        }

    def _grams(self, model: oir.Model, key: str, chosen: Sequence[Product]) -> dict[str, np.ndarray]:
        inside, samples = self._look(model, key)
        by_value: dict[tuple[str, str], Gram] = {}
        for p in chosen:
            by_value.setdefault((str(p.x.name), Gram.seen(p)), Gram(p))
        watching: dict[str, list[Gram]] = {}
        for (name, _), gram in by_value.items():
            watching.setdefault(name, []).append(gram)
        observe(inside, watching, samples, self.progress)
        return {p.name: by_value[str(p.x.name), Gram.seen(p)].matrix for p in chosen}

    def _corrected(self, model: oir.Model, key: str, plan: static.Plan) -> static.Plan:
        inside, samples = self._look(model, key)
        chosen = [p for p in products(model) if p.name in plan.products and p.bias is not None]
        means = {
            str(p.x.name): ChannelMean(1 if p.node.op_type == "Conv" else -1, plan.encodings[str(p.x.name)])
            for p in chosen
        }
        observe(inside, {name: [mean] for name, mean in means.items()}, samples, self.progress)
        biases = {}
        for p in chosen:
            original = constant(p.bias)
            shift = bias.correction(p, static.integers(p, plan), *means[str(p.x.name)].means)
            if original is not None and original.shape == shift.shape:
                biases[p.name] = original + shift
        return static.Plan(plan.products, plan.encodings, plan.weights, biases, plan.bits, plan.per_channel)

    def _packed(self, model: oir.Model, key: str, options: Options, names: frozenset[str]) -> dict[str, Integers]:
        matrices = [p for p in weight_only.matrices(model) if p.name in names]
        grams = self._grams(model, key, matrices) if not options.nearest else {}
        packed = {}
        for number, p in enumerate(matrices):
            self.progress(f"rounding {number + 1} of {len(matrices)}: {p.name}")
            matrix, gram = p.matrix().T, grams.get(p.name)
            packed[p.name] = weight_only.rounded(
                matrix, options.weight_type, options.rows, "nearest" if options.nearest else options.rounding, gram
            )
        for node in weight_only.tables(model):
            table = constant(node.inputs[0])
            assert table is not None
            array = weight_only.rounded(table.T, options.weight_type, options.rows)
            packed[str(node.name)] = weight_only.turned(array)
        return packed

    def _large(self, model: oir.Model) -> list[str]:
        """Return the values that calibration sees above what is safe in half precision."""
        if self.samples is None:
            return []
        names = [str(v.name) for node in model.graph for v in node.outputs if v.dtype == oir.DataType.FLOAT]
        self.progress("compiling the model to look inside")
        extremes = {name: Extremes() for name in names}
        observe(Inside(model, names), {name: [e] for name, e in extremes.items()}, self.samples, self.progress)
        return [name for name, e in extremes.items() if max(-e.low, e.high) > half.LARGEST]


def _require_mixable(options: Options) -> None:
    if options.kind != "int8" and not options.packs_weights:
        raise UsageError(f"layers are chosen for int8, int8-weights and int4-weights, not for {options.kind}")


def _best_factors(matrices: Sequence[np.ndarray], gram: np.ndarray, options: Options) -> np.ndarray:
    """Return AWQ's factors ``mean(x^2)^(a/2)`` with the exponent whose rounded products are the closest."""
    strength = np.sqrt(np.maximum(np.diag(gram), 1e-12))
    best, chosen = np.inf, np.ones(len(gram), np.float32)
    for exponent in _EXPONENTS:
        # x is divided by what the weights are multiplied with: large channels get large weights.
        scale = strength**exponent
        scale = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
        error = 0.0
        for matrix in matrices:
            array = blocks.nearest(matrix * scale[:, None], options.weight_type, options.rows)
            difference = array.dequantized() / scale[:, None] - matrix
            error += float((difference * (gram @ difference)).sum())
        if error < best:
            best, chosen = error, scale
    return chosen


def _read(model: oir.Model) -> list[str]:
    return list(dict.fromkeys(str(p.x.name) for p in products(model)))


def report(
    before: oir.Model, after: oir.Model, options: Options, details: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what was done, as JSON."""
    layers = [
        {
            "name": p.name,
            "operator": p.node.op_type,
            "weights": p.array().size,
            "to": options.kind if p.name in details else "float32",
            **details.get(p.name, {}),
        }
        for p in products(before)
    ]
    for node in weight_only.tables(before):
        table = constant(node.inputs[0])
        if table is not None and str(node.name) in details:
            row = {"name": str(node.name), "operator": node.op_type, "weights": table.size, "to": options.kind}
            layers.append(row)
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
        close = difflib.get_close_matches(unknown[0], [p.name for p in found], n=3, cutoff=0.0)
        raise UsageError(f"no product is called {unknown[0]!r}", hint=f"did you mean {' or '.join(map(repr, close))}?")
    return [p for p in found if p.name not in exclude]
