"""Loading ONNX models: file, protobuf or onnx-ir model -> canonical IR."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as oir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from optc.errors import InvalidModelError, UsageError
from optc.frontend import proto, structure
from optc.frontend.bind import InputShapes, bind, name_input_dims
from optc.frontend.canonicalize import canonicalize


def load(
    source: str | os.PathLike[str] | onnx.ModelProto | oir.Model,
    *,
    input_shapes: InputShapes | None = None,
    dims: Mapping[str, int] | None = None,
) -> oir.Model:
    """Load a model of opset 6 or newer into canonical IR.

    ``input_shapes`` fixes inputs: a size is a number, a name, or ``?`` for what the model says. ``dims``
    binds named dimensions. What is bound to nothing stays symbolic. External data is memory-mapped when it
    is read. An ``oir.Model`` is edited in place and returned.

    Raises:
        UsageError: no such file, or shapes that do not fit the inputs.
        InvalidModelError: not an ONNX model, a truncated one, external data that is missing or outside of the
            model's directory, or a model that breaks the ONNX specification.
        UnsupportedModelError: an opset outside of 6 to the newest, or operators without canonical equivalent.
    """
    name = str(source) if isinstance(source, str | os.PathLike) else None
    try:
        if isinstance(source, oir.Model):
            model = source
        elif isinstance(source, onnx.ModelProto):
            # Renaming a weight would rename it in the protobuf of the caller.
            message = onnx.ModelProto()
            message.CopyFrom(source)
            model = _from_proto(message, None)
        else:
            model = _from_file(Path(source))
        _check_external_data(model)
        structure.drop_default_inputs(model)
        name_input_dims(model)
        bind(model, input_shapes, dims)
        canonicalize(model)
    except InvalidModelError as error:
        if name is None:
            raise
        raise InvalidModelError(f"{name}: {error.message}", hint=error.hint) from error
    return model


def _from_file(path: Path) -> oir.Model:
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise UsageError(f"{path}: the model file {what}")
    try:
        message = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (DecodeError, ValueError, onnx.parser.ParseError) as error:
        raise InvalidModelError("the file is truncated or not an ONNX model") from error
    return _from_proto(message, path.absolute().parent)


def _from_proto(message: onnx.ModelProto, directory: Path | None) -> oir.Model:
    proto.check(message)
    proto.make_dense(message)
    try:
        model = oir.serde.deserialize_model(message)
    except (oir.serde.SerdeError, ValueError, KeyError) as error:
        raise InvalidModelError(f"the model cannot be read: {_root_cause(error)}") from error
    if directory is not None:
        for graph in _bodies(model):
            oir.external_data.set_base_dir(graph, directory)
    return model


def _bodies(model: oir.Model) -> list[oir.Graph]:
    return [model.graph, *(function.graph for function in model.functions.values())]


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def _check_external_data(model: oir.Model) -> None:
    """Check that every external tensor is part of a file below the model's directory and not cut off.

    The tensors themselves stay unread.
    """
    for tensor in _external_tensors(model):
        problem = _external_problem(tensor)
        if problem:
            raise InvalidModelError(f"the external data of tensor '{tensor.name}' {problem}")


def _external_problem(tensor: oir.ExternalTensor) -> str | None:
    location = os.fspath(tensor.location)
    if not os.fspath(tensor.base_dir):
        return f"is in '{location}', and a model without file has no directory: load it from its file"
    base = Path(tensor.base_dir)
    path = Path(os.path.normpath(base / location))
    if not path.is_relative_to(base) or not path.resolve().is_relative_to(base.resolve()):
        return f"is at '{location}', which is outside of the model's directory"
    if not path.is_file():
        return f"is missing: there is no file '{path}'"
    status = path.stat()
    if status.st_nlink > 1:
        return f"is in '{path}', a file with several hard links, which is not trusted: copy it"
    end = (tensor.offset or 0) + tensor.nbytes
    if tensor.length is not None and tensor.length != tensor.nbytes:
        return f"has {tensor.length} bytes, its shape needs {tensor.nbytes}"
    if end > status.st_size:
        return f"is cut off: '{path}' has {status.st_size} bytes, {end} are needed"
    return None


def _external_tensors(model: oir.Model) -> list[oir.ExternalTensor]:
    found = []
    for body in _bodies(model):
        for graph in (body, *body.subgraphs()):
            found += [value.const_value for value in graph.initializers.values()]
        for node in body.all_nodes():
            for attribute in node.attributes.values():
                if attribute.type == oir.AttributeType.TENSOR and not attribute.is_ref():
                    found.append(attribute.as_tensor())
    return [tensor for tensor in found if isinstance(tensor, oir.ExternalTensor)]
