"""Cases of what networks are made of: products, convolutions, pooling, normalization, recurrence, resizing."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from operator_case import FLOATS, Case, Draw, onnxruntime_result

_HALVES = ("float16", "bfloat16")


def _runtime(case: Case) -> list[np.ndarray]:
    """Return onnxruntime's result; in float32 for what it has in no other type."""
    narrow = [
        a.astype(np.float32) if a is not None and a.dtype.name in (*_HALVES, "float64") else a for a in case.arrays
    ]
    kinds = ["float32" if k in FLOATS else k for k in case.outputs]
    return onnxruntime_result(
        Case(case.op, narrow, kinds, case.attributes, case.constants, case.symbolic, opset=case.opset)
    )


def _sum(case: Case, terms: float) -> Case:
    """Give ``case`` the tolerance of sums of ``terms`` products of normal numbers, in float32 or wider."""
    case.roundings, case.scale = 4 + terms / 8, 3 * np.sqrt(max(terms, 1))
    if case.outputs[0] in _HALVES:
        # Sums are float32; what is rounded is the result.
        case.roundings = 1.5
    return case


def matmul(d: Draw) -> Case:
    dtype = d.pick((*FLOATS, "int32", "int64", "uint32", "uint64")) if d.flag() else "float32"
    m, k, n = d.pick([1, 2, 5, 17, 40]), d.pick([1, 3, 16, 33, 100, 300]), d.pick([1, 2, 8, 24, 33, 70])
    batch = d.shape(0, 2)[:2]
    batch = [min(b, 3) for b in batch]
    a, b = [*batch, m, k], [*batch[d.integer(0, len(batch)) :], k, n]
    if len(b) == 2 and d.integer(0, 5) == 5:
        b = [k]
    elif len(a) == 2 and d.integer(0, 5) == 5:
        a = [k]
    arrays = [d.array(dtype, s) if dtype in FLOATS else d.array(dtype, s, 0, 99) for s in (a, b)]
    constants = frozenset(d.pick([[1], [0], []]))
    return _sum(Case("MatMul", arrays, [dtype], {}, constants, d.all_symbols(*arrays), wide=dtype in FLOATS), k)


def gemm(d: Draw) -> Case:
    dtype = d.pick((*FLOATS, "int32", "int64"))
    m, k, n = d.pick([1, 2, 5, 17, 40]), d.pick([1, 3, 16, 33, 300, 0]), d.pick([1, 2, 8, 24, 33])
    ta, tb = d.integer(0, 1), d.integer(0, 1)
    arrays: list[np.ndarray | None] = [
        d.array(dtype, s, *(() if dtype in FLOATS else (0, 99)))
        for s in ([k, m] if ta else [m, k], [n, k] if tb else [k, n], d.pick([[n], [m, n], [1, n], [m, 1], [], [1]]))
    ]
    if d.integer(0, 3) == 0:
        arrays.pop()
    scales = {"alpha": d.pick([1.0, 0.5, -2.0]), "beta": d.pick([1.0, 0.5, 0.0])} if dtype in FLOATS else {}
    constants = frozenset(d.pick([[1], [1, 2], []]))
    case = Case("Gemm", arrays, [dtype], {"transA": ta, "transB": tb, **scales}, constants, d.all_symbols(*arrays))
    case.wide = dtype in FLOATS
    return _sum(case, k)


EQUATIONS = ("ij,jk->ik", "bij,bjk->bik", "bhqd,bhkd->bhqk", "ij->ji", "ii->i", "ij->", "i,j->ij", "...ij,...jk->...ik",
             "ij,ij->", "bij,jk,kl->bil", "ijk->ki", "bij,kj->bik", "i,i->i")  # fmt: skip


def einsum(d: Draw) -> Case:
    dtype, equation = d.pick((*FLOATS, "int32", "int64")), d.pick(EQUATIONS)
    sizes: dict[str, int] = {}
    arrays = []
    for term in equation.split("->")[0].split(","):
        letters = term.replace("...", "")
        for letter in letters:
            sizes.setdefault(letter, d.pick([1, 2, 5, 9]))
        outer = (
            d.pick([[2], [3, 2]])
            if "..." in term and not arrays
            else list(arrays[0].shape[:-2])
            if "..." in term
            else []
        )
        shape = [*outer, *(sizes[letter] for letter in letters)]
        arrays.append(d.array(dtype, shape) if dtype in FLOATS else d.array(dtype, shape, 0, 9))
    symbolic = d.all_symbols(*arrays) if "ii" not in equation else {}
    case = Case("Einsum", arrays, [dtype], {"equation": equation}, symbolic=symbolic, wide=dtype in FLOATS)
    return _sum(case, 100)


def _window(d: Draw, rank: int) -> tuple[list[int], list[int], list[int]]:
    """Return kernel, dilations and strides."""
    kernel = [d.pick([1, 2, 3, 3, 5]) if rank < 3 else d.integer(1, 3) for _ in range(rank)]
    return kernel, [d.pick([1, 1, 1, 2, 3]) for _ in kernel], [d.pick([1, 1, 2, 3]) for _ in kernel]


def _padding(d: Draw, kernel: list[int], dilations: list[int]) -> dict[str, Any]:
    kind = d.pick(["none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID", "pads"])
    if kind == "pads":
        return {"pads": [d.integer(0, k - 1) for _ in range(2) for k in kernel]}
    return {} if kind == "none" else {"auto_pad": kind}


def _extent(d: Draw, kernel: list[int], dilations: list[int]) -> list[int]:
    """Return sizes that hold a kernel."""
    return [(k - 1) * e + 1 + d.pick([0, 1, 3, 6, 9]) for k, e in zip(kernel, dilations, strict=True)]


def convolution(d: Draw) -> Case:
    dtype = d.pick(FLOATS) if d.flag() else "float32"
    rank = d.pick([1, 2, 2, 2, 3])
    kernel, dilations, strides = _window(d, rank)
    padding = _padding(d, kernel, dilations)
    if "SAME" in str(padding):
        dilations = [1] * rank
    groups = d.pick([1, 1, 1, 2, 3, "depthwise"])
    each, outputs = d.pick([1, 3, 8, 16, 20]), d.pick([1, 5, 16, 24])
    if groups == "depthwise":
        groups, each, outputs = d.pick([3, 8, 16, 19]), 1, d.pick([1, 1, 2])
    x = d.array(dtype, [d.integer(1, 2), groups * each, *_extent(d, kernel, dilations)])
    w = d.array(dtype, [groups * outputs, each, *kernel])
    arrays = [x, w, d.array(dtype, [groups * outputs])][: d.integer(2, 3)]
    attributes = {"kernel_shape": kernel, "dilations": dilations, "strides": strides, "group": groups, **padding}
    constants = frozenset(d.pick([[1], [1, 2], [1, 2], []]))
    free = [0, *range(2, rank + 2)]
    case = Case("Conv", arrays, [dtype], attributes, constants, d.symbols(arrays, {0: free}))
    return _sum(case, each * np.prod(kernel))


def transposed(d: Draw) -> Case:
    dtype = d.pick(FLOATS) if d.flag() else "float32"
    rank = d.pick([1, 2, 2, 3])
    kernel, dilations, strides = _window(d, rank)
    groups, each, outputs = d.pick([1, 1, 2, 3]), d.pick([1, 3, 8, 17]), d.pick([1, 3, 8, 17])
    x = d.array(dtype, [d.integer(1, 2), groups * each, *(d.pick([1, 2, 5, 7]) for _ in kernel)])
    arrays = [x, d.array(dtype, [groups * each, outputs, *kernel]), d.array(dtype, [groups * outputs])][
        : d.integer(2, 3)
    ]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "dilations": dilations, "strides": strides, "group": groups}
    out = [(n - 1) * s + (k - 1) * e + 1 for n, s, k, e in zip(x.shape[2:], strides, kernel, dilations, strict=True)]
    kind = d.pick(["none", "pads", "output_padding", "SAME_UPPER", "SAME_LOWER", "output_shape"])
    if kind == "pads":
        attributes["pads"] = [min(d.integer(0, 2), (n - 1) // 2) for _ in range(2) for n in out]
    elif kind == "output_padding":
        attributes["output_padding"] = [d.integer(0, max(s, e) - 1) for s, e in zip(strides, dilations, strict=True)]
    elif kind == "output_shape":
        attributes["output_shape"] = [max(1, n - d.integer(0, 2)) for n in out]
    elif kind != "none" and all(n >= a * s for n, a, s in zip(out, x.shape[2:], strides, strict=True)):
        attributes["auto_pad"] = kind
    constants = frozenset(d.pick([[1], [1, 2], []]))
    symbolic = d.symbols(arrays, {0: [0] if kind in ("output_shape",) else [0, *range(2, rank + 2)]})
    case = Case("ConvTranspose", arrays, [dtype], attributes, constants, symbolic)
    case.reference, case.single = _runtime, True
    return _sum(case, each * np.prod(kernel))


def pooling(d: Draw) -> Case:
    op = d.pick(["MaxPool", "AveragePool", "LpPool"])
    dtype = d.pick((*FLOATS, "int8", "uint8") if op == "MaxPool" else FLOATS)
    rank = d.pick([1, 2, 2, 3])
    kernel, dilations, strides = _window(d, rank)
    padding = _padding(d, kernel, dilations)
    if "SAME" in str(padding):
        dilations = [1] * rank
    x = d.array(dtype, [d.integer(1, 2), d.pick([1, 3, 16, 19]), *_extent(d, kernel, dilations)])
    attributes: dict[str, Any] = {"kernel_shape": kernel, "dilations": dilations, "strides": strides, **padding}
    attributes["ceil_mode"] = d.integer(0, 1) if "auto_pad" not in padding else 0
    outputs = [dtype]
    if op == "MaxPool" and d.flag():
        outputs = [dtype, "int64"]
        attributes["storage_order"] = d.integer(0, 1) if rank == 2 else 0
    elif op == "AveragePool":
        attributes["count_include_pad"] = d.integer(0, 1)
    elif op == "LpPool":
        attributes["p"] = d.integer(1, 3)
    case = Case(op, [x], outputs, attributes, symbolic=d.symbols([x], {0: [0, *range(2, rank + 2)]}))
    case.reference, case.single = _runtime, True
    case.wide = dtype in FLOATS
    return _sum(case, np.prod(kernel))


def global_pooling(d: Draw) -> Case:
    op = d.pick(["GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"])
    dtype = d.pick(FLOATS)
    x = d.array(dtype, [d.integer(1, 2), d.size(), *(d.pick([1, 2, 5, 9]) for _ in range(d.integer(1, 3)))])
    attributes = {"p": d.integer(1, 3)} if op == "GlobalLpPool" else {}
    case = Case(op, [x], [dtype], attributes, symbolic=d.all_symbols(x))
    axes = tuple(range(2, x.ndim))
    reference = {
        "GlobalLpPool": lambda x: _norm(x, attributes["p"], axes),
        "GlobalMaxPool": lambda x: x.max(axes, keepdims=True),
        "GlobalAveragePool": lambda x: x.mean(axes, keepdims=True),
    }[op]
    case.reference = lambda c: [reference(c.arrays[0].astype(np.float64))]
    return _sum(case, x.size / x.shape[0] / x.shape[1])


def _norm(x: np.ndarray, p: int, axes: Any) -> np.ndarray:
    return np.asarray((np.abs(x) ** p).sum(axes, keepdims=True) ** (1 / p))


def softmax(d: Draw) -> Case:
    op, dtype = d.pick(["Softmax", "LogSoftmax", "Hardmax"]), d.pick(FLOATS)
    x = d.array(dtype, d.shape(1, 4, empty=op != "Hardmax"), -10, 10)
    case = Case(op, [x], [dtype], {"axis": d.axis(x.ndim)}, symbolic=d.all_symbols(x))
    case.roundings = 8 if dtype in ("float32", "float64") else 1.5
    if x.size == 0:
        case.reference = lambda c: [c.arrays[0].astype(np.float64)]
    return case


def normalization(d: Draw) -> Case:
    op = d.pick(["LayerNormalization", "RMSNormalization", "BatchNormalization", "InstanceNormalization",
                 "GroupNormalization", "LpNormalization", "LRN", "MeanVarianceNormalization"])  # fmt: skip
    dtype = d.pick(FLOATS if op not in ("LRN",) else ("float32", "float16", "bfloat16", "float64"))
    shape = d.shape(2, 4, empty=False)
    outputs, attributes, constants = [dtype], {}, frozenset()
    if op in ("InstanceNormalization", "GroupNormalization", "LRN"):
        shape = [d.integer(1, 2), d.pick([2, 4, 6, 16]), *(d.pick([2, 3, 7]) for _ in range(d.integer(1, 3)))]
    if op == "LRN":
        shape = [*shape[:2], *(d.pick([2, 3, 7]) for _ in range(2))]
    if op == "MeanVarianceNormalization":
        shape = [d.integer(2, 3), d.size(), 3, 5]
    x = d.array(dtype, shape)
    channels = [x.shape[1]]
    symbolic = d.symbols([x], {0: [0, *range(2, x.ndim)]})
    if op in ("LayerNormalization", "RMSNormalization"):
        axis = d.axis(x.ndim)
        inner = x.shape[axis:]
        arrays = [x, d.array(dtype, inner), d.array(dtype, inner)]
        arrays = arrays[:2] if op[0] == "R" or d.flag() else arrays
        attributes = {"axis": axis, "epsilon": d.pick([1e-5, 1e-2])}
        if op[0] == "L" and d.integer(0, 3) == 3 and dtype == "float32":
            outputs = [dtype, "float32", "float32"]
        symbolic = d.symbols([x], {0: range(axis % x.ndim)})
    elif op == "BatchNormalization":
        arrays = [x, *(d.array(dtype, channels) for _ in range(3)), d.array(dtype, channels, 0.5, 2)]
        attributes = {"epsilon": d.pick([1e-5, 1e-2])}
        constants = frozenset([1, 2, 3, 4]) if d.flag() else frozenset()
    elif op == "InstanceNormalization":
        arrays = [x, d.array(dtype, channels), d.array(dtype, channels)]
    elif op == "GroupNormalization":
        arrays = [x, d.array(dtype, channels), d.array(dtype, channels)]
        attributes = {"num_groups": d.pick([1, 2, x.shape[1]])}
    elif op == "LRN":
        arrays, attributes = [x], {"size": d.pick([1, 3, 5]), "alpha": 0.5, "beta": 0.75, "bias": 1.5}
    elif op == "LpNormalization":
        arrays, attributes = [x], {"axis": d.axis(x.ndim), "p": d.integer(1, 2)}
    else:
        arrays, attributes = [x], {"axes": d.pick([[0, 2, 3], [1, 2, 3], [2, 3]])}
    case = Case(op, arrays, outputs, attributes, constants, symbolic)
    case.roundings = 24 if dtype not in _HALVES else 4
    # stash_type is float.
    case.single = op in ("GroupNormalization", "LayerNormalization", "RMSNormalization")
    if op == "LpNormalization":
        case.reference = lambda c: [
            (a := c.arrays[0].astype(np.float64)) / _norm(a, attributes["p"], attributes["axis"])
        ]
    elif op == "MeanVarianceNormalization":
        case.reference = lambda c: [_standardized(c.arrays[0].astype(np.float64), tuple(attributes["axes"]))]
    return case


def _standardized(x: np.ndarray, axes: Any) -> np.ndarray:
    centered = x - x.mean(axes, keepdims=True)
    return np.asarray(centered / (np.sqrt((centered**2).mean(axes, keepdims=True)) + 1e-9))


def recurrent(d: Draw) -> Case:
    op = d.pick(["RNN", "GRU", "LSTM"])
    dtype = d.pick(("float32", "float32", "float64", "float16"))
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[op]
    direction = d.pick(["forward", "reverse", "bidirectional"])
    layout, n = d.integer(0, 1), 2 if direction == "bidirectional" else 1
    time, batch, features, hidden = d.pick([1, 2, 7]), d.pick([1, 3]), d.pick([1, 4, 9]), d.pick([1, 5, 8])
    x = d.array(dtype, [batch, time, features] if layout else [time, batch, features])
    state = [batch, n, hidden] if layout else [n, batch, hidden]
    optional = [
        d.array(dtype, [n, 2 * gates * hidden]),
        d.array("int32", [batch], 0 if d.flag() else 1, time),
        d.array(dtype, state),
        *([d.array(dtype, state), d.array(dtype, [n, 3 * hidden])] if op == "LSTM" else []),
    ]
    optional = [a if d.flag() else None for a in optional]
    weights = [d.array(dtype, [n, gates * hidden, features]), d.array(dtype, [n, gates * hidden, hidden])]
    arrays: list[np.ndarray | None] = [x, *(w / w.dtype.type(2) for w in weights), *optional]
    while arrays[-1] is None:
        arrays.pop()
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction, "layout": layout}
    if d.flag():
        attributes["clip"] = 0.7
    per = {"RNN": 1, "GRU": 2, "LSTM": 3}[op]
    if d.flag():
        known = ["Sigmoid", "Tanh", "Relu", "HardSigmoid", "Softsign", "Elu", "LeakyRelu", "Softplus", "Affine",
                 "ScaledTanh", "ThresholdedRelu"]  # fmt: skip
        attributes["activations"] = [d.pick(known) for _ in range(per * n)]
        defaults = {"HardSigmoid": (0.3, 0.4), "Elu": (0.8, 0), "LeakyRelu": (0.1, 0), "Affine": (0.5, 0.1),
                    "ScaledTanh": (0.5, 0.75), "ThresholdedRelu": (0.3, 0)}  # fmt: skip
        # Functions without parameters take none from these lists.
        attributes["activation_alpha"] = [defaults[a][0] for a in attributes["activations"] if a in defaults]
        attributes["activation_beta"] = [defaults[a][1] for a in attributes["activations"] if a in _BETA]
        attributes = {k: v for k, v in attributes.items() if v != []}
    if op == "GRU":
        attributes["linear_before_reset"] = d.integer(0, 1)
    elif op == "LSTM":
        attributes["input_forget"] = d.integer(0, 1)
    outputs = [dtype] * (3 if op == "LSTM" else 2)
    constants = frozenset([1, 2, 3, 7] if d.integer(0, 3) else [])
    symbolic = d.symbols(arrays, {0: [0, 1]})
    case = Case(op, arrays, outputs, attributes, constants, symbolic, opset=22)
    case.reference, case.roundings, case.scale = recurrence, 32 + 8 * time, 1
    if dtype == "float16":
        case.roundings = 4 + 2 * time
    return case


ACTIVATIONS = {
    "Sigmoid": lambda x, a, b: 1 / (1 + np.exp(-x)),
    "Tanh": lambda x, a, b: np.tanh(x),
    "Relu": lambda x, a, b: np.maximum(x, 0),
    "HardSigmoid": lambda x, a, b: np.clip(a * x + b, 0, 1),
    "Softsign": lambda x, a, b: x / (1 + np.abs(x)),
    "Elu": lambda x, a, b: np.where(x >= 0, x, a * np.expm1(x)),
    "LeakyRelu": lambda x, a, b: np.where(x >= 0, x, a * x),
    "Softplus": lambda x, a, b: np.logaddexp(0, x),
    "Affine": lambda x, a, b: a * x + b,
    "ScaledTanh": lambda x, a, b: a * np.tanh(b * x),
    "ThresholdedRelu": lambda x, a, b: np.where(x >= a, x, 0),
}


_ALPHA = {"HardSigmoid", "Elu", "LeakyRelu", "Affine", "ScaledTanh", "ThresholdedRelu"}
_BETA = {"HardSigmoid", "Affine", "ScaledTanh"}


def recurrence(case: Case) -> list[np.ndarray]:
    """RNN-22, GRU-22 and LSTM-22 in float64, from the equations of the standard."""
    op, at = case.op, case.attributes
    arrays = [None if a is None else a if a.dtype == np.int32 else a.astype(np.float64) for a in case.arrays]
    x, w, r, b, lengths, h0, c0, p = [*arrays, *([None] * (8 - len(arrays)))]
    if at["layout"]:
        x, h0, c0 = (None if a is None else np.swapaxes(a, 0, 1) for a in (x, h0, c0))
    steps, batch, _ = x.shape
    hidden, n = at["hidden_size"], w.shape[0]
    lengths = np.full(batch, steps) if lengths is None else lengths
    default = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}[op]
    names = at.get("activations", default * n)
    given = {k: list(np.float32(at.get(f"activation_{k}", [])).astype(np.float64)) for k in ("alpha", "beta")}
    alpha = [given["alpha"].pop(0) if name in _ALPHA else 0.0 for name in names]
    beta = [given["beta"].pop(0) if name in _BETA else 0.0 for name in names]
    limit = float(np.float32(at.get("clip", np.inf)))
    y = np.zeros([steps, n, batch, hidden])
    last = np.zeros([2, n, batch, hidden])
    for k in range(n):
        per = len(names) // n
        f = [
            partial(lambda g, a, b, v: g(np.clip(v, -limit, limit), a, b), ACTIVATIONS[names[i]], alpha[i], beta[i])
            for i in range(k * per, (k + 1) * per)
        ]
        whole = partial(
            lambda g, a, b, v: g(v, a, b),
            ACTIVATIONS[names[(k + 1) * per - 1]],
            *[v[(k + 1) * per - 1] for v in (alpha, beta)],
        )
        backward = at["direction"] == "reverse" or k == 1
        wb, rb = np.zeros(w.shape[1]) if b is None else b[k, : w.shape[1]], 0 if b is None else b[k, w.shape[1] :]
        rb = rb + np.zeros(w.shape[1])
        peep = np.zeros(3 * hidden) if p is None else p[k]
        for s in range(batch):
            h = np.zeros(hidden) if h0 is None else h0[k, s]
            c = np.zeros(hidden) if c0 is None else c0[k, s]
            order = range(lengths[s])
            for t in reversed(order) if backward else order:
                gates = w[k] @ x[t, s] + wb
                back = r[k] @ h + rb
                if op == "RNN":
                    h = f[0](gates + back)
                elif op == "GRU":
                    z, q, g = np.split(gates, 3)
                    rz, rq, rg = np.split(r[k], 3)
                    bz, bq, bg = np.split(rb, 3)
                    z, q = f[0](z + rz @ h + bz), f[0](q + rq @ h + bq)
                    g = g + q * (rg @ h + bg) if at["linear_before_reset"] else g + rg @ (q * h) + bg
                    h = (1 - z) * f[1](g) + z * h
                else:
                    i, o, forget, cell = np.split(gates + back, 4)
                    pi, po, pf = np.split(peep, 3)
                    i = f[0](i + pi * c)
                    forget = 1 - i if at["input_forget"] else f[0](forget + pf * c)
                    c = forget * c + i * f[1](cell)
                    # Unlike the inputs of the gates, the state is not clipped: so does onnxruntime.
                    h = f[0](o + po * c) * whole(c)
                y[t, k, s] = h
            last[:, k, s] = h, c
    if at["layout"]:
        y, last = y.transpose(2, 0, 1, 3), last.transpose(0, 2, 1, 3)
    return [y, *last[: len(case.outputs) - 1]]


def resize(d: Draw) -> Case:
    dtype = d.pick((*FLOATS, "uint8", "int8", "int32")) if d.flag() else "float32"
    mode = d.pick(["nearest", "linear", "cubic"])
    rank = d.pick([1, 2, 2, 3]) if mode != "cubic" else d.pick([1, 2, 2])
    sizes = [d.pick([1, 2, 3, 5, 8, 13]) for _ in range(rank)]
    x = d.array(dtype, [d.integer(1, 2), d.pick([1, 3, 16]), *sizes], *((-3, 3) if dtype in FLOATS else (-100, 100)))
    transform = d.pick(["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric",
                        "tf_crop_and_resize"])  # fmt: skip
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": transform}
    if mode == "nearest":
        attributes["nearest_mode"] = d.pick(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
    elif d.integer(0, 2) == 2 and transform != "tf_crop_and_resize":
        attributes["antialias"] = 1
    if mode == "cubic":
        attributes |= {"cubic_coeff_a": d.pick([-0.75, -0.5]), "exclude_outside": d.integer(0, 1)}
    axes = list(range(2, x.ndim))
    attributes["axes"] = axes
    roi = None
    if transform == "tf_crop_and_resize":
        roi = np.concatenate([d.array("float32", [rank], 0, 0.3), d.array("float32", [rank], 0.6, 1.2)])
        attributes["extrapolation_value"] = -1.0
    if d.flag():
        target = np.array([d.pick([1, 2, 3, 7, 11, 16]) for _ in axes], np.int64)
        arrays = [x, roi, None, target]
        if transform not in ("tf_crop_and_resize",) and d.integer(0, 3) == 3:
            attributes["keep_aspect_ratio_policy"] = d.pick(["not_larger", "not_smaller"])
    else:
        arrays = [x, roi, np.array([d.pick([0.5, 1.0, 2.0, 1.5, 0.75, 3.0, 0.6]) for _ in axes], np.float32)]
        arrays[2] = np.maximum(arrays[2], np.float32(1) / np.array(sizes, np.float32))
    symbolic = d.symbols(arrays, {0: [0, 1]})
    constants = frozenset([1, 2, 3])
    case = Case("Resize", arrays, [dtype], attributes, constants, symbolic)
    # Coordinates are float32.
    case.single = True
    case.roundings, case.scale, case.off_by = 64, 3.0, 0 if mode == "nearest" else 1
    case.wide = dtype in FLOATS and mode != "nearest"
    if dtype in _HALVES:
        case.roundings = 3
    return case


def grid_sample(d: Draw) -> Case:
    dtype, mode = d.pick(("float32", "float64", "float32", "float16")), d.pick(["linear", "nearest", "cubic"])
    rank = 2 if mode == "cubic" else d.pick([2, 2, 3])
    batch = d.integer(1, 2)
    x = d.array(dtype, [batch, d.pick([1, 3, 16]), *(d.pick([2, 3, 6]) for _ in range(rank))])
    grid = d.array(dtype, [batch, *(d.pick([1, 2, 5]) for _ in range(rank)), rank], -1.3, 1.3)
    attributes = {
        "mode": mode,
        "align_corners": d.integer(0, 1),
        "padding_mode": d.pick(["zeros", "border", "reflection"]),
    }
    case = Case("GridSample", [x, grid], [dtype], attributes, symbolic=d.all_symbols(x, grid))
    # Coordinates are float32.
    case.roundings, case.scale, case.single = 100, 3.0, True
    case.symbolic = {k: v for k, v in case.symbolic.items() if k != (1, grid.ndim - 1)}
    if dtype == "float16":
        case.roundings = 30
    return case


FAMILIES = (
    matmul, gemm, einsum, convolution, transposed, pooling, global_pooling, softmax, normalization, recurrent, resize,
    grid_sample,
)  # fmt: skip
