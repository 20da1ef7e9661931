"""Cases of operators for images and signals: regions, deformed convolutions, columns, Fourier transforms."""

from __future__ import annotations

import numpy as np
from operator_case import Case, Draw

_WIDE = ("float32", "float32", "float64")


def roi_align(d: Draw) -> Case:
    dtype, channels = d.pick(_WIDE), d.pick([1, 3, 16, 19])
    images, height, width, regions = d.pick([1, 2]), d.pick([1, 5, 16]), d.pick([1, 7, 17]), d.pick([0, 1, 4])
    corner = d.array(dtype, [regions, 2], -2, 14)
    rois = np.concatenate([corner, corner + d.array(dtype, [regions, 2], -1, 12)], axis=1).astype(dtype)
    arrays = [d.array(dtype, [images, channels, height, width]), rois, d.array("int64", [regions], 0, images - 1)]
    attributes = {
        "mode": d.pick(["avg", "max"]), "output_height": d.pick([1, 3]), "output_width": d.pick([1, 2, 5]),
        "sampling_ratio": d.integer(0, 3), "spatial_scale": d.pick([1.0, 0.5]),
        "coordinate_transformation_mode": d.pick(["half_pixel", "output_half_pixel"]),
    }  # fmt: skip
    symbolic = d.symbols(arrays, {0: [0, 2, 3]})
    if d.flag():
        symbolic |= {(1, 0): "r", (2, 0): "r"}
    return Case("RoiAlign", arrays, [dtype], attributes, symbolic=symbolic, roundings=64, single=True)


def deform_conv(d: Draw) -> Case:
    dtype = d.pick(_WIDE)
    groups, offset_groups = d.pick([1, 1, 2]), d.pick([1, 2])
    channels, outputs = 2 * groups * d.pick([1, 2, 4]), groups * d.pick([1, 3, 8])
    kernel, strides, dilations = ([d.integer(1, 3) for _ in range(2)] for _ in range(3))
    pads = [d.integer(0, 2) for _ in range(4)]
    size = [(k - 1) * e + 1 + d.pick([0, 3, 6]) for k, e in zip(kernel, dilations, strict=True)]
    out = [
        (n + pads[k] + pads[k + 2] - ((kernel[k] - 1) * dilations[k] + 1)) // strides[k] + 1 for k, n in enumerate(size)
    ]
    batch, taps = d.pick([1, 2]), kernel[0] * kernel[1] * offset_groups
    arrays = [
        d.array(dtype, [batch, channels, *size]), d.array(dtype, [outputs, channels // groups, *kernel]),
        d.array(dtype, [batch, 2 * taps, *out]), d.array(dtype, [outputs]) if d.flag() else None,
        d.array(dtype, [batch, taps, *out], 0, 1) if d.flag() else None,
    ]  # fmt: skip
    while arrays[-1] is None:
        arrays.pop()
    attributes = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads, "group": groups,
                  "offset_group": offset_groups}  # fmt: skip
    symbolic = {(0, 0): "n", (2, 0): "n"} | ({(4, 0): "n"} if len(arrays) > 4 else {}) if d.flag() else {}
    case = Case("DeformConv", arrays, [dtype], attributes, frozenset(d.pick([[1], []])), symbolic, single=True)
    case.roundings, case.scale = 64, 3 * np.sqrt(channels * taps)
    return case


def col2im(d: Draw) -> Case:
    dtype, rank = d.pick(("float32", "float64", "float16", "int32")), d.pick([1, 2, 2, 3])
    kernel, dilations, strides = ([d.integer(1, 3) for _ in range(rank)] for _ in range(3))
    pads = [d.integer(0, 2) for _ in range(2 * rank)]
    image = [max(1, (k - 1) * e + 1 + d.pick([0, 2, 5])) for k, e in zip(kernel, dilations, strict=True)]
    blocks = [
        (n + pads[k] + pads[k + rank] - dilations[k] * (kernel[k] - 1) - 1) // strides[k] + 1
        for k, n in enumerate(image)
    ]
    shape = [d.pick([1, 2]), d.pick([1, 3]) * int(np.prod(kernel)), int(np.prod(blocks))]
    x = d.array(dtype, shape) if dtype != "int32" else d.array(dtype, shape, -99, 99)
    arrays = [x, np.array(image, np.int64), np.array(kernel, np.int64)]
    attributes = {"pads": pads, "dilations": dilations, "strides": strides}
    constants = frozenset([1, 2] if d.flag() else [2])
    symbolic = {(0, 0): "n"} if d.flag() else {}
    case = Case("Col2Im", arrays, [dtype], attributes, constants, symbolic, wide=dtype != "int32")
    case.scale = 10.0
    return case


def dft(d: Draw) -> Case:
    dtype = d.pick(("float32", "float32", "float64"))
    inverse, onesided = d.integer(0, 1), d.integer(0, 1)
    rank, complex_input = d.integer(1, 3), d.flag()
    dims = [d.pick([1, 2, 3, 5, 8, 17, 132]) for _ in range(rank)]
    axis = d.integer(0, rank - 1)
    if onesided:
        # One side of a real signal, and back.
        complex_input = bool(inverse)
    length = None
    arrays: list[np.ndarray | None] = [d.array(dtype, [*dims, 2 if complex_input else 1])]
    if d.flag():
        length = d.pick([1, 2, 4, 7, 16])
        arrays.append(np.array(length, np.int64))
    else:
        arrays.append(None)
    arrays.append(np.array(axis - d.integer(0, 1) * (rank + 1), np.int64))
    constants = frozenset([1, 2])
    symbolic = {(0, k): f"d{k}" for k in range(rank) if d.flag() and (k != axis or not inverse)}
    case = Case("DFT", arrays, [dtype], {"inverse": inverse, "onesided": onesided}, constants, symbolic, opset=20)
    case.roundings, case.scale = 64, 3 * np.sqrt(max(dims[axis], length or 1))
    case.single = True
    return case


def stft(d: Draw) -> Case:
    dtype = d.pick(("float32", "float64"))
    length, step, onesided = d.pick([2, 5, 8, 16]), d.pick([1, 3, 8]), d.integer(0, 1)
    complex_input = d.flag() and not onesided
    x = d.array(dtype, [d.pick([1, 2]), length + d.pick([0, 4, 30]), 2 if complex_input else 1])
    window = d.array(dtype, [length], 0, 1) if d.flag() else None
    frame = np.array(length, np.int64) if window is None or d.flag() else None
    arrays = [x, np.array(step, np.int64), window, frame]
    while arrays[-1] is None:
        arrays.pop()
    constants = frozenset([1, 2, 3])
    case = Case("STFT", arrays, [dtype], {"onesided": onesided}, constants, d.symbols(arrays, {0: [0, 1]}))
    case.roundings, case.scale, case.single = 64, 3 * np.sqrt(length), True
    return case


FAMILIES = (roi_align, deform_conv, col2im, dft, stft)
