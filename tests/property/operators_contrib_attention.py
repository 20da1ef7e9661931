"""Cases of com.microsoft's attention, against onnxruntime's own kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from operator_case import Case, Draw
from operators_contrib import contrib


def attention(d: Draw) -> Case:
    batch, length, heads, size = d.integer(1, 3), d.pick([1, 2, 7, 18]), d.pick([1, 2, 3]), d.pick([2, 8, 16])
    width, hidden = d.pick([4, 24]), heads * size
    values = hidden if d.flag() else heads * d.pick([4, 8])
    past = d.pick([0, 0, 3]) if values == hidden else 0
    x, w = d.array("float32", [batch, length, width]), d.array("float32", [width, 2 * hidden + values], -0.5, 0.5)
    attributes: dict[str, Any] = {"num_heads": heads, "unidirectional": d.integer(0, 1)}
    if values != hidden:
        attributes["qkv_hidden_sizes"] = [hidden, hidden, values]
    bias = d.array("float32", [2 * hidden + values])
    cache = d.array("float32", [2, batch, heads, past, size]) if past else None
    mask = d.array("int32", [batch, 1], 0, 1) if d.integer(0, 5) == 0 else _mask(d, batch, length, past + length)
    added = d.array("float32", [batch, heads, length, past + length]) if not past and d.flag() else None
    outputs = ["float32", "float32"] if past or (values == hidden and d.integer(0, 2) == 0) else ["float32"]
    case = contrib("Attention", [x, w, bias, mask, cache, added], outputs, **attributes)
    _scaled(d, case)
    _opened(case, mask)
    case.constants = frozenset(d.pick([[1, 2], []]))
    case.symbolic = _symbols(d, case, {(0, 0): "n", (0, 1): "s", (3, 0): "n", (4, 1): "n", (4, 3): "p"})
    return case


def _scaled(d: Draw, case: Case) -> None:
    """Draw a scale, and a filling that leaves a row without keys some digits."""
    if d.flag():
        case.attributes["scale"] = 0.3
    if d.flag():
        case.attributes["mask_filter_value"] = -200.0
        case.scale = 100


def _mask(d: Draw, batch: int, queries: int, keys: int) -> np.ndarray | None:
    form = d.pick(["none", "ends", "starts", "keys", "all"])
    if form == "none":
        return None
    if form in ("keys", "all"):
        return d.array("int32", [batch, keys] if form == "keys" else [batch, queries, keys], 0, 1)
    ends = d.array("int32", [batch], 0, keys)
    return ends if form == "ends" else np.concatenate([ends, d.array("int32", [batch], 0, keys)])


def _opened(case: Case, mask: np.ndarray | None) -> None:
    """Let each row see its first key where the filling leaves no digits to a row without keys."""
    if mask is None or "mask_filter_value" in case.attributes:
        return
    batch = len(case.arrays[0])
    if mask.ndim > 1:
        mask[..., 0] = 1
    else:
        mask[:batch] = np.maximum(mask[:batch], 1)
        mask[batch:] = 0


def _symbols(d: Draw, case: Case, places: dict[tuple[int, int], str]) -> dict[tuple[int, int], str]:
    """Return names for some dimensions, the same for equal ones; not for a mask whose form its size tells."""
    names = d.subset(sorted(set(places.values())))
    mask = case.arrays[3] if case.op == "Attention" else None
    if mask is not None and mask.ndim == 1:
        names = [name for name in names if name != "n"]
    return {
        place: name for place, name in places.items()
        if name in names and place[0] < len(case.arrays) and case.arrays[place[0]] is not None
    }  # fmt: skip


def multi_head(d: Draw) -> Case:
    batch, queries, heads, size = d.integer(1, 3), d.pick([1, 2, 9]), d.pick([1, 2, 3]), d.pick([4, 8, 16])
    past, hidden, causal = d.pick([0, 0, 4]), heads * size, d.integer(0, 1)
    keys = queries if causal else d.pick([1, 5, 17])
    turned = not past and d.integer(0, 3) == 0
    values = hidden if past or turned else heads * d.pick([size, 8])
    q = d.array("float32", [batch, queries, hidden])
    if turned:
        k, v = (d.array("float32", [batch, heads, keys, size]) for _ in range(2))
    else:
        k, v = d.array("float32", [batch, keys, hidden]), d.array("float32", [batch, keys, values])
    bias = d.array("float32", [2 * hidden + values]) if not turned and d.flag() else None
    mask = _mask(d, batch, queries, past + keys)
    if mask is not None and (mask.shape[-1] == 1 or mask.shape == (2 * batch,)):
        mask = None
    added = d.array("float32", [d.pick([1, batch]), heads, queries, past + keys]) if d.flag() else None
    caches = [d.array("float32", [batch, heads, past, size]) for _ in range(2)] if past else [None, None]
    # Without present, onnxruntime leaves out the past.
    outputs = ["float32"] * (3 if past else 1 if turned else d.pick([1, 3]))
    arrays = [q, k, v, bias, mask, added, *caches]
    case = contrib("MultiHeadAttention", arrays, outputs, num_heads=heads, unidirectional=causal)
    _scaled(d, case)
    _opened(case, mask)
    places = {(k, 0): "n" for k in (0, 1, 2, 4, 6, 7)} | {(6, 2): "p", (7, 2): "p"}
    if not causal:
        places[0, 1] = "q"
    if mask is not None and mask.ndim == 1:
        places = {place: name for place, name in places.items() if name != "n"}
    case.symbolic = _symbols(d, case, places)
    return case


def rotary(d: Draw) -> Case:
    batch, length, heads, size = d.integer(1, 3), d.pick([1, 2, 9]), d.pick([1, 3]), d.pick([8, 16, 32])
    packed = d.flag()
    part = d.flag()
    half = size // 4 if part else size // 2
    x = d.array("float32", [batch, length, heads * size] if packed else [batch, heads, length, size])
    caches = [d.array("float32", [length + 6, half], -1, 1) for _ in range(2)]
    places = d.array("int64", [1], 0, 6) if d.flag() else d.array("int64", [batch, length], 0, length + 5)
    attributes: dict[str, Any] = {"interleaved": d.integer(0, 1)}
    if part:
        attributes |= {"rotary_embedding_dim": 2 * half, "num_heads": heads}
    case = contrib("RotaryEmbedding", [x, places, *caches], ["float32"], **attributes)
    shared = {(0, 0): "n", (0, 1 if packed else 2): "s"} | ({(1, 0): "n", (1, 1): "s"} if places.ndim == 2 else {})
    case.symbolic = _symbols(d, case, shared)
    return case


def grouped(d: Draw) -> Case:
    prompt, room, shared, group = d.flag(), d.pick([0, 5]), d.pick([1, 2]), d.pick([1, 3])
    batch = d.integer(1, 3)
    steps = d.pick([1, 6]) if prompt else 1
    size, heads = d.pick([16, 32]), shared * group
    lengths = np.full(batch, steps) if prompt else d.array("int64", [batch], 1, 7) + 1
    total = int(lengths.max())
    width, packed = total + room, d.flag()
    counts = [heads, shared, shared]
    tensors: list[np.ndarray | None] = [d.array("float32", [batch, steps, n * size]) for n in counts]
    if packed:
        tensors = [np.concatenate([t for t in tensors if t is not None], axis=-1), None, None]
    caches: list[np.ndarray | None] = [None, None]
    if not prompt or d.flag():
        rows = np.arange(width)[None, None, :, None] < (lengths - steps)[:, None, None, None]
        caches = [d.array("float32", [batch, shared, width, size]) * rows.astype(np.float32) for _ in range(2)]
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": shared}
    rotary = [None, None]
    if d.flag():
        attributes |= {"do_rotary": 1, "rotary_interleaved": d.integer(0, 1)}
        rotary = [d.array("float32", [width, d.pick([8, size // 2])], -1, 1)] * 2
    if d.flag():
        attributes["local_window_size"] = d.integer(1, 4)
    if d.flag():
        attributes["softcap"] = 2.0
    if d.flag():
        attributes["scale"] = 0.3
    sizes = [(lengths - 1).astype(np.int32), np.array([total], np.int32)]
    added = [None, d.array("float32", [1, d.pick([1, heads]), steps, total])] if d.integer(0, 2) == 0 else []
    arrays = [*tensors, *caches, *sizes, *rotary, *added]
    case = contrib("GroupQueryAttention", arrays, ["float32"] * 3, **attributes)
    if d.flag():
        names = {(k, 0): "n" for k in (0, 1, 2, 3, 4, 5)} | {(3, 2): "w", (4, 2): "w"}
        case.symbolic = _symbols(d, case, names)
    return case


FAMILIES = (attention, multi_head, rotary, grouped)
