"""The cost model: a Gaussian process on the logarithm of a candidate's time over that of the untuned kernel.

It starts from the analytic model of the templates and learns from every measurement. Kernels share what is learned, the
more the more alike they are: the covariance is a product of one between decisions and one between workloads (Bonilla et
al., "Multi-task Gaussian process prediction", 2007). Expected improvement (Jones et al., 1998) says what to try next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from optc.backends.kernels.workload import Workload

Vector = NDArray[np.float64]

_DEVIATION = 0.12
"""How far, in logarithms, candidates lie from what the analytic model says."""
_NOISE = 0.03
_LENGTH = 1.2
"""The distance of decisions, in factors of two, over which times are alike."""
_ALIKE = 0.6
"""The correlation of equal decisions about very similar kernels."""
_REACH = 6.0
"""The distance of workloads, in factors of two, over which they are alike."""
_TRUST = 0.5
"""The part of the analytic model's logarithm that is believed."""
_MOST = 400
"""Measurements that are kept: solving takes their cube."""
_FAILED = math.log(2.0)


@dataclass(frozen=True)
class Point:
    """A candidate for the model: its task, coordinates by knob, and the analytic model's relative cost."""

    task: str
    features: Mapping[str, float]
    prior: float


def features(decisions: Mapping[str, int], defaults: Mapping[str, int]) -> dict[str, float]:
    """Return the coordinates of a candidate: what it changes, in factors of two."""
    return {
        name: math.log2((value + 1) / (defaults.get(name, value) + 1))
        for name, value in decisions.items()
        if value != defaults.get(name, value)
    }


@dataclass
class CostModel:
    """Learns from ``add`` and answers ``predict``."""

    workloads: Mapping[str, Workload]
    points: list[Point] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    _factor: Vector | None = None
    _weights: Vector | None = None
    _alike: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, point: Point, ratio: float) -> None:
        """Learn a measured ratio; infinity for a failure."""
        self.points.append(point)
        self.values.append(math.log(ratio) if math.isfinite(ratio) else _FAILED)
        del self.points[:-_MOST], self.values[:-_MOST]
        self._factor = None

    def predict(self, points: Sequence[Point]) -> tuple[Vector, Vector]:
        """Return mean and deviation of the logarithm of each candidate's ratio."""
        mean = np.array([_prior(p) for p in points])
        deviation = np.full(len(points), _DEVIATION)
        if not self.points:
            return mean, deviation
        if self._factor is None or self._weights is None:
            covariance = self._covariance(self.points, self.points)
            covariance[np.diag_indices(len(self.points))] += _NOISE**2
            self._factor = np.linalg.inv(np.linalg.cholesky(covariance))
            residual = np.array(self.values) - np.array([_prior(p) for p in self.points])
            self._weights = self._factor.T @ (self._factor @ residual)
        between = self._covariance(points, self.points)
        reduced = self._factor @ between.T
        variance = _DEVIATION**2 - (reduced**2).sum(axis=0)
        return mean + between @ self._weights, np.sqrt(np.maximum(variance, 1e-8))

    def _covariance(self, left: Sequence[Point], right: Sequence[Point]) -> Vector:
        names = sorted({name for p in (*left, *right) for name in p.features})
        a, b = (
            np.array([[p.features.get(n, 0.0) for n in names] for p in ps]).reshape(len(ps), -1) for ps in (left, right)
        )
        square = ((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2)
        tasks = sorted({p.task for p in (*left, *right)})
        index = {task: i for i, task in enumerate(tasks)}
        table = np.array([[self._likeness(s, t) for t in tasks] for s in tasks])
        shared = table[[index[p.task] for p in left]][:, [index[p.task] for p in right]]
        covariance: Vector = _DEVIATION**2 * np.exp(-square / (2 * _LENGTH**2)) * shared
        return covariance

    def _likeness(self, s: str, t: str) -> float:
        if s == t:
            return 1.0
        if (s, t) not in self._alike:
            away = _distance(self.workloads[s], self.workloads[t])
            self._alike[s, t] = self._alike[t, s] = _ALIKE * math.exp(-away / _REACH)
        return self._alike[s, t]


def _prior(point: Point) -> float:
    return _TRUST * math.log(point.prior)


def _distance(a: Workload, b: Workload) -> float:
    """Return the sum of factors of two between all sizes, infinite between different operators."""
    if a.operator != b.operator:
        return math.inf
    return float(np.abs(_sizes(a, 12) - _sizes(b, 12)).sum())


def _sizes(workload: Workload, count: int) -> Vector:
    """Return logarithms of all numbers of the core, by name."""
    numbers: list[float] = []
    for key in sorted(workload.core):
        value = workload.core[key]
        flat = value if isinstance(value, list) else [value]
        numbers += [math.log2(v + 1) for v in flat if isinstance(v, int)]
    return np.array((numbers + [0.0] * count)[:count])


def improvement(mean: Vector, deviation: Vector, best: float) -> Vector:
    """Return the expected decrease of the logarithm below ``best``."""
    z = (best - mean) / deviation
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1.0 + np.array([math.erf(v / math.sqrt(2)) for v in z]))
    gain: Vector = (best - mean) * below + deviation * density
    return gain
