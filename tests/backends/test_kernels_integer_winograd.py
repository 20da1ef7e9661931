"""Winograd's algorithm on integers: exact at the limits of its range, chosen where it is exact and pays."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import te

from optc.backends.cpu.single import aligned
from optc.backends.cpu.target import resolve, to_tvm
from optc.backends.kernels import integer_contraction, integer_schedule, integer_winograd
from optc.backends.kernels.fused import Reader, take_apart
from optc.backends.kernels.integer_form import WIDE
from optc.backends.kernels.integer_rows import WindowRows


def function(shape, packed, maps, zero, magnitude):
    x, w = te.placeholder(shape, "uint8", "x"), te.placeholder(packed.shape, str(packed.dtype), "w")
    y = integer_contraction.conv(
        x,
        w,
        lambda value: value - zero,
        maps=maps,
        groups=1,
        kernel=[3, 3],
        strides=[1, 1],
        dilations=[1, 1],
        before=[1, 1],
        out=shape[1:3],
        magnitude=magnitude,
        notes={},
    )
    return te.create_prim_func([x, w, y], "int64")


def chosen(f):
    fused = take_apart(f, integer_contraction.TEMPLATE)
    reader = Reader(fused)
    axes = list(fused.spatial.variables[1:3]), fused.spatial.extents[1:3]
    rows = WindowRows(reader.fused, reader, type(fused.spatial)(*axes), fused.core.body.value.b.a, WIDE, 16, 2**18, 1)
    return integer_winograd.choose(reader.fused, rows, fused.spatial.extents[-1])


@pytest.mark.parametrize("transform", [integer_winograd.SMALL, integer_winograd.LARGE])
def test_transforms_are_winograds(transform):
    b, g, a = (np.array(m, dtype=object) for m in (transform.data, transform.filters, transform.sums))
    rng = np.random.default_rng(0)
    d, w = rng.integers(-255, 256, (2, transform.m + 2, transform.m + 2)), rng.integers(-128, 128, (3, 3))
    y = a @ ((g @ w @ g.T) * (b @ d[0] @ b.T)) @ a.T
    m = transform.m
    direct = [[(d[0][i : i + 3, j : j + 3] * w).sum() for j in range(m)] for i in range(m)]
    np.testing.assert_array_equal(y.astype(np.int64), transform.scale * np.array(direct))
    assert (transform.inverse * (transform.scale >> transform.shift)) % (1 << 32) == 1


def test_operands_fit_16_bits():
    for transform in (integer_winograd.SMALL, integer_winograd.LARGE):
        for matrix, largest in ((transform.data, 255), (transform.filters, 128)):
            assert max(sum(map(abs, row)) for row in matrix) ** 2 * largest < 1 << 15


@pytest.mark.parametrize(
    ("size", "channels", "maps", "largest"),
    [
        ((13, 9), 32, 16, 128),
        ((7, 7), 512, 32, 20),
        ((6, 30), 144, 48, 60),
        ((16, 8), 272, 16, 128),
        ((57, 29), 32, 32, 128),
        ((10, 12), 48, 24, 60),
        ((12, 12), 32, 29, 128),
    ],
)
@pytest.mark.parametrize("pattern", ["random", "extreme"])
def test_equal_to_direct_convolution(size, channels, maps, largest, pattern):
    rng = np.random.default_rng(channels)
    shape = (2, *size, channels)
    if pattern == "random":
        x, w = rng.integers(0, 256, shape), rng.integers(-largest, largest, (maps, channels, 3, 3))
    else:
        x, w = rng.choice([0, 255], shape), rng.choice([-largest, largest - 1], (maps, channels, 3, 3))
        # The largest sum there is, and the smallest.
        w[0], w[1] = largest - 1, -largest
        x[0] = 255
    packed = integer_contraction.pack_filters(w, [1, 1])[None]
    results = []
    for magnitude in (integer_winograd.magnitude(w), 0):
        f = function(shape, packed, maps, 0, magnitude)
        assert (chosen(f) is None) == (magnitude == 0)
        target = resolve("cpu")
        library = tvm.compile(
            integer_schedule.schedule(f, target).with_attr("global_symbol", "main"), target=to_tvm(target)
        )
        tensors = [aligned(a) for a in (x.astype(np.uint8), packed, np.zeros((2, *size, maps), np.int32))]
        library["main"](*tensors)
        results.append(tensors[-1].numpy())
    np.testing.assert_array_equal(*results)


def test_larger_weights_take_the_smaller_transform():
    packed = np.zeros((1, 1, 9 * 128, 16, 2), np.int8)
    limit = (1 << 25) // 255
    pick = [chosen(function((1, 28, 28, 256), packed, 16, 0, m)) for m in (limit, limit + 1, 1 << 22)]
    assert pick == [integer_winograd.LARGE, integer_winograd.SMALL, None]
