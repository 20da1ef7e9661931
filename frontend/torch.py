"""PyTorch models into canonical IR: torch.export (FX) -> torch.onnx.export -> onnx-ir."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from optc.errors import InvalidModelError, MissingDependencyError, UnsupportedModelError, UsageError
from optc.frontend.factory import resolve
from optc.frontend.onnx import load
from optc.frontend.torch_operators import translations
from optc.ir import provenance

_FX_NODE = "pkg.torch.onnx.fx_node"
EXAMPLES = "optc.example_inputs"
"""Key of what ``capture`` keeps of example inputs, in the model's ``meta``: integers, and shapes of floats."""

_INSTALL = "pip install 'optc[torch]'"


def capture(
    source: Any, *, example_inputs: Sequence[Any] | Mapping[str, Any] | None = None, dynamic_shapes: Any = None
) -> oir.Model:
    """Return a PyTorch model as canonical IR; each node's source is the name of its FX node.

    ``source`` is an ``nn.Module`` (captured in evaluation mode, its own mode untouched), an ``ExportedProgram``, a
    ``.pt2`` file, or ``package.module:factory``, whose function returns ``module``, ``(module, example_inputs)`` or
    ``(module, example_inputs, dynamic_shapes)``. ``example_inputs`` are positional, or by keyword in a mapping.
    ``dynamic_shapes`` is torch.export's; without it every size is fixed.

    Raises:
        MissingDependencyError: torch or onnxscript is not installed.
        UsageError: no example inputs, no such module or factory, a file of another kind.
        InvalidModelError: a damaged .pt2 file.
        UnsupportedModelError: torch.export or the ONNX exporter cannot capture the model; names the source line.
    """
    torch = _torch()
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if Path(text).exists():
            source = _load_program(torch, Path(text))
        else:
            source, found_inputs, found_shapes = _factory(text)
            example_inputs = found_inputs if example_inputs is None else example_inputs
            dynamic_shapes = found_shapes if dynamic_shapes is None else dynamic_shapes
    if isinstance(source, torch.export.ExportedProgram):
        program = _export(torch, source, None, None)
    else:
        if example_inputs is None:
            raise UsageError(
                f"capturing {type(source).__name__} needs example inputs",
                hint="optc.compile(module, (x,)), or let the factory return (module, (x,))",
            )
        with _evaluation_mode(source):
            program = _export(torch, source, example_inputs, dynamic_shapes)
    model = program.model
    for node in model.graph.all_nodes():
        fx = node.metadata_props.get(_FX_NODE)
        if fx and (match := re.match(r"%([\w.]+)", fx)):
            provenance.stamp(node, match.group(1))
    captured = load(model)
    if program.exported_program is not None and program.exported_program.example_inputs is not None:
        captured.meta[EXAMPLES] = _examples(torch, program.exported_program.example_inputs)
    return captured


def _examples(torch: Any, inputs: Any) -> list[np.ndarray | tuple[int, ...]]:
    """Return the tensors in nested ``inputs``: arrays of integers and booleans, and the shapes of others."""
    tensors = [x for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    return [tuple(x.shape) if x.is_floating_point() or x.is_complex() else x.detach().cpu().numpy() for x in tensors]


def _torch() -> Any:
    try:
        import onnxscript  # noqa: F401 - torch.onnx.export needs it and says so late
        import torch
        import torch.onnx
    except ImportError as error:
        raise MissingDependencyError(f"PyTorch models need {error.name}", hint=_INSTALL) from error
    return torch


def _load_program(torch: Any, path: Path) -> Any:
    if path.suffix != ".pt2":
        raise UsageError(
            f"{path}: only exported programs (.pt2) can be compiled from a file",
            hint="torch.export.save(torch.export.export(module, inputs), 'model.pt2')",
        )
    try:
        return torch.export.load(path)
    except Exception as error:  # torch raises whatever its unpickler met
        raise InvalidModelError(f"{path} is no readable .pt2 file: {_first_line(error)}") from error


def _factory(text: str) -> tuple[Any, Any, Any]:
    found = resolve(text)
    result = found() if callable(found) else found
    parts = result if isinstance(result, tuple) else (result,)
    if not 1 <= len(parts) <= 3:
        raise UsageError(
            f"{text} returned {len(parts)} values", hint="return (module, example_inputs[, dynamic_shapes])"
        )
    module, inputs, shapes = (*parts, None, None)[:3]
    return module, inputs, shapes


@contextlib.contextmanager
def _evaluation_mode(module: Any) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def _arguments(inputs: Any) -> dict[str, Any]:
    """Return positional inputs, or those by keyword of a mapping, as the exporter takes them."""
    if isinstance(inputs, Mapping):
        return {"args": (), "kwargs": dict(inputs)}
    args = tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)
    # It takes a mapping at the end for arguments by keyword.
    return {"args": (*args, {}) if args and isinstance(args[-1], dict) else args}


def _export(torch: Any, source: Any, inputs: Any, dynamic_shapes: Any) -> Any:
    try:
        with _silence(), torch.no_grad():
            arguments = {} if inputs is None else _arguments(inputs) | {"dynamic_shapes": dynamic_shapes}
            table = translations(torch)
            return torch.onnx.export(
                source, **arguments, dynamo=True, verbose=False, optimize=False, custom_translation_table=table
            )
    except Exception as error:  # torch.export and the exporter raise many unrelated classes
        raise UnsupportedModelError(
            f"PyTorch cannot export this model: {_place(error)}{_summary(_root(error))}",
            hint="torch.export.export(module, inputs) tells more; data-dependent control flow needs torch.cond",
        ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what the exporter says about itself from the user: packages it does without, attributes it guesses."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _place(error: BaseException) -> str:
    """Return which operator could not be translated to ONNX, if that is what failed."""
    found: BaseException | None = error
    while found is not None:
        if match := re.search(r"Error when translating node (%\w+)\b.*?\[target=([\w.]+)\]", str(found), re.DOTALL):
            return f"{match.group(2)} ({match.group(1)}): "
        found = found.__cause__
    return ""


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _summary(error: BaseException) -> str:
    """Return the message without its repeated headings, and the user's source line where there is one."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    source = [line.strip() for line in lines if re.match(r'\s*File "', line) and "site-packages" not in line]
    return " ".join([*lines[:2], *source[-1:]]) or type(error).__name__


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
