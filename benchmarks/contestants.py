"""The programs that are compared: each runs one model on one machine, with the threads that it is given.

Every contestant takes NumPy arrays and returns arrays of its own. onnxruntime and OpenVINO open the model's file as
it is; PyTorch runs the module that the file was exported from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], list[np.ndarray]]


def onnxruntime(file: Path, threads: int) -> Run:
    """A session with all graph optimizations, which are the default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda inputs: list(session.run(None, dict(inputs)))


def openvino(file: Path, threads: int) -> Run:
    """The CPU plugin tuned for latency, in float32 where the model is; inputs are not copied."""
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(core.read_model(str(file)), "CPU", settings).create_infer_request()

    def run(inputs: Arrays) -> list[np.ndarray]:
        result = request.infer(dict(inputs), share_inputs=True)
        return [result[i] for i in range(len(request.model_outputs))]

    return run


def torch_eager(module: Any, threads: int) -> Run:
    """PyTorch as it is, in inference mode."""
    import torch

    def run(inputs: Arrays) -> list[np.ndarray]:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            result = module(*(torch.from_numpy(array) for array in inputs.values()))
        return [t.numpy() for t in (result if isinstance(result, tuple) else (result,))]

    return run


def torch_compiled(module: Any, threads: int) -> Run:
    """PyTorch with its default compiler, which generates code for the number of threads of the first run."""
    import torch

    torch.set_num_threads(threads)
    return torch_eager(torch.compile(module, dynamic=False), threads)


def plain_tvm(file: Path, inputs: Arrays) -> Run:
    """TVM's own ONNX importer and default pipeline for CPUs, for one thread."""
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    from optc.backends.cpu.target import resolve, to_tvm

    shapes = {name: list(array.shape) for name, array in inputs.items()}
    module = from_onnx(onnx.load(file), shape_dict=shapes, keep_params_in_input=False)
    target = to_tvm(resolve("cpu"))
    with target:
        executable = tvm.compile(module, target=target, relax_pipeline=relax.get_default_pipeline(target))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    arguments = [tvm.runtime.tensor(array) for array in inputs.values()]

    def run(_: Arrays) -> list[np.ndarray]:
        result = machine["main"](*arguments)
        return [result.numpy()] if hasattr(result, "numpy") else [tensor.numpy() for tensor in result]

    return run
