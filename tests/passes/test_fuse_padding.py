"""Pad folded into convolutions and pools."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.fuse.fold_padding import fold_padding_pass

CONV = "Conv(Pad(x,0)) => Conv(x,pads)"
AVERAGE = "AveragePool(Pad(x,0)) => AveragePool(x,pads,count_include_pad=1)"
MAXIMUM = "MaxPool(Pad(x,-inf)) => MaxPool(x,pads)"
PADS = np.array([0, 0, 1, 2, 0, 0, 2, 1])
ZERO = np.array(0, np.float32)
INF = np.array(-np.inf, np.float32)


@pytest.fixture
def attempt(build, check, rng):
    """Run the pass on ``Pad`` followed by ``consumer``; the weight has a 3x3 kernel."""

    def run(pad: str, consumer: str, fired: dict[str, int], **constants: np.ndarray):
        if "w)" in consumer:
            constants["w"] = rng.standard_normal((2, 3, 3, 3), np.float32)
        model = build(
            "(float[b,3,h,w0] x) => (float[b,o,h2,w2] y) { p = " + pad + " y = " + consumer + "}", **constants
        )
        shape = (1, 3, 7, 8)
        result = check(
            model, fold_padding_pass(), {"x": rng.standard_normal(shape, np.float32)}, fired=fired, atol=1e-5
        )
        return model, result

    return run


@pytest.mark.parametrize(
    ("pad", "constants"),
    [
        ("Pad(x, pads)", {"pads": PADS}),
        ("Pad(x, pads, zero)", {"pads": PADS, "zero": ZERO}),
        ("Pad(x, pads, zero, axes)", {"pads": PADS[[2, 3, 6, 7]], "zero": ZERO, "axes": np.array([2, -1])}),
    ],
)
def test_conv(pad, constants, attempt):
    model, _ = attempt(pad, "Conv<pads=[1,0,0,1], strides=[2,2]>(p, w)", {CONV: 1}, **constants)
    assert list(model.graph.node(0).attributes["pads"].as_ints()) == [2, 2, 2, 2]
    assert len(model.graph) == 1


def test_conv_with_auto_pad_valid(attempt):
    model, _ = attempt("Pad(x, pads)", 'Conv<auto_pad="VALID">(p, w)', {CONV: 1}, pads=PADS)
    assert model.graph.node(0).attributes["auto_pad"].as_string() == "NOTSET"


def test_average_pool_counts_the_padding(attempt):
    model, _ = attempt("Pad(x, pads)", "AveragePool<kernel_shape=[3,3]>(p)", {AVERAGE: 1}, pads=PADS)
    assert model.graph.node(0).attributes["count_include_pad"].as_int() == 1


def test_average_pool_that_counts_its_own_padding(attempt):
    consumer = "AveragePool<kernel_shape=[4,4], pads=[1,1,1,1], count_include_pad=1>(p)"
    attempt("Pad(x, pads)", consumer, {AVERAGE: 1}, pads=PADS)


def test_max_pool(attempt):
    model, _ = attempt("Pad(x, pads, inf)", "MaxPool<kernel_shape=[3,3]>(p)", {MAXIMUM: 1}, pads=PADS, inf=INF)
    assert len(model.graph) == 1


@pytest.mark.parametrize(
    ("pad", "consumer", "constants", "reason"),
    [
        ('Pad<mode="reflect">(x, pads)', "Conv(p, w)", {"pads": PADS}, "mode 'reflect'"),
        ("Pad(x, pads, one)", "Conv(p, w)", {"pads": PADS, "one": np.array(1, np.float32)}, "padding with 1"),
        ("Pad(x, pads)", "Conv(p, w)", {"pads": -(PADS // 2)}, "negative"),
        ("Pad(x, pads)", "MaxPool<kernel_shape=[3,3]>(p)", {"pads": np.array([0, 1, 1, 1, 0, 0, 1, 1])}, "channel"),
        ("Pad(x, pads)", 'Conv<auto_pad="SAME_UPPER">(p, w)', {"pads": PADS}, "auto_pad"),
        ("Pad(x, pads)", "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(p)", {"pads": PADS}, "does not count"),
        ("Pad(x, pads)", "AveragePool<kernel_shape=[3,3], ceil_mode=1>(p)", {"pads": PADS}, "ceil_mode"),
        ("Pad(x, pads, inf)", "MaxPool<kernel_shape=[3,3], ceil_mode=1>(p)", {"pads": PADS, "inf": INF}, "ceil_mode"),
        ("Pad(x, pads)", "AveragePool<kernel_shape=[2,2]>(p)", {"pads": PADS}, "reach over the kernel"),
        ("Pad(x, pads)", "MaxPool<kernel_shape=[3,3]>(p)", {"pads": PADS}, "padding with 0"),
    ],
)
def test_near_misses(pad, consumer, constants, reason, attempt):
    _, result = attempt(pad, consumer, {}, **constants)
    assert reason in result.skipped[0].reason


def test_channel_padding_before_conv(build, check, rng):
    model = build(
        "(float[b,2,7,8] x) => (float[b,2,5,6] y) { p = Pad(x, pads) y = Conv(p, w) }",
        pads=np.array([0, 1, 0, 0, 0, 0, 0, 0]),
        w=rng.standard_normal((2, 3, 3, 3), np.float32),
    )
    result = check(model, fold_padding_pass(), {"x": rng.standard_normal((1, 2, 7, 8), np.float32)}, fired={})
    assert "channel" in result.skipped[0].reason


@pytest.mark.parametrize(
    ("text", "outputs", "reason"),
    [
        ("p = Pad(x, pads) y = Conv(p, w)", "float[b,2,8,9] y, float[b,3,10,11] p", "graph output"),
        ("p = Pad(x, pads) y = Conv(p, w) z = Neg(p)", "float[b,2,8,9] y, float[b,3,10,11] z", "also used by Neg"),
    ],
)
def test_padded_value_needed_elsewhere(text, outputs, reason, build, check, rng):
    weight = rng.standard_normal((2, 3, 3, 3), np.float32)
    model = build(f"(float[b,3,7,8] x) => ({outputs}) {{ {text} }}", pads=PADS, w=weight)
    result = check(model, fold_padding_pass(), {"x": rng.standard_normal((1, 3, 7, 8), np.float32)}, fired={})
    assert reason in result.skipped[0].reason


def test_computed_amount(build):
    model = build(
        "(float[b,3,7,8] x, int64[8] pads) => (float[b,2,h,v] y) { p = Pad(x, pads) y = Conv(p, w) }",
        w=np.ones((2, 3, 3, 3), np.float32),
    )
    result = fold_padding_pass().call(model)
    assert "not known" in result.skipped[0].reason


def test_max_pool_with_indices(build, check, rng):
    text = "p = Pad(x, pads, inf) y, i = MaxPool<kernel_shape=[3,3]>(p)"
    model = build(f"(float[b,3,7,8] x) => (float[b,3,8,9] y, int64[b,3,8,9] i) {{ {text} }}", pads=PADS, inf=INF)
    result = check(model, fold_padding_pass(), {"x": rng.standard_normal((1, 3, 7, 8), np.float32)}, fired={})
    assert "indices" in result.skipped[0].reason
