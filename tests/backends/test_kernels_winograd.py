"""Winograd convolution: right at every size, both tiles, chunk by chunk or phase by phase, and it can be left out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve
from optc.backends.kernels import winograd
from optc.backends.kernels.loops import SEPARATE
from optc.backends.kernels.schedule import schedule_kernel
from optc.frontend.onnx import load

F = np.float32
CPU = resolve("cpu")


def model(maps, depth, pads="1, 1, 1, 1", after="", size="n, D, h, w"):
    size = size.replace("D", str(depth))
    return f"""g (float[{size}] x, float[{maps}, {depth}, 3, 3] k, float[{maps}] b) => (float[n, {maps}, p, q] y)
    {{ c = Conv<pads = [{pads}]>(x, k, b)
       y = {after or "Identity(c)"} }}"""


def run(check, maps, depth, *images, pads="1, 1, 1, 1", after="", size="n, D, h, w"):
    generator = np.random.default_rng(0)
    k = generator.standard_normal((maps, depth, 3, 3)).astype(F)
    b = generator.standard_normal(maps).astype(F)
    text = model(maps, depth, pads, after, size)
    text = text.replace(f", float[{maps}, {depth}, 3, 3] k, float[{maps}] b", "")
    kernel, bias = (", ".join(map(repr, values.reshape(-1).tolist())) for values in (k, b))
    weights = f"<float[{maps}, {depth}, 3, 3] k = {{{kernel}}}, float[{maps}] b = {{{bias}}}>"
    text = text.replace("{ c", f"{weights} {{ c")
    feeds = [[generator.standard_normal(image).astype(F)] for image in images]
    # Sums of 9 * depth products of normal numbers have a deviation of 3 * sqrt(depth); the largest is about 4 of these.
    check(text, *feeds, rtol=0, atol=2e-5 * 12 * np.sqrt(depth))


@pytest.mark.parametrize("height, width", [(1, 1), (3, 9), (7, 7), (14, 13), (30, 33)])
def test_fixed_sizes(check, height, width):
    run(check, 20, 19, (2, 19, height, width), size=f"2, D, {height}, {width}")


def test_few_channels_take_it_too(check):
    lanes = CPU.lanes(32)
    assert winograd.choose(40, 40, lanes, lanes + 1, CPU) == 4
    run(check, lanes + 1, lanes, (1, lanes, 40, 40), size=f"1, {lanes}, 40, 40")


def test_one_kernel_serves_every_size(check):
    run(check, 16, 24, (1, 24, 5, 6), (1, 24, 61, 60), (3, 24, 4, 4), (1, 24, 1, 17))


@pytest.mark.parametrize("pads", ["0, 0, 0, 0", "2, 2, 2, 2", "0, 1, 2, 0"])
def test_padding(check, pads):
    run(check, 16, 16, (1, 16, 21, 18), pads=pads)


@pytest.mark.parametrize("after", ["Relu(c)", "Add(c, x)", "HardSwish(c)"])
def test_what_follows_runs_on_the_tile(check, after):
    run(check, 24, 24, (1, 24, 15, 17), after=after)


@pytest.mark.parametrize("m", [2, 4])
def test_transforms_convolve(m):
    """The one-dimensional algorithm gives what a sliding window of three gives, exactly up to rounding."""
    generator = np.random.default_rng(m)
    d, g = generator.standard_normal(m + 2), generator.standard_normal(3)
    found = winograd.OUTPUT[m] @ ((winograd.INPUT[m] @ d) * (winograd.FILTER[m] @ g))
    np.testing.assert_allclose(found, np.convolve(d, g[::-1], "valid"), rtol=1e-12, atol=1e-12)


def test_the_choice_counts_cycles():
    assert winograd.choose(56, 56, 64, 64, CPU) == 4
    assert winograd.choose(7, 7, 512, 512, CPU) in (None, 2)  # F(4x4) would read four times the weights
    assert winograd.choose(56, 56, 3, 64, CPU) is None


@pytest.fixture
def square():
    """A convolution of 32 channels of 28 x 28 pixels."""
    weights = ", ".join(["0.5"] * (32 * 32 * 9))
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g (float[1, 32, 28, 28] x) => (float[1, 32, 28, 28] y)
    <float[32, 32, 3, 3] k = {{{weights}}}> {{ y = Conv<pads = [1, 1, 1, 1]>(x, k) }}"""
    return load(onnx.parser.parse_model(text))


def test_it_can_be_left_out(square):
    kept, left = (
        [k.rule for k in CpuBackend(CPU, None, without).schedule(square).kernels] for without in ((), ("winograd",))
    )
    assert "winograd" in kept
    assert "winograd" not in left and "contraction" in left


def test_its_scratch_buffers_share_no_memory(square):
    module, _ = CpuBackend(CPU).fuse(square)
    scheduled = [schedule_kernel(f, CPU) for v, f in module.functions.items() if "winograd" in str(v.name_hint)]
    assert [(rule, bool(f.attrs.get(SEPARATE))) for f, rule, _ in scheduled] == [("winograd", True)]
