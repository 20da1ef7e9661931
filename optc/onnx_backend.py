"""optc as an ``onnx.backend.base.Backend``, so that onnx's standard test suite runs against it.

Everything goes the ordinary way: capture, graph passes, lowering, code generation, artifact, runtime. What optc does
not support raises ``BackendIsNotSupposedToImplementIt``, which the suite counts as skipped, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend, BackendRep
from onnx.backend.test.runner import BackendIsNotSupposedToImplementIt

from optc.driver import compile
from optc.errors import UnsupportedModelError
from optc.runtime import Model


class OptcRep(BackendRep):  # type: ignore[misc]
    """A compiled model."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def run(self, inputs: Any, **kwargs: Any) -> tuple[np.ndarray, ...]:
        """Run on a sequence of arrays in the order of the inputs, or on a dict by name."""
        if not isinstance(inputs, dict):
            given = inputs if isinstance(inputs, list | tuple) else [inputs]
            inputs = {spec.name: np.asarray(array) for spec, array in zip(self.model.inputs, given, strict=True)}
        results = self.model.run(inputs)
        return tuple(results[spec.name] for spec in self.model.outputs)


class OptcBackend(Backend):  # type: ignore[misc]
    """Compiles for this machine's CPU."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> OptcRep:
        """Compile ``model``."""
        try:
            return OptcRep(compile(model, verify=False).model())
        except UnsupportedModelError as error:
            raise BackendIsNotSupposedToImplementIt(str(error)) from error

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any) -> Any:
        """Compile and run once."""
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(
        cls,
        node: onnx.NodeProto,
        inputs: Sequence[np.ndarray],
        device: str = "CPU",
        outputs_info: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Compile and run a model of one node whose inputs are all given as arrays."""
        arrays = [np.asarray(array) for array in inputs]
        names = [name for name in node.input if name]
        values = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for name, a in zip(names, arrays, strict=True)
        ]
        outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output]
        graph = onnx.helper.make_graph([node], "node", values, outputs)
        return cls.run_model(onnx.helper.make_model(graph), arrays, device, **kwargs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Only the CPU."""
        return device == "CPU"


prepare = OptcBackend.prepare
run_model = OptcBackend.run_model
run_node = OptcBackend.run_node
supports_device = OptcBackend.supports_device
