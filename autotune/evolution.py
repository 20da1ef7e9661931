"""TVM's meta_schedule search for kernels without a template of ours: what it proposes are traces (``traces.py``).

Its rules make the design space of a kernel, and evolution changes the traces that were fastest so far. It neither
builds nor measures anything: a proposal goes to our workers, is timed in turns with the untuned kernel, as every other
candidate is, and the ratio comes back. A Gaussian process on TVM's features of loops says which children look good.
"""

from __future__ import annotations

import logging
import math
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import s_tir
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as search

from optc.autotune.model import improvement
from optc.backends.kernels import loops, traces
from optc.backends.kernels.decisions import IllegalDecisionError
from optc.backends.kernels.fused import REDUCTION

Vector = NDArray[np.float64]

BATCH = 6
"""Proposals that come together: evolution goes on when all of them are measured."""
_POPULATION = 48
_ROUNDS = 2
_UNMEASURED = 16
"""Random traces among the first parents."""
_MOST = 1 << 20
_LEAST = 4
"""Measurements from which their features say something about others."""
_SUMS = 4
"""Sums of a kernel whose partial sums are tried."""
_RIDGE = 0.1
_USUAL = math.log(1.2)
_DEVIATION = 0.3
"""What TVM's schedules take, by their logarithm, before any is measured: ours are good, and some of its are better."""
_WEIGHT = 4
"""As many measurements count as much as that."""
_FAILED = math.log(2.0)
_INSTRUCTIONS = "tvm.s_tir.tensor_intrin"


@dataclass
class Evolution:
    """The traces of one kernel. ``target`` is TVM's, with the number of cores; times are relative to the untuned.

    ``failure`` tells why TVM's search broke off, if it did: that costs the kernel its traces, no more.
    """

    function: Any
    target: Any
    seed: int = 1
    values: list[float] = field(default_factory=list)
    failure: str = ""
    _waiting: list[Any] = field(default_factory=list)
    _asked: dict[str, Any] = field(default_factory=dict)
    _context: Any = None
    _scores: Any = None
    _ended: bool = False

    def promise(self, best: float) -> float:
        """Return the decrease of the logarithm of the time below ``best`` that the next trace is expected to bring."""
        if self._ended:
            return 0.0
        weight = _WEIGHT + len(self.values)
        mean = (_WEIGHT * _USUAL + sum(self.values)) / weight
        spread = _WEIGHT * _DEVIATION**2 + sum((v - mean) ** 2 for v in self.values)
        deviation = math.sqrt(spread / weight)
        return float(improvement(np.array([mean]), np.array([deviation]), math.log(best))[0])

    def propose(self) -> str:
        """Return a trace that was not proposed before; an empty text if there is none."""
        try:
            return self._next()
        except Exception as error:  # TVM's search runs on any kernel, and may fail in any way
            self._fail(error)
            return ""

    def learn(self, text: str, ratio: float) -> None:
        """Take note of what a trace takes relative to the untuned kernel, infinite for a failure."""
        self.values.append(math.log(ratio) if math.isfinite(ratio) else _FAILED)
        if self.failure:
            return
        try:
            self._take(text, ratio)
        except Exception as error:  # as above
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        # TVM loses what is raised where it calls back.
        cause = getattr(self._scores, "raised", None) or error
        if isinstance(cause, KeyboardInterrupt):
            raise cause
        self._ended, self.failure = True, f"TVM's search failed: {type(cause).__name__}: {str(cause).strip()[-200:]}"

    def _next(self) -> str:
        self._begin()
        if not self._waiting and not self._ended:
            self._waiting = list(self._context.generate_measure_candidates() or [])
            self._ended = not self._waiting
        if self._ended:
            return ""
        candidate = self._waiting.pop()
        text = traces.text_of(candidate.sch.trace)
        self._asked[text] = candidate
        return text

    def _take(self, text: str, ratio: float) -> None:
        self._begin()
        candidate = self._asked.pop(text, None) or self._candidate(text)
        if candidate is None:
            return
        self._scores.add(self._context, candidate, self.values[-1])
        if math.isfinite(ratio):
            record = search.database.TuningRecord(
                candidate.sch.trace, self._workload, [ratio], self.target, candidate.args_info
            )
            self._database.commit_tuning_record(record)

    def _begin(self) -> None:
        """Make the design space, once."""
        if self._context is not None:
            return
        rules = search.space_generator.PostOrderApply(
            sch_rules=_rules(self.function), postprocs="llvm", mutator_probs="llvm"
        )
        strategy = search.search_strategy.EvolutionarySearch(
            population_size=_POPULATION, init_min_unmeasured=_UNMEASURED, genetic_num_iters=_ROUNDS
        )
        with _without_instructions():
            self._context = search.TuneContext(
                self.function,
                target=self.target,
                space_generator=rules,
                search_strategy=strategy,
                rand_state=self.seed,
                num_threads=1,
                logger=_silent(),
            )
        self._database = search.database.MemoryDatabase()
        self._workload = self._database.commit_workload(self._context.mod)
        self._scores = _Scores(self.seed)
        self._context.pre_tuning(_MOST, BATCH, database=self._database, cost_model=self._scores)

    def _candidate(self, text: str) -> Any:
        """Return the candidate of a trace that another run proposed, None if it does not fit."""
        function = self._context.mod["main"]
        try:
            schedule = traces.replayed(function, text)
        except IllegalDecisionError:
            return None
        return search.MeasureCandidate(schedule, search.arg_info.ArgInfo.from_prim_func(function))


@derived_object
class _Scores(search.cost_model.PyCostModel):  # type: ignore[misc]
    """Scores traces by a Gaussian process on the features of their stores; by chance as long as little is known."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.features = search.feature_extractor.PerStoreFeature()
        self.random = np.random.default_rng(seed)
        self.points: list[Vector] = []
        self.values: list[float] = []
        self.raised: BaseException | None = None

    def add(self, context: Any, candidate: Any, value: float) -> None:
        """Learn the logarithm of a time."""
        self.points += self._features(context, [candidate])
        self.values.append(value)

    def predict(self, context: Any, candidates: Sequence[Any]) -> Vector:
        """Return a score for each candidate, more for faster ones."""
        try:
            return self._predict(context, candidates)
        except BaseException as error:
            self.raised = error
            raise

    def _predict(self, context: Any, candidates: Sequence[Any]) -> Vector:
        if len(self.points) < _LEAST:
            return self.random.random(len(candidates))
        known, asked = np.array(self.points), np.array(self._features(context, candidates))
        scale = known.std(axis=0) + 1e-6
        near = _squares(known / scale, known / scale)
        reach = max(float(np.median(near)), 1e-6)
        values = np.array(self.values)
        covariance = np.exp(-near / reach) + _RIDGE * np.eye(len(values))
        weights = np.linalg.solve(covariance, values - values.mean())
        scores: Vector = -np.exp(-_squares(asked / scale, known / scale) / reach) @ weights
        return scores

    def update(self, context: Any, candidates: Sequence[Any], results: Sequence[Any]) -> None:
        """Do nothing: ``add`` tells what was measured."""

    def load(self, path: str) -> None:
        """Do nothing."""

    def save(self, path: str) -> None:
        """Do nothing."""

    def _features(self, context: Any, candidates: Sequence[Any]) -> list[Vector]:
        stores = [array.numpy() for array in self.features.extract_from(context, list(candidates))]
        return [np.concatenate([s.sum(axis=0), s.max(axis=0, initial=0.0)]) for s in stores]


def _rules(function: Any) -> list[Any]:
    """Return TVM's rules for CPUs, without the one for partial sums where there are many sums: it has three answers to
    each, and spaces multiply.
    """
    sums = sum(
        any(int(v.iter_type) == REDUCTION for v in block.iter_vars)
        for block in loops.collect(function.body, s_tir.SBlock)
    )
    rules = search.ScheduleRule.create("llvm")
    return [r for r in rules if sums <= _SUMS or not isinstance(r, search.schedule_rule.AddRFactor)]


def _squares(left: Vector, right: Vector) -> Vector:
    """Return the squares of the distances of all points of both sides, at least 0."""
    both = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None, :] - 2 * left @ right.T
    squares: Vector = np.maximum(both, 0.0)
    return squares


@contextmanager
def _without_instructions() -> Iterator[None]:
    """Keep TVM from importing its instructions for tensors, those of GPUs most of all, which it parses for half a
    minute. The rules here use none of them.
    """
    if _INSTRUCTIONS in sys.modules:
        yield
        return
    sys.modules[_INSTRUCTIONS] = types.ModuleType(_INSTRUCTIONS)
    try:
        yield
    finally:
        del sys.modules[_INSTRUCTIONS]


def _silent() -> logging.Logger:
    """Return a logger that says nothing: TVM's search explains itself at length."""
    logger = logging.getLogger(__name__)
    logger.setLevel(logging.CRITICAL + 1)
    return logger


def target_of(target: Any, threads: int) -> Any:
    """Return TVM's target with as many cores as kernels have threads."""
    return tvm.target.Target({**target.export(), "num-cores": threads})
