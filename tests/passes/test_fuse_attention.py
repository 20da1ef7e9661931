"""Scaled-dot-product attention as the exporters write it."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as oir
import pytest
from onnx.reference import ReferenceEvaluator

from optc.passes.fuse.attention import attention_pass
from optc.passes.fuse.portable import portable_pass

ATTENTION = "Softmax(s*q@k^T+mask)@v => Attention(q,k,v,mask)"
SPLIT = "Reshape(Transpose(x,[0,2,1]),[..,D,S]) => Transpose(Reshape(x,[..,S,D]),[0,1,3,2])"
EXPAND = "Attention(q,k,v,m) => Attention(q,k,v,Expand(m))"

HEADS = "float[b,2,t,4] q, float[b,2,s,4] k, float[b,2,s,4] v"
SIZES = {"b": 3, "c": 3, "t": 5, "s": 7}
CORE = "kt = Transpose<perm=[0,1,3,2]>(k) m = MatMul(q, kt) z = Mul(m, scale) "
TAIL = "p = Softmax<axis=-1>({}) y = MatMul(p, v)"
MIN = float(np.finfo(np.float32).min)


def numbers(text: str, **more: np.ndarray) -> dict[str, np.ndarray]:
    every = {
        "scale": np.array(0.5, np.float32),
        "two": np.array(2, np.float32),
        "root": np.array(math.sqrt(0.5), np.float32),
        "zero": np.array(0, np.float32),
        "low": np.array(MIN, np.float32),
        "inf": np.array(-np.inf, np.float32),
        "mild": np.array(-100, np.float32),
        **more,
    }
    words = set(text.replace(")", " ").replace("(", " ").replace(",", " ").split())
    return {name: array for name, array in every.items() if name in words}


@pytest.fixture
def attempt(build, check, rng):
    """Build ``text`` over random q, k, v (and ``mask``), run the pass, compare with onnxruntime before it."""

    def run(text: str, fired=None, *, inputs: str = HEADS, feeds=None, ops=None, outputs="float[b,2,t,4] y", **more):
        model = build(f"({inputs}) => ({outputs}) {{ {text} }}", **numbers(text, **more))
        shapes = {
            value.name: [d if isinstance(d, int) else SIZES[str(d)] for d in value.shape]
            for value in model.graph.inputs
        }
        arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()} | (feeds or {})
        fired = {ATTENTION: 1} if fired is None else fired
        result = check(model, [attention_pass(), portable_pass()], arrays, fired=fired, ops=ops)
        return model, result

    return run


def node_of(model: oir.Model) -> oir.Node:
    return next(node for node in model.graph if node.op_type == "Attention")


@pytest.mark.parametrize(
    "text",
    [
        CORE + TAIL.format("z"),
        "kt = Transpose<perm=[0,1,3,2]>(k) m = MatMul(q, kt) z = Div(m, two) " + TAIL.format("z"),
        "kt = Transpose<perm=[0,1,3,2]>(k) r = Mul(q, scale) z = MatMul(r, kt) " + TAIL.format("z"),
        "kt = Transpose<perm=[0,1,3,2]>(k) r = Div(q, two) z = MatMul(r, kt) " + TAIL.format("z"),
        "kt = Transpose<perm=[0,1,3,2]>(k) r = Mul(q, root) w = Mul(kt, root) z = MatMul(r, w) " + TAIL.format("z"),
        "l = Mul(scale, k) kt = Transpose<perm=[0,1,3,2]>(l) z = MatMul(q, kt) " + TAIL.format("z"),
        CORE + "p = Softmax<axis=3>(z) n = IsNaN(p) g = Where(n, zero, p) y = MatMul(g, v)",
    ],
)
def test_scale_anywhere(text, attempt):
    model, _ = attempt(text, ops=["Attention"])
    assert node_of(model).attributes["scale"].as_float() == pytest.approx(0.5)


def test_without_scale(attempt):
    model, _ = attempt("kt = Transpose<perm=[0,1,3,2]>(k) z = MatMul(q, kt) " + TAIL.format("z"), ops=["Attention"])
    assert node_of(model).attributes["scale"].as_float() == 1.0


def test_transposed_key_merges_into_the_head_transpose(attempt):
    inputs = "float[b,t,2,4] q0, float[b,s,2,4] k, float[b,2,s,4] v"
    text = "q = Transpose<perm=[0,2,1,3]>(q0) kt = Transpose<perm=[0,2,3,1]>(k) z = MatMul(q, kt) " + TAIL.format("z")
    model, _ = attempt(text, inputs=inputs, ops=["Transpose", "Transpose", "Attention"])
    assert node_of(model).inputs[1].producer().attributes["perm"].as_ints() == (0, 2, 1, 3)


def test_key_that_is_stored_transposed(attempt):
    inputs = "float[b,2,t,4] q, float[b,2,4,s] kt, float[b,2,s,4] v"
    attempt("z = MatMul(q, kt) " + TAIL.format("z"), inputs=inputs, ops=["Transpose", "Attention"])


@pytest.mark.parametrize("merged", [True, False])
def test_key_transposed_as_three_dimensions(merged, attempt):
    """How PyTorch's exporter writes K^T of scaled_dot_product_attention."""
    inputs = "float[3,2,t,4] q, float[3,2,7,4] k, float[3,2,7,4] v" if merged else (
        "float[3,2,t,4] q, float[6,7,4] f, float[3,2,7,4] v"
    )  # fmt: skip
    text = ("f = Reshape(k, flat) " if merged else "") + (
        "g = Transpose<perm=[0,2,1]>(f) kt = Reshape(g, full) z = MatMul(q, kt) " + TAIL.format("z")
    )
    shapes = {"flat": np.array([-1, 7, 4]), "full": np.array([3, 2, 4, 7])}
    ops = ["Attention"] if merged else ["Reshape", "Attention"]
    attempt(text, {SPLIT: 1, ATTENTION: 1}, inputs=inputs, ops=ops, outputs="float[3,2,t,4] y", **shapes)


@pytest.mark.parametrize("mask", ["float[b,2,t,s]", "float[b,1,t,s]", "float[1,1,t,s]", "float[t,s]", "float[2,t,s]"])
@pytest.mark.parametrize("op", ["Add(z, mask)", "Add(mask, z)"])
def test_additive_mask(mask, op, attempt):
    model, _ = attempt(CORE + f"w = {op} " + TAIL.format("w"), inputs=f"{HEADS}, {mask} mask", ops=["Attention"])
    assert node_of(model).inputs[3].name == "mask"


@pytest.mark.parametrize("mask", ["float[b,1,1,s]", "float[1,s]"])
def test_padding_mask_stays_small(mask, build, attempt):
    text = CORE + "w = Add(z, mask) " + TAIL.format("w")
    model = build(f"({HEADS}, {mask} mask) => (float[b,2,t,4] y) {{ {text} }}", **numbers(text))
    attention_pass().call(model)
    assert [node.op_type for node in model.graph] == ["Attention"]
    attempt(text, {ATTENTION: 1, EXPAND: 1}, inputs=f"{HEADS}, {mask} mask")


def test_mask_by_key_only(attempt):
    model, _ = attempt(
        CORE + "w = Add(z, mask) " + TAIL.format("w"), {ATTENTION: 1, EXPAND: 1}, inputs=f"{HEADS}, float[s] mask"
    )
    assert any(node.op_type == "Reshape" for node in model.graph)


@pytest.mark.parametrize("shape", [(3, 1, 5, 1), (3, 2, 1, 1), (5, 1), (1,)])
@pytest.mark.parametrize("step", ["Add(z, mask)", "Where(mask, z, inf)"])
def test_mask_by_query_only(shape, step, attempt, rng):
    """The operator does not repeat masks along the keys."""
    boolean = "Where" in step
    feeds = {"mask": np.ones(shape, bool) if boolean else rng.standard_normal(shape, np.float32)}
    text = CORE + f"w = {step} " + TAIL.format("w")
    named = ",".join({3: "b", 5: "t"}.get(size, str(size)) for size in shape)
    kind = "bool" if boolean else "float"
    fired = {ATTENTION: 1} if shape[-2:] == (5, 1) else {ATTENTION: 1, EXPAND: 1}
    attempt(text, fired, inputs=f"{HEADS}, {kind}[{named}] mask", feeds=feeds)


def test_two_masks_are_added(attempt):
    text = CORE + "w = Add(z, mask) u = Add(w, other) " + TAIL.format("u")
    attempt(text, inputs=f"{HEADS}, float[b,1,1,s] mask, float[t,s] other", ops=["Add", "Attention"])


def test_mask_of_zeros_is_dropped(attempt):
    text = CORE + "e = Where(yes, zero, low) w = Add(z, e) " + TAIL.format("w")
    model, _ = attempt(text, yes=np.ones((1, 1, 1, 1), bool))
    assert len([v for v in node_of(model).inputs if v is not None]) == 3


KEEP = np.array([[1, 0, 1, 1, 0, 1, 1]] * 5, bool)


def kept(rng: np.random.Generator, *shape: int) -> np.ndarray:
    array = rng.random(shape) > 0.4
    array[..., 0] = True
    return array


@pytest.mark.parametrize("fill", ["inf", "low"])
@pytest.mark.parametrize("keep", [True, False])
def test_boolean_mask(keep, fill, attempt, rng):
    where = f"w = Where(mask, z, {fill}) " if keep else f"w = Where(mask, {fill}, z) "
    mask = kept(rng, 3, 1, 5, 7)
    feeds = {"mask": mask if keep else ~mask}
    model, _ = attempt(CORE + where + TAIL.format("w"), inputs=f"{HEADS}, bool[b,1,t,s] mask", feeds=feeds)
    dtype = node_of(model).inputs[3].dtype
    assert dtype == (oir.DataType.BOOL if fill == "inf" else oir.DataType.FLOAT)


def test_wholly_masked_row_with_a_finite_fill_stays_uniform(build, rng):
    """Against the reference: onnxruntime gives zeros where the mask is the lowest number itself."""
    text = CORE + "w = Where(mask, z, low) " + TAIL.format("w")
    model = build(f"({HEADS}, bool[b,1,t,s] mask) => (float[b,2,t,4] y) {{ {text} }}", **numbers(text))
    feeds = {n: rng.standard_normal((3, 2, 5 if n == "q" else 7, 4), np.float32) for n in "qkv"}
    feeds["mask"] = kept(rng, 3, 1, 5, 7)
    feeds["mask"][0, 0, 2] = False
    expected = ReferenceEvaluator(oir.to_proto(model)).run(None, feeds)[0]
    assert attention_pass().call(model).fired == {ATTENTION: 1}
    got = ReferenceEvaluator(oir.to_proto(model)).run(None, feeds)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_two_boolean_masks(attempt, rng):
    text = CORE + "w = Where(mask, z, inf) u = Where(other, w, inf) " + TAIL.format("u")
    mask, other = kept(rng, 3, 1, 5, 7), kept(rng, 5, 7)
    inputs = f"{HEADS}, bool[b,1,t,s] mask, bool[t,s] other"
    attempt(text, inputs=inputs, feeds={"mask": mask, "other": other}, ops=["And", "Attention"])


def test_boolean_and_additive_mask(attempt, rng):
    text = CORE + "w = Where(mask, z, inf) u = Add(w, other) " + TAIL.format("u")
    inputs = f"{HEADS}, bool[b,1,t,s] mask, float[t,s] other"
    attempt(text, inputs=inputs, feeds={"mask": kept(rng, 3, 1, 5, 7)}, ops=["Where", "Add", "Attention"])


def test_constant_boolean_mask_with_a_mild_fill(attempt):
    text = "kt = Transpose<perm=[0,1,3,2]>(k) z = MatMul(q, kt) w = Where(mask, z, strong) " + TAIL.format("w")
    inputs = "float[b,2,5,4] q, float[b,2,7,4] k, float[b,2,7,4] v"
    attempt(text, inputs=inputs, outputs="float[b,2,5,4] y", mask=KEEP, strong=np.array(-1e4, np.float32))


SQUARE = "float[b,2,5,4] q, float[b,2,5,4] k, float[b,2,5,4] v"
LOWER = np.tril(np.ones((5, 5), bool))


@pytest.mark.parametrize(
    ("step", "constants"),
    [
        ("w = Add(z, mask)", {"mask": np.where(LOWER, 0, MIN).astype(np.float32)}),
        ("w = Add(z, mask)", {"mask": np.where(LOWER, 0, -np.inf).astype(np.float32)[None, None]}),
        ("w = Where(mask, z, inf)", {"mask": LOWER[None, None]}),
        ("w = Where(mask, z, strong)", {"mask": LOWER, "strong": np.array(-1e4, np.float32)}),
        ("w = Where(mask, low, z)", {"mask": ~LOWER}),
    ],
)
def test_causal_constant(step, constants, attempt):
    text = CORE + step + " " + TAIL.format("w")
    model, _ = attempt(text, inputs=SQUARE, outputs="float[b,2,5,4] y", ops=["Attention"], **constants)
    assert node_of(model).attributes["is_causal"].as_int() == 1


@pytest.mark.parametrize("same", [True, False])
def test_causal_constant_of_each_batch(same, attempt):
    mask = np.stack([LOWER, LOWER if same else np.ones_like(LOWER)])[:, None]
    text = CORE + "w = Where(mask, z, inf) " + TAIL.format("w")
    inputs = SQUARE.replace("b,", "2,")
    model, _ = attempt(text, inputs=inputs, outputs="float[2,2,5,4] y", ops=["Attention"], mask=mask)
    assert node_of(model).attributes["is_causal"].as_int() == int(same)


@pytest.mark.parametrize("kind", ["Equal", "Cast"])
def test_causal_over_symbolic_sizes(kind, attempt):
    """How PyTorch's exporter builds the mask of is_causal=True."""
    choose = {
        "Equal": "o = Expand(one, n) l = Trilu<upper=0>(o) c = Equal(l, zero) e = Where(c, low, zero) ",
        "Cast": "o = Expand(one, n) l = Trilu<upper=0>(o) c = Cast<to=9>(l) e = Where(c, zero, low) ",
    }[kind]
    text = "a = Shape<start=2, end=3>(q) d = Shape<start=2, end=3>(k) n = Concat<axis=0>(a, d) " + choose
    text += CORE + "w = Add(z, e) " + TAIL.format("w")
    model, _ = attempt(text, ops=["Attention"], one=np.array(1, np.float32))
    assert node_of(model).attributes["is_causal"].as_int() == 1


@pytest.mark.parametrize(
    "mask",
    [np.triu(np.ones((5, 5), bool)), np.tril(np.ones((5, 5), bool), 1), np.ones((5, 5), bool) ^ np.eye(5, dtype=bool)],
)
def test_other_triangles_are_masks(mask, attempt):
    text = CORE + "w = Add(z, mask) " + TAIL.format("w")
    added = np.where(mask, 0, -np.inf).astype(np.float32)
    model, _ = attempt(text, inputs=SQUARE, outputs="float[b,2,5,4] y", ops=["Attention"], mask=added)
    assert node_of(model).attributes["is_causal"].as_int() == 0
    assert len(node_of(model).inputs) == 4


GROUPED = "float[b,4,t,4] q, float[b,2,s,4] k0, float[b,2,s,4] v0"


def repeat(name: str, times: int = 2) -> str:
    """Repeat heads like ``repeat_kv`` of transformers."""
    return (
        f"{name}1 = Unsqueeze({name}0, two_) {name}s = Shape({name}0) {name}b = Slice({name}s, i0, i2) "
        f"{name}e = Slice({name}s, i2, i4) {name}n = Concat<axis=0>({name}b, times, {name}e) "
        f"{name}2 = Expand({name}1, {name}n) "
        f"{name}g = Slice({name}s, i0, i1) {name}f = Concat<axis=0>({name}g, heads, {name}e) "
        f"{name} = Reshape({name}2, {name}f) "
    )


REPEATS = {
    "two_": np.array([2]), "times": np.array([2]), "heads": np.array([4]), "i0": np.array([0]), "i1": np.array([1]),
    "i2": np.array([2]), "i4": np.array([4]),
}  # fmt: skip


def test_repeated_heads_become_grouped_queries(attempt):
    text = repeat("k") + repeat("v") + CORE + TAIL.format("z")
    model, _ = attempt(text, inputs=GROUPED, outputs="float[b,4,t,4] y", ops=["Attention"], **REPEATS)
    assert [value.name for value in node_of(model).inputs[1:3]] == ["k0", "v0"]


def test_heads_repeated_in_keys_only(attempt):
    inputs = "float[b,4,t,4] q, float[b,2,s,4] k0, float[b,4,s,4] v"
    text = repeat("k") + CORE + TAIL.format("z")
    model, _ = attempt(text, inputs=inputs, outputs="float[b,4,t,4] y", **REPEATS)
    assert node_of(model).inputs[1].name == "k"


def test_one_head_of_keys_for_all_queries(attempt):
    inputs = "float[b,2,t,4] q, float[b,1,s,4] k, float[b,1,s,4] v"
    attempt(CORE + TAIL.format("z"), inputs=inputs, ops=["Attention"])


@pytest.mark.parametrize("mask", [None, "float[b,t,s]", "float[t,s]"])
def test_three_dimensions(mask, attempt):
    text = "kt = Transpose<perm=[0,2,1]>(k) m = MatMul(q, kt) z = Mul(m, scale) "
    text += TAIL.format("z") if mask is None else "w = Add(z, mask) " + TAIL.format("w")
    inputs = "float[b,t,4] q, float[b,s,4] k, float[b,s,4] v" + (f", {mask} mask" if mask else "")
    unsqueezed = 4 if mask == "float[b,t,s]" else 3
    attempt(text, inputs=inputs, outputs="float[b,t,4] y", ops=["Unsqueeze"] * unsqueezed + ["Attention", "Squeeze"])


def test_softmax_in_float32_of_a_float16_model(build, rng):
    text = "kt = Transpose<perm=[0,1,3,2]>(k) z = MatMul(q, kt) w = Cast<to=1>(z) p = Softmax(w) h = Cast<to=10>(p) "
    inputs = HEADS.replace("float", "float16")
    model = build(f"({inputs}) => (float16[b,2,t,4] y) {{ {text} y = MatMul(h, v) }}")
    feeds = {n: rng.standard_normal((3, 2, 5 if n == "q" else 7, 4)).astype(np.float16) for n in "qkv"}
    expected = ReferenceEvaluator(oir.to_proto(model)).run(None, feeds)[0]
    assert attention_pass().call(model).fired == {ATTENTION: 1}
    assert node_of(model).attributes["softmax_precision"].as_int() == oir.DataType.FLOAT
    got = ReferenceEvaluator(oir.to_proto(model)).run(None, feeds)[0]
    np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("text", "inputs", "reason"),
    [
        (CORE + "p = Softmax<axis=2>(z) y = MatMul(p, v)", HEADS, "runs over axis 2"),
        (
            "kt = Transpose<perm=[0,1,3,2]>(k) m = MatMul(q, kt) a = Add(m, mask) z = Mul(a, scale) "
            + TAIL.format("z"),
            HEADS + ", float[t,s] mask",
            "scaled after the mask",
        ),
        (CORE + "w = Add(z, mask) " + TAIL.format("w"), HEADS + ", float[c,1,t,s] mask", "not known to broadcast"),
        (CORE + "w = Where(mask, z, mild) " + TAIL.format("w"), HEADS + ", bool[t,s] mask", "wholly masked row"),
        (CORE + TAIL.format("z"), HEADS.replace("float[b,2,s,4] k", "float[1,2,s,4] k"), "batch sizes"),
        (CORE + TAIL.format("z"), HEADS.replace("float[b,2,s,4] v", "float[b,1,s,4] v"), "keys have 2 heads, values 1"),
        (CORE + TAIL.format("z"), HEADS.replace("float[b,2,t,4] q", "float[b,1,t,4] q"), "queries have 1 heads"),
    ],
)
def test_near_misses(text, inputs, reason, attempt, rng):
    feeds = {"mask": kept(rng, 5, 7)} if "bool" in inputs else None
    _, result = attempt(text, {}, inputs=inputs, feeds=feeds)
    assert any(reason in skip.reason for skip in result.skipped)


def test_mask_that_widens_the_scores(attempt):
    text = CORE + "w = Add(z, mask) " + TAIL.format("w")
    inputs = "float[1,2,t,4] q, float[1,2,s,4] k, float[1,2,s,4] v, float[b,1,t,s] mask"
    _, result = attempt(text, {}, inputs=inputs)
    assert "not known to broadcast" in result.skipped[0].reason


@pytest.mark.parametrize(
    ("extra", "output", "reason"),
    [
        ("", "float[b,2,t,s] p", "'p' is a graph output"),
        ("r = Neg(z)", "float[b,2,t,s] r", "also used by Neg"),
        ("r = Neg(p)", "float[b,2,t,s] r", "also used by Neg"),
    ],
)
def test_parts_that_are_needed_elsewhere(extra, output, reason, attempt):
    _, result = attempt(CORE + TAIL.format("z") + " " + extra, {}, outputs=f"float[b,2,t,4] y, {output}")
    assert reason in result.skipped[0].reason


def test_keys_needed_elsewhere_do_not_matter(attempt):
    outputs = "float[b,2,t,4] y, float[b,2,4,s] kt"
    attempt(CORE + TAIL.format("z"), outputs=outputs, ops=["Transpose", "Attention"])


@pytest.mark.parametrize("step", ["w = Add(z, five)", "w = Mul(z, five)"])
def test_constant_that_widens_the_scores(step, attempt):
    text = CORE + step + " p = Softmax<axis=-1>(w) y = MatMul(p, v)"
    five = np.full((1,) * 5, 2, np.float32)
    _, result = attempt(text, {}, outputs="float[1,b,2,t,4] y", five=five)
    assert any("widens the scores" in skip.reason or "rank" in skip.reason for skip in result.skipped)


def test_fill_that_widens_the_scores_stays(attempt, rng):
    inputs = "float[1,2,t,4] q, float[1,2,s,4] k, float[1,2,s,4] v, bool[t,s] mask"
    text = CORE + "w = Where(mask, z, fill) " + TAIL.format("w")
    fill = np.full((3, 1, 1, 1), -np.inf, np.float32)
    attempt(text, {}, inputs=inputs, outputs="float[3,2,t,4] y", feeds={"mask": kept(rng, 5, 7)}, fill=fill)


def test_scale_that_is_computed_stays(attempt):
    text = "kt = Transpose<perm=[0,1,3,2]>(k) m = MatMul(q, kt) z = Mul(m, factor) " + TAIL.format("z")
    attempt(text, {}, inputs=HEADS + ", float[1] factor")


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("g = Transpose<perm=[0,2,1]>(f) kt = Reshape(g, full)", "is not split into"),
        ("g = Transpose<perm=[0,2,1]>(f) kt = Reshape(g, full) r = Neg(g)", "also used by Neg"),
    ],
)
def test_split_near_misses(step, reason, build, check, rng):
    full = np.array([3, 2, 4, 7]) if "Neg" in step else np.array([3, 2, 2, 14])
    outputs = f"float[{','.join(map(str, full))}] kt" + (", float[6,4,7] r" if "Neg" in step else "")
    model = build(f"(float[6,7,4] f) => ({outputs}) {{ {step} }}", full=full)
    result = check(model, attention_pass(), {"f": rng.standard_normal((6, 7, 4), np.float32)}, fired={})
    assert reason in result.skipped[0].reason
