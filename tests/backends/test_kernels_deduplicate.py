"""Kernels that differ in constants alone are one, which takes them as parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper
from tvm import tirx

from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve
from optc.backends.kernels import loops
from optc.frontend.onnx import load
from optc.ir.serialize import to_proto
from optc.passes import pipeline

DTYPES = [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int32]


def chain(make_model: Any, dtype: Any, factors: list[float], shape: tuple[int | str, ...] = (8, 5)) -> Any:
    """Return a model of ``y = max(x * factor, floor)`` steps, each of whose results is an output."""
    nodes, constants, outputs = [], {}, {}
    for i, factor in enumerate(factors):
        constants |= {f"f{i}": np.array(factor, dtype), f"floor{i}": np.array(i + 1, dtype)}
        nodes.append(helper.make_node("Mul", ["x", f"f{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Max", [f"m{i}", f"floor{i}"], [f"y{i}"]))
        outputs[f"y{i}"] = dtype
    return make_model(nodes, {"x": (dtype, shape)}, outputs, constants)


def kernels(model: Any, name: str = "") -> list[Any]:
    functions = CpuBackend(resolve("x86-64-v3")).schedule(load(model)).relax.functions
    return [f for v, f in functions.items() if isinstance(f, tirx.PrimFunc) and name in v.name_hint]


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_and_count(compile_model, make_model, dtype):
    factors = [2, 3, 5] if np.issubdtype(dtype, np.integer) else [0.3, -1.7, 60.5]
    model = chain(make_model, dtype, factors)
    x = (np.arange(40).reshape(8, 5) % 11).astype(dtype)
    for i, (factor, y) in enumerate(zip(factors, compile_model(model)(x), strict=True)):
        np.testing.assert_array_equal(y, np.maximum(x * np.array(factor, dtype), np.array(i + 1, dtype)))
    (kernel,) = kernels(model)
    # One tensor in, a factor and a floor, one tensor out.
    assert len(kernel.params) == 4


def test_symbolic_sizes_and_infinities(compile_model, make_model):
    factors = [float("inf"), -0.0, 1e-45]
    run = compile_model(chain(make_model, np.float32, factors, ("n", 5)))
    x = np.linspace(-2, 2.5, 35, dtype=np.float32).reshape(7, 5)
    for i, y in enumerate(run(x)):
        np.testing.assert_array_equal(y, np.maximum(x * np.float32(factors[i]), np.float32(i + 1)))


def test_what_is_equal_stays_constant(make_model):
    (kernel,) = kernels(chain(make_model, np.float32, [2.0, 2.0, 2.0]))
    assert len(kernel.params) == 3
    assert 2.0 in [c.value for c in loops.collect(kernel.body, tirx.FloatImm)]


def test_sizes_and_64_bit_integers_stay_apart(make_model):
    assert len(kernels(chain(make_model, np.int64, [2, 3]))) == 2
    nodes = [helper.make_node("Elu", ["a"], ["y"], alpha=0.5), helper.make_node("Elu", ["b"], ["z"], alpha=0.25)]
    inputs = {"a": (np.float32, (4, 6)), "b": (np.float32, (6, 4))}
    assert len(kernels(make_model(nodes, inputs, {"y": np.float32, "z": np.float32}))) == 2


def test_layers_of_a_quantized_network(compile_model, make_model):
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (1, 32, 9, 9)).astype(np.int8)

    def layers(some: list[int]) -> Any:
        """Return a model of convolutions with scales and zero points of their own, of which each is an output."""
        nodes, constants = [], {"sw": np.float32(0.01), "zw": np.int8(0)}
        for i in some:
            constants |= {f"s{i}": np.float32(0.02 + i / 100), f"z{i}": np.int8([3, -7, 0, -128][i])}
            constants[f"w{i}"] = np.random.default_rng(i).integers(-60, 60, (32, 32, 3, 3)).astype(np.int8)
            nodes += [
                helper.make_node("DequantizeLinear", ["q", f"s{i}", f"z{i}"], [f"x{i}"]),
                helper.make_node("DequantizeLinear", [f"w{i}", "sw", "zw"], [f"v{i}"]),
                helper.make_node("Conv", [f"x{i}", f"v{i}"], [f"c{i}"], pads=[1] * 4),
                helper.make_node("QuantizeLinear", [f"c{i}", f"s{i}", f"z{i}"], [f"y{i}"]),
            ]
        model = load(make_model(nodes, {"q": (np.int8, x.shape)}, {f"y{i}": np.int8 for i in some}, constants))
        pipeline.run(model)
        return to_proto(model)

    together = layers([0, 1, 2, 3])
    # Those with zero points 0 and -128 have less to compute.
    assert len(kernels(together, "integer_conv")) == 3
    for i, y in enumerate(compile_model(together)(x)):
        np.testing.assert_array_equal(y, compile_model(layers([i]))(x)[0])
