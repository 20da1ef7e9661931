"""Runs a model in onnx's reference evaluator: slow, NumPy only, and written by the authors of the standard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as oir

from optc.errors import InputError, UnsupportedModelError
from optc.ir.serialize import to_proto


def evaluate(model: oir.Model, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the outputs of ``model`` by name; sequences come as lists of arrays.

    Raises InputError for a missing, unknown or wrongly typed input, and UnsupportedModelError for an operator that
    the reference evaluator does not implement.
    """
    _check(model, inputs)
    # Imported late: it brings every reference implementation along.
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import RuntimeContextError, RuntimeImplementationError, RuntimeTypeError

    names = [value.name for value in model.graph.outputs]
    try:
        results: list[Any] = ReferenceEvaluator(to_proto(model)).run(None, dict(inputs))
    except (NotImplementedError, RuntimeImplementationError, RuntimeContextError, RuntimeTypeError) as error:
        raise UnsupportedModelError(
            f"onnx's reference evaluator cannot run this model: {error}",
            hint="install onnxruntime and verify against it",
        ) from error
    return {name or "": value for name, value in zip(names, results, strict=True)}


def _check(model: oir.Model, inputs: Mapping[str, np.ndarray]) -> None:
    wanted = {value.name or "": value for value in model.graph.inputs if not value.is_initializer()}
    described = ", ".join(f"{name} ({value.dtype}{value.shape or ''})" for name, value in wanted.items())
    unknown = [name for name in inputs if name not in wanted]
    missing = [name for name in wanted if name not in inputs]
    if unknown or missing:
        what = [f"no value for input {name!r}" for name in missing] + [f"no input {name!r}" for name in unknown]
        raise InputError("; ".join(what), hint=f"the inputs are: {described}")
    for name, array in inputs.items():
        dtype = wanted[name].dtype
        if isinstance(array, np.ndarray) and dtype not in (None, oir.DataType.STRING):
            assert dtype is not None
            if array.dtype != dtype.numpy():
                raise InputError(f"input {name!r} is {array.dtype}, the model wants {dtype.numpy()}")
