"""What each node costs for one microbatch: measured on this device, and kept in a file for every rank."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from optc.errors import UsageError
from optc.training.analysis import Facts, written
from optc.training.capture import Program

FORMAT = 1


@dataclass(frozen=True)
class NodeCost:
    """Seconds of one microbatch, and bytes that the node keeps for its backward pass."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    saved: float = 0.0
    flops: int = 0

    def __add__(self, other: NodeCost) -> NodeCost:
        return NodeCost(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
            self.saved + other.saved,
            self.flops + other.flops,
        )


@dataclass(frozen=True)
class Costs:
    """Costs by node name. ``source`` says how they were found: ``measured`` or ``roofline``."""

    fingerprint: str
    source: str
    nodes: dict[str, NodeCost] = field(default_factory=dict)

    def of(self, node: fx.Node) -> NodeCost:
        """Cost of ``node``; nothing for inputs and weights."""
        return self.nodes.get(node.name, NodeCost())

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self.as_json()), encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        """Plain lists and dictionaries."""
        nodes = {name: list(asdict(cost).values()) for name, cost in self.nodes.items()}
        return {"format": FORMAT, "fingerprint": self.fingerprint, "source": self.source, "nodes": nodes}

    @staticmethod
    def from_json(content: Any, where: str) -> Costs:
        """Read what ``as_json`` made; UsageError names ``where`` if it is something else."""
        try:
            if content["format"] != FORMAT:
                raise UsageError(f"{where} has format {content['format']}, this optc reads {FORMAT}")
            nodes = {name: NodeCost(*values) for name, values in content["nodes"].items()}
            return Costs(content["fingerprint"], content["source"], nodes)
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{where} is no file of costs: {error!r}") from error

    @staticmethod
    def load(path: Path, program: Program) -> Costs:
        """Read ``path``; UsageError if it is missing, damaged or of another model."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"{path} is not JSON: {error}") from error
        costs = Costs.from_json(content, str(path))
        if costs.fingerprint != program.fingerprint():
            raise UsageError(f"{path} holds the costs of another model or microbatch shape", hint="measure it again")
        return costs


def measure(program: Program, facts: dict[fx.Node, Facts], repeats: int = 3) -> Costs:
    """Time every node of ``program`` forward and backward on the device of its examples.

    The module, its buffers and the random state are left as they were. Times are medians of ``repeats`` runs after a
    first one; the cost of asking autograd for one node's gradient, which a whole backward pass does not have, is
    measured apart and subtracted.
    """
    devices = sorted({tensor.device.index or 0 for tensor in program.examples if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        meter = _Meter(program, facts, repeats)
        meter.run(*program.examples)
    return Costs(program.fingerprint(), "measured", meter.costs)


class _Meter(fx.Interpreter):
    """Runs node by node; between nodes every tensor is a leaf, so that each has an autograd graph of its own."""

    def __init__(self, program: Program, facts: dict[fx.Node, Facts], repeats: int) -> None:
        # Values stay alive, so that memory saved by several nodes is recognized and counted once.
        super().__init__(program.root, garbage_collect_values=False)
        self.costs: dict[str, NodeCost] = {}
        self._facts, self._repeats = facts, repeats
        self._device = program.examples[0].device
        self._weights: dict[str, Any] = {}
        self._seen: dict[int, torch.Tensor] = {}
        probe = torch.zeros(1, device=self._device, requires_grad=True)
        self._overhead = self._backward([probe.view_as(probe)], [probe], 0.0)

    def fetch_attr(self, target: str) -> Any:
        if target not in self._weights:
            found = super().fetch_attr(target)
            if isinstance(found, torch.Tensor):
                # Buffers are copied: batch normalization would count this run.
                found = found if isinstance(found, torch.nn.Parameter) else found.clone()
                self._seen[found.untyped_storage().data_ptr()] = found
            self._weights[target] = found
        return self._weights[target]

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_module", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        run = getattr(self, n.op)
        times = []
        saved = 0.0
        with torch.enable_grad():
            for attempt in range(self._repeats + 1):
                call = _Call(args, kwargs, copies=bool(written(n)))
                self._synchronize()
                start = time.perf_counter()
                result = run(n.target, call.args, call.kwargs)
                self._synchronize()
                times.append(time.perf_counter() - start)
                if attempt == 0:
                    saved = self._saved(n, run, args, kwargs)
            leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            outputs = [leaf for leaf in leaves if leaf.requires_grad]
            total = self._backward(outputs, [*call.activations, *call.weights], self._overhead)
            to_inputs = self._backward(outputs, call.activations, self._overhead) if call.weights else total
        self.costs[n.name] = NodeCost(
            forward=statistics.median(times[1:]),
            backward_input=min(to_inputs, total),
            backward_weight=max(total - to_inputs, 0.0),
            saved=saved,
            flops=self._facts[n].flops,
        )
        if written(n):
            with torch.no_grad():
                result = run(n.target, args, kwargs)
        flags = iter(self._facts[n].leaves)
        return pytree.tree_map_only(
            torch.Tensor, lambda leaf: leaf.detach().requires_grad_(next(flags).requires_grad), result
        )

    def _saved(self, n: fx.Node, run: Callable[..., Any], args: Any, kwargs: Any) -> float:
        """Bytes that autograd keeps for this node and that no node before it keeps already."""
        call = _Call(args, kwargs, copies=bool(written(n)))
        saved = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:
                # Kept alive: another tensor at the same address would be taken for this one.
                self._seen[storage.data_ptr()] = tensor.detach()
                saved += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(n.target, call.args, call.kwargs)
        return float(saved)

    def _backward(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], overhead: float) -> float:
        """Seconds that the gradients of ``outputs`` with respect to ``inputs`` take, less ``overhead``."""
        if not outputs or not inputs:
            return 0.0
        gradients = [torch.ones_like(output) for output in outputs]
        times = []
        for _ in range(self._repeats + 1):
            self._synchronize()
            start = time.perf_counter()
            torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True)
            self._synchronize()
            times.append(time.perf_counter() - start)
        return max(statistics.median(times[1:]) - overhead, 0.0)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Call:
    """Arguments of one run of a node, cut off from what made them; ``copies`` for one that writes to them."""

    def __init__(self, args: Any, kwargs: Any, *, copies: bool) -> None:
        self.activations: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        self._copies = copies
        self.args, self.kwargs = pytree.tree_map_only(torch.Tensor, self._detach, (args, kwargs))

    def _detach(self, value: torch.Tensor) -> torch.Tensor:
        if isinstance(value, torch.nn.Parameter):
            if value.requires_grad:
                self.weights.append(value)
            return value
        leaf = value.detach().requires_grad_(value.requires_grad)
        if leaf.requires_grad:
            self.activations.append(leaf)
        # autograd refuses to write into a leaf
        return leaf.clone() if self._copies else leaf
