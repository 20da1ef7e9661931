"""Fine-tuning with the rounding that the compiled model will do (quantization-aware training).

    prepared = finetune.prepare(module, (x,), Options("int8"), calibrate=samples)
    ...                       # train prepared.module: any loop, or optc.training
    optc.compile(prepared.quantized().model).save("model.optc")

Scales and zero points are those that ``optc.quantize`` finds for the module before it is trained; what is trained are
the weights that are rounded with them. Parameters keep their names, so masks of pruning apply
(``optc.compression.masks``), and what they hold at zero is the integer zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from optc import driver
from optc.compression import data
from optc.compression.observe import Progress
from optc.compression.options import Options
from optc.compression.owners import Owners
from optc.compression.quantize import Quantized, Quantizer, report, selected
from optc.errors import MissingDependencyError, UnsupportedModelError, UsageError
from optc.passes.quantize import static, weight_only
from optc.passes.quantize.products import Product, products
from optc.passes.quantize.weights import Integers


@dataclass(frozen=True)
class _Layer:
    """A product of the graph that is a layer of the module. ``array``: its weights at first, and its scales."""

    module: Any
    array: Integers
    zero: np.ndarray
    turned: bool

    def weight(self) -> np.ndarray:
        """Return the float32 weights as the graph has them."""
        return self._as_product(self.module.weight)

    def integers(self) -> Integers:
        """Return the weights as the module rounds them, as the graph has them."""
        steps = self._as_product(self.module.of_weight.steps(self.module.weight))
        values = (steps + self.zero).astype(self.array.values.dtype)
        return Integers(values, self.array.scale, self.array.zero, self.array.axis, self.array.block)

    def _as_product(self, tensor: Any) -> np.ndarray:
        array: np.ndarray = tensor.detach().cpu().numpy()
        return np.ascontiguousarray(array.T) if self.turned else array


@dataclass
class Prepared:
    """A module that rounds as the compiled model will.

    Attributes:
        module: what to train, a copy of the module that was given; in evaluation mode, as it was calibrated.
        left: why products stay in float32, by the name of the product in the graph.
    """

    module: Any
    left: dict[str, str]
    _options: Options
    _capture: Callable[[Any], Any]
    _layers: dict[str, _Layer] = field(default_factory=dict)
    _encodings: dict[str, Any] = field(default_factory=dict)

    def quantized(self) -> Quantized:
        """Return the module quantized: the integers are those that it rounds its weights to by now.

        Raises UnsupportedModelError if the graph of the trained module is not the one that was calibrated.
        """
        with self._unrounded():
            model = self._capture(self.module)
        found = {p.name: p for p in products(model)}
        for name, layer in self._layers.items():
            if name not in found or not np.array_equal(found[name].array(), layer.weight()):
                raise UnsupportedModelError(
                    f"'{name}' is not the layer any more that was calibrated", hint="prepare the module again"
                )
        arrays = {name: layer.integers() for name, layer in self._layers.items()}
        result = model.clone()
        if self._options.kind == "int8":
            names = frozenset(arrays)
            static.StaticPass(static.Plan(names, self._encodings, arrays, bits=self._options.bits)).call(result)
        else:
            # What is packed is given as [depth, columns], however the graph has it.
            turn = {name for name, p in found.items() if p.channels == 0}
            columns = {name: weight_only.turned(a) if name in turn else a for name, a in arrays.items()}
            weight_only.WeightOnlyPass(columns).call(result)
        return Quantized(result, report(model, result, self._options, {name: {} for name in arrays}))

    @contextmanager
    def _unrounded(self) -> Iterator[None]:
        try:
            for layer in self._layers.values():
                layer.module.rounds = False
            yield
        finally:
            for layer in self._layers.values():
                layer.module.rounds = True


def prepare(
    module: Any,
    example_inputs: Sequence[Any],
    options: Options | None = None,
    *,
    calibrate: Any = None,
    dynamic_shapes: Any = None,
    limit: int = data.LIMIT,
    progress: Progress = lambda _: None,
) -> Prepared:
    """Return a copy of ``module`` whose Linear and Conv layers round as ``options`` say.

    Batch normalizations are folded into what they follow first: what is rounded are the folded weights.

    Args:
        module: a PyTorch module in float32.
        example_inputs: see ``optc.capture``, and there for ``dynamic_shapes``.
        options: int8, int8-weights or int4-weights with rounding to nearest; int8 if left out. Ranges of channels
            and biases stay as they are: smoothing that is ``auto`` and the correction of biases are left out.
        calibrate: calibration data, for int8; see ``optc.compression.data.load``.
        limit: how many calibration samples to use at most.
        progress: is told what is done.

    Raises:
        MissingDependencyError: PyTorch is not installed.
        UsageError: options that training cannot follow, no calibration data for int8.
        UnsupportedModelError: no layer of the module can be quantized.
    """
    try:
        from optc.compression import rounding
    except ImportError as error:
        raise MissingDependencyError("fine-tuning needs PyTorch", hint="pip install 'optc[torch]'") from error
    options = options or Options()
    if options.kind == "int8":
        options = replace(options, smooth=None if options.smooth == "auto" else options.smooth, correct_bias=False)
    _require_trainable(options, calibrate)
    module = _folded(module)

    def capture(trained: Any) -> Any:
        return driver.optimize(trained, example_inputs, dynamic_shapes=dynamic_shapes)

    model = capture(module)
    names = frozenset(p.name for p in selected(model, options.exclude))
    samples = None if calibrate is None else data.load(calibrate, driver.specs(model.graph.inputs), limit=limit)
    mixture = Quantizer(model, samples, progress).mixture(options)
    result = Prepared(module, {}, options, capture)
    owners, uses = Owners(module), [p.weight for p in products(model)]
    for p in products(model):
        found = owners.find(str(p.weight.name), p.array())
        layer = None if found is None else _holder(module, found[0], rounding.LAYERS)
        if p.name not in names:
            result.left[p.name] = "excluded"
        elif p.name not in mixture.names:
            result.left[p.name] = f"not quantized to {options.kind}"
        elif layer is None:
            result.left[p.name] = "its weights are not those of one Linear or Conv layer"
        elif uses.count(p.weight) > 1:
            result.left[p.name] = "its layer is used more than once"
        else:
            assert found is not None
            result._layers[p.name] = _rounding_layer(p, mixture, layer, found[1], options, rounding)
    if not result._layers:
        raise UnsupportedModelError(f"no layer can be trained in {options.kind}: {result.left}")
    if mixture.plan is not None:
        result._encodings = dict(mixture.plan.encodings)
    return result


def _rounding_layer(p: Product, mixture: Any, layer: Any, turned: bool, options: Options, rounding: Any) -> _Layer:
    if mixture.plan is not None:
        array = static.integers(p, mixture.plan)
        of_input = rounding.of_encoding(mixture.plan.encodings[str(p.x.name)])
    else:
        packed = mixture.packed[p.name]
        array, of_input = weight_only.turned(packed) if p.channels == 0 else packed, None
    bits = None if mixture.plan is None else options.bits
    of_weight, zero = rounding.of_integers(weight_only.turned(array) if turned else array, bits)
    rounding.let_round(layer, of_input, of_weight)
    return _Layer(layer, array, zero.T if turned else zero, turned)


def _require_trainable(options: Options, calibrate: Any) -> None:
    if options.kind not in ("int8", "int8-weights", "int4-weights"):
        raise UsageError(f"modules are trained for int8, int8-weights and int4-weights, not for {options.kind}")
    rescaled = options.smooths or options.equalize or options.scale_weights
    if not options.nearest or rescaled:
        raise UsageError(
            "what changes weights before or while they are rounded is not for training",
            hint="leave out rounding, smooth, equalize and scale-weights: training does their work",
        )
    if options.kind == "int8" and calibrate is None:
        raise UsageError("int8 needs calibration data")


def _folded(module: Any) -> Any:
    """Return a copy in evaluation mode, with batch normalizations folded into Conv and Linear layers."""
    import torch
    from torch.fx.experimental.optimization import fuse

    module = copy.deepcopy(module).eval()
    if not any(isinstance(child, torch.nn.modules.batchnorm._BatchNorm) for child in module.modules()):
        return module
    try:
        return fuse(module)
    except Exception as error:  # tracing raises many unrelated classes
        raise UnsupportedModelError(
            f"batch normalizations of {type(module).__name__} cannot be folded: {error}",
            hint="fold them first, with torch.nn.utils.fusion.fuse_conv_bn_eval",
        ) from error


def _holder(module: Any, name: str, kinds: tuple[type, ...]) -> Any:
    """Return the layer whose ``weight`` a parameter is, None if it is not of ``kinds``."""
    path, _, attribute = name.rpartition(".")
    layer = module.get_submodule(path)
    return layer if attribute == "weight" and type(layer) in kinds else None
