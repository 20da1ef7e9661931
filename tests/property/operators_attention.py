"""Cases of attention, and of what surrounds it."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto
from operator_case import EPSILON, Case, Draw

_FLOATS = ("float32", "float32", "float16", "bfloat16", "float64")


def attention(d: Draw) -> Case:
    dtype = d.pick(_FLOATS)
    batch, group, heads = d.pick([1, 2, 3]), d.pick([1, 1, 2, 3]), d.pick([1, 2, 3])
    queries, keys, past = d.pick([1, 2, 5, 17]), d.pick([1, 3, 8, 19]), d.pick([0, 0, 1, 6])
    size, value_size = d.pick([2, 8, 16, 20]), d.pick([1, 8, 16, 24])
    packed = d.flag()

    def tensor(count: int, length: int, width: int) -> np.ndarray:
        return d.array(dtype, [batch, length, count * width] if packed else [batch, count, length, width])

    opset = d.pick([23, 24, 25])
    attributes: dict[str, object] = {"q_num_heads": heads * group, "kv_num_heads": heads} if packed else {}
    if d.flag():
        attributes["scale"] = d.pick([0.1, 0.5, 1.0])
    if d.integer(0, 2) == 0:
        attributes["softcap"] = d.pick([0.5, 2.0, 30.0])
    if d.integer(0, 2) == 0:
        attributes["softmax_precision"] = TensorProto.FLOAT
    causal = d.integer(0, 2) == 0
    if causal:
        attributes["is_causal"] = 1
    if opset == 25:
        for side in d.subset(["left_window_size", "right_window_size"]):
            attributes[side] = d.integer(0, 4)
    arrays: list[np.ndarray | None] = [
        tensor(heads * group, queries, size), tensor(heads, keys, size), tensor(heads, keys, value_size),
        None, None, None,
    ]  # fmt: skip
    lengths = None
    if past and d.flag():
        arrays[4] = d.array(dtype, [batch, heads, past, size])
        arrays[5] = d.array(dtype, [batch, heads, past, value_size])
    else:
        past = 0
        if opset > 23 and d.integer(0, 3) == 0:
            lengths = d.array("int64", [batch], 0, keys)
    arrays[3] = _mask(d, dtype, [batch, heads * group, queries, past + keys], opset)
    arrays.append(lengths)
    while arrays[-1] is None:
        arrays.pop()
    wanted = [True, arrays[-1] is not None and past > 0, past > 0, d.integer(0, 3) == 0]
    if wanted[3]:
        # onnx's evaluator caps what mode 0 gives.
        attributes["qk_matmul_output_mode"] = d.integer("softcap" in attributes, 3)
    outputs = [dtype if want else "" for want in wanted]
    while not outputs[-1]:
        outputs.pop()
    symbolic = {}
    if d.flag():
        names = {"n": [(0, 0), (1, 0), (2, 0), (4, 0), (5, 0), (6, 0)], "q": [(0, 1 if packed else 2)],
                 "k": [(1, 1 if packed else 2), (2, 1 if packed else 2)], "p": [(4, 2), (5, 2)]}  # fmt: skip
        chosen = d.subset(sorted(names))
        symbolic = {
            place: name for name in chosen for place in names[name]
            if place[0] < len(arrays) and arrays[place[0]] is not None
        }  # fmt: skip
    case = Case("Attention", arrays, outputs, attributes, symbolic=symbolic, opset=opset)
    # Sums of products of normal numbers, which go into an exponential.
    case.roundings, case.scale = (40, 1) if dtype in ("float32", "float64") else (3, 1)
    case.single = True
    return case


def _mask(d: Draw, dtype: str, shape: list[int], opset: int) -> np.ndarray | None:
    """Return nothing, or a mask of some rank that broadcasts to ``shape``, from opset 24 on perhaps too short."""
    if d.flag():
        return None
    rank = d.integer(2, 4)
    dims = [1 if k < rank - 2 and d.flag() else n for k, n in enumerate(shape[4 - rank :])]
    if opset > 23 and d.integer(0, 3) == 0:
        dims[-1] = d.integer(1, dims[-1])
    if d.flag():
        return d.array("bool", dims)
    values = d.array(dtype, dims)
    if d.flag():
        values = np.where(d.array("bool", dims), values, np.array(-np.inf, values.dtype)).astype(values.dtype)
    return values


def rotary(d: Draw) -> Case:
    dtype = d.pick(("float32", "float32", "float16", "bfloat16"))
    batch, heads, length, half = d.pick([1, 2]), d.pick([1, 3]), d.pick([1, 2, 9]), d.pick([1, 2, 4, 8])
    rotated = 2 * half
    size = rotated + d.pick([0, 0, 2, 5])
    packed = d.flag()
    x = d.array(dtype, [batch, length, heads * size] if packed else [batch, heads, length, size])
    attributes: dict[str, object] = {"interleaved": d.integer(0, 1)}
    if packed or d.flag():
        attributes["num_heads"] = heads
    if rotated != size or d.flag():
        attributes["rotary_embedding_dim"] = rotated
    arrays: list[np.ndarray | None]
    if d.flag():
        rows = length + d.integer(0, 4)
        arrays = [
            x,
            *(d.array(dtype, [rows, half], -1, 1) for _ in range(2)),
            d.array("int64", [batch, length], 0, rows - 1),
        ]
    else:
        arrays = [x, *(d.array(dtype, [batch, length, half], -1, 1) for _ in range(2))]
    symbolic = d.symbols(arrays, {0: [0, 1 if packed else 2], 1: [0]})
    case = Case("RotaryEmbedding", arrays, [dtype], attributes, symbolic=symbolic)
    case.single = dtype in EPSILON
    return case


FAMILIES = (attention, rotary)
