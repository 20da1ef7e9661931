"""MatMulInteger and QLinearMatMul: equal to integer arithmetic to the last bit, and taken by their template."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve
from optc.frontend.onnx import load

TYPES = st.sampled_from([np.uint8, np.int8])


def integers(rng, shape, dtype):
    """Random integers in which the extremes are frequent: they are what overflows."""
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max + 1, shape)
    extremes = rng.choice([info.min, info.max], shape)
    return np.where(rng.random(shape) < 0.3, extremes, values).astype(dtype)


def product(a, az, b, bz):
    return (a.astype(np.int32) - az.astype(np.int32)) @ (b.astype(np.int32) - bz.astype(np.int32))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    left=TYPES,
    right=TYPES,
    constant=st.booleans(),
    per_column=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_size_type_and_zero_point(compile_model, make_model, m, n, k, left, right, constant, per_column, seed):
    rng = np.random.default_rng(seed)
    a, b = integers(rng, (m, k), left), integers(rng, (k, n), right)
    az, bz = integers(rng, (), left), integers(rng, (n,) if per_column else (), right)
    node = helper.make_node("MatMulInteger", ["a", "b", "az", "bz"], ["y"])
    given = {"a": a} if constant else {"a": a, "b": b, "az": az, "bz": bz}
    known = {"b": b, "az": az, "bz": bz} if constant else {}
    inputs = {name: (array.dtype, array.shape) for name, array in given.items()}
    run = compile_model(make_model([node], inputs, {"y": np.int32}, known))
    np.testing.assert_array_equal(run(*given.values())[0], product(a, az, b, bz))


@pytest.mark.parametrize("m, k, n", [(13, 2100, 33), (70, 1030, 16), (1, 4096, 7)])
def test_depth_in_blocks_sums_exactly(compile_model, make_model, m, k, n):
    a, b = np.full((m, k), 255, np.uint8), np.full((k, n), -128, np.int8)
    b[::3] = 127
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    run = compile_model(make_model([node], {"a": (np.uint8, ["m", k])}, {"y": np.int32}, {"b": b}))
    np.testing.assert_array_equal(run(a)[0], product(a, np.int32(0), b, np.int32(0)))


@pytest.mark.parametrize("k", [1028, 1036])
def test_depth_that_its_blocks_do_not_divide(compile_model, make_model, k):
    rng = np.random.default_rng(0)
    a, b = integers(rng, (5, k), np.uint8), integers(rng, (k, 20), np.int8)
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    run = compile_model(make_model([node], {"a": (np.uint8, a.shape), "b": (np.int8, b.shape)}, {"y": np.int32}))
    for _ in range(2):  # what the first run leaves in scratch memory must not matter to the second
        np.testing.assert_array_equal(run(a, b)[0], product(a, np.int32(0), b, np.int32(0)))


@pytest.mark.parametrize("n", [3, 8, 16, 24, 25, 40, 75])
@pytest.mark.parametrize("m, k", [(1, 20), (7, 1100), (150, 36)])
def test_last_columns(compile_model, make_model, m, k, n):
    rng = np.random.default_rng(n)
    a, b = integers(rng, (m, k), np.uint8), integers(rng, (k, n), np.int8)
    z = np.array(77, np.uint8)
    node = helper.make_node("MatMulInteger", ["a", "b", "z"], ["y"])
    run = compile_model(make_model([node], {"a": (np.uint8, [m, k])}, {"y": np.int32}, {"b": b, "z": z}))
    np.testing.assert_array_equal(run(a)[0], product(a, z, b, np.int8(0)))


def test_batches_broadcast_and_all_sizes_may_be_open(compile_model, make_model):
    rng = np.random.default_rng(3)
    node = helper.make_node("MatMulInteger", ["a", "b", "z"], ["y"])
    inputs = {"a": (np.uint8, ["h", "m", "k"]), "b": (np.int8, [2, 1, "k", "n"])}
    model = make_model([node], inputs, {"y": np.int32}, {"z": np.array(131, np.uint8)})
    run = compile_model(model)
    for h, m, k, n in [(3, 7, 5, 18), (1, 1, 1, 1), (2, 9, 33, 16)]:
        a, b = integers(rng, (h, m, k), np.uint8), integers(rng, (2, 1, k, n), np.int8)
        np.testing.assert_array_equal(run(a, b)[0], product(a, np.uint8(131), b, np.int8(0)))


@pytest.mark.parametrize("shapes", [((5,), (5,)), ((5,), (5, 3)), ((4, 5), (5,)), ((2, 3, 5), (5, 4))])
@pytest.mark.parametrize("constant", [True, False])
def test_ranks(compile_model, make_model, shapes, constant):
    rng = np.random.default_rng(4)
    a, b = (integers(rng, shape, np.int8) for shape in shapes)
    z = np.array(-3, np.int8)
    node = helper.make_node("MatMulInteger", ["a", "b", "z"], ["y"])
    inputs = {"a": (np.int8, a.shape)} | ({} if constant else {"b": (np.int8, b.shape)})
    run = compile_model(make_model([node], inputs, {"y": np.int32}, {"z": z} | ({"b": b} if constant else {})))
    np.testing.assert_array_equal(run(*([a] if constant else [a, b]))[0], product(a, z, b, np.int8(0)))


def test_zero_points_by_row(compile_model, make_model):
    rng = np.random.default_rng(5)
    a, b, az = integers(rng, (6, 9), np.uint8), integers(rng, (9, 20), np.uint8), integers(rng, (6,), np.uint8)
    node = helper.make_node("MatMulInteger", ["a", "b", "az"], ["y"])
    run = compile_model(make_model([node], {"a": (np.uint8, [6, 9])}, {"y": np.int32}, {"b": b, "az": az}))
    np.testing.assert_array_equal(run(a)[0], product(a, az[:, None], b, np.int32(0)))


@pytest.mark.parametrize("m", [1, 12, 50])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_requantization_is_one_kernel(compile_model, make_model, m, dtype):
    rng = np.random.default_rng(m)
    k, n = 64, 48
    a, b = integers(rng, (m, k), np.uint8), integers(rng, (k, n), np.int8)
    scales = {"as": np.float32(0.02), "bs": rng.uniform(0.001, 0.01, n).astype(np.float32), "ys": np.float32(0.5)}
    zeros = {"az": np.uint8(120), "bz": np.zeros(n, np.int8), "yz": np.array(3, dtype)}
    node = helper.make_node("QLinearMatMul", ["a", "as", "az", "b", "bs", "bz", "ys", "yz"], ["y"])
    constants = {"b": b} | {name: np.asarray(value) for name, value in {**scales, **zeros}.items()}
    model = make_model([node], {"a": (np.uint8, [m, k])}, {"y": dtype}, constants)
    info = np.iinfo(dtype)
    factor = scales["as"] * scales["bs"] / scales["ys"]
    rounded = np.rint(product(a, zeros["az"], b, zeros["bz"]).astype(np.float32) * factor)
    expected = np.clip(rounded + 3, info.min, info.max).astype(dtype)
    np.testing.assert_array_equal(compile_model(model)(a)[0], expected)
    kernels = CpuBackend(resolve("cpu")).schedule(load(model)).kernels
    assert [kernel.rule for kernel in kernels] == ["integer_contraction"]


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v4", "aarch64", "riscv64"])
def test_other_targets_compile(make_model, target):
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    constants = {"b": np.ones((20, 33), np.int8)}
    model = make_model([node], {"a": (np.uint8, ["m", 20])}, {"y": np.int32}, constants)
    assert len(CpuBackend(resolve(target)).build(load(model)).code) > 0
