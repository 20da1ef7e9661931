"""What a kernel computes, in words that stay the same when the compiler changes: the key of tuning records.

A workload has an operator with its sizes (``core``), the names of the element-wise stages fused behind it, and the
decisions that lowering has taken about its operands (``layout``). Names of kernels, variables, and the code that a
template writes are no part of it; ``VERSION`` counts changes of this description.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import s_tir

from optc.backends.kernels.fused import REDUCTION
from optc.backends.kernels.loops import collect, static

VERSION = 1
CORE = "optc.workload"
"""The block annotation with a core as JSON, where lowering knows more than the block says."""
LAYOUT = "optc.layout"
"""The block annotation with the layout's decisions as JSON."""
TEMPLATE = "optc.template"
_LAYOUT_ONLY = {TEMPLATE, CORE, LAYOUT, "optc.rows", "optc.columns", "optc.stage", "optc.magnitude"}

Core = Mapping[str, Any]


@dataclass(frozen=True)
class Workload:
    """``core`` maps names to numbers, texts and lists of numbers; a size that only a run knows is None."""

    core: Core
    epilogue: tuple[str, ...] = ()
    layout: Mapping[str, int] = field(default_factory=dict)

    @property
    def operator(self) -> str:
        """The kind of kernel."""
        return str(self.core["op"])

    @property
    def core_key(self) -> str:
        """The fingerprint of the core alone: what lowering can ask for."""
        return _digest({"core": self.core})

    @property
    def key(self) -> str:
        """The fingerprint of core and epilogue; layouts of one workload compete under it."""
        return _digest({"core": self.core, "epilogue": list(self.epilogue)})

    @property
    def fixed(self) -> bool:
        """Whether all sizes are known."""
        values = [v for value in self.core.values() for v in (value if isinstance(value, list) else [value])]
        return not any(v is None or (isinstance(v, str) and "?" in v) for v in values)

    def describe(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"core": dict(self.core), "epilogue": list(self.epilogue), "layout": dict(self.layout)}

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={_short(v)}" for k, v in sorted(self.core.items()) if k != "op")
        return " ".join([self.operator, sizes, *(f"+{stage}" for stage in self.epilogue)])


def parse(data: Mapping[str, Any]) -> Workload:
    """Return the workload of a JSON form; raises KeyError, TypeError or ValueError for anything else."""
    layout = {str(k): int(v) for k, v in data["layout"].items()}
    core = dict(data["core"])
    if not isinstance(core["op"], str):
        raise TypeError("op is no text")
    return Workload(core, tuple(str(s) for s in data["epilogue"]), layout)


def annotation(core: Core, layout: Mapping[str, int]) -> dict[str, str]:
    """Return the block annotations that ``of`` reads."""
    return {CORE: _json(core), LAYOUT: _json(layout)}


def of(function: Any) -> Workload:
    """Return the workload of an unscheduled kernel: its annotated core, or what its blocks say."""
    blocks = [block for block in collect(function.body, s_tir.SBlock) if block.name_hint != "root"]
    cores = [block for block in blocks if TEMPLATE in block.annotations]
    if len(cores) != 1:
        stages = [_stage(block) for block in blocks]
        return Workload({"op": "generic", "stages": stages, "tensors": _tensors(function)})
    (core,) = cores
    at = next(i for i, block in enumerate(blocks) if block.same_as(core))
    epilogue = tuple(_stage(block) for block in blocks[at + 1 :])
    if CORE in core.annotations:
        described = json.loads(str(core.annotations[CORE]))
        return Workload(described, epilogue, json.loads(str(core.annotations[LAYOUT])))
    outputs = [static(v.dom.extent) for v in core.iter_vars if int(v.iter_type) != REDUCTION]
    summed = [static(v.dom.extent) for v in core.iter_vars if int(v.iter_type) == REDUCTION]
    notes = {k.removeprefix("optc."): _note(v) for k, v in core.annotations.items() if k not in _LAYOUT_ONLY}
    described = {
        "op": str(core.annotations[TEMPLATE]),
        "stage": _stage(core),
        "outputs": outputs,
        "summed": summed,
        "tensors": _tensors(function),
        **notes,
    }
    return Workload(described, epilogue)


def sizes(values: Sequence[Any]) -> list[int | None]:
    """Return sizes for a core: numbers, None for symbolic ones."""
    return [static(v) for v in values]


def _tensors(function: Any) -> list[str]:
    """Return the dtypes and shapes of the arguments."""
    texts = []
    for parameter in function.params:
        shape = getattr(parameter.ty, "shape", None)
        if shape is not None:
            extents = ("?" if static(d) is None else str(static(d)) for d in shape)
            texts.append(f"{parameter.ty.dtype}[{','.join(extents)}]")
    return texts


def _stage(block: Any) -> str:
    """Return the name of a stage without the number that makes it unique."""
    return re.sub(r"_?\d+$", "", str(block.name_hint))


def _note(value: Any) -> Any:
    if isinstance(value, str):
        return value
    try:
        return [int(v) for v in value]
    except TypeError:
        return int(value)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(value: Any) -> str:
    return f"w{VERSION}-" + hashlib.sha256(_json(value).encode()).hexdigest()[:20]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "x".join("?" if v is None else str(v) for v in value)
    return str(value)
