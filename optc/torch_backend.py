"""``torch.compile(module, backend="optc")``, for inference.

Dynamo hands over an FX graph whose parameters are inputs. They become weights of the compiled model, so a parameter
that is changed afterwards makes the compiled code stale: every call checks the parameters' version counters and
compiles again when one moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from optc.errors import UnsupportedModelError


def optc(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """Compile one FX graph. Dynamic sizes stay dynamic. Raises UnsupportedModelError when gradients are wanted."""
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        raise UnsupportedModelError(
            "torch.compile(backend='optc') is for inference, and this call records gradients",
            hint="call the module under torch.no_grad()",
        )
    return _Compiled(graph_module, example_inputs)


class _Compiled:
    """A compiled FX graph, called with all of the graph's inputs."""

    def __init__(self, graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.graph_module = graph_module
        self.placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        self.frozen = [i for i, x in enumerate(example_inputs) if _is_weight(x)]
        self.numbers = [i for i, node in enumerate(self.placeholders) if _is_number(node, example_inputs[i])]
        known = {*self.frozen, *self.numbers}
        self.tensors = [i for i, x in enumerate(example_inputs) if isinstance(x, torch.Tensor) and i not in known]
        self.versions: list[tuple[float, int]] | None = None
        self.run: Callable[[Sequence[Any]], tuple[Any, ...]] | None = None

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        versions = [(arguments[i].data_ptr(), arguments[i]._version) for i in self.frozen]
        versions += [(arguments[i].item(), 0) for i in self.numbers]
        if self.run is None or versions != self.versions:
            self.run = self._compile(arguments)
            self.versions = versions
        return self.run([arguments[i] for i in self.tensors])

    def _compile(self, arguments: Sequence[Any]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        import optc as package

        graph_module = _with_numbers(self.graph_module, {i: arguments[i].item() for i in self.numbers})
        wrapper = _Wrapper(graph_module, self._plan(arguments))
        inputs = tuple(arguments[i] for i in self.tensors)
        shapes = tuple(_dynamic_dims(self.placeholders[i]) for i in self.tensors)
        artifact = package.compile(wrapper, inputs, dynamic_shapes=(shapes,) if any(shapes) else None, verify=False)
        model = artifact.model()
        names = [spec.name for spec in model.inputs]
        used = _used_inputs(wrapper, len(inputs), len(names))

        def run(tensors: Sequence[Any]) -> tuple[Any, ...]:
            feeds = {name: tensors[i].detach().contiguous() for name, i in zip(names, used, strict=True)}
            results = model.run(feeds)
            return tuple(torch.from_numpy(results[spec.name]) for spec in model.outputs)

        return run

    def _plan(self, arguments: Sequence[Any]) -> list[Any]:
        """Return, per placeholder: a frozen tensor, an input's number, or where a size is read from."""
        plan: list[Any] = []
        for i, node in enumerate(self.placeholders):
            if i in self.frozen or i in self.numbers:
                plan.append(("weight", arguments[i].detach()))
            elif i in self.tensors:
                plan.append(("input", self.tensors.index(i)))
            else:
                plan.append(("size", self._find_size(node)))
        return plan

    def _find_size(self, node: torch.fx.Node) -> tuple[int, int]:
        symbol = str(node.meta["example_value"])
        for position, i in enumerate(self.tensors):
            for axis, size in enumerate(self.placeholders[i].meta["example_value"].shape):
                if str(size) == symbol:
                    return position, axis
        raise UnsupportedModelError(
            f"the graph takes the number {symbol}, which is no tensor's size", hint="pass it as a tensor"
        )


class _Wrapper(torch.nn.Module):  # type: ignore[misc]
    """The FX graph as a module of its tensor inputs only: weights are buffers, sizes are read off the inputs."""

    def __init__(self, graph_module: torch.fx.GraphModule, plan: list[Any]) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.plan = plan
        for number, (kind, value) in enumerate(plan):
            if kind == "weight":
                self.register_buffer(f"weight_{number}", value)

    def forward(self, *inputs: Any) -> Any:
        """Call the FX graph with all of its inputs."""
        arguments = []
        for number, (kind, value) in enumerate(self.plan):
            if kind == "weight":
                arguments.append(getattr(self, f"weight_{number}"))
            elif kind == "input":
                arguments.append(inputs[value])
            else:
                arguments.append(inputs[value[0]].shape[value[1]])
        return self.graph_module(*arguments)


def _is_weight(value: Any) -> bool:
    return isinstance(value, torch.nn.Parameter) or (
        isinstance(value, torch.Tensor) and getattr(value, "_dynamo_static_input_type", None) is not None
    )


def _is_number(node: torch.fx.Node, value: Any) -> bool:
    """Tell whether a placeholder is a Python float, which dynamo passes as a 0-d tensor when sizes are dynamic."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 0
        and value.dtype == torch.float64
        and all(user.op == "call_method" and user.target == "item" for user in node.users)
    )


def _with_numbers(graph_module: torch.fx.GraphModule, numbers: dict[int, float]) -> torch.fx.GraphModule:
    """Return the graph with the floats at these placeholders written into it."""
    if not numbers:
        return graph_module
    copied = torch.fx.GraphModule(graph_module, graph_module.graph.__class__())
    copied.graph.output(copied.graph.graph_copy(graph_module.graph, {}))
    placeholders = [node for node in copied.graph.nodes if node.op == "placeholder"]
    for position, number in numbers.items():
        for item in list(placeholders[position].users):

            def written(node: torch.fx.Node, item: torch.fx.Node = item, number: float = number) -> Any:
                return number if node is item else node

            for user in list(item.users):
                user.args = torch.fx.node.map_arg(user.args, written)
                user.kwargs = torch.fx.node.map_arg(user.kwargs, written)
            copied.graph.erase_node(item)
    copied.recompile()
    return copied


def _dynamic_dims(node: torch.fx.Node) -> dict[int, Any]:
    shape = node.meta["example_value"].shape
    return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(shape) if not isinstance(size, int)}


def _used_inputs(wrapper: _Wrapper, given: int, kept: int) -> list[int]:
    if given == kept:
        return list(range(given))
    raise UnsupportedModelError(f"{given - kept} of the graph's {given} inputs have no effect and were dropped")
