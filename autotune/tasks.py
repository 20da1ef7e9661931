"""Tasks: the distinct kernels of a model, with the forms that other layouts of their weights give them.

What is measured is a kernel as it stands in the model: fused, with the model's weights. A layout is decided while
lowering, so the model is lowered once for each answer; each kernel is then found again by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as oir
import tvm
from tvm import relax, tirx

from optc.backends.base import Target
from optc.backends.cpu.build import CpuBackend
from optc.backends.kernels import generic
from optc.backends.kernels.decisions import Space, deciding
from optc.backends.kernels.schedule import schedule_kernel
from optc.backends.kernels.work import work
from optc.backends.kernels.workload import Workload
from optc.backends.kernels.workload import of as workload_of

LAYOUTS: tuple[Mapping[str, int], ...] = (
    {},
    {"vectors": 1},
    {"vectors": 2},
    {"vectors": 3},
    {"vectors": 4},
    {"winograd": 0},
    {"winograd": 2},
    {"winograd": 4},
)
"""What lowering is told for all kernels at once; the first is what it decides by itself."""

_DTYPES = (
    "float16",
    "float32",
    "float64",
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
"""What kernels may read and write to be measured alone."""


@dataclass
class Variant:
    """A kernel with one layout: unscheduled, with the arrays of those parameters that are weights."""

    workload: Workload
    function: Any
    weights: dict[int, np.ndarray]
    outputs: int
    template: str
    space: Space

    @property
    def layout(self) -> Mapping[str, int]:
        """The layout's decisions."""
        return self.workload.layout


@dataclass
class Task:
    """A kernel to tune. ``names`` are its kernels in the model, ``seconds`` what their calls take in one run."""

    names: list[str]
    variants: list[Variant]
    operations: int
    calls: int = 1
    seconds: float = 0.0
    share: float = 0.0

    @property
    def workload(self) -> Workload:
        """The workload, with the untuned layout."""
        return self.variants[0].workload

    @property
    def decided(self) -> bool:
        """Whether there are decisions to take."""
        return any(v.space.knobs for v in self.variants) or len(self.variants) > 1

    @property
    def searched(self) -> bool:
        """Whether TVM's search may find a schedule, because no template of ours does."""
        return self.variants[0].template in generic.SEARCHED

    @property
    def key(self) -> str:
        """The fingerprint."""
        return self.workload.key


@dataclass
class Call:
    """How a kernel is called: how many arguments it gets, the arrays of those that are weights, and how often."""

    arguments: int
    weights: dict[int, np.ndarray]
    count: int = 1


@dataclass
class _Forced:
    """Answers lowering with one layout."""

    given: Mapping[str, int] = field(default_factory=dict)

    def layout(self, workload: Workload) -> Mapping[str, int]:
        return self.given if workload.fixed else {}

    def schedule(self, workload: Workload) -> Mapping[str, int]:
        return {}

    def trace(self, workload: Workload) -> str:
        return ""

    def holds(self, workload: Workload, space: Space) -> bool:
        return True


def extract(model: oir.Model, target: Target, without: Collection[str] = ()) -> list[Task]:
    """Return the tasks of an optimized model, whose sizes must be fixed where something is to be tuned."""
    tasks: dict[str, Task] = {}
    for given in LAYOUTS:
        if given and not any(_answers(task, given) for task in tasks.values()):
            continue
        module, lowered = CpuBackend(target, without=without, tuning=_Forced(given)).fuse(model.clone())
        calls = calls_of(module, lowered)
        for var, function in sorted(module.functions.items(), key=lambda item: str(item[0].name_hint)):
            name = str(var.name_hint)
            if isinstance(function, tirx.PrimFunc) and name in calls:
                _add(tasks, name, function, calls[name], target, first=not given)
    return [task for task in tasks.values() if task.searched or task.decided]


def _answers(task: Task, given: Mapping[str, int]) -> bool:
    """Tell whether a layout may give the task another form."""
    return any(name in task.workload.layout and task.workload.layout[name] != value for name, value in given.items())


def _add(tasks: dict[str, Task], name: str, function: Any, call: Call, target: Target, *, first: bool) -> None:
    workload = workload_of(function)
    if not workload.fixed or not all(str(getattr(p.ty, "dtype", "")) in _DTYPES for p in function.params):
        return
    if not all(hasattr(p.ty, "shape") for p in function.params):
        return
    task = tasks.get(workload.key)
    if not first:
        if task is None or any(dict(v.layout) == dict(workload.layout) for v in task.variants):
            return
        # Without Winograd's algorithm padding is a kernel of its own, whose time would be missing.
        algorithms = {bool(w.layout.get("winograd")) for w in (workload, task.workload)}
        if workload.core.get("padded") and len(algorithms) > 1:
            return
    elif task is not None:
        task.names.append(name)
        task.calls += call.count
        return
    with deciding({}) as space:
        _, template, _ = schedule_kernel(function, target)
    variant = Variant(workload, function, call.weights, len(function.params) - call.arguments, template, space)
    if task is not None:
        task.variants.append(variant)
        return
    asked = work(function)
    tasks[workload.key] = Task([name], [variant], asked.operations if asked else 0, call.count)


def calls_of(module: Any, lowered: Any) -> dict[str, Call]:
    """Return how each kernel is called; its parameters beyond the arguments are outputs."""
    found: dict[str, Call] = {}
    for function in module.functions.values():
        if not isinstance(function, relax.Function):
            continue
        arrays: dict[Any, np.ndarray] = {}
        if len(function.params) == len(lowered.input_names) + len(lowered.weights):
            own = function.params[len(lowered.input_names) :]
            arrays = dict(zip(own, lowered.weights.values(), strict=True))
        for call in _calls(function.body):
            name, arguments = str(call.args[0].name_hint), list(call.args[1].fields)
            if name in found:
                found[name].count += 1
                continue
            weights = {}
            for i, argument in enumerate(arguments):
                if isinstance(argument, tvm.ir.GenericConst):
                    weights[i] = argument.value.numpy()
                elif argument in arrays:
                    weights[i] = arrays[argument]
            found[name] = Call(len(arguments), weights)
    return found


def _calls(body: Any) -> list[Any]:
    calls: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, relax.Call) and getattr(node.op, "name", "") == "relax.call_tir":
            calls.append(node)

    relax.analysis.post_order_visit(body, visit)
    return calls
