"""Ranges of histograms, against a search over the values themselves."""

import numpy as np
import pytest

from optc.passes.quantize.encoding import encode
from optc.passes.quantize.ranges import METHODS, Histogram, choose


def histogram(values):
    found = Histogram.empty(float(values.min()), float(values.max()))
    for part in np.array_split(values, 3):
        found.add(part)
    return found


def error(encoding, values):
    return float(((encoding.round(values) - values) ** 2).mean())


def test_every_value_is_counted(rng):
    values = rng.normal(0, 1, 1000).astype(np.float32)
    found = histogram(values)
    assert found.counts.sum() == 1000
    expected, _ = np.histogram(values, len(found.counts), (found.low, found.high))
    assert np.abs(found.counts - expected).sum() <= 4  # values on an edge of bins


def test_a_constant_has_a_range():
    found = Histogram.empty(2.0, 2.0)
    found.add(np.full(5, 2.0, np.float32))
    for method in METHODS:
        assert choose(found, method, "uint8", symmetric=False).round(np.float32([2.0])) == pytest.approx(2.0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", ["normal", "relu", "heavy"])
def test_mse_is_about_the_best_there_is(shape, symmetric, rng):
    values = rng.normal(0, 1, 20_000)
    values = {"normal": values, "relu": np.maximum(values, 0), "heavy": values**5}[shape].astype(np.float32)
    found = choose(histogram(values), "mse", "uint8", symmetric=symmetric)
    bounds = [
        (values.min() * f, values.max() * g) for f in np.geomspace(1, 0.05, 24) for g in np.geomspace(1, 0.05, 24)
    ]
    best = min(error(encode(a, b, "uint8", symmetric=symmetric), values) for a, b in bounds)
    assert error(found, values) <= 1.05 * best


def test_min_max_keeps_outliers_and_the_others_cut_them(rng):
    values = np.append(rng.normal(0, 1, 100_000), 400.0).astype(np.float32)
    ranges = {m: choose(histogram(values), m, "uint8", symmetric=False).scale * 255 for m in METHODS}
    assert ranges["min-max"] > 400
    assert ranges["percentile"] < 12
    assert ranges["entropy"] < 100
