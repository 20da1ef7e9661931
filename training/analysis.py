"""What each node of a program yields, found by running it on fake tensors: shapes, gradients, storage, work."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from optc.errors import UnsupportedModelError
from optc.training.capture import Program, placed, source_line

# They write to their running statistics in training mode, which their schemas do not say.
_WRITES = {"aten::batch_norm": (3, 4), "aten::instance_norm": (3, 4), "aten::_batch_norm_impl_index": (3, 4)}


@dataclass(frozen=True)
class Value:
    """A tensor that a node yields. ``storage`` is the same number for tensors that share memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    storage: int

    @property
    def bytes(self) -> int:
        """Size of a contiguous copy."""
        return math.prod(self.shape) * int(self.dtype.itemsize)

    def meta(self) -> torch.Tensor:
        """A contiguous tensor without data that looks like this one."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta", requires_grad=self.requires_grad)


@dataclass(frozen=True)
class Facts:
    """Of one node: its value if it is a single tensor, all tensors that it yields, operations of its forward pass."""

    value: Value | None
    leaves: tuple[Value, ...]
    flops: int


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to ``dtype``, or nothing; casts of weights are not shared, so that microbatches stay independent."""
    if dtype is None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = torch.autocast(device.type, dtype, cache_enabled=False)
    return context


def analyse(
    program: Program, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> dict[fx.Node, Facts]:
    """Facts of every node but the output, under autocast to ``dtype`` if it is given.

    Autocast treats operators differently on different kinds of ``device``; it is that of the examples by default.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = device or program.examples[0].device
    interpreter = _Fake(program.root, mode, device)
    with mode, torch.enable_grad(), autocast(device, dtype):
        interpreter.run(*(mode.from_tensor(tensor.detach()).to(device) for tensor in program.examples))
        return interpreter.settled()


class _Random(TorchDispatchMode):
    """Notes the operators that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            self.met.append(str(func))
        return func(*args, **(kwargs or {}))


class _Fake(fx.Interpreter):
    def __init__(self, root: fx.GraphModule, mode: FakeTensorMode, device: torch.device) -> None:
        super().__init__(root, garbage_collect_values=False)
        self.facts: dict[fx.Node, Facts] = {}
        self._mode, self._device = mode, device
        self._weights: dict[int, Any] = {}
        self._storages: dict[StorageWeakRef, int] = {}

    def settled(self) -> dict[fx.Node, Facts]:
        """The facts after the last write: ``y = zeros(…)`` comes to want gradients by ``y[0] = layer(x)``."""
        return {node: self._facts_of(self.env[node], facts.flops) for node, facts in self.facts.items()}

    def fetch_attr(self, target: str) -> Any:
        found = super().fetch_attr(target)
        if not isinstance(found, torch.Tensor):
            return found
        if id(found) not in self._weights:
            self._weights[id(found)] = self._mode.from_tensor(found).to(self._device)
        return self._weights[id(found)]

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return placed(super().fetch_args_kwargs_from_env(n), self._device)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return super().run_node(n)
        before = [(argument, found._version) for argument, found in self._arguments(n)]
        # Counting fails on the branches of torch.cond; what is inside of regions is not counted.
        counter, random = FlopCounterMode(display=False), _Random()
        counted = isinstance(n.target, torch._ops.OpOverload)
        custom = n.target is torch.ops.higher_order.flat_apply
        with counter if counted else random if custom else contextlib.nullcontext():
            result = super().run_node(n)
        self._refuse_unknown_writes(n, before)
        if random.met:
            raise UnsupportedModelError(
                f"{source_line(n)}: the autograd function {n.args[2]} draws random numbers ({random.met[0]})",
                hint="draw them outside and give them to it",
            )
        self.facts[n] = self._facts_of(result, counter.get_total_flops() if counted else 0)
        return result

    def _facts_of(self, result: Any, flops: int) -> Facts:
        leaves = tuple(self._value(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return Facts(leaves[0] if isinstance(result, torch.Tensor) else None, leaves, flops)

    def _arguments(self, n: fx.Node) -> list[tuple[fx.Node, torch.Tensor]]:
        return [(node, self.env[node]) for node in n.all_input_nodes if isinstance(self.env[node], torch.Tensor)]

    def _refuse_unknown_writes(self, n: fx.Node, before: list[tuple[fx.Node, int]]) -> None:
        """Whether memory may be cut apart depends on ``written``."""
        # Tensors of one memory count its writes together.
        known = {leaf.storage for argument in written(n) for leaf in self.facts[argument].leaves}
        for argument, version in before:
            if self.env[argument]._version != version and self._value(self.env[argument]).storage not in known:
                raise UnsupportedModelError(
                    f"{source_line(n)}: {n.name} writes to its argument {argument.name} without saying so",
                    hint="let it return a new tensor",
                )

    def _value(self, tensor: torch.Tensor) -> Value:
        storage = StorageWeakRef(tensor.untyped_storage())
        number = self._storages.setdefault(storage, len(self._storages))
        return Value(tuple(tensor.shape), tensor.dtype, tensor.requires_grad, number)


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory ``node`` writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return _written_inside(node)
    positions = [
        i for i, argument in enumerate(schema.arguments) if argument.alias_info and argument.alias_info.is_write
    ]
    if schema.name in _WRITES and _trains(node):
        positions += _WRITES[schema.name]
    named = {schema.arguments[i].name for i in positions}
    arguments = [node.args[i] for i in positions if i < len(node.args)]
    arguments += [value for key, value in node.kwargs.items() if key in named]
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, fx.Node)]


def _written_inside(node: fx.Node) -> list[fx.Node]:
    """All tensors that a region is given, if it writes to anything: which of them is not looked for."""
    regions = [getattr(node.graph.owning_module, n.target, None) for n in node.all_input_nodes if n.op == "get_attr"]
    bodies = [region for region in regions if isinstance(region, fx.GraphModule)]
    if not any(written(inner) for body in bodies for inner in body.graph.nodes):
        return []
    return [argument for argument in node.all_input_nodes if argument.op != "get_attr" or _is_tensor(argument)]


def _is_tensor(node: fx.Node) -> bool:
    *path, name = str(node.target).split(".")
    owner = node.graph.owning_module
    assert owner is not None
    return isinstance(getattr(owner.get_submodule(".".join(path)), name), torch.Tensor)


def _trains(node: fx.Node) -> bool:
    # `training` of batch_norm and `use_input_stats` of instance_norm are both the sixth argument.
    return bool(node.args[5]) if len(node.args) > 5 else True


def is_random(node: fx.Node) -> bool:
    """Whether ``node`` draws random numbers when it runs."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    schema = node.target._schema
    given = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)} | node.kwargs
    off = given.get("train", True) is False or given.get("training", True) is False
    default = 0.0 if schema.name == "aten::scaled_dot_product_attention" else 1.0
    probability = given.get("dropout_p", given.get("p", given.get("dropout", default)))
    return not off and probability != 0.0
