"""A module as a flat FX graph at the shape of one microbatch, by torch.export."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from optc.errors import UnsupportedModelError, UsageError
from optc.training.export import export
from optc.training.regions import inline_no_grad

# Checks of what export assumed; the trainer checks its inputs itself, and dtypes differ under autocast.
_CHECKS = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range")

_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)


@dataclass(frozen=True)
class Program:
    """A captured module.

    ``graph`` reads its weights by their original names with ``get_attr`` and outputs a flat tuple, of which
    ``out_spec`` makes what the module returned. ``canonical`` maps every name of a weight to the first name of the
    same tensor, so that tied weights have one. ``examples`` are the inputs of one microbatch.
    """

    root: fx.GraphModule
    examples: tuple[torch.Tensor, ...]
    out_spec: pytree.TreeSpec
    canonical: dict[str, str]

    @property
    def graph(self) -> fx.Graph:
        """The nodes."""
        return self.root.graph

    def fingerprint(self) -> str:
        """Hash of the operators, their names and the input shapes; the same for any weights and on any device."""
        digest = hashlib.sha256()
        for node in self.graph.nodes:
            args, kwargs = placed((node.args, node.kwargs), None)
            digest.update(f"{node.op} {node.name} {node.target} {args} {kwargs}\n".encode())
        for tensor in self.examples:
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
        return digest.hexdigest()[:16]


def placed(arguments: Any, device: torch.device | None) -> Any:
    """Arguments of operators with ``device`` for every device among them: a program may run where it was not captured.

    Export writes the device of the example inputs into operators such as ``arange``.
    """
    return fx.node.map_aggregate(arguments, lambda leaf: device if isinstance(leaf, torch.device) else leaf)


def as_tuple(inputs: Any) -> tuple[torch.Tensor, ...]:
    """Return a tensor or a sequence of tensors as a tuple; UsageError for anything else."""
    values = tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)
    for position, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            raise UsageError(
                f"input {position} is a {type(value).__name__}, not a tensor",
                hint="give a tensor or a tuple of tensors, each with the batch as its first dimension",
            )
    if not values:
        raise UsageError("no inputs were given", hint="give the tensors of one microbatch")
    return values


def capture(module: torch.nn.Module, example_inputs: Any) -> Program:
    """Export ``module``, in the mode it is in, at the shape of ``example_inputs``: a tensor or a tuple of tensors.

    The module and its weights are not changed; the program refers to the same weights.

    Raises:
        UsageError: the inputs are not tensors.
        UnsupportedModelError: what the module does depends on its data; names the source line.
    """
    examples = as_tuple(example_inputs)
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"a {type(module).__name__} is not a torch module")
    try:
        exported = export(module, examples)
        root = exported.module(check_guards=False)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error.message} ({_line(error)})", hint=error.hint) from error
    except Exception as error:  # torch.export raises many unrelated classes
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be captured at {_line(error)}: {_first_line(error)}", hint=_hint(error)
        ) from error
    assert isinstance(root, fx.GraphModule)
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    _clean(root)
    inline_no_grad(root)
    _refuse_transforms(root)
    _refuse_dynamic(root)
    return Program(root, examples, out_spec, canonical_names(module))


def _clean(root: fx.GraphModule) -> None:
    for node in list(root.graph.nodes):
        name = getattr(node.target, "__name__", str(node.target))
        checks = node.op == "call_function" and any(check in name for check in _CHECKS)
        if checks or (node.op == "call_module" and node.name.startswith("_guards")):
            root.graph.erase_node(node)
    for node in list(root.graph.nodes):
        if node.op == "get_attr" and not node.users:
            root.graph.erase_node(node)
    # The output is flattened by the graph itself; what follows works on plain nodes.
    root.graph.set_codegen(fx.graph.CodeGen())
    root.recompile()


def _refuse_transforms(root: fx.GraphModule) -> None:
    """``torch.vmap`` and its kin are recorded as nodes that switch modes of torch: no node of them runs alone."""
    found = [n for n in root.graph.nodes if getattr(n.target, "__module__", "") == "torch._functorch.predispatch"]
    if found:
        lines = ", ".join(sorted({source_line(node) for node in found})[:5])
        raise UnsupportedModelError(
            f"transformations of torch.func, such as vmap, cannot be split into stages: {lines}",
            hint="write the batch dimension out, as in torch.einsum or with unsqueeze",
        )


def _refuse_dynamic(root: fx.GraphModule) -> None:
    dynamic = []
    for node in root.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            sizes: Sequence[Any] = value.shape if isinstance(value, torch.Tensor) else (value,)
            if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
                dynamic.append(f"{node.name} ({source_line(node)})")
                break
    if dynamic:
        raise UnsupportedModelError(
            f"{len(dynamic)} operators have sizes that depend on data: {', '.join(dynamic[:5])}",
            hint="stages exchange tensors of fixed shape; pad to a fixed size instead",
        )


def canonical_names(module: torch.nn.Module) -> dict[str, str]:
    """The first name of the same tensor, for every name of a parameter or buffer."""
    first: dict[int, str] = {}
    names = {}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        names[name] = first.setdefault(id(tensor), name)
    return names


def source_line(node: fx.Node) -> str:
    """``file.py:12`` of the user's line that made ``node``, or its name if that is not known."""
    trace: str = node.stack_trace or ""
    places = [line.split('"') for line in trace.splitlines() if line.strip().startswith('File "')]
    places = [place for place in places if not place[1].startswith(_TORCH)] or places
    if not places:
        return str(node.name)
    return f"{places[-1][1]}:{places[-1][2].split(',')[1].split()[-1]}"


def _line(error: BaseException) -> str:
    """The innermost frame outside of torch, the user's line, else that of one of torch's modules."""
    trace = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in trace if not frame.filename.startswith((_TORCH, _HERE, "<"))]
    inside = [
        frame
        for frame in trace
        if frame.filename.startswith(f"{_TORCH}/nn/modules") and "module.py" not in frame.filename
    ]
    frames = frames or inside
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else "an unknown line"


def _hint(error: BaseException) -> str:
    if isinstance(error, GuardOnDataDependentSymNode | DataDependentOutputException):
        return "control flow that depends on values cannot be split into stages; use torch.where or torch.cond"
    return "torch.export has to be able to trace the module; torch.export.draft_export says more"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
