"""Layer, RMS, instance and group normalization."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as oir
import pytest

from optc.passes.fuse.normalization import normalization_pass

CORE = "d/sqrt(mean(d^2)+eps) => LayerNormalization|RMSNormalization"
SCALE = "Norm(x,1)*gamma => Norm(x,gamma)"
BIAS = "Norm(x,gamma)+beta => Norm(x,gamma,beta)"
TENSORFLOW = "x*r+(beta-mean(x)*r), r=gamma/sqrt(var+eps) => LayerNormalization(x,gamma,beta)"
CAST = "Cast(Norm(Cast(x,float32)),float16) => Norm(x)"
GROUP = "Reshape(InstanceNormalization(Reshape(x,[N,G,-1]))) => GroupNormalization(x)"

HEAD = "(float[b,4,6] x) => (float[b,4,6] y) "
CENTER = "m = ReduceMean(x, ax) d = Sub(x, m) "
TAIL = " s = Mul(n, gamma) y = Add(s, beta)"


@pytest.fixture
def constants(rng):
    """Everything the texts below name; ``pick`` keeps what a text uses."""
    every = {
        "ax": np.array([-1]),
        "both": np.array([1, 2]),
        "first": np.array([1]),
        "eps": np.array(1e-5, np.float32),
        "one": np.array(1, np.float32),
        "two": np.array(2, np.float32),
        "three": np.array(3, np.float32),
        "half": np.array(0.5, np.float32),
        "mhalf": np.array(-0.5, np.float32),
        "gamma": rng.standard_normal(6, np.float32),
        "beta": rng.standard_normal(6, np.float32),
        "wide": rng.standard_normal((4, 6), np.float32),
        "column": rng.standard_normal((4, 1), np.float32),
        "rank4": np.ones((1, 1, 1, 6), np.float32),
    }

    def pick(text: str) -> dict[str, np.ndarray]:
        words = set(text.replace(")", " ").replace("(", " ").replace(",", " ").split())
        return {name: array for name, array in every.items() if name in words}

    return pick


def values(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": rng.standard_normal((3, 4, 6), np.float32) * 2 + 1}


CORES = {
    "torch": "p = Pow(d, two) v = ReduceMean(p, ax) e = Add(v, eps) r = Sqrt(e) n = Div(d, r)",
    "squared product": "p = Mul(d, d) v = ReduceMean(p, ax) e = Add(eps, v) r = Sqrt(e) n = Div(d, r)",
    "rsqrt": "p = Mul(d, d) v = ReduceMean(p, ax) e = Add(v, eps) r = Sqrt(e) i = Reciprocal(r) n = Mul(i, d)",
    "one over": "p = Mul(d, d) v = ReduceMean(p, ax) e = Add(v, eps) r = Sqrt(e) i = Div(one, r) n = Mul(d, i)",
    "power": "p = Pow(d, two) v = ReduceMean(p, ax) e = Add(v, eps) i = Pow(e, mhalf) n = Mul(d, i)",
    "root by power": "p = Pow(d, two) v = ReduceMean(p, ax) e = Add(v, eps) r = Pow(e, half) n = Div(d, r)",
    "computed twice": "f = Sub(x, m) p = Mul(f, d) v = ReduceMean(p, ax) e = Add(v, eps) r = Sqrt(e) n = Div(d, r)",
}


@pytest.mark.parametrize("name", CORES)
def test_layer_normalization(name, constants, build, check, rng):
    text = CENTER + CORES[name] + TAIL
    model = build(HEAD + "{" + text + "}", **constants(text))
    fired = {CORE: 1, SCALE: 1, BIAS: 1}
    check(model, normalization_pass(), values(rng), fired=fired, ops=["LayerNormalization"], atol=1e-5)
    node = model.graph.node(0)
    assert node.attributes["axis"].as_int() == 2
    assert node.attributes["epsilon"].as_float() == pytest.approx(1e-5)
    assert [v.shape for v in node.inputs[1:]] == [oir.Shape([6]), oir.Shape([6])]


def test_without_scale_and_bias(constants, build, check, rng):
    text = CENTER + CORES["torch"].replace("n = ", "y = ")
    model = build(HEAD + "{" + text + "}", **constants(text))
    check(model, normalization_pass(), values(rng), fired={CORE: 1}, ops=["LayerNormalization"], atol=1e-5)


def test_over_two_dimensions_with_broadcast_bias(constants, build, check, rng):
    text = (CENTER + CORES["torch"] + " s = Mul(wide, n) y = Add(column, s)").replace("ax", "both")
    model = build(HEAD + "{" + text + "}", **constants(text))
    fired = {CORE: 1, SCALE: 1, BIAS: 1}
    check(model, normalization_pass(), values(rng), fired=fired, ops=["LayerNormalization"], atol=1e-5)
    assert model.graph.node(0).inputs[2].shape == oir.Shape([4, 6])


def test_double_keeps_its_precision(build, check, rng):
    text = CENTER + CORES["squared product"].replace("n = ", "y = ")
    model = build("(double[b,6] x) => (double[b,6] y) {" + text + "}", ax=np.array([-1]), eps=np.array(1e-5))
    normalization_pass().call(model)
    assert model.graph.node(0).attributes["stash_type"].as_int() == oir.DataType.DOUBLE


@pytest.mark.parametrize("scaled", [True, False])
def test_tensorflow(scaled, constants, build, check, rng):
    text = CENTER + "p = Mul(d, d) v = ReduceMean(p, ax) e = Add(v, eps) q = Sqrt(e) i = Reciprocal(q) "
    text += "r = Mul(i, gamma) " if scaled else ""
    text += "a = Mul(x, r) c = Mul(m, r) t = Sub(beta, c) y = Add(a, t)"
    text = text if scaled else text.replace(", r)", ", i)")
    model = build(HEAD + "{" + text + "}", **constants(text))
    check(model, normalization_pass(), values(rng), fired={TENSORFLOW: 1}, ops=["LayerNormalization"], atol=1e-5)


@pytest.mark.parametrize("core", ["torch", "rsqrt", "power"])
def test_rms_normalization(core, constants, build, check, rng):
    text = re.sub(r"\bd\b", "x", CORES[core]) + " y = Mul(gamma, n)"
    model = build(HEAD + "{" + text + "}", **constants(text))
    fired = {CORE: 1, SCALE: 1}
    check(model, normalization_pass(), values(rng), fired=fired, ops=["RMSNormalization"], atol=1e-5)


def test_bias_after_rms_normalization_stays(constants, build, check, rng):
    text = "p = Mul(x, x) v = ReduceMean(p, ax) e = Add(v, eps) r = Sqrt(e) n = Div(x, r)" + TAIL
    model = build(HEAD + "{" + text + "}", **constants(text))
    ops = ["RMSNormalization", "Add"]
    check(model, normalization_pass(), values(rng), fired={CORE: 1, SCALE: 1}, ops=ops, atol=1e-5)


def test_llama_with_casts(build, op_types, rng):
    text = """w = Cast<to=1>(x) p = Pow(w, two) v = ReduceMean(p, ax) e = Add(v, eps) r = Sqrt(e) i = Reciprocal(r)
    n = Mul(w, i) h = Cast<to=10>(n) y = Mul(gamma, h)"""
    constants = {
        "ax": np.array([-1]), "two": np.array(2, np.float32), "eps": np.array(1e-6, np.float32),
        "gamma": rng.standard_normal(6).astype(np.float16),
    }  # fmt: skip
    model = build("(float16[b,4,6] x) => (float16[b,4,6] y) {" + text + "}", **constants)
    result = normalization_pass().call(model)
    assert result.fired == {CORE: 1, CAST: 1, SCALE: 1}
    assert op_types(model) == ["RMSNormalization"]
    assert model.graph.node(0).inputs[0].dtype == oir.DataType.FLOAT16


def test_layer_normalization_inside_casts(build, check, rng):
    text = """w = Cast<to=1>(x) n = LayerNormalization<axis=-1, stash_type=1>(w, gamma, beta) y = Cast<to=10>(n)"""
    constants = {name: rng.standard_normal(6, np.float32) for name in ("gamma", "beta")}
    model = build("(float16[b,4,6] x) => (float16[b,4,6] y) {" + text + "}", **constants)
    feeds = {"x": rng.standard_normal((3, 4, 6)).astype(np.float16)}
    check(model, normalization_pass(), feeds, fired={CAST: 1}, ops=["LayerNormalization"], atol=1e-2, rtol=1e-2)


def test_casts_to_another_type_stay(build, check, rng):
    text = "w = Cast<to=1>(x) n = LayerNormalization<axis=-1>(w, gamma) y = Cast<to=11>(n)"
    model = build("(float16[b,4,6] x) => (double[b,4,6] y) {" + text + "}", gamma=np.ones(6, np.float32))
    result = check(model, normalization_pass(), {"x": rng.standard_normal((3, 4, 6)).astype(np.float16)}, fired={})
    assert "the result is DOUBLE" in result.skipped[0].reason


def test_instance_normalization_over_unknown_size(build, check, rng):
    text = """m = ReduceMean(x, ax) d = Sub(x, m) p = Mul(d, d) v = ReduceMean(p, ax) e = Add(v, eps) r = Sqrt(e)
    n = Div(d, r) s = Mul(n, gamma) y = Add(s, beta)"""
    constants = {"ax": np.array([2, 3]), "eps": np.array(1e-5, np.float32)}
    constants |= {name: rng.standard_normal((4, 1, 1), np.float32) for name in ("gamma", "beta")}
    model = build("(float[b,4,h,w] x) => (float[b,4,h,w] y) {" + text + "}", **constants)
    fired = {CORE: 1, SCALE: 1, BIAS: 1}
    feeds = {"x": rng.standard_normal((2, 4, 5, 3), np.float32)}
    check(model, normalization_pass(), feeds, fired=fired, ops=["InstanceNormalization"], atol=1e-5)


def group(rng: np.random.Generator, groups: int = 2) -> tuple[str, dict[str, np.ndarray]]:
    text = """g = Reshape<allowzero=0>(x, split) i = InstanceNormalization(g, ones, zeros) h = Shape(x)
    n = Reshape(i, h) s = Mul(n, gamma) y = Add(s, beta)"""
    constants = {
        "split": np.array([0, groups, -1]),
        "ones": np.ones(groups, np.float32),
        "zeros": np.zeros(groups, np.float32),
        "gamma": rng.standard_normal((4, 1, 1), np.float32),
        "beta": rng.standard_normal((1, 4, 1, 1), np.float32),
    }
    return text, constants


def test_group_normalization(build, check, rng):
    text, constants = group(rng)
    model = build("(float[b,4,h,w] x) => (float[b,4,h,w] y) {" + text + "}", **constants)
    feeds = {"x": rng.standard_normal((2, 4, 5, 3), np.float32)}
    fired = {GROUP: 1, SCALE: 1, BIAS: 1}
    check(model, normalization_pass(), feeds, fired=fired, ops=["GroupNormalization"], atol=1e-5)
    assert model.graph.node(0).attributes["num_groups"].as_int() == 2


def test_group_normalization_with_scale_by_group_stays(build, check, rng):
    text, constants = group(rng)
    constants["ones"] = np.full(2, 2, np.float32)
    model = build("(float[b,4,h,w] x) => (float[b,4,h,w] y) {" + text + "}", **constants)
    result = check(model, normalization_pass(), {"x": rng.standard_normal((2, 4, 5, 3), np.float32)}, fired={})
    assert "by group" in result.skipped[0].reason


def test_reshape_that_splits_no_channels_stays(build, check, rng):
    text, constants = group(rng, groups=3)
    model = build("(float[b,4,3,3] x) => (float[b,4,3,3] y) {" + text + "}", **constants)
    result = check(model, normalization_pass(), {"x": rng.standard_normal((2, 4, 3, 3), np.float32)}, fired={})
    assert "does not split channels only" in result.skipped[0].reason


TORCH = CENTER + CORES["torch"]


@pytest.mark.parametrize(
    ("text", "outputs", "reason"),
    [
        (TORCH.replace("ax", "first").replace("n =", "y ="), "y", "are not the last ones"),
        (TORCH + " y = Neg(n) z = Neg(r)", "y,z", "also used by Neg"),
        (TORCH + " y = Neg(n)", "y,d", "graph output"),
        (TORCH.replace("n =", "y ="), "y,v", "graph output"),
    ],
)
def test_near_misses(text, outputs, reason, constants, build, verify):
    outs = ", ".join("float[b,4,1] v" if o == "v" else f"float[b,4,6] {o}" for o in outputs.split(","))
    model = build(f"(float[b,4,6] x) => ({outs}) {{ {text} }}", **constants(text))
    result = normalization_pass().call(model)
    assert not result.fired
    assert any(reason in skip.reason for skip in result.skipped)
    verify(model)


def test_normalized_output_used_twice_keeps_the_scale_outside(constants, build, check, rng):
    text = TORCH + " y = Mul(n, gamma) z = Neg(n)"
    model = build("(float[b,4,6] x) => (float[b,4,6] y, float[b,4,6] z) {" + text + "}", **constants(text))
    ops = ["LayerNormalization", "Mul", "Neg"]
    result = check(model, normalization_pass(), values(rng), fired={CORE: 1}, ops=ops, atol=1e-5)
    assert "used elsewhere" in result.skipped[0].reason


@pytest.mark.parametrize(
    "change",
    [
        ("Pow(d, two)", "Pow(d, three)"),
        ("d = Sub(x, m)", "d = Sub(m, x)"),
        ("v = ReduceMean(p, ax)", "v = ReduceSum(p, ax)"),
        ("n = Div(d, r)", "n = Div(r, d)"),
    ],
)
def test_other_formulas_stay(change, constants, build, check, rng):
    text = TORCH.replace(*change)
    assert text != TORCH
    text = text.replace("n =", "y =")
    model = build(HEAD + "{" + text + "}", **constants(text))
    result = normalization_pass().call(model)
    assert "LayerNormalization" not in [node.op_type for node in model.graph]
    assert SCALE not in result.fired


def test_symbolic_size_of_the_normalized_dimension(constants, build, check, rng):
    text = TORCH.replace("n =", "y =")
    model = build("(float[b,s,c] x) => (float[b,s,c] y) {" + text + "}", **constants(text))
    result = check(model, normalization_pass(), values(rng), fired={})
    assert "not known" in result.skipped[0].reason


def test_scale_of_higher_rank_stays(constants, build, check, rng):
    text = TORCH + " y = Mul(n, rank4)"
    model = build("(float[b,4,6] x) => (float[1,b,4,6] y) {" + text + "}", **constants(text))
    result = check(model, normalization_pass(), values(rng), fired={CORE: 1}, atol=1e-5)
    assert "the result has shape" in result.skipped[0].reason


def test_scale_by_row_stays(constants, build, check, rng):
    text = TORCH + " y = Mul(n, column)"
    model = build(HEAD + "{" + text + "}", **constants(text))
    result = check(model, normalization_pass(), values(rng), fired={CORE: 1}, atol=1e-5)
    assert "does not broadcast" in result.skipped[0].reason


def test_scale_that_is_computed(constants, build, check, rng):
    text = TORCH + " y = Mul(n, g)"
    model = build("(float[b,4,6] x, float[6] g, float[b,4,6] o) => (float[b,4,6] y) {" + text + "}", **constants(text))
    feeds = values(rng) | {"g": rng.standard_normal(6, np.float32), "o": rng.standard_normal((3, 4, 6), np.float32)}
    check(model, normalization_pass(), feeds, fired={CORE: 1, SCALE: 1}, ops=["LayerNormalization"], atol=1e-5)
