"""Fixing input shapes and dimensions by what the user says: ``--input-shape`` and ``--dim``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as oir

from optc.errors import InvalidModelError, UsageError
from optc.ir import dims

InputShapes = Mapping[str, Sequence[int | str]]


def parse_input_shape(text: str) -> tuple[str, tuple[int | str, ...]]:
    """Read ``name:1,3,224,224``. Sizes may be names or ``?`` (stays free); the name may contain colons.

    ``name:`` is the scalar shape.

    Raises:
        UsageError: the text has another form.
    """
    name, colon, sizes = text.rpartition(":")
    if not colon or not name:
        raise UsageError(f"'{text}' is no input shape", hint="write name:1,3,224,224 or name:batch,3,?,?")
    if not sizes.strip():
        return name, ()
    return name, tuple(_parse_size(size, text) for size in sizes.split(","))


def parse_dim(text: str) -> tuple[str, int]:
    """Read ``batch=8``.

    Raises:
        UsageError: the text has another form.
    """
    name, equals, size = (part.strip() for part in text.rpartition("="))
    if not equals or not name or not (size.isascii() and size.isdigit()):
        raise UsageError(f"'{text}' binds no dimension", hint="write batch=8")
    return name, int(size)


def _parse_size(text: str, whole: str) -> int | str:
    size = text.strip()
    if size == "?" or size.isidentifier():
        return size
    if size.isascii() and size.isdigit():
        return int(size)
    raise UsageError(f"'{size}' in '{whole}' is no size", hint="sizes are numbers, names or ?")


def describe_inputs(model: oir.Model) -> str:
    """Return one line per input of ``model``: name, dtype and shape."""
    lines = []
    for value in model.graph.inputs:
        kind = value.dtype.name.lower() if value.dtype is not None else str(value.type)
        shape = value.shape
        sizes = f"[{', '.join(map(str, shape))}]" if shape is not None else " of unknown shape"
        lines.append(f"{value.name}: {kind}{sizes}")
    return "\n  ".join(lines) or "(none)"


def name_input_dims(model: oir.Model) -> None:
    """Give each dimension of an input a legal name; those that exporters write for "unknown" get one each."""
    for value in model.graph.inputs:
        if value.shape is not None and any(_is_unknown(dim) for dim in value.shape):
            value.shape = oir.Shape([None if _is_unknown(dim) else dim for dim in value.shape])
    dims.name_input_dims(model.graph)


def _is_unknown(dim: dims.Dim) -> bool:
    return dim < 0 if isinstance(dim, int) else dim.value in ("None", "none", "unknown")


def bind(model: oir.Model, input_shapes: InputShapes | None, sizes: Mapping[str, int] | None) -> None:
    """Fix inputs and named dimensions of ``model``, in place; a name means the same size everywhere.

    The dimensions of the inputs have names (:func:`name_input_dims`).

    Raises:
        UsageError: an input or a dimension that the model does not have, a wrong number of sizes, sizes that
            contradict each other or the model; the message shows the inputs.
    """
    if not input_shapes and not sizes:
        return
    shown = describe_inputs(model)

    def fail(message: str) -> UsageError:
        return UsageError(f"{message}\nthe inputs of the model are:\n  {shown}")

    bound: dict[str, int] = {}
    renamed: dict[str, str] = {}

    def assign(name: str, size: int | str, where: str) -> None:
        if isinstance(size, int) and size < 1:
            raise fail(f"{where} is {size}; sizes start at 1")
        before = bound.get(name) if isinstance(size, int) else renamed.get(name)
        if before is not None and before != size:
            raise fail(f"{where} makes the dimension '{name}' {size}, elsewhere it is {before}")
        if isinstance(size, int):
            bound[name] = size
        else:
            renamed[name] = size

    known = dims.used_names(model.graph.inputs)
    for name, size in (sizes or {}).items():
        if name not in known:
            raise fail(f"no input has a dimension '{name}'")
        assign(name, size, f"'{name}={size}'")
    inputs = {value.name: value for value in model.graph.inputs}
    for name, shape in (input_shapes or {}).items():
        if name not in inputs:
            raise fail(f"the model has no input '{name}'")
        value = inputs[name]
        text = f"{name}:{','.join(map(str, shape))}"
        if value.shape is None:
            value.shape = oir.Shape([None if size == "?" else size for size in shape])
        elif len(shape) != len(value.shape):
            raise fail(f"'{text}' has {len(shape)} sizes, the input has {len(value.shape)}")
        for axis, (dim, wanted) in enumerate(zip(value.shape, shape, strict=True)):
            if wanted == "?" or dim == wanted:
                continue
            if isinstance(dim, int):
                raise fail(f"size {axis} of '{text}' is {wanted}, the model fixes it to {dim}")
            if dim.value is not None and dims.is_name(dim.value):
                assign(dim.value, wanted, f"size {axis} of '{text}'")
    for value in dims.all_values(model.graph):
        _rename(value, renamed)
    try:
        dims.bind(model, {renamed.get(name, name): size for name, size in bound.items()})
    except InvalidModelError as error:
        raise fail(error.message) from error
    for name, shape in (input_shapes or {}).items():
        result = inputs[name].shape
        assert result is not None
        for axis, (dim, wanted) in enumerate(zip(result, shape, strict=True)):
            if wanted not in ("?", dim):
                raise fail(f"size {axis} of input '{name}' is {wanted}, but its dimensions make it {dim}")


def _rename(value: oir.Value, renamed: Mapping[str, str]) -> None:
    """Give dimensions in the shape of ``value`` other names, in expressions too."""
    if not renamed or not dims.used_names([value]) & renamed.keys():
        return
    new: list[dims.Dim] = []
    for dim in value.shape or ():
        if not isinstance(dim, int) and dims.names(dim.value or "") & renamed.keys():
            expression = dims.to_expr(dim)
            names = {s: dims.to_expr(renamed[s.name]) for s in expression.free_symbols if s.name in renamed}
            dim = dims.from_expr(expression.subs(names, simultaneous=True))
        new.append(dim)
    value.shape = oir.Shape(new)
