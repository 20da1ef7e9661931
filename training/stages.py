"""Relay stages: a graph module per stage that computes its units and passes on what later stages still need.

A value that skips stages is handed on by each of them, so stages talk to their neighbours alone and any schedule can
run them. Tensors leave a stage as contiguous copies, and gradients are made contiguous before they do: what is sent
has to be dense and owned by nobody else.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from optc.passes.partition.chain import segments
from optc.training.analysis import Facts, autocast, is_random, written
from optc.training.capture import placed
from optc.training.distributed import in_memory
from optc.training.linearize import Layout
from optc.training.randomness import Clock, Seeded


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return in_memory(gradients[0])


def enter(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of what a stage receives; its gradient is made fit to be sent."""
    result: torch.Tensor = _Boundary.apply(tensor) if tensor.requires_grad else tensor.clone()
    return result


def leave(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of what a stage sends."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _finish(tensor: torch.Tensor) -> torch.Tensor:
    # FSDP cannot watch over views; a product of three dimensions is one, too.
    return leave(tensor) if tensor._is_view() else tensor


class Stage(torch.nn.Module):
    """One stage: ``body`` is the graph, whose weights are this stage's own and keep their original names.

    ``inputs`` and ``outputs`` are tensors on the device ``meta`` that look like what comes in and goes out.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        inputs: tuple[torch.Tensor, ...],
        outputs: tuple[torch.Tensor, ...],
        clock: Clock,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.body = body
        self.inputs, self.outputs = inputs, outputs
        self._clock, self._device, self._dtype, self._recompute = clock, device, dtype, recompute

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Run the stage's units; returns a tensor, or a tuple of them."""
        if not (self._recompute and torch.is_grad_enabled()):
            return self._run(self._clock.now(), *tensors)
        return checkpoint(
            self._run,
            self._clock.now(),
            *tensors,
            use_reentrant=False,
            preserve_rng_state=False,  # random operators are seeded by the clock
            context_fn=lambda: (contextlib.nullcontext(), _KeptBuffers(self.body)),
        )

    def _run(self, moment: tuple[int, int, int], *tensors: torch.Tensor) -> Any:
        with self._clock.at(moment), autocast(self._device, self._dtype):
            return self.body(*tensors)


class _KeptBuffers(contextlib.AbstractContextManager["_KeptBuffers"]):
    """A recomputed forward pass must not count in running statistics a second time."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __enter__(self) -> _KeptBuffers:
        self._kept = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        return self

    def __exit__(self, *_: object) -> None:
        for name, buffer in self._module.named_buffers():
            buffer.copy_(self._kept[name])


def build(
    layout: Layout,
    facts: dict[fx.Node, Facts],
    cuts: Sequence[int],
    number: int,
    clock: Clock,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> Stage:
    """Return stage ``number`` of those that ``cuts`` make, on ``device``, with copies of its weights.

    ``facts`` are those under autocast to ``dtype``. The last stage returns all tensors of the program's outputs.
    """
    start, stop = segments(cuts, len(layout.units))[number]
    first, last = number == 0, number == len(cuts)
    program = layout.program
    sources = [n for n in program.graph.nodes if n.op == "placeholder"] if first else layout.crossing(start)
    targets = _output_tensors(layout) if last else layout.crossing(stop)
    graph, modules = _graph(layout, sources, layout.units[start:stop], targets, first, last, clock)
    body = _own_weights(_place(fx.GraphModule(_Root(program.root, graph, modules), graph), device), device)
    stage = Stage(
        body,
        tuple(_meta(facts, node, first) for node in sources),
        tuple(_meta(facts, node, False) for node in targets),
        clock,
        device=device,
        dtype=dtype,
        recompute=recompute,
    )
    stage.train(program.root.training)
    return stage


def _meta(facts: dict[fx.Node, Facts], node: fx.Node, is_input: bool) -> torch.Tensor:
    value = facts[node].value
    assert value is not None
    return value.meta().detach() if is_input else value.meta()


def _output_tensors(layout: Layout) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(layout.program.graph.output_node().args) if isinstance(leaf, fx.Node)]


def restore_outputs(layout: Layout, tensors: Any) -> Any:
    """What the captured module would have returned, from the tensors of the last stage."""
    flat = iter(tensors if isinstance(tensors, tuple | list) else (tensors,))
    leaves = pytree.tree_leaves(layout.program.graph.output_node().args[0], is_leaf=lambda leaf: leaf is None)
    values = [next(flat) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    return pytree.tree_unflatten(values, layout.program.out_spec)


def _graph(
    layout: Layout,
    sources: Sequence[fx.Node],
    units: Sequence[fx.Node],
    targets: Sequence[fx.Node],
    first: bool,
    last: bool,
    clock: Clock,
) -> tuple[fx.Graph, dict[str, torch.nn.Module]]:
    graph = fx.Graph()
    modules: dict[str, torch.nn.Module] = {}
    copies: dict[fx.Node, fx.Node] = {}
    for node in sources:
        copies[node] = graph.placeholder(node.name)
    # Microbatches are parts of one tensor: writing to one would spoil what another has saved.
    changed = {leaf.storage for unit in units for target in written(unit) for leaf in layout.facts[target].leaves}
    for node in sources:
        if not first or any(leaf.storage in changed for leaf in layout.facts[node].leaves):
            copies[node] = graph.call_function(enter, (copies[node],))

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:
            assert node.op == "get_attr" or node in layout.derived, f"{node} is not in this stage"
            copies[node] = graph.node_copy(node, copy_of)
        return copies[node]

    for unit in units:
        if is_random(unit):
            modules[f"random_{unit.name}"] = Seeded(unit.target, unit.name, clock)
            args, kwargs = fx.node.map_arg((unit.args, unit.kwargs), copy_of)
            copies[unit] = graph.call_module(f"random_{unit.name}", args, kwargs)
        else:
            copies[unit] = graph.node_copy(unit, copy_of)
    results = [graph.call_function(_finish if last else leave, (copy_of(node),)) for node in targets]
    graph.output(tuple(results) if len(results) > 1 else results[0])
    graph.lint()
    return graph, modules


class _Root(torch.nn.Module):
    """Where a stage's graph module finds what its graph names: the program's weights, and the seeded operators."""

    def __init__(self, root: fx.GraphModule, graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> None:
        super().__init__()
        for name, child in root.named_children():
            self.add_module(name, child)
        for name, parameter in root.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in root.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, module in modules.items():
            self.add_module(name, module)
        for node in graph.nodes:
            if node.op == "get_attr" and not hasattr(self, node.target.partition(".")[0]):
                setattr(self, node.target, getattr(root, node.target))  # how autograd functions are called


def _place(body: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Let operators make tensors on ``device``, also inside of branches and loops."""
    for name, child in list(body.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(body, name, _place(copy.deepcopy(child), device))
    for node in body.graph.nodes:
        node.args, node.kwargs = placed((node.args, node.kwargs), device)
    body.recompile()
    return body


def _own_weights(body: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Replace the weights by copies on ``device``; one tensor under two names stays one."""
    copies: dict[int, torch.Tensor] = {}
    for module in body.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in copies:
                owned = parameter.detach().to(device, copy=True)
                copies[id(parameter)] = torch.nn.Parameter(owned, requires_grad=parameter.requires_grad)
            setattr(module, name, copies[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if id(buffer) not in copies:
                copies[id(buffer)] = buffer.detach().to(device, copy=True)
            setattr(module, name, copies[id(buffer)])
    return body
