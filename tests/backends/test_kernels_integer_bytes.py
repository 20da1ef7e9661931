"""Products of bytes: the limit of exactness, and exact results on both sides of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import helper

from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve
from optc.backends.kernels import integer_window
from optc.backends.kernels.integer_contraction import QUAD, pack_columns
from optc.backends.kernels.integer_dot import choose_bytes
from optc.frontend.onnx import load

SETTINGS = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def saturates(pairs: np.ndarray, byte: np.ndarray) -> np.ndarray:
    """Tell for each pair of depths whether a sum of two products of bytes 0 or ``byte`` leaves 16 bits."""
    sums = np.stack([pairs @ np.array(factors) for factors in ((1, 0), (0, 1), (1, 1))], -1) * byte[:, None, None]
    return (sums.max((1, 2)) > 32767) | (sums.min((1, 2)) < -32768)


@SETTINGS
@given(seed=st.integers(0, 99), size=st.sampled_from([1, 20, 64, 65, 100, 127, 128]))
def test_the_limit_of_a_depth_is_the_largest_exact_byte(seed, size):
    weights = np.random.default_rng(seed).integers(-size, size, (24, 40))
    limits = integer_window.exact_limits(pack_columns(weights, QUAD))
    assert limits.shape == (24,)
    assert 128 <= limits.min() <= limits.max() <= 255
    pairs = weights.reshape(12, 2, 40).transpose(0, 2, 1)
    assert (limits[::2] == limits[1::2]).all()
    assert not saturates(pairs, limits[::2]).any()
    assert not saturates(pairs, 255 - limits[::2]).any()
    assert (saturates(pairs, limits[::2] + 1) | (limits[::2] == 255)).all()


@SETTINGS
@given(seed=st.integers(0, 99), taps=st.integers(1, 3), quads=st.integers(1, 5))
def test_the_limit_of_four_products(seed, taps, quads):
    weights = np.random.default_rng(seed).integers(-128, 128, (taps, quads, 2, 2, 20))
    limits = integer_window.exact_limits(pack_columns(weights.reshape(taps, -1, 20), QUAD), taps)
    limits = limits.reshape(taps, quads, 2, 2)
    runs = weights.transpose(0, 1, 2, 4, 3)  # taps, quads, pairs, columns, 2
    even = quads // 2 * 2
    fours = np.concatenate([runs[:, :even:2], runs[:, 1:even:2]], -1)
    assert (limits[:, :even:2] == limits[:, 1:even:2]).all()
    for sums, limit in ((fours, limits[:, :even:2, :, 0]), (runs[:, even:], limits[:, even:, :, 0])):
        high, low = np.maximum(sums, 0).sum(-1).max(-1), np.minimum(sums, 0).sum(-1).min(-1)
        assert (high * limit <= 32767).all()
        assert (low * limit >= -32768).all()
        more = limit + 1
        assert ((high * more > 32767) | (low * more < -32768) | (limit == 255)).all()


def test_no_weights_have_no_limit():
    assert integer_window.exact_limits(np.zeros((1, 2, 16, 4), np.int8)).tolist() == [255] * 8


SMALL, LARGE = pack_columns(np.full((8, 32), 64), QUAD), pack_columns(np.full((8, 32), -128), QUAD)
DEEP = pack_columns(np.full((256, 32), 127), QUAD)


@pytest.mark.parametrize(
    ("target", "element", "zero", "packed", "expected"),
    [
        ("x86-64-v3", "uint8", 0, SMALL, (0, 255)),
        ("x86-64-v3", "uint8", 200, SMALL, (200, 255)),
        ("x86-64-v3", "int8", -128, LARGE, (0, 128)),
        ("x86-64-v3", "int8", -64, LARGE, (64, 128)),
        ("x86-64-v3", "int8", 1, DEEP, (129, 129)),
        ("x86-64-v3", "int8", 1, DEEP[:, :5], None),  # around zero, of few channels
        ("x86-64-v3", "int8", 1, np.full_like(DEEP, -128), None),  # -128 has no opposite
        ("x86-64-v3", "uint8", 0, LARGE[:, :, :8], None),  # few columns
        ("x86-64-v3", "uint8", None, SMALL, None),  # a zero point that is not known
        ("x86-64-v3", "uint8", 0, SMALL.astype(np.int16), None),  # weights of more bits
        ("x86-64-v3", "int32", 0, SMALL, None),
        ("x86-64-v3", "uint8", -1, SMALL, None),
        ("x86-64-v3:-ssse3,-avx2,-avx", "uint8", 0, SMALL, None),  # no instruction
        ("alderlake", "uint8", 200, LARGE, (200, 255)),
        ("icelake-server", "int8", 0, LARGE, (128, 255)),
        ("aarch64-linux-gnu:neoverse-n1", "uint8", 3, LARGE, (3, 255)),
        ("aarch64", "uint8", 0, SMALL, None),
        ("riscv64", "uint8", 0, SMALL, None),
    ],
)
def test_choice(target, element, zero, packed, expected):
    chosen = integer_window.choose(resolve(target), element, zero, 8, packed)
    assert integer_window.choose(resolve("x86-64-v3"), "uint8", 0, 7, LARGE) is None
    if expected is None:
        assert chosen is None
        return
    told = chosen.packed[-1].view(np.uint8).astype(int)
    sizes = told[:, integer_window.LAST] - told[:, integer_window.FIRST]
    assert (chosen.zero, sizes.min()) == expected
    assert chosen.splits == (expected[1] < 255)
    np.testing.assert_array_equal(chosen.packed[:-1], packed)


def test_each_channel_has_the_window_of_its_weights():
    weights = np.full((2, 16, 32), 64)
    weights[1, 2] = 127
    chosen = integer_window.choose(resolve("x86-64-v3"), "uint8", 100, 16, pack_columns(weights, QUAD), taps=2)
    columns = integer_window.FIRST, integer_window.LAST, integer_window.EXCESS
    first, last, excess = (chosen.packed[-1, :, column].reshape(2, 16).view(np.uint8) for column in columns)
    narrow = np.isin(np.arange(16), (2, 3))
    np.testing.assert_array_equal(first[0], np.where(narrow, 100 - 171 // 2, 0))
    np.testing.assert_array_equal(last[0], np.where(narrow, 100 - 171 // 2 + 171, 255))
    np.testing.assert_array_equal(excess, np.tile(100 - first[0], (2, 1)))


@pytest.mark.parametrize(
    ("target", "rows"), [("nehalem", 2), ("haswell", 5), ("skylake-avx512", 15), ("icelake-server", 15)]
)
def test_sums_stay_in_registers(target, rows):
    assert choose_bytes(resolve(target)).rows(16) == rows


@pytest.mark.parametrize("target", ["icelake-server", "znver3"])
def test_columns_are_fetched_ahead_if_the_first_cache_cannot_hold_them(make_model, target):
    for k, fetched in ((64, False), (512, True)):
        b = np.random.default_rng(0).integers(-127, 128, (k, 256)).astype(np.int8)
        nodes = [helper.make_node("MatMulInteger", ["a", "b"], ["y"])]
        model = make_model(nodes, {"a": (np.uint8, [64, k])}, {"y": np.int32}, {"b": b})
        scheduled = CpuBackend(resolve(target)).schedule(load(model)).relax.script()
        assert ("prefetch" in scheduled) == fetched


def bytes_of(rng: np.random.Generator, shape, dtype, pattern: str) -> np.ndarray:
    """Draw values that are never, rarely, often or always above a limit, or close to it."""
    raw = {
        "none": lambda: rng.integers(0, 100, shape),
        "few": lambda: np.where(rng.random(shape) < 0.03, rng.integers(120, 256, shape), rng.integers(0, 128, shape)),
        "one row": lambda: np.where(np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) == 1, 255, 3),
        "any": lambda: rng.integers(0, 256, shape),
        "limit": lambda: rng.integers(125, 133, shape),
        "ends": lambda: rng.choice([0, 255], shape),
        "all": lambda: np.full(shape, 255),
    }[pattern]()
    return (np.broadcast_to(raw, shape) + np.iinfo(dtype).min).astype(dtype)


PATTERNS = st.sampled_from(["none", "few", "one row", "any", "limit", "ends", "all"])


# Values on the stack that LLVM, without AVX, would read before they are written.
@example(m=23, k=1, n=48, dtype=np.uint8, zero=0, largest=64, pattern="none", target="nehalem", known=True, seed=0)
@SETTINGS
@given(
    m=st.integers(1, 40),
    k=st.sampled_from([1, 3, 4, 31, 32, 33, 64, 100, 192, 259, 1100]),
    n=st.sampled_from([32, 33, 40, 48, 57]),
    dtype=st.sampled_from([np.uint8, np.int8]),
    zero=st.sampled_from([0, 0, 1, 64, 100, 128, 191, 192, 254, 255]),
    largest=st.sampled_from([64, 100, 128]),
    pattern=PATTERNS,
    target=st.sampled_from(["cpu", "nehalem"]),
    known=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_matrix(compile_model, make_model, m, k, n, dtype, zero, largest, pattern, target, known, seed):
    rng = np.random.default_rng(seed)
    a = bytes_of(rng, (m, k), dtype, pattern)
    b = rng.choice([max(-largest, -127), largest - 1, 0, 5], (k, n)).astype(np.int8)
    z = np.array(zero + np.iinfo(dtype).min, dtype)
    if k >= 192 or (zero <= 64 and k >= 8):
        assert (
            integer_window.choose(resolve(target), np.dtype(dtype).name, int(z), k, pack_columns(b, QUAD)) is not None
        )
    node = helper.make_node("MatMulInteger", ["a", "b", "z"], ["y"])
    model = make_model([node], {"a": (dtype, [m if known else "m", k])}, {"y": np.int32}, {"b": b, "z": z})
    expected = (a.astype(np.int32) - np.int32(z)) @ b.astype(np.int32)
    np.testing.assert_array_equal(compile_model(model, target)(a)[0], expected)


@SETTINGS
@given(
    size=st.tuples(st.integers(6, 14), st.integers(6, 14)),
    channels=st.sampled_from([1, 3, 8, 16, 33]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.sampled_from([(1, 1), (2, 2), (1, 2)]),
    dilations=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    group=st.sampled_from([1, 1, 2]),
    zero=st.sampled_from([0, 17, 60]),
    largest=st.sampled_from([60, 127]),
    pattern=PATTERNS,
    target=st.sampled_from(["cpu", "nehalem"]),
    seed=st.integers(0, 9),
)
def test_any_window(
    compile_model,
    make_model,
    size,
    channels,
    kernel,
    strides,
    dilations,
    pads,
    group,
    zero,
    largest,
    pattern,
    target,
    seed,
):
    rng = np.random.default_rng(seed)
    x = bytes_of(rng, (2, channels * group, *size), np.uint8, pattern)
    w = rng.integers(-largest, largest + 1, (34 * group, channels, *kernel)).astype(np.int8)
    geometry = {"strides": strides, "dilations": dilations, "pads": pads, "group": group}
    node = helper.make_node("ConvInteger", ["x", "w", "z"], ["y"], **geometry)
    z = np.uint8(zero)
    model = make_model([node], {"x": (np.uint8, x.shape)}, {"y": np.int32}, {"w": w, "z": z})
    centred = np.pad(x.astype(np.int64) - zero, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    windows = np.lib.stride_tricks.sliding_window_view(
        centred, [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)], axis=(2, 3)
    )[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    parts = windows.reshape(2, group, channels, *windows.shape[2:])
    filters = w.astype(np.int64).reshape(group, 34, channels, *kernel)
    expected = np.einsum("bgcyxij,gmcij->bgmyx", parts, filters).reshape(2, 34 * group, *windows.shape[2:4])
    np.testing.assert_array_equal(compile_model(model, target)(x)[0], expected)
