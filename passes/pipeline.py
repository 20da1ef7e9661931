"""The one place that orders passes: phases, each with the reason for its place, and the loop that runs them."""

from __future__ import annotations

import difflib
import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as oir

from optc.errors import UsageError
from optc.ir import dims, shapes
from optc.passes import fuse, integer
from optc.passes.base import Pass
from optc.passes.observer import Observer, PassRecord
from optc.passes.simplify import (
    algebra,
    casts,
    common_subexpressions,
    dead_code,
    fold_constants,
    fold_shapes,
    identities,
    reassociate,
    reshapes,
    transposes,
)


@dataclass(frozen=True)
class Phase:
    """Passes that run in order, up to ``rounds`` times or until none of them finds anything to do."""

    name: str
    passes: tuple[Pass, ...]
    rounds: int = 1


def phases() -> list[Phase]:
    """Return the default pipeline."""
    simplify = (
        # First drop what no output needs, so that nothing below works on it.
        dead_code.PASS,
        # Constants first: they decide conditions, shapes and the operands that other rules look at.
        fold_constants.PASS,
        # Then shapes, which need folded indices and axes; what they free is constant or dead.
        fold_shapes.PASS,
        # No-ops hide patterns from every structural rule below.
        identities.PASS,
        casts.PASS,
        # Transposes before reshapes: a transpose that moves only unit axes becomes a reshape.
        transposes.PASS,
        reshapes.PASS,
        # Arithmetic on what is now adjacent; new constant operands are folded in the next round.
        algebra.PASS,
        # Last: equal nodes are most visible when both are in simplest form.
        common_subexpressions.PASS,
        dead_code.PASS,
    )
    return [
        # Each family makes work for others, so they repeat; a real model settles after two or three rounds.
        Phase("simplify", simplify, rounds=8),
        # Before fusion, which looks for operators on floats; integers pass through one operator after the other.
        Phase("integer", tuple(integer.passes()), rounds=8),
        # Exporters' spellings of operators are recognised when constants and no-ops are out of the way.
        Phase("fuse", tuple(fuse.passes())),
        # Folding into weights leaves constant expressions, and fusion leaves unused nodes. Constants of chains are
        # combined only now: Mul(Div(x, 6), scale) is no HardSwish any more when it is one multiplication.
        Phase("clean", (reassociate.PASS, *simplify), rounds=8),
    ]


def default_pipeline() -> list[Pass]:
    """Return the passes of the default pipeline in order, without repetition of phases."""
    return [one for phase in phases() for one in phase.passes]


def run(
    model: oir.Model,
    *,
    passes: Sequence[Pass] | None = None,
    disable: Collection[str] = (),
    observers: Sequence[Observer] = (),
) -> list[PassRecord]:
    """Run the passes on a canonical model, in place, and return a record of each run.

    Args:
        model: a canonical model.
        passes: these, once each, in place of the default pipeline.
        disable: names of passes or of single rules to leave out.
        observers: are told of the model before the first pass and after each.

    Raises:
        UsageError: ``disable`` holds a name that no pass and no rule has.
    """
    plan = phases() if passes is None else [Phase("passes", tuple(passes))]
    plan = _without(plan, frozenset(disable))
    runner = _Runner(model, observers)
    for phase in plan:
        runner.phase(phase)
    return runner.records


def _without(plan: Sequence[Phase], names: frozenset[str]) -> list[Phase]:
    known = {name for phase in plan for one in phase.passes for name in (one.name, *one.rule_names())}
    for name in sorted(names - known):
        close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.4)
        raise UsageError(
            f"no pass or rule is called {name!r}",
            hint=f"did you mean {' or '.join(map(repr, close))}?" if close else f"passes: {sorted(known)}",
        )
    return [
        Phase(phase.name, tuple(p.without(names) for p in phase.passes if p.name not in names), phase.rounds)
        for phase in plan
    ]


class _Runner:
    """Runs phases and skips a pass when nothing changed since it last found nothing more to do."""

    def __init__(self, model: oir.Model, observers: Sequence[Observer]) -> None:
        self.model = model
        self.observers = observers
        self.records: list[PassRecord] = []
        self._changes = 0
        self._settled: dict[Pass, int] = {}
        for observer in observers:
            observer.start(model)

    def phase(self, phase: Phase) -> None:
        for _ in range(phase.rounds):
            before = self._changes
            for one in phase.passes:
                if self._settled.get(one) != self._changes:
                    self._pass(one)
            if self._changes == before:
                return
            self._refresh_shapes()

    def _pass(self, one: Pass) -> None:
        nodes = count_nodes(self.model)
        started = time.perf_counter()
        result = one.call(self.model)
        seconds = time.perf_counter() - started
        self._changes += result.modified
        self._settled[one] = self._changes
        record = PassRecord(
            one.name, seconds, nodes, count_nodes(self.model), result.fired, result.modified, result.skipped
        )
        self.records.append(record)
        for observer in self.observers:
            observer.after(record, self.model)

    def _refresh_shapes(self) -> None:
        """Infer anew where a shape is unknown or a size had no better name than one of its own.

        Rewrites keep shapes up to date, so a model whose shapes are all told by its inputs needs no inference.
        """
        if not shapes_are_open(self.model):
            return
        outputs = self.model.graph.outputs
        declared = [value.shape for value in outputs]
        known = _shape_texts(self.model)
        shapes.infer(self.model)
        used = dims.used_names(dims.all_values(self.model.graph))
        for value, shape in zip(outputs, declared, strict=True):
            if value.shape is None and shape is not None:
                # The interface says more than can be inferred; sizes get names of their own again.
                value.shape = oir.Shape([d if isinstance(d, int) else _fresh_dim(used) for d in shape])
        # A shape that became known lets settled passes find more to do, like any other change.
        self._changes += _shape_texts(self.model) != known


def _shape_texts(model: oir.Model) -> dict[str, str]:
    return {str(value.name): str(value.shape) for graph in model.graphs() for node in graph for value in node.outputs}


def _fresh_dim(used: set[str]) -> str:
    name = next(name for n in itertools.count() if (name := f"_output{n}") not in used)
    used.add(name)
    return name


def count_nodes(model: oir.Model) -> int:
    """Return the number of nodes, those of subgraphs included."""
    return sum(len(graph) for graph in model.graphs())


def shapes_are_open(model: oir.Model) -> bool:
    """Tell whether some value has an unknown shape, or a size that is not told by the sizes of the inputs."""
    told = frozenset(dims.dim_names(model))
    for graph in model.graphs():
        for node in graph:
            for value in node.outputs:
                if value.shape is None or any(
                    d.value is None or (d.value not in told and not dims.names(d.value) <= told)
                    for d in value.shape
                    if not isinstance(d, int)
                ):
                    return True
    return False
