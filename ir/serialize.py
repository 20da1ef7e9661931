"""Models to portable ONNX: protobuf objects and files, with deterministic bytes and atomic writes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnx_ir as oir

from optc.ir import IR_VERSION, dims

INLINE_LIMIT = 1_500_000_000
"""Models with more bytes of weights go into two files: protobuf messages end at 2 GiB."""

# Types that readers of IR version 13 do not know.
_NEEDS_14 = frozenset({oir.DataType.FLOAT6E2M3, oir.DataType.FLOAT6E3M2})


def to_proto(model: oir.Model) -> onnx.ModelProto:
    """Return ``model`` as one protobuf object with all weights inside; the model is not changed.

    External weights are read from their files. An object of more than 2 GiB cannot be turned into bytes.
    """
    proto = oir.serde.serialize_model(model)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            data = model.graph.initializers[tensor.name].const_value
            assert data is not None
            tensor.CopyFrom(oir.serde.serialize_tensor(oir.Tensor(data.numpy(), dtype=data.dtype, name=tensor.name)))
    proto.ir_version = _ir_version(model)
    return proto


def weight_bytes(model: oir.Model) -> int:
    """Return the number of bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def save(model: oir.Model, path: str | Path, *, inline_limit: int = INLINE_LIMIT) -> None:
    """Write ``model`` as ONNX to ``path``; above ``inline_limit`` bytes, weights go to ``<path>.data`` beside it.

    The same model gives the same bytes. Files appear complete or not at all, whatever interrupts the write. Raises
    OSError as the file system does.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        for file in _write(model, Path(folder), path.name, inline_limit):
            file.replace(path.parent / file.name)


def _write(model: oir.Model, folder: Path, name: str, inline_limit: int) -> list[Path]:
    """Write the files into ``folder`` and return them, the model last: it names the others."""
    file = folder / name
    if weight_bytes(model) <= inline_limit:
        file.write_bytes(to_proto(model).SerializeToString(deterministic=True))
        return [file]
    data = folder / f"{name}.data"
    version = model.ir_version
    model.ir_version = _ir_version(model)
    try:
        oir.save(model, file, format="protobuf", external_data=data.name)
    finally:
        model.ir_version = version
    return [data, file]


def _ir_version(model: oir.Model) -> int:
    newest = any(value.dtype in _NEEDS_14 for value in dims.all_values(model.graph))
    return IR_VERSION + 1 if newest else IR_VERSION
