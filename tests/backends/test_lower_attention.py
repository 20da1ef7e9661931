"""Attention and RotaryEmbedding against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

F = np.float32


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def expected(q, k, v, *, mask=None, causal=False, past=0, scale=None, cap=0.0, lengths=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if cap:
        scores = np.tanh(scores / cap) * cap
    i, j = np.arange(q.shape[2])[:, None], np.arange(k.shape[2])[None]
    if causal:
        offset = past if lengths is None else (lengths - q.shape[2]).reshape(-1, 1, 1, 1)
        scores = np.where(j <= i + offset, scores, -np.inf)
    if lengths is not None:
        scores = np.where(j < lengths.reshape(-1, 1, 1, 1), scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    return (weights / np.where(total == 0, 1, total)) @ v


def attention(make_model, inputs, outputs=("y",), symbolic=None, opset=24, **attributes):
    names = ["q", "k", "v", "mask", "past_key", "past_value", "lengths"]
    used = [n if n in inputs else "" for n in names]
    while not used[-1]:
        used.pop()
    node = helper.make_node("Attention", used, list(outputs), **attributes)
    given = {n: (a.dtype, (symbolic or {}).get(n, a.shape)) for n, a in inputs.items()}
    return make_model([node], given, {o: F for o in outputs if o}, opset=opset)


def run(compile_model, make_model, inputs, **options):
    return compile_model(attention(make_model, inputs, **options))(*inputs.values())


@pytest.mark.parametrize(
    "mask",
    [
        None,
        data(5, 7),
        data(5, 7) > 0,
        data(2, 1, 5, 7) > -0.5,
        data(2, 4, 5, 7),
        data(5, 4),
        np.zeros((5, 7), bool),
    ],
    ids=["none", "float", "bool", "padding", "per head", "short", "nothing allowed"],
)
@pytest.mark.parametrize("causal", [0, 1])
def test_masks(compile_model, make_model, mask, causal):
    q, k, v = data(2, 4, 5, 8), data(2, 4, 7, 8, seed=1), data(2, 4, 7, 6, seed=2)
    inputs = {"q": q, "k": k, "v": v} | ({} if mask is None else {"mask": mask})
    (y,) = run(compile_model, make_model, inputs, is_causal=causal)
    if mask is not None and mask.shape[-1] < 7:
        mask = np.pad(mask.astype(np.float64), [(0, 0), (0, 3)], constant_values=-np.inf)
    np.testing.assert_allclose(y, expected(q, k, v, mask=mask, causal=causal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
def test_packed_heads_with_groups(compile_model, make_model, heads):
    hq, hk = heads
    q, k, v = data(2, 5, hq * 8), data(2, 7, hk * 8, seed=1), data(2, 7, hk * 6, seed=2)
    (y,) = run(
        compile_model, make_model, {"q": q, "k": k, "v": v}, q_num_heads=hq, kv_num_heads=hk, scale=0.3, softcap=2.0
    )

    def unpack(x, h):
        return x.reshape(2, x.shape[1], h, -1).transpose(0, 2, 1, 3)

    want = expected(unpack(q, hq), unpack(k, hk), unpack(v, hk), scale=0.3, cap=2.0)
    np.testing.assert_allclose(y, want.transpose(0, 2, 1, 3).reshape(2, 5, -1), rtol=1e-4, atol=1e-5)


def test_cache_grows(compile_model, make_model):
    q, k, v = data(1, 2, 3, 8), data(1, 2, 3, 8, seed=1), data(1, 2, 3, 8, seed=2)
    symbolic = {"past_key": (1, 2, "p", 8), "past_value": (1, 2, "p", 8)}
    model_run = None
    for past in (4, 0, 9):
        old = {"past_key": data(1, 2, past, 8, seed=3), "past_value": data(1, 2, past, 8, seed=4)}
        inputs = {"q": q, "k": k, "v": v, **old}
        options = {"outputs": ("y", "pk", "pv"), "symbolic": symbolic, "is_causal": 1}
        model_run = model_run or compile_model(attention(make_model, inputs, **options))
        y, keys, values = model_run(*inputs.values())
        whole_k, whole_v = np.concatenate([old["past_key"], k], 2), np.concatenate([old["past_value"], v], 2)
        np.testing.assert_array_equal(keys, whole_k)
        np.testing.assert_array_equal(values, whole_v)
        np.testing.assert_allclose(y, expected(q, whole_k, whole_v, causal=True, past=past), rtol=1e-4, atol=1e-5)


def test_valid_lengths(compile_model, make_model):
    q, k, v = data(2, 2, 3, 8), data(2, 2, 6, 8, seed=1), data(2, 2, 6, 8, seed=2)
    lengths = np.array([4, 6])
    inputs = {"q": q, "k": k, "v": v, "lengths": lengths}
    (y,) = run(compile_model, make_model, inputs, is_causal=1)
    np.testing.assert_allclose(y, expected(q, k, v, causal=True, lengths=lengths), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_exposed_scores(compile_model, make_model, mode):
    q, k, v, mask = data(1, 2, 3, 8), data(1, 2, 5, 8, seed=1), data(1, 2, 5, 8, seed=2), data(3, 5, seed=3)
    inputs = {"q": q, "k": k, "v": v, "mask": mask}
    outputs = ("y", "", "", "scores")
    _, scores = run(
        compile_model, make_model, inputs, outputs=outputs, qk_matmul_output_mode=mode, softcap=1.5, opset=24
    )
    raw = q.astype(np.float64) @ k.swapaxes(-1, -2) * 8**-0.5
    capped = np.tanh(raw / 1.5) * 1.5
    weights = np.exp(capped + mask)
    want = [raw, capped, capped + mask, weights / weights.sum(-1, keepdims=True)][mode]
    np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-5)


def test_symbolic_batch_and_lengths(compile_model, make_model):
    symbolic = {"q": ("b", 2, "s", 8), "k": ("b", 2, "t", 8), "v": ("b", 2, "t", 8)}
    model_run = None
    for b, s, t in [(1, 1, 1), (2, 17, 33), (0, 3, 4)]:
        q, k, v = data(b, 2, s, 8), data(b, 2, t, 8, seed=1), data(b, 2, t, 8, seed=2)
        inputs = {"q": q, "k": k, "v": v}
        model_run = model_run or compile_model(attention(make_model, inputs, symbolic=symbolic))
        np.testing.assert_allclose(model_run(q, k, v)[0], expected(q, k, v), rtol=1e-4, atol=1e-5)


def rotate(x, cosine, sine, part, interleaved):
    x1, x2 = (x[..., 0:part:2], x[..., 1:part:2]) if interleaved else (x[..., : part // 2], x[..., part // 2 : part])
    a, b = x1 * cosine - x2 * sine, x1 * sine + x2 * cosine
    turned = np.stack([a, b], -1).reshape(*a.shape[:-1], part) if interleaved else np.concatenate([a, b], -1)
    return np.concatenate([turned, x[..., part:]], -1)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("part", [0, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_rotary_embedding(compile_model, make_model, interleaved, part, packed, positions):
    x, half = data(2, 3, 5, 8), (part or 8) // 2
    ids = np.random.default_rng(1).integers(0, 11, (2, 5))
    cosine, sine = (data(11, half, seed=s) if positions else data(2, 5, half, seed=s) for s in (2, 3))
    given = x.transpose(0, 2, 1, 3).reshape(2, 5, 24) if packed else x
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": part} | ({"num_heads": 3} if packed else {})
    node = helper.make_node("RotaryEmbedding", ["x", "c", "s", *(["i"] if positions else [])], ["y"], **attributes)
    arrays = {"x": given, "c": cosine, "s": sine} | ({"i": ids} if positions else {})
    inputs = {n: (a.dtype, a.shape) for n, a in arrays.items()}
    (y,) = compile_model(make_model([node], inputs, {"y": F}))(*arrays.values())
    c, s = ((t[ids] if positions else t)[:, None] for t in (cosine, sine))
    want = rotate(x, c, s, part or 8, interleaved)
    want = want.transpose(0, 2, 1, 3).reshape(2, 5, 24) if packed else want
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
