"""Other programs that run the same model: references for numbers, opponents for time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as oir

from optc.errors import InvalidModelError, MissingDependencyError, UsageError

Arrays = Mapping[str, np.ndarray]
_LARGE = 1 << 30


class Peer(Protocol):
    """A loaded model in another program."""

    name: str

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run once."""


class OnnxRuntime:
    """onnxruntime's CPU provider with ``threads`` threads; ``literal`` runs the graph as written, not optimized."""

    def __init__(self, model: oir.Model, threads: int, *, literal: bool = False) -> None:
        import onnxruntime

        self.name = f"onnxruntime {onnxruntime.__version__}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if literal:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

        def open_session(source: Any) -> Any:
            try:
                return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's own errors share no public base class
                raise InvalidModelError(f"onnxruntime refuses the model: {error}") from error

        self.session = _with_file(model, open_session)
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run once."""
        return dict(zip(self.outputs, self.session.run(None, dict(inputs)), strict=True))


class OpenVino:
    """OpenVINO's CPU plugin, tuned for latency, with ``threads`` threads."""

    def __init__(self, model: oir.Model, threads: int) -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingDependencyError("OpenVINO is not installed", hint="pip install 'optc[bench]'") from error
        self.name = f"openvino {openvino.__version__.split('-')[0]}"
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }

        def compile_model(source: Any) -> Any:
            try:
                return core.compile_model(core.read_model(source), "CPU", settings)
            except RuntimeError as error:
                raise InvalidModelError(f"OpenVINO refuses the model: {error}") from error

        self.compiled = _with_file(model, compile_model)
        self.request = self.compiled.create_infer_request()
        self.outputs = [next(iter(port.get_names())) for port in self.compiled.outputs]

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run once."""
        result = self.request.infer(dict(inputs))
        return {name: result[port] for name, port in zip(self.outputs, self.compiled.outputs, strict=True)}


def _with_file(model: oir.Model, use: Callable[[Any], Any]) -> Any:
    """Give ``use`` the serialized model: as bytes, or as a temporary file when it is too large for a proto."""
    from optc.ir import serialize

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size < _LARGE:
        return use(serialize.to_proto(model).SerializeToString())
    with tempfile.TemporaryDirectory(prefix="optc-") as folder:
        path = Path(folder) / "model.onnx"
        serialize.save(model, path)
        return use(str(path))


PEERS: dict[str, Callable[[oir.Model, int], Peer]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}


def open_peer(name: str, model: oir.Model, threads: int) -> Peer:
    """Load ``model`` into the peer called ``name``; errors say what is missing."""
    if name not in PEERS:
        raise UsageError(f"no peer called '{name}'", hint=f"there are: {', '.join(PEERS)}")
    try:
        return PEERS[name](model, threads)
    except ImportError as error:
        raise MissingDependencyError(f"{name} is not installed", hint="pip install 'optc[bench]'") from error
