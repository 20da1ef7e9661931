"""Normalization layers against NumPy in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import helper

from optc.errors import UnsupportedModelError

EPSILON = float(np.float32(1e-5))  # the default of the attribute, which is a float32


def normalized(x, axes, epsilon=EPSILON):
    x = x.astype(np.float64)
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon), mean, 1 / np.sqrt(variance + epsilon)


def sample(shape, dtype=np.float32, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 3 + 5).astype(dtype)


@pytest.mark.parametrize(
    ("shape", "axis", "scale"),
    [
        (["b", 7, 96], -1, (96,)),
        (["b", 7, 50], -1, (50,)),
        ([4, 5, 6, 7], 1, (5, 6, 7)),
        ([4, 5, 96], 1, (96,)),  # the scale broadcasts
        (["b", "n", 33], -1, (33,)),
    ],
)
def test_layer_normalization(compile_model, make_model, shape, axis, scale):
    node = helper.make_node("LayerNormalization", ["x", "s", "b"], ["y", "mean", "inverse"], axis=axis)
    constants = {"s": sample(scale, seed=1), "b": sample(scale, seed=2)}
    run = compile_model(
        make_model([node], {"x": (np.float32, shape)}, dict.fromkeys(["y", "mean", "inverse"], np.float32), constants)
    )
    x = sample([d if isinstance(d, int) else 3 for d in shape])
    first = axis % len(shape)
    want, mean, inverse = normalized(x, tuple(range(first, len(shape))))
    got = run(x)
    exact = want * constants["s"] + constants["b"]
    np.testing.assert_allclose(got[0], exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())
    np.testing.assert_allclose(got[1], mean, rtol=1e-6)
    np.testing.assert_allclose(got[2], inverse, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_layer_normalization_dtypes(compile_model, make_model, dtype):
    node = helper.make_node("LayerNormalization", ["x", "s"], ["y"])
    inputs = {"x": (dtype, [3, 70]), "s": (dtype, [70])}
    x, s = sample((3, 70), dtype), sample(70, dtype, 1)
    got = compile_model(make_model([node], inputs, {"y": dtype}))(x, s)[0]
    exact = normalized(x, 1)[0] * s.astype(np.float64)
    step = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(got.astype(np.float64), exact, rtol=step, atol=1e-5 if step > 1e-9 else 1e-13)


def test_layer_normalization_of_large_means_does_not_cancel(compile_model, make_model):
    node = helper.make_node("LayerNormalization", ["x", "s"], ["y"])
    run = compile_model(
        make_model([node], {"x": (np.float32, [2, 128])}, {"y": np.float32}, {"s": np.ones(128, np.float32)})
    )
    x = (np.random.default_rng(3).standard_normal((2, 128)) + 10_000).astype(np.float32)
    np.testing.assert_allclose(run(x)[0], normalized(x, 1)[0], atol=2e-3)


@pytest.mark.parametrize(("shape", "axis"), [([2, 3, 96], -1), (["b", "n", 40], -1), ([2, 3, 4, 5], 2)])
def test_rms_normalization(compile_model, make_model, shape, axis):
    node = helper.make_node("RMSNormalization", ["x", "s"], ["y"], axis=axis, epsilon=1e-6)
    scale = sample([d for d in shape[axis:] if isinstance(d, int)], seed=1)
    run = compile_model(make_model([node], {"x": (np.float32, shape)}, {"y": np.float32}, {"s": scale}))
    x = sample([d if isinstance(d, int) else 3 for d in shape])
    axes = tuple(range(axis % x.ndim, x.ndim))
    square = np.mean(x.astype(np.float64) ** 2, axes, keepdims=True)
    np.testing.assert_allclose(run(x)[0], x / np.sqrt(square + 1e-6) * scale, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), ("n", 6, "h", "w"), (2, 6, 40)])
def test_group_and_instance_normalization(compile_model, make_model, shape):
    nodes = [
        helper.make_node("GroupNormalization", ["x", "s", "b"], ["group"], num_groups=3),
        helper.make_node("InstanceNormalization", ["x", "s", "b"], ["instance"]),
    ]
    s, b = sample(6, seed=1), sample(6, seed=2)
    outputs = dict.fromkeys(["group", "instance"], np.float32)
    run = compile_model(make_model(nodes, {"x": (np.float32, shape)}, outputs, {"s": s, "b": b}))
    x = sample([d if isinstance(d, int) else size for d, size in zip(shape, (2, 6, 5, 7), strict=False)])
    group, instance = run(x)
    channel = (6, *[1] * (x.ndim - 2))
    want = normalized(x.reshape(2, 3, -1), 2)[0].reshape(x.shape)
    for got, value in ((group, want), (instance, normalized(x, tuple(range(2, x.ndim)))[0])):
        exact = value * s.reshape(channel) + b.reshape(channel)
        np.testing.assert_allclose(got, exact, rtol=2e-6, atol=2e-5)


def test_group_normalization_refuses_groups_that_do_not_divide(compile_model, make_model):
    node = helper.make_node("GroupNormalization", ["x", "s", "s"], ["y"], num_groups=4, name="norm")
    model = make_model([node], {"x": (np.float32, [2, 6, 5])}, {"y": np.float32}, {"s": np.ones(6, np.float32)})
    with pytest.raises(UnsupportedModelError, match=r"norm.*6 channels"):
        compile_model(model)


@pytest.mark.parametrize("known", [True, False])
def test_batch_normalization(compile_model, make_model, known):
    parameters = {n: np.abs(sample(6, seed=i)) for i, n in enumerate("sbmv")}
    node = helper.make_node("BatchNormalization", ["x", *"sbmv"], ["y"])
    inputs = {"x": (np.float32, ["n", 6, 4, "w"])}
    if not known:
        inputs |= {n: (np.float32, [6]) for n in "sbmv"}
    run = compile_model(make_model([node], inputs, {"y": np.float32}, parameters if known else {}))
    x = sample((3, 6, 4, 5))
    s, b, m, v = (p.astype(np.float64).reshape(6, 1, 1) for p in parameters.values())
    got = run(x, *([] if known else parameters.values()))[0]
    np.testing.assert_allclose(got, (x - m) / np.sqrt(v + 1e-5) * s + b, rtol=1e-5, atol=1e-5)


def test_batch_normalization_while_training(compile_model, make_model):
    parameters = {n: np.abs(sample(6, seed=i)) for i, n in enumerate("sbmv")}
    node = helper.make_node(
        "BatchNormalization", ["x", *"sbmv"], ["y", "mean", "variance"], training_mode=1, momentum=0.8
    )
    outputs = dict.fromkeys(["y", "mean", "variance"], np.float32)
    run = compile_model(make_model([node], {"x": (np.float32, [4, 6, 3, 5])}, outputs, parameters))
    x = sample((4, 6, 3, 5), seed=9)
    y, mean, variance = run(x)
    s, b, m, v = parameters.values()
    want = normalized(x, (0, 2, 3))[0] * s.reshape(6, 1, 1) + b.reshape(6, 1, 1)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mean, 0.8 * m + 0.2 * x.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(variance, 0.8 * v + 0.2 * x.var((0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("p", [1, 2])
def test_lp_normalization(compile_model, make_model, p):
    node = helper.make_node("LpNormalization", ["x"], ["y"], p=p, axis=1)
    run = compile_model(make_model([node], {"x": (np.float32, ["n", 5, 3])}, {"y": np.float32}))
    x = sample((2, 5, 3))
    x[1, :, 2] = 0
    norm = np.linalg.norm(x.astype(np.float64), p, axis=1, keepdims=True)
    np.testing.assert_allclose(run(x)[0], np.where(norm == 0, 0, x / np.where(norm == 0, 1, norm)), rtol=1e-6)


@pytest.mark.parametrize("size", [3, 4, 9])
def test_local_response_normalization(compile_model, make_model, size):
    node = helper.make_node("LRN", ["x"], ["y"], size=size, alpha=0.3, beta=0.6, bias=1.5)
    model = make_model([node], {"x": (np.float32, ["n", 7, 4, 5])}, {"y": np.float32}, opset=22)
    x = sample((2, 7, 4, 5))
    (got,) = compile_model(model)(x)
    padded = np.pad(x.astype(np.float64) ** 2, ((0, 0), ((size - 1) // 2, size // 2), (0, 0), (0, 0)))
    total = sum(padded[:, i : i + 7] for i in range(size))
    np.testing.assert_allclose(got, x / (1.5 + 0.3 / size * total) ** 0.6, rtol=2e-6)
    if size % 2:
        want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
        np.testing.assert_allclose(got, want, rtol=2e-5)
