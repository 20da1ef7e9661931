"""GridSample, AffineGrid, DeformConv, RoiAlign and MaxRoiPool against torch and onnxruntime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

F = np.float32


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def run(compile_model, make_model, op, arrays, constants=(), opset=22, **attributes):
    node = helper.make_node(op, list(arrays), ["y"], **attributes)
    inputs = {n: (a.dtype, a.shape) for n, a in arrays.items() if n not in constants}
    fixed = {n: arrays[n] for n in constants}
    model = make_model([node], inputs, {"y": F}, fixed, opset=opset)
    return compile_model(model)(*(arrays[n] for n in inputs))[0], model


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_grid_sample(compile_model, make_model, mode, padding, align):
    x, grid = data(2, 3, 5, 7), data(2, 4, 6, 2, seed=1) * 1.5
    y, model = run(
        compile_model,
        make_model,
        "GridSample",
        {"x": x, "g": grid},
        mode=mode,
        padding_mode=padding,
        align_corners=align,
    )
    names = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}
    if mode == "cubic" and padding == "border":
        # ONNX moves the point to the border, torch only the pixels that it reads.
        want = ReferenceEvaluator(model).run(None, {"x": x, "g": grid})[0]
    else:
        want = torch.nn.functional.grid_sample(
            torch.tensor(x), torch.tensor(grid), names[mode], padding, align_corners=bool(align)
        ).numpy()
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_grid_sample_of_a_volume(compile_model, make_model, padding):
    x, grid = data(1, 2, 4, 5, 6), data(1, 3, 2, 4, 3, seed=1)
    y, _ = run(compile_model, make_model, "GridSample", {"x": x, "g": grid}, mode="linear", padding_mode=padding)
    want = torch.nn.functional.grid_sample(
        torch.tensor(x), torch.tensor(grid), "bilinear", padding, align_corners=False
    )
    np.testing.assert_allclose(y, want.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 3, 4, 5, 6)], ids=str)
def test_affine_grid(compile_model, make_model, align, size):
    theta = data(2, len(size) - 2, len(size) - 1)
    arrays = {"t": theta, "s": np.array(size)}
    y, _ = run(compile_model, make_model, "AffineGrid", arrays, ["s"], align_corners=align)
    want = torch.nn.functional.affine_grid(torch.tensor(theta), list(size), align_corners=bool(align))
    np.testing.assert_allclose(y, want.numpy(), rtol=1e-5, atol=1e-5)


def bilinear(image, y, x):
    """The value of one channel at a fractional position, zeros outside."""
    total = 0.0
    for i in (int(np.floor(y)), int(np.floor(y)) + 1):
        for j in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * image[i, j]
    return total


@pytest.mark.parametrize("constant", [True, False], ids=["packed", "run-time"])
@pytest.mark.parametrize("masked", [True, False])
def test_deform_conv(compile_model, make_model, constant, masked):
    x, w, b = data(1, 4, 6, 5), data(6, 2, 2, 3, seed=1), data(6, seed=2)
    # Two offset groups, six kernel positions, two coordinates; pads 1, stride 2 by 1.
    offset, mask = data(1, 24, 4, 5, seed=3), data(1, 12, 4, 5, seed=4)
    arrays = {"x": x, "w": w, "o": offset, "b": b} | ({"m": mask} if masked else {})
    y, _ = run(
        compile_model, make_model, "DeformConv", arrays, ["w"] if constant else [], group=2, offset_group=2,
        pads=[1, 1, 1, 1], strides=[2, 1],
    )  # fmt: skip
    want = np.zeros((1, 6, 4, 5))
    for m, i, j in np.ndindex(6, 4, 5):
        total = float(b[m])
        for c, p, q in np.ndindex(2, 2, 3):
            channel = m // 3 * 2 + c
            tap = channel // 2 * 6 + p * 3 + q
            at = (i * 2 - 1 + p + offset[0, tap * 2, i, j], j - 1 + q + offset[0, tap * 2 + 1, i, j])
            value = bilinear(x[0, channel], *at) * (mask[0, tap, i, j] if masked else 1)
            total += w[m, c, p, q] * value
        want[0, m, i, j] = total
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-4)


ROIS = np.array([[0, 0, 6, 6], [1.5, 2.2, 4.7, 7.9], [3, 3, 3.2, 3.1], [-2, -1, 20, 20]], F)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("transform", ["half_pixel", "output_half_pixel"])
def test_roi_align(compile_model, make_model, mode, ratio, transform):
    arrays = {"x": data(2, 3, 8, 9), "r": ROIS, "b": np.array([0, 1, 1, 0])}
    y, model = run(
        compile_model, make_model, "RoiAlign", arrays, mode=mode, sampling_ratio=ratio, output_height=3, output_width=2,
        spatial_scale=0.9, coordinate_transformation_mode=transform, opset=16,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(y, session.run(None, arrays)[0], rtol=1e-4, atol=1e-4)


def test_max_roi_pool(compile_model, make_model):
    rois = np.concatenate([np.array([[0], [1], [1]], F), ROIS[:3]], 1)
    arrays = {"x": data(2, 3, 8, 9), "r": rois}
    y, model = run(compile_model, make_model, "MaxRoiPool", arrays, pooled_shape=[3, 2], spatial_scale=1.0, opset=21)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(y, session.run(None, arrays)[0], rtol=1e-5, atol=1e-5)
