"""Compiling small models in process: frontend, lowering, fusion, generic schedule, LLVM, Relax VM."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import tvm
from onnx import helper
from onnx.reference import ReferenceEvaluator
from tvm import relax

from optc.backends.cpu.build import CpuBackend, generate
from optc.backends.cpu.single import aligned
from optc.backends.cpu.target import resolve
from optc.frontend.onnx import load

Run = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="session")
def compile_model() -> Callable[..., Run]:
    """Return a function that compiles a model for a target that this machine can run: ``run(*inputs) -> outputs``."""

    def compile_(model: onnx.ModelProto, name: str = "cpu") -> Run:
        target = resolve(name)
        module = CpuBackend(target).schedule(load(model))
        machine = relax.VirtualMachine(generate(module.relax, target).executable, tvm.cpu())
        no_clock = tvm.runtime.tensor(np.zeros(0, np.int64))
        weights = [aligned(w) for w in module.lowered.weights.values()]

        def run(*inputs: np.ndarray) -> list[np.ndarray]:
            return [r.numpy() for r in machine["main"](*(aligned(np.asarray(x)) for x in inputs), *weights, no_clock)]

        return run

    return compile_


@pytest.fixture(scope="session")
def make_model() -> Callable[..., onnx.ModelProto]:
    """Return a function that makes a model of ``nodes`` from inputs and outputs ``{name: (dtype, shape)}``."""

    def make(
        nodes: Sequence[onnx.NodeProto],
        inputs: dict[str, tuple[object, Sequence[int | str]]],
        outputs: dict[str, object],
        constants: dict[str, np.ndarray] | None = None,
        opset: int = 23,
    ) -> onnx.ModelProto:
        def info(name: str, dtype: object, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
            code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            return helper.make_tensor_value_info(name, code, shape)

        graph = helper.make_graph(
            nodes,
            "test",
            [info(name, dtype, shape) for name, (dtype, shape) in inputs.items()],
            [info(name, dtype, None) for name, dtype in outputs.items()],
            [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
        )
        imports = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)

    return make


@pytest.fixture
def check(compile_model: Callable[..., Run]) -> Callable[..., None]:
    """Return a function that compiles a model in text form once, and runs it on each set of inputs.

    Results must equal those of onnxruntime, or of onnx's reference evaluator, exactly unless a tolerance is given.
    """

    def check_(
        text: str,
        *feeds: Sequence[np.ndarray],
        opset: int = 21,
        evaluator: bool = False,
        rtol: float = 0.0,
        atol: float = 0.0,
    ) -> None:
        header = f'<ir_version: 10, opset_import: ["" : {opset}]>'
        model = onnx.parser.parse_model(header + text.replace("'", '"'))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        reference = (
            ReferenceEvaluator(model) if evaluator else onnxruntime.InferenceSession(model.SerializeToString(), options)
        )
        names = [i.name for i in model.graph.input]
        run = compile_model(model)
        for feed in feeds:
            expected = reference.run(None, dict(zip(names, feed, strict=True)))
            for a, b in zip(run(*feed), expected, strict=True):
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                if rtol or atol:
                    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
                else:
                    np.testing.assert_array_equal(a, b)

    return check_
