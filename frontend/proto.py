"""What must be checked or converted on the protobuf: onnx-ir would not tell, or would drop it silently."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx

from optc.errors import InvalidModelError


def check(model: onnx.ModelProto) -> None:
    """Check that ``model`` is complete and that every name has one definition.

    Raises:
        InvalidModelError: no graph, no opset, contradictory opset imports, a name defined twice in one
            graph, or weights of the wrong length.
    """
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise InvalidModelError("no graph or an empty one: the file is truncated or not an ONNX model")
    if not model.opset_import:
        raise InvalidModelError("no opset imports: the file is truncated or not an ONNX model")
    versions: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if versions.setdefault(domain, entry.version) != entry.version:
            raise InvalidModelError(
                f"the model imports opset {versions[domain]} and opset {entry.version} of the domain "
                f"'{domain or 'ai.onnx'}'"
            )
    complaints: list[str] = []
    for graph in _graphs(model.graph):
        complaints += _redefinitions(graph)
        complaints += (text for tensor in graph.initializer if (text := _wrong_length(tensor)))
    if complaints:
        raise InvalidModelError("the model is not legal:\n  " + "\n  ".join(complaints))


def make_dense(model: onnx.ModelProto) -> None:
    """Replace sparse initializers and sparse Constant nodes by dense ones, in place."""
    for graph in _graphs(model.graph):
        graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
        del graph.sparse_initializer[:]
        for attribute in _sparse_constants(graph):
            tensor = _dense(attribute.sparse_tensor)
            attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))


def _sparse_constants(graph: onnx.GraphProto) -> Iterator[onnx.AttributeProto]:
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (a for a in node.attribute if a.type == onnx.AttributeProto.SPARSE_TENSOR)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _redefinitions(graph: onnx.GraphProto) -> Iterator[str]:
    inputs: set[str] = set()
    for info in graph.input:
        if info.name in inputs:
            yield f"two inputs are called '{info.name}'"
        inputs.add(info.name)
    weights: set[str] = set()
    for name in [t.name for t in graph.initializer] + [s.values.name for s in graph.sparse_initializer]:
        if not name:
            yield "an initializer has no name"
        if name in weights:
            yield f"two initializers are called '{name}'"
        weights.add(name)
    defined = inputs | weights
    for node in graph.node:
        for name in node.output:
            if name and name in defined:
                yield f"'{name}' is defined again by {node.op_type} '{node.name}'"
            defined.add(name)


def _wrong_length(tensor: onnx.TensorProto) -> str | None:
    """Compare the number of bytes of ``tensor`` with its shape and type."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL or not tensor.HasField("raw_data"):
        return None
    if tensor.data_type not in onnx.TensorProto.DataType.values():
        return f"initializer '{tensor.name}' has the unknown type {tensor.data_type}"
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    expected = math.prod(tensor.dims) * itemsize
    found = len(tensor.raw_data)
    packed = tensor.data_type in _PACKED
    if found == (expected * _PACKED[tensor.data_type] + 7) // 8 if packed else found == expected:
        return None
    return f"initializer '{tensor.name}' has {found} bytes, its shape needs {expected}"


# Bits per element of the types that are packed into bytes.
_PACKED = {
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
    onnx.TensorProto.INT2: 2,
    onnx.TensorProto.UINT2: 2,
}


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """Scatter the values of a sparse tensor (linear or per-axis indices) into zeros."""
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return onnx.numpy_helper.from_array(dense, sparse.values.name)
