"""Cases of com.microsoft's layers, against onnxruntime's own kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from operator_case import Case, Draw, onnxruntime_result

_ACTIVATIONS = {
    "Relu": 0, "Tanh": 0, "Sigmoid": 0, "LeakyRelu": 1, "HardSigmoid": 2, "HardSwish": 0, "Clip": 2,
}  # fmt: skip
_GEMM_ACTIVATIONS = {
    "Relu": 0, "Tanh": 0, "Sigmoid": 0, "LeakyRelu": 1, "HardSigmoid": 2, "Elu": 1, "Softplus": 0, "Softsign": 0,
    "ThresholdedRelu": 1,
}  # fmt: skip


def contrib(op: str, arrays: Sequence[np.ndarray | None], outputs: Sequence[str], **attributes: Any) -> Case:
    """Return a case of the domain; results are sums of numbers about 1, or have passed through an exponential."""
    case = Case(op, list(arrays), outputs, attributes, domain="com.microsoft", reference=onnxruntime_result)
    case.roundings, case.scale = 40, 1
    return case


def gelu(d: Draw) -> Case:
    op = d.pick(["Gelu", "FastGelu", "BiasGelu", "QuickGelu"])
    x = d.array("float32", d.shape(1, 4, empty=False), -6, 6)
    biased = op == "BiasGelu" or (op == "FastGelu" and d.flag())
    arrays = [x, d.array("float32", [x.shape[-1]])] if biased else [x]
    attributes = {"alpha": d.pick([1.0, 1.5])} if op == "QuickGelu" and d.flag() else {}
    case = contrib(op, arrays, ["float32"], **attributes)
    case.symbolic = d.symbols(arrays, {0: range(x.ndim - 1)})
    return case


def matmul(d: Draw) -> Case:
    m, k, n = d.size(), d.size(), d.size()
    batch = [d.integer(1, 3) for _ in range(d.integer(0, 2))]
    sides: dict[str, Any] = {}
    operands = []
    moved = [len(batch) > 0 and d.integer(0, 3) == 0 for _ in range(2)]
    for side, shape, move in zip("AB", ([m, k], [k, n]), moved, strict=True):
        if d.flag():
            sides[f"trans{side}"] = 1
            shape = shape[::-1]
        wide = [shape[0], *batch, shape[1]] if move else [*batch, *shape]
        if move:
            sides[f"transBatch{side}"] = 1
        elif not any(moved) and d.integer(0, 2) == 0:
            wide = shape
        operands.append(d.array("float32", wide))
    if d.flag():
        sides["alpha"] = d.pick([0.125, 2.0])
    case = contrib("FusedMatMul", operands, ["float32"], **sides)
    case.constants = frozenset(d.pick([[], [1]]))
    case.symbolic = d.symbols(operands, {0: [0]}) if not any(moved) and "transA" not in sides and not batch else {}
    return case


def gemm(d: Draw) -> Case:
    m, k, n = d.size(), d.size(), d.size()
    swap = d.flag()
    arrays = [d.array("float32", [m, k]), d.array("float32", [n, k] if swap else [k, n]), d.array("float32", [n])]
    name = d.pick(sorted(_GEMM_ACTIVATIONS))
    given = {f"activation_{key}": d.pick([0.2, 0.5]) for key in ("alpha", "beta")[: _GEMM_ACTIVATIONS[name]]}
    case = contrib("FusedGemm", arrays, ["float32"], transB=int(swap), activation=name, alpha=0.5, **given)
    case.symbolic = d.symbols(arrays, {0: [0]})
    return case


def convolution(d: Draw) -> Case:
    rank, name = d.pick([1, 2]), d.pick(["", *sorted(_ACTIVATIONS)])
    sizes = [d.pick([3, 7, 12]) for _ in range(rank)]
    x = d.array("float32", [d.integer(1, 2), 4, *sizes])
    w = d.array("float32", [6, 2, *[3] * rank], -0.3, 0.3)
    arrays = [x, w, d.array("float32", [6])]
    if rank == 2 and d.flag():
        arrays.append(d.array("float32", [len(x), 6, *sizes]))
    parameters = {"Clip": [-0.5, 0.7], "LeakyRelu": [0.2], "HardSigmoid": [0.3, 0.4]}.get(name)
    given: dict[str, Any] = {"activation": name} if name else {}
    if parameters is not None:
        given["activation_params"] = parameters
    return contrib("FusedConv", arrays, ["float32"], group=2, pads=[1] * (2 * rank), **given)


def normalization(d: Draw) -> Case:
    op = d.pick(["SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"])
    shape = [d.integer(1, 3), d.size(), d.pick([4, 8, 33, 64])]
    x, scale, shift, bias = d.array("float32", shape), *(d.array("float32", shape[-1:]) for _ in range(3))
    if op == "SimplifiedLayerNormalization":
        case = contrib(op, [x, scale], ["float32"], epsilon=1e-5, axis=-1)
        case.domain = ""
    else:
        few = op == "SkipLayerNormalization" and d.flag()
        skip = d.array("float32", shape[1:] if few else shape)
        more = [shift if d.flag() else None] if op == "SkipLayerNormalization" else []
        arrays = [x, skip, scale, *more, bias if d.flag() else None]
        outputs = d.pick([["float32"], ["float32", "", "", "float32"]])
        case = contrib(op, arrays, outputs, epsilon=d.pick([1e-5, 1e-12]))
    case.symbolic = d.pick([{}, {(0, 0): "n", (1, 0): "n"}]) if case.arrays[1].ndim == 3 else {}
    # Rows of few numbers close to each other are divided by a small deviation.
    case.roundings = 400
    return case


def embedding(d: Draw) -> Case:
    batch, length, width = d.integer(1, 3), d.size(), d.pick([8, 33, 64])
    ids, kinds = d.array("int32", [batch, length], 0, 19), d.array("int32", [batch, length], 0, 1)
    tables = [d.array("float32", [rows, width]) for rows in (20, 40, 2)]
    norm = [d.array("float32", [width]) for _ in range(2)]
    segments = d.flag()
    mask = np.tril(np.ones((length, length), np.int32))[d.rng.integers(0, length, batch)] if d.flag() else None
    places = d.array("int32", [batch, length], 0, 39) if d.flag() else None
    arrays = [ids, kinds if segments else None, *tables[:2], tables[2] if segments else None, *norm, mask, places]
    outputs = d.pick([["float32", "int32"], ["float32", "int32", "float32"]])
    case = contrib("EmbedLayerNormalization", arrays, outputs, epsilon=1e-5)
    case.constants = frozenset([2, 3, 4, 5, 6])
    names = {(k, axis): name for k in (0, 1, 7, 8) for axis, name in enumerate("ns") if arrays[k] is not None}
    case.symbolic = d.pick([{}, names])
    case.roundings = 400
    return case


def movement(d: Draw) -> Case:
    x = d.array("float32", [d.integer(1, 3), 3, d.size()])
    kind = d.pick(["ExpandDims", "Trilu", "GatherND", "Range", "Pad", "Unique", "GridSample"])
    if kind == "ExpandDims":
        case = contrib(kind, [x, np.array(d.integer(-4, 3), np.int32)], ["float32"])
        case.constants = frozenset([1])
    elif kind == "Trilu":
        case = contrib(kind, [x, np.array(d.integer(-2, 2), np.int64)], ["float32"], upper=d.integer(0, 1))
    elif kind == "GatherND":
        case = contrib(kind, [x, d.array("int32", [4, 2], 0, 0)], ["float32"])
    elif kind == "Range":
        numbers = [np.array([value], np.int64) for value in (d.integer(-3, 3), d.integer(4, 9), d.integer(1, 3))]
        case = contrib(kind, numbers[: d.integer(2, 3)], ["int64"])
        case.constants = frozenset(range(3))
    elif kind == "Pad":
        case = contrib(kind, [x, d.array("int64", [1, 6], 0, 2), np.array([0.5], np.float32)], ["float32"])
        case.constants = frozenset([1, 2])
    elif kind == "Unique":
        case = contrib(kind, [d.array("float32", [12], 0, 4).round()], ["float32", "int64", "int64"])
    else:
        arrays = [d.array("float32", [1, 2, 5, 6]), d.array("float32", [1, 3, 4, 2], -1.2, 1.2)]
        mode, padding = d.pick(["bilinear", "nearest", "bicubic"]), d.pick(["zeros", "border", "reflection"])
        case = contrib(kind, arrays, ["float32"], mode=mode, padding_mode=padding, align_corners=d.integer(0, 1))
    return case


FAMILIES = (gelu, matmul, gemm, convolution, normalization, embedding, movement)
