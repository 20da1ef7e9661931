"""What a layer costs in float32 and quantized: measured on this machine, or modelled for another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np
import onnx_ir as oir

from optc.compression.switchboard import Mixture
from optc.ir import CANONICAL_OPSET, IR_VERSION, cost
from optc.passes.quantize.encoding import DTYPES
from optc.passes.quantize.products import Product, products

Progress = Callable[[str], None]

_SECONDS, _RUNS = 0.2, 5
_NOT_COUNTED = ("transpose", "between kernels")
"""Kernels that change layouts at both ends, and the time of the call."""
_OPERATIONS = 5e10
"""Float32 operations in a second that the model of a core assumes; only ratios matter."""
_BYTES = 1e10
"""Bytes from memory in a second that it assumes."""
_INTEGERS = 1.5
"""How many times faster products of bytes are modelled to be."""


def layer_times(
    mixture: Mixture, shapes: Mapping[str, Sequence[int]], target: str, progress: Progress
) -> dict[str, tuple[float, float]]:
    """Return the seconds that each layer takes by itself, in float32 and quantized, one thread.

    ``shapes`` are those of what the layers read, by the layer's name. Equal layers are measured once. The quantized
    layer reads integers and writes integers, as it does between others. The roundings at both ends of a chain are not
    counted, nor are changes of the memory's layout: neighbours have the layout of the layer.
    """
    from optc.driver import resolve_target

    native = resolve_target(target).native
    found: dict[str, tuple[float, float]] = {}
    known: dict[str, tuple[float, float]] = {}
    chosen = [p for p in products(mixture.model) if p.name in mixture.names]
    for number, p in enumerate(chosen, 1):
        shape = shapes[p.name]
        key = repr((p.node.op_type, shape, p.array().shape, p.channels, sorted(map(str, p.node.attributes.values()))))
        if key not in known:
            progress(f"timing layer {number} of {len(chosen)}: {p.name}")
            plain, quantized = _alone(p, shape), _quantized(p, shape, mixture)
            known[key] = _measured(plain, quantized, target) if native else _modelled(plain, mixture)
        found[p.name] = known[key]
    return found


def _alone(p: Product, shape: Sequence[int]) -> oir.Model:
    """Return the model of one layer, with the names that it has in the whole."""
    x = oir.Value(name=p.x.name, shape=oir.Shape(list(shape)), type=oir.TensorType(oir.DataType.FLOAT))
    constants = []
    for value in p.node.inputs[1:]:
        if value is not None:
            assert value.const_value is not None
            constants.append(
                oir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
            )
    attributes = {name: attribute.value for name, attribute in p.node.attributes.items()}
    node = oir.node(p.node.op_type, [x, *constants], attributes, name=p.node.name)
    output = node.outputs[0]
    output.name, output.type = "y", oir.TensorType(oir.DataType.FLOAT)
    graph = oir.Graph(
        [x], [output], nodes=[node], initializers=constants, opset_imports={"": CANONICAL_OPSET}, name="layer"
    )
    return oir.Model(graph, ir_version=IR_VERSION)


def _quantized(p: Product, shape: Sequence[int], mixture: Mixture) -> oir.Model:
    """Return the layer quantized; with a plan, from integers to integers."""
    model = _alone(p, shape)
    if mixture.plan is None:
        return Mixture(model, None, {p.name: mixture.packed[p.name]}).with_layers(frozenset({p.name}))
    model = Mixture(model, replace(mixture.plan, products=frozenset({p.name}))).with_layers(frozenset({p.name}))
    graph = model.graph
    first = next(node for node in graph if node.op_type == "QuantizeLinear")
    whole = first.outputs[0]
    x = oir.Value(name="integers", shape=oir.Shape(list(shape)), type=whole.type)
    for user, index in list(whole.uses()):
        user.replace_input_with(index, x)
    scale, zero = first.inputs[1], first.inputs[2]
    graph.remove(first, safe=True)
    graph.inputs[0] = x
    last = oir.node("QuantizeLinear", [graph.outputs[0], scale, zero], name="rounding of y")
    kind = oir.DataType.from_numpy(DTYPES[mixture.plan.encodings[str(p.x.name)].dtype])
    last.outputs[0].name, last.outputs[0].type = "rounded", oir.TensorType(kind)
    graph.append(last)
    graph.outputs[0] = last.outputs[0]
    return model


def _measured(plain: oir.Model, quantized: oir.Model, target: str) -> tuple[float, float]:
    from optc import driver
    from optc.sample import random_inputs

    running = []
    for model in (plain, quantized):
        compiled = driver.compile(model, target=target, verify=False).model()
        compiled.threads = 1
        inputs = random_inputs(compiled.inputs)
        if inputs[compiled.inputs[0].name].dtype.kind in "iu":
            shape = inputs[compiled.inputs[0].name].shape
            inputs = {compiled.inputs[0].name: _bytes(shape, compiled.inputs[0].dtype)}
        running.append((compiled, inputs, list[float]()))
    start = perf_counter()
    while perf_counter() - start < _SECONDS or len(running[0][2]) < _RUNS:
        for compiled, inputs, samples in running:
            kernels = compiled.profile(inputs)
            samples.append(sum(kernel.seconds for kernel in kernels if not kernel.name.startswith(_NOT_COUNTED)))
    # What else the machine does only adds.
    a, b = (min(samples) for _, _, samples in running)
    return a, b


def _bytes(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return integers that crowd around the middle, as activations do."""
    info = np.iinfo(dtype)
    middle = (int(info.min) + int(info.max) + 1) // 2
    values = np.random.default_rng(0).normal(middle, (info.max - middle) / 4, shape)
    return np.clip(np.rint(values), info.min, info.max).astype(dtype)


def _modelled(plain: oir.Model, mixture: Mixture) -> tuple[float, float]:
    """Return the larger of the time to compute and the time to read weights."""
    from optc.ir import shapes

    shapes.infer(plain)
    operations = cost.totals(cost.estimate(plain)).at({}).flops
    weight = max((v.const_value.size for v in plain.graph.initializers.values() if v.const_value), default=0)
    rate = 1.0 if mixture.plan is None else _INTEGERS
    packed = next(iter(mixture.packed.values()), None)
    size = 1.0 if packed is None or "4" not in str(packed.values.dtype) else 0.5

    def seconds(faster: float, item: float) -> float:
        return max((operations or 0) / (_OPERATIONS * faster), weight * item / _BYTES)

    return seconds(1.0, 4.0), seconds(rate, size)
