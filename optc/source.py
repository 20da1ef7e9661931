"""Anything a user calls a model, captured as canonical IR."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as oir

from optc.errors import MissingDependencyError, UsageError

_FACTORY = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


def capture(
    source: Any,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    dims: Mapping[str, int] | None = None,
) -> oir.Model:
    """Return ``source`` as a canonical model.

    ``source`` is an ONNX file or proto, an ``onnx_ir.Model``, a ``.pt2`` file, a torch ``ExportedProgram`` or
    ``nn.Module`` (with ``example_inputs`` and optionally torch.export's ``dynamic_shapes``), or the text
    ``package.module:factory`` naming a function that returns ``module`` or ``(module, example_inputs)`` or
    ``(module, example_inputs, dynamic_shapes)``.

    Raises UsageError for what is none of these, InvalidModelError for broken files.
    """
    if _is_torch(source):
        from optc.frontend.torch import capture as capture_torch

        model = capture_torch(source, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
        return _fix(model, input_shapes, dims)
    from optc.frontend.onnx import load as load_onnx

    if isinstance(source, oir.Model):
        source = source.clone()  # loading edits in place, and the model is the caller's
    return load_onnx(source, input_shapes=input_shapes, dims=dims)


def _fix(
    model: oir.Model,
    input_shapes: Mapping[str, Sequence[int | str]] | None,
    dims: Mapping[str, int] | None,
) -> oir.Model:
    if not input_shapes and not dims:
        return model
    from optc.frontend.onnx import load as load_onnx

    return load_onnx(model, input_shapes=input_shapes, dims=dims)


def _is_torch(source: Any) -> bool:
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if Path(text).exists():
            return text.endswith((".pt2", ".pt", ".pth"))
        if text.endswith((".pt2", ".pt", ".pth")):
            raise UsageError(f"no such file: {text}")
        return bool(_FACTORY.match(text))
    module = type(source).__module__
    if module.startswith(("onnx", "onnx_ir")):
        return False
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f"cannot capture a {type(source).__name__}: PyTorch is not installed",
            hint="pip install 'optc[torch]'",
        ) from error
    if isinstance(source, torch.nn.Module | torch.export.ExportedProgram):
        return True
    raise UsageError(
        f"a {type(source).__name__} is not a model",
        hint="give an ONNX file, an nn.Module with example_inputs, a .pt2 file or package.module:factory",
    )
