"""Cases of operators that move data, reduce it, and sort it."""

from __future__ import annotations

import numpy as np
from operator_case import ANY, FLOATS, NUMBERS, Case, Draw, dtype_of, evaluate

_INDEX = ("int32", "int64")


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def transpose(d: Draw) -> Case:
    dtype = d.pick(ANY)
    x = d.array(dtype, d.shape(0, 5))
    perm = {"perm": d.permutation(x.ndim)} if x.ndim and d.flag() else {}
    return Case("Transpose", [x], [dtype], perm, symbolic=d.all_symbols(x), wide=False)


def concat(d: Draw) -> Case:
    dtype = d.pick(ANY)
    shape = d.shape(1, 4)
    axis = d.axis(len(shape))
    arrays = []
    for _ in range(d.integer(1, 4)):
        part = list(shape)
        part[axis] = d.pick([0, 1, 2, 5, 8])
        arrays.append(d.array(dtype, part))
    constants = frozenset([0]) if len(arrays) > 1 and d.flag() else frozenset()
    return Case("Concat", arrays, [dtype], {"axis": axis}, constants, d.all_symbols(*arrays), wide=False)


def split(d: Draw) -> Case:
    dtype = d.pick(ANY)
    shape = d.shape(1, 4, empty=False)
    axis = d.axis(len(shape))
    count = d.integer(1, 4)
    if d.flag():
        parts = [d.pick([0, 1, 2, 3]) for _ in range(count)]
        shape[axis] = sum(parts)
        arrays, attributes, constants = [d.array(dtype, shape), _ints(*parts)], {"axis": axis}, frozenset([1])
    else:
        # The last part may be smaller, but is not empty.
        each = d.pick([1, 2, 3, 5])
        shape[axis] = each * count - (d.integer(0, each - 1) if count > 1 else 0)
        arrays, attributes, constants = [d.array(dtype, shape)], {"axis": axis, "num_outputs": count}, frozenset()
    free = [i for i in range(len(shape)) if i != axis % len(shape)]
    symbolic = d.symbols(arrays, {0: free})
    return Case("Split", arrays, [dtype] * count, attributes, constants, symbolic, wide=False)


def slice_(d: Draw) -> Case:
    dtype = d.pick(ANY)
    x = d.array(dtype, d.shape(1, 4))
    axes = d.subset(range(x.ndim)) or [0]
    far = [-100, 100, -(2**63) + 1, 2**63 - 1]
    starts = [d.pick([*range(-x.shape[a] - 1, x.shape[a] + 2), *far]) for a in axes]
    # onnx's evaluator takes what starts before the beginning and goes backwards for empty; the standard does not.
    starts = [max(s, -x.shape[a]) for s, a in zip(starts, axes, strict=True)]
    ends = [d.pick([*range(-x.shape[a] - 1, x.shape[a] + 2), *far]) for a in axes]
    steps = [d.pick([1, 1, 2, 3, -1, -2, 7]) for _ in axes]
    if d.flag():
        axes = [a - x.ndim if d.flag() else a for a in axes]
    arrays = [x, _ints(*starts), _ints(*ends), _ints(*axes), _ints(*steps)]
    fixed = d.integer(0, 3) > 0
    constants = frozenset([1, 2, 3, 4] if fixed else [3, 4])
    return Case("Slice", arrays, [dtype], {}, constants, d.symbols(arrays, {0: range(x.ndim)}), wide=False)


def expand(d: Draw) -> Case:
    dtype = d.pick(ANY)
    shape = d.shape(0, 4)
    x = d.array(dtype, [1 if d.integer(0, 2) == 2 else n for n in shape][d.integer(0, len(shape)) :])
    target = [
        1 if d.integer(0, 5) == 5 and n in (x.shape[i - len(shape) :] or [1])[:1] else n for i, n in enumerate(shape)
    ]
    arrays = [x, _ints(*target)]
    constants = frozenset([1]) if d.flag() else frozenset()
    return Case("Expand", arrays, [dtype], {}, constants, d.symbols(arrays, {0: range(x.ndim)}), wide=False)


def tile(d: Draw) -> Case:
    dtype = d.pick(ANY)
    x = d.array(dtype, d.shape(1, 3))
    arrays = [x, _ints(*(d.pick([1, 2, 3, 1, 0]) for _ in range(x.ndim)))]
    constants = frozenset([1]) if d.flag() else frozenset()
    return Case("Tile", arrays, [dtype], {}, constants, d.symbols(arrays, {0: range(x.ndim)}), wide=False)


def pad(d: Draw) -> Case:
    dtype = d.pick(ANY)
    mode = d.pick(["constant", "reflect", "edge", "wrap"])
    x = d.array(dtype, d.shape(1, 4, empty=mode == "constant"))
    axes = d.subset(range(x.ndim)) or [x.ndim - 1]
    limit = {"constant": lambda n: 5, "edge": lambda n: 4, "reflect": lambda n: n - 1, "wrap": lambda n: n}[mode]
    pads = [d.integer(0, min(4, limit(x.shape[a]))) for _ in range(2) for a in axes]
    if mode == "constant" and d.flag():
        pads = [-1 if x.shape[axes[i % len(axes)]] > 2 and d.flag() else p for i, p in enumerate(pads)]
    value = d.array(dtype, []) if mode == "constant" and d.flag() else None
    arrays = [x, _ints(*pads), value, _ints(*(a - x.ndim if d.flag() else a for a in axes))]
    constants = frozenset([1, 2, 3] if d.integer(0, 3) else [2, 3])
    symbolic = d.symbols(arrays, {0: range(x.ndim)})
    return Case("Pad", arrays, [dtype], {"mode": mode}, constants, symbolic, wide=False)


def gather(d: Draw) -> Case:
    dtype, index = d.pick(ANY), d.pick(_INDEX)
    x = d.array(dtype, d.shape(1, 4, empty=False))
    axis = d.axis(x.ndim)
    n = x.shape[axis]
    if d.flag():
        i = d.array(index, d.shape(0, 3), -n, n - 1)
        constants = frozenset([d.integer(0, 1)]) if d.flag() else frozenset()
        return Case("Gather", [x, i], [dtype], {"axis": axis}, constants, d.all_symbols(x, i), wide=False)
    shape = [max(1, s - d.integer(0, 1)) for s in x.shape]
    shape[axis] = d.size()
    i = d.array(index, shape, -n, n - 1)
    case = Case("GatherElements", [x, i], [dtype], {"axis": axis}, frozenset(), d.all_symbols(x, i))

    def reference(_: Case) -> list[np.ndarray]:
        wrapped = np.where(i < 0, i + n, i)
        inner = tuple(slice(s) if k != axis % x.ndim else slice(None) for k, s in enumerate(i.shape))
        return [np.take_along_axis(x[inner], wrapped.astype(np.int64), axis)]

    case.reference = reference
    return case


def gather_nd(d: Draw) -> Case:
    dtype = d.pick(ANY)
    x = d.array(dtype, d.shape(1, 4, empty=False))
    batch = d.integer(0, x.ndim - 1)
    width = d.integer(1, x.ndim - batch)
    outer = [*x.shape[:batch], *d.shape(0, 2)]
    columns = [d.array("int64", outer, -x.shape[batch + k], x.shape[batch + k] - 1) for k in range(width)]
    i = np.stack(columns, axis=-1)
    symbolic = d.symbols([x, i], {0: range(x.ndim), 1: range(i.ndim - 1)})
    symbolic = {k: v for k, v in symbolic.items() if k[1] >= batch}
    return Case("GatherND", [x, i], [dtype], {"batch_dims": batch}, frozenset(), symbolic, wide=False)


def scatter(d: Draw) -> Case:
    reduction = d.pick(["none", "add", "mul", "max", "min"])
    dtype = d.pick(ANY if reduction == "none" else NUMBERS)
    x = d.array(dtype, d.shape(1, 4, empty=False))
    axis = d.axis(x.ndim)
    n = x.shape[axis]
    shape = [d.integer(1, s) for s in x.shape]
    if reduction == "none":
        # Which of equal indices wins is not defined.
        count = min(shape[axis], n)
        shape[axis] = count
        i = np.argsort(d.rng.random([n if k == axis % x.ndim else s for k, s in enumerate(shape)]), axis)
        i = np.take(i, range(count), axis)
        i = np.where(d.array("bool", shape), i, i - n)
    else:
        i = d.array("int64", shape, -n, n - 1)
    arrays = [x, i.astype(d.pick(_INDEX)), d.array(dtype, shape)]
    symbolic = d.symbols(arrays, {0: range(x.ndim)})
    case = Case("ScatterElements", arrays, [dtype], {"axis": axis, "reduction": reduction}, frozenset(), symbolic)
    case.wide, case.roundings = reduction != "none" and dtype in FLOATS, 4 * n
    return case


def scatter_nd(d: Draw) -> Case:
    reduction = d.pick(["none", "add", "mul", "max", "min"])
    dtype = d.pick(ANY if reduction == "none" else NUMBERS)
    x = d.array(dtype, d.shape(1, 4, empty=False))
    width = d.integer(1, x.ndim)
    rows = d.integer(1, 6)
    if reduction == "none":
        places = int(np.prod(x.shape[:width]))
        flat = d.rng.permutation(places)[:rows]
        i = np.stack(np.unravel_index(flat, x.shape[:width]), axis=-1)
    else:
        i = np.stack([d.array("int64", [rows], -n, n - 1) for n in x.shape[:width]], axis=-1)
    updates = d.array(dtype, [len(i), *x.shape[width:]])
    arrays = [x, i.astype(np.int64), updates]
    symbolic = d.symbols(arrays, {0: range(x.ndim)})
    case = Case("ScatterND", arrays, [dtype], {"reduction": reduction}, frozenset(), symbolic)
    case.wide, case.roundings = reduction != "none" and dtype in FLOATS, 32
    return case


def shuffle(d: Draw) -> Case:
    dtype = d.pick(("float32", "float16", "int32", "bool", "uint8"))
    block = d.integer(1, 3)
    n, c, h, w = d.integer(1, 2), d.integer(1, 4), d.integer(1, 5), d.integer(1, 5)
    if d.flag():
        x = d.array(dtype, [n, c * block * block, h, w])
        attributes = {"blocksize": block, "mode": d.pick(["DCR", "CRD"])}
        return Case("DepthToSpace", [x], [dtype], attributes, symbolic=d.symbols([x], {0: [0, 2, 3]}), wide=False)
    x = d.array(dtype, [n, c, h * block, w * block])
    return Case("SpaceToDepth", [x], [dtype], {"blocksize": block}, symbolic=d.symbols([x], {0: [0, 1]}), wide=False)


def triangle(d: Draw) -> Case:
    dtype = d.pick(ANY)
    x = d.array(dtype, d.shape(2, 4))
    arrays = [x, np.array(d.integer(-6, 6))] if d.flag() else [x]
    constants = frozenset([1]) if len(arrays) > 1 and d.flag() else frozenset()
    attributes = {"upper": d.integer(0, 1)}
    return Case("Trilu", arrays, [dtype], attributes, constants, d.symbols(arrays, {0: range(x.ndim)}), wide=False)


def one_hot(d: Draw) -> Case:
    index, dtype = (
        d.pick(("int64", "int32", "float32", "uint8")),
        d.pick(("float32", "int32", "int64", "bool", "float16")),
    )
    depth = d.integer(1, 9)
    i = d.array(index, d.shape(0, 3), 0 if index == "uint8" else -depth - 2, depth + 2)
    i = np.rint(i.astype(np.float64)).astype(dtype_of(index))
    arrays = [i, np.array(depth, np.int64), d.array(dtype, [2])]
    constants = frozenset([1]) if d.flag() else frozenset([1, 2])
    attributes = {"axis": d.integer(-i.ndim - 1, i.ndim)}
    return Case("OneHot", arrays, [dtype], attributes, constants, d.symbols(arrays, {0: range(i.ndim)}), wide=False)


def reverse(d: Draw) -> Case:
    dtype = d.pick(ANY)
    x = d.array(dtype, d.shape(2, 4, empty=False))
    time = d.integer(0, 1)
    lengths = d.array("int64", [x.shape[1 - time]], 1, x.shape[time])
    attributes = {"time_axis": time, "batch_axis": 1 - time}
    symbolic = d.symbols([x], {0: range(2, x.ndim)})
    return Case("ReverseSequence", [x, lengths], [dtype], attributes, symbolic=symbolic, wide=False)


REDUCTIONS = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
              "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp")  # fmt: skip


def reduce(d: Draw) -> Case:
    op = d.pick(REDUCTIONS)
    kinds = (*FLOATS, "int32", "int64", "uint32", "uint64")
    dtype = d.pick((*kinds, "int8", "uint8", "bool") if op in ("ReduceMax", "ReduceMin") else kinds)
    if "Log" in op or op in ("ReduceL2", "ReduceMean"):
        dtype = d.pick(FLOATS)
    # onnx's evaluator fails at ReduceLogSumExp of a scalar.
    shape = d.shape(int(op == "ReduceLogSumExp"), 4, empty=op not in ("ReduceMean",))
    low, high = (0.1, 2) if op == "ReduceLogSum" else (0.5, 1.5) if op == "ReduceProd" else (-3, 3)
    x = d.array(dtype, shape, low, high) if dtype in FLOATS else d.array(dtype, shape)
    if dtype in ("int32", "int64") and op not in ("ReduceMax", "ReduceMin"):
        x = d.array(dtype, shape, -9, 9)
    attributes = {"keepdims": d.integer(0, 1), "noop_with_empty_axes": d.integer(0, 1)}
    axes = d.subset(range(x.ndim))
    arrays = [x, _ints(*(a - x.ndim if d.flag() else a for a in axes))] if d.integer(0, 3) else [x]
    if len(arrays) == 1:
        axes = []
    if not axes and attributes["noop_with_empty_axes"] == 0:
        axes = list(range(x.ndim))
    count = int(np.prod([x.shape[a] for a in axes]))
    if op in ("ReduceMax", "ReduceMin") and dtype in FLOATS and count == 0:
        attributes["noop_with_empty_axes"] = 0
    symbolic = d.symbols(arrays, {0: range(x.ndim)})
    case = Case(op, arrays, [dtype], attributes, frozenset([1]) if len(arrays) > 1 else frozenset(), symbolic)
    case.roundings = 8 + count if op == "ReduceProd" else 8 + count / 4
    case.scale = (
        1.0 if "Log" in op else 3.0 * np.sqrt(max(count, 1)) if op == "ReduceSum" else 3.0 if op == "ReduceMean" else 0
    )
    case.wide = dtype in FLOATS
    if dtype not in FLOATS:
        # NumPy widens what it sums.
        case.reference = lambda c: [a.astype(dtype_of(dtype)) for a in evaluate(c, wide=False)]
    return case


def arg(d: Draw) -> Case:
    op, dtype = d.pick(["ArgMax", "ArgMin"]), d.pick(NUMBERS)
    x = d.array(dtype, d.shape(1, 4, empty=False))
    if d.flag():
        x = np.asarray(d.rng.integers(0, 3, x.shape)).astype(x.dtype)
    attributes = {"axis": d.axis(x.ndim), "keepdims": d.integer(0, 1), "select_last_index": d.integer(0, 1)}
    return Case(op, [x], ["int64"], attributes, symbolic=d.all_symbols(x), wide=False)


def cumulative(d: Draw) -> Case:
    op = d.pick(["CumSum", "CumProd"])
    dtype = d.pick((*FLOATS, "int32", "int64", "uint32", "uint64"))
    shape = d.shape(1, 4)
    x = d.array(dtype, shape, 0.5, 1.5) if dtype in FLOATS else d.array(dtype, shape, 0, 3)
    axis = d.axis(x.ndim)
    attributes = {"exclusive": d.integer(0, 1), "reverse": d.integer(0, 1)}
    arrays = [x, np.array(axis, d.pick(_INDEX))]
    case = Case(op, arrays, [dtype], attributes, frozenset([1]), d.symbols(arrays, {0: range(x.ndim)}))
    case.wide, case.roundings = dtype in FLOATS, 4 + x.shape[axis]
    case.opset = 26 if op == "CumProd" else case.opset
    return case


def top_k(d: Draw) -> Case:
    dtype = d.pick(NUMBERS)
    shape = d.shape(1, 4, empty=False)
    axis = d.axis(len(shape))
    if d.integer(0, 2) == 0:
        # More than one block of what is looked at together.
        shape[axis] = d.pick([70, 200, 333])
    x, n = d.array(dtype, shape), shape[axis]
    if d.flag():
        x = np.asarray(d.rng.integers(0, 4, x.shape)).astype(x.dtype)
    else:
        x = d.special(x)
    k = d.integer(0, d.pick([n, min(n, 9)])) if d.flag() else n
    arrays = [x, _ints(k)]
    attributes = {"axis": axis, "largest": d.integer(0, 1), "sorted": 1}
    symbolic = d.symbols(arrays, {0: range(x.ndim)})
    constants = frozenset([1]) if d.integer(0, 2) else frozenset()

    def reference(case: Case) -> list[np.ndarray]:
        x = case.arrays[0]
        # Equal elements keep their order.
        keys = x.astype(np.float64) if x.dtype.name not in ("int64", "uint64") else x
        if attributes["largest"]:
            order = np.flip(np.argsort(np.flip(keys, axis), axis, kind="stable"), axis)
            order = x.shape[axis] - 1 - order
        else:
            order = np.argsort(keys, axis, kind="stable")
        order = np.take(order, range(k), axis)
        return [np.take_along_axis(x, order, axis), order.astype(np.int64)]

    return Case("TopK", arrays, [dtype, "int64"], attributes, constants, symbolic, roundings=0, reference=reference)


def unique(d: Draw) -> Case:
    dtype = d.pick(("float32", "int64", "float64", "uint8", "bool", "int8"))
    x = d.array(dtype, d.shape(1, 3, empty=False))
    if dtype != "bool":
        x = np.asarray(d.rng.integers(0, 4, x.shape)).astype(x.dtype)
    attributes = {"sorted": 1} | ({"axis": d.axis(x.ndim)} if d.flag() else {})
    outputs = [dtype, "int64", "int64", "int64"]
    return Case("Unique", [x], outputs, attributes, symbolic=d.all_symbols(x), wide=False)


def select(d: Draw) -> Case:
    dtype = d.pick(ANY)
    x = d.array(dtype, d.shape(1, 4))
    if d.flag():
        x = np.where(d.array("bool", x.shape), x, x.dtype.type(0))
        return Case("NonZero", [x], ["int64"], symbolic=d.all_symbols(x), wide=False)
    axis = d.axis(x.ndim)
    attributes = {"axis": axis} if d.flag() else {}
    n = x.shape[axis] if attributes else x.size
    condition = d.array("bool", [d.integer(0, n)])
    return Case("Compress", [x, condition], [dtype], attributes, symbolic=d.all_symbols(x, condition), wide=False)


def reshape(d: Draw) -> Case:
    dtype = d.pick(ANY)
    x = d.array(dtype, d.shape(0, 4))
    op = d.pick(["Reshape", "Flatten", "Squeeze", "Unsqueeze"])
    symbolic = d.all_symbols(x)
    if op == "Flatten":
        return Case(op, [x], [dtype], {"axis": d.integer(-x.ndim, x.ndim)}, symbolic=symbolic, wide=False)
    if op == "Squeeze":
        ones = [a for a in range(x.ndim) if x.shape[a] == 1]
        arrays = [x, _ints(*(a - x.ndim if d.flag() else a for a in d.subset(ones)))]
        return Case(op, arrays, [dtype], {}, frozenset([1]), symbolic, wide=False)
    if op == "Unsqueeze":
        rank = x.ndim + d.integer(1, 3)
        axes = d.permutation(rank)[: rank - x.ndim]
        arrays = [x, _ints(*(a - rank if d.flag() else a for a in axes))]
        return Case(op, arrays, [dtype], {}, frozenset([1]), symbolic, wide=False)
    target, attributes = list(x.shape), {}
    if x.size:
        target = [int(np.prod(x.shape[:1])), int(np.prod(x.shape[1:]))]
        target = d.pick([target, list(reversed(target)), [x.size], [1, x.size, 1], [-1], [-1, 1], list(x.shape)])
        if len(target) == x.ndim and d.flag() and list(target) == list(x.shape):
            target[d.integer(0, len(target) - 1) if target else 0 :] = [0] * len(target[d.integer(0, 0) :])[:0]
    else:
        attributes = {"allowzero": 1}
    arrays = [x, _ints(*target)]
    constants = frozenset([1]) if d.flag() else frozenset()
    return Case(op, arrays, [dtype], attributes, constants, symbolic, wide=False)


def generate(d: Draw) -> Case:
    op = d.pick(["Range", "EyeLike", "ConstantOfShape", "CenterCropPad"])
    if op == "Range":
        dtype = d.pick(("int32", "int64", "int16", "float32", "float64"))
        start, step = d.integer(-5, 5), d.pick([1, 2, -1, -3])
        arrays = [np.array(v, dtype) for v in (start, start + step * d.integer(0, 20), step)]
        constants = frozenset(d.pick([[0, 1, 2], [0, 2], []]))
        return Case(op, arrays, [dtype], {}, constants, wide=False)
    if op == "EyeLike":
        dtype = d.pick(NUMBERS)
        x = d.array(dtype, d.shape(2, 2))
        return Case(op, [x], [dtype], {"k": d.integer(-4, 4)}, symbolic=d.all_symbols(x), wide=False)
    if op == "ConstantOfShape":
        from onnx import numpy_helper

        value = d.array(d.pick(ANY), [1])
        shape = _ints(*d.shape(0, 4))
        attributes = {"value": numpy_helper.from_array(value)}
        constants = frozenset([0]) if d.flag() else frozenset()
        return Case(op, [shape], [value.dtype.name], attributes, constants, wide=False)
    dtype = d.pick(ANY)
    x = d.array(dtype, d.shape(1, 4, empty=False))
    axes = d.subset(range(x.ndim)) or [0]
    arrays = [x, _ints(*(d.size() for _ in axes))]
    return Case(op, arrays, [dtype], {"axes": axes}, frozenset([1]), d.symbols(arrays, {0: range(x.ndim)}), wide=False)


FAMILIES = (
    transpose, concat, split, slice_, expand, tile, pad, gather, gather_nd, scatter, scatter_nd, shuffle, triangle,
    one_hot, reverse, reduce, arg, cumulative, top_k, unique, select, reshape, generate,
)  # fmt: skip
