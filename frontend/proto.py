"""What must be checked or converted on the protobuf: onnx-ir would not tell, or would drop it silently."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as oir

from optc.errors import InvalidModelError

Body: TypeAlias = onnx.GraphProto | onnx.FunctionProto
_TYPES = frozenset(onnx.TensorProto.DataType.values())


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
        if not 1 <= entry.version < 2**31:
            raise InvalidModelError(f"opset {entry.version} of the domain '{entry.domain}' does not exist")
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if versions.setdefault(domain, entry.version) != entry.version:
            raise InvalidModelError(
                f"the model imports opset {versions[domain]} and opset {entry.version} of the domain "
                f"'{domain or 'ai.onnx'}'"
            )
    complaints: list[str] = []
    for body in _bodies(model):
        complaints += _bad_texts(body)
        if isinstance(body, onnx.GraphProto):
            complaints += _redefinitions(body)
        complaints += (text for tensor in _tensors(body) if (text := _tensor_problem(tensor)))
    if complaints:
        raise InvalidModelError("the model is not legal:\n  " + "\n  ".join(complaints))


def make_dense(model: onnx.ModelProto) -> None:
    """Replace sparse initializers and sparse Constant nodes by dense ones, in place."""
    for body in list(_bodies(model)):
        if isinstance(body, onnx.GraphProto):
            body.initializer.extend(_dense(sparse) for sparse in body.sparse_initializer)
            del body.sparse_initializer[:]
        for attribute in _sparse_constants(body):
            tensor = _dense(attribute.sparse_tensor)
            attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))


def _sparse_constants(body: Body) -> Iterator[onnx.AttributeProto]:
    for node in body.node:
        if node.op_type == "Constant":
            yield from (a for a in node.attribute if a.type == onnx.AttributeProto.SPARSE_TENSOR)


def _bodies(model: onnx.ModelProto) -> Iterator[Body]:
    """Yield the graph, the functions, and all subgraphs."""
    stack: list[Body] = [model.graph, *model.functions]
    while stack:
        body = stack.pop()
        yield body
        for node in body.node:
            for attribute in node.attribute:
                stack.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)


def _tensors(body: Body) -> Iterator[onnx.TensorProto]:
    if isinstance(body, onnx.GraphProto):
        yield from body.initializer
        for sparse in body.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in body.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR and not attribute.ref_attr_name:
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)


def _bad_texts(body: Body) -> Iterator[str]:
    """Protobuf hands out a text that is not UTF-8 as bytes."""
    for node in body.node:
        texts = [node.name, node.op_type, node.domain, *node.input, *node.output]
        texts += [attribute.name for attribute in node.attribute]
        if any(not isinstance(text, str) for text in texts):
            yield f"node {node.name!r} of operator {node.op_type!r} has names that are not UTF-8"


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


def _tensor_problem(tensor: onnx.TensorProto) -> str | None:
    """Compare the content of ``tensor`` with its type and shape; external content is checked elsewhere."""
    kind = oir.DataType(tensor.data_type) if tensor.data_type in _TYPES else oir.DataType.UNDEFINED
    if kind == oir.DataType.UNDEFINED:
        return f"tensor '{tensor.name}' has the unknown type {tensor.data_type}"
    if any(size < 0 for size in tensor.dims):
        return f"tensor '{tensor.name}' has the shape {list(tensor.dims)}"
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    expected = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        found, unit = len(tensor.raw_data), "bytes"
        expected = (expected * (0 if kind == oir.DataType.STRING else kind.bitwidth) + 7) // 8
    else:
        found, unit = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))), "elements"
        if kind in (oir.DataType.COMPLEX64, oir.DataType.COMPLEX128):
            expected *= 2
        elif kind != oir.DataType.STRING and kind.bitwidth < 8:
            expected = (expected * kind.bitwidth + 7) // 8
    if found == expected:
        return None
    return f"tensor '{tensor.name}' has {found} {unit}, its shape needs {expected}"


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """Scatter the values of a sparse tensor (linear or per-axis indices) into zeros."""
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    try:
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
    except (IndexError, ValueError) as error:
        raise InvalidModelError(f"the sparse tensor '{sparse.values.name}' is not legal: {error}") from error
    return onnx.numpy_helper.from_array(dense, sparse.values.name)
