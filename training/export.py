"""torch.export, kept from losing gradients without a word.

As of torch 2.13 it traces what an ``autograd.Function`` computes forward and forgets its backward, runs reentrant
checkpoints without gradients, and forgets hooks on gradients. Here the first are recorded as operators, the second
are run as if they were not there (recomputation is the planner's choice), and the last are refused.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._export.wrappers import allow_in_pre_dispatch_graph
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from optc.errors import UnsupportedModelError

# What changes gradients, or asks for them, where a graph of the forward pass cannot say so.
_LOST = {
    torch.Tensor.register_hook: "a hook on a gradient",
    torch.Tensor.backward: "a backward pass",
    torch.autograd.grad: "a gradient",
    torch.autograd.backward: "a backward pass",
}


def export(module: torch.nn.Module, examples: tuple[torch.Tensor, ...]) -> ExportedProgram:
    """Trace ``module``, in the mode it is in, at the shapes of ``examples``.

    Raises UnsupportedModelError for what a graph cannot say; else whatever torch.export raises.
    """
    _refuse_names(module)
    _refuse_uninitialized(module)
    _refuse_hooks(module)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_custom_gradients())
        stack.enter_context(_NoHooks())
        stack.enter_context(_quiet())
        return torch.export.export(module, examples, strict=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what torch prints when it fails, among it the whole graph: the error says what there is to say."""
    disabled, said = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(said):
            yield
        sys.stderr.write(said.getvalue())
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _custom_gradients() -> Iterator[None]:
    original = torch.autograd.Function.__dict__["apply"]
    record = allow_in_pre_dispatch_graph(original.__func__)

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if issubclass(cls, CheckpointFunction):
            function, _, *inputs = args
            return function(*inputs)
        if cls.__module__.startswith(("torch._", "torch.utils.checkpoint")):
            # Parts of operators, which are recorded as such.
            return original.__func__(cls, *args, **kwargs)
        name = f"{cls.__module__}.{cls.__qualname__}"
        if getattr(importlib.import_module(cls.__module__), cls.__qualname__, None) is not cls:
            raise UnsupportedModelError(
                f"the graph cannot name the autograd function {name}",
                hint="define it at the top level of a module",
            )
        try:
            return record(cls, *args, **kwargs)
        except RuntimeError as error:
            if "graphable" not in str(error):
                raise
            raise UnsupportedModelError(
                f"the autograd function {name} is given something that a graph cannot hold",
                hint="give it tensors, numbers, strings and lists of them",
            ) from error

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = original


class _NoHooks(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOST:
            raise UnsupportedModelError(
                f"forward asks for {_LOST[func]}, which a graph of it does not hold",
                hint="write it as an autograd.Function, or as part of the loss",
            )
        return func(*args, **(kwargs or {}))


def _refuse_uninitialized(module: torch.nn.Module) -> None:
    lazy = [name for name, weight in module.named_parameters() if torch.nn.parameter.is_lazy(weight)]
    if lazy:
        raise UnsupportedModelError(
            f"{len(lazy)} weights have no shape yet: {', '.join(lazy[:5])}", hint="call the module once before"
        )


def _refuse_hooks(module: torch.nn.Module) -> None:
    found = [n or type(m).__name__ for n, m in module.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            found.append(name)
    if found:
        raise UnsupportedModelError(
            f"{len(found)} modules or weights have hooks on gradients: {', '.join(found[:5])}",
            hint="stages have weights of their own, which the hooks would not see; remove them",
        )


def _refuse_names(module: torch.nn.Module) -> None:
    """A graph module has attributes of its own at its top level."""
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    taken = [name for name, _ in [*tensors, *module.named_children()] if hasattr(fx.GraphModule, name)]
    if taken:
        raise UnsupportedModelError(
            f"{type(module).__name__} has weights or modules called {', '.join(taken)}, which graphs use themselves",
            hint="give them another name, or put the module into another one",
        )
