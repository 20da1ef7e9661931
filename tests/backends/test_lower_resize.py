"""Resize against ONNX's reference implementation; sizes and scales constant, symbolic and known only at run time."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from tvm import tirx

import optc
from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve
from optc.errors import UnsupportedModelError
from optc.frontend.onnx import load

F = np.float32
X = np.random.default_rng(0).standard_normal((1, 2, 5, 7)).astype(F)


def model_of(make_model, shape, inputs=(), constants=None, **attributes):
    names = [n if n in {**dict(inputs), **(constants or {})} else "" for n in ("roi", "scales", "sizes")]
    while names and not names[-1]:
        names.pop()
    node = helper.make_node("Resize", ["x", *names], ["y"], **attributes)
    given = {"x": (F, shape)} | {n: (a.dtype, a.shape) for n, a in inputs}
    return make_model([node], given, {"y": F}, constants, opset=19)


def reference(model, x, **feeds):
    return ReferenceEvaluator(model).run(None, {"x": x, **feeds})[0]


SIZES = [(8, 11), (3, 4), (5, 14), (1, 1)]
MODES = ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("transform", MODES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_interpolation(compile_model, make_model, mode, transform, size):
    sizes = np.array([1, 2, *size])
    model = model_of(
        make_model, X.shape, constants={"sizes": sizes}, mode=mode, coordinate_transformation_mode=transform
    )
    np.testing.assert_allclose(compile_model(model)(X)[0], reference(model, X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("transform", ["half_pixel", "asymmetric", "align_corners"])
@pytest.mark.parametrize("size", [(10, 14), (3, 4), (4, 21)], ids=str)
def test_nearest(compile_model, make_model, rounding, transform, size):
    model = model_of(
        make_model, X.shape, constants={"sizes": np.array([1, 2, *size])}, mode="nearest", nearest_mode=rounding,
        coordinate_transformation_mode=transform,
    )  # fmt: skip
    np.testing.assert_array_equal(compile_model(model)(X)[0], reference(model, X))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("attributes", [{"antialias": 1}, {"exclude_outside": 1}, {"cubic_coeff_a": -0.5}], ids=str)
@pytest.mark.parametrize("size", [(3, 3), (9, 4)], ids=str)
def test_filters(compile_model, make_model, mode, attributes, size):
    model = model_of(make_model, X.shape, constants={"sizes": np.array([1, 2, *size])}, mode=mode, **attributes)
    np.testing.assert_allclose(compile_model(model)(X)[0], reference(model, X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_scales_of_symbolic_dimensions(compile_model, make_model, mode):
    scales = np.array([1, 1, 2, 0.5], F)
    model = model_of(make_model, ["n", 2, "h", "w"], constants={"scales": scales}, mode=mode)
    run = compile_model(model)
    for shape in [(1, 2, 3, 4), (2, 2, 6, 9)]:
        x = np.random.default_rng(1).standard_normal(shape).astype(F)
        np.testing.assert_allclose(run(x)[0], reference(model, x), rtol=1e-5, atol=1e-5)


def test_an_odd_scale_of_a_symbolic_dimension_is_refused(compile_model, make_model):
    scales = np.array([1, 1, 1.2345678, 1], F)
    with pytest.raises(UnsupportedModelError, match="simple fraction"):
        compile_model(model_of(make_model, ["n", 2, "h", "w"], constants={"scales": scales}, mode="linear"))


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("antialias", [0, 1])
def test_run_time_scales(compile_model, make_model, mode, antialias):
    if mode == "nearest" and antialias:
        return
    run = None
    for scales in ([1, 1, 0.5, 0.6], [1, 1, 2, 1.5]):
        scales = np.array(scales, F)
        model = model_of(make_model, X.shape, [("scales", scales)], mode=mode, antialias=antialias)
        run = run or compile_model(model)
        expected = reference(model, X, scales=scales)
        np.testing.assert_allclose(run(X, scales)[0], expected, rtol=1e-4, atol=1e-4)


def test_run_time_sizes(compile_model, make_model):
    run = None
    for size in SIZES[:3]:
        sizes = np.array([1, 2, *size])
        model = model_of(make_model, X.shape, [("sizes", sizes)], mode="linear")
        run = run or compile_model(model)
        np.testing.assert_allclose(run(X, sizes)[0], reference(model, X, sizes=sizes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
@pytest.mark.parametrize("shape", [(1, 2, 5, 7), (1, 2, "h", "w")], ids=str)
def test_aspect_ratio(compile_model, make_model, policy, shape):
    sizes = np.array([10, 11])
    model = model_of(
        make_model, shape, constants={"sizes": sizes}, mode="linear", axes=[2, 3], keep_aspect_ratio_policy=policy
    )
    np.testing.assert_allclose(compile_model(model)(X)[0], reference(model, X), rtol=1e-4, atol=1e-4)


def test_crop(compile_model, make_model):
    roi = np.array([0, 0, 0.4, 0.6, 1, 1, 1.2, 0.2], F)
    model = model_of(
        make_model, X.shape, constants={"sizes": np.array([1, 2, 4, 6]), "roi": roi}, mode="linear",
        coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=10.0,
    )  # fmt: skip
    np.testing.assert_allclose(compile_model(model)(X)[0], reference(model, X), rtol=1e-4, atol=1e-4)


def test_integers_are_rounded_and_saturated(compile_model, make_model):
    x = np.array([0, 255, 0, 255, 255, 0], np.uint8).reshape(1, 1, 1, 6)
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="cubic")
    model = make_model(
        [node], {"x": (np.uint8, x.shape)}, {"y": np.uint8}, {"sizes": np.array([1, 1, 1, 15])}, opset=19
    )
    (y,) = compile_model(model)(x)
    assert np.abs(y.astype(int) - reference(model, x).astype(int)).max() <= 1
    assert {0, 255} <= set(y.reshape(-1).tolist())


def test_agrees_with_onnxruntime_on_a_feature_pyramid(compile_model, make_model):
    model = model_of(
        make_model, ["n", 4, "h", "w"], constants={"scales": np.array([1, 1, 2, 2], F)}, mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    x = np.random.default_rng(1).standard_normal((2, 4, 5, 3)).astype(F)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(compile_model(model)(x)[0], session.run(None, {"x": x})[0])


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_what_leaves_the_model_is_turned_before_it_grows(make_model, mode):
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((21, 16, 3, 3)).astype(np.float32),
        "scales": np.array([1, 1, 4, 3], np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Resize", ["c", "", "scales"], ["y"], mode=mode),
    ]
    model = make_model(nodes, {"x": (np.float32, [2, 16, 9, 7])}, {"y": np.float32}, constants)
    backend = CpuBackend(resolve("cpu"))
    module, _ = backend.fuse(load(model))
    turned = [f for v, f in module.functions.items() if "transpose" in v.name_hint and isinstance(f, tirx.PrimFunc)]
    sizes = {int(np.prod([int(d) for d in f.params[-1].ty.shape])) for f in turned}
    assert 2 * 21 * 9 * 7 in sizes
    assert 2 * 21 * 36 * 21 not in sizes
    x = rng.standard_normal((2, 16, 9, 7)).astype(np.float32)
    (found,) = optc.compile(model, verify=False).model().run({"x": x}).values()
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
