"""If, Loop, Scan and sequences against onnxruntime."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import onnx.parser
import pytest

from optc.backends.cpu.target import resolve
from optc.backends.lowering import TABLE
from optc.backends.lowering.lower import lower
from optc.errors import UnsupportedModelError
from optc.frontend.onnx import load

X = np.arange(24, dtype="f4").reshape(2, 3, 4)
TRUE, FALSE = np.array(True), np.array(False)


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>' + text.replace("'", '"'))


@pytest.fixture
def check(check):
    return partial(check, rtol=1e-6)


def test_if_with_branches_of_different_shapes_and_two_outputs(check):
    text = """g (float[a, b, 4] x, bool c) => (float[p, q, r] y, float[a, b, 4] w) {
        z = Add(x, x)
        y, w = If(c) <
            then_branch = t () => (float[a1, b, 4] u, float[a, b, 4] v) { u = Concat<axis = 0>(z, x) v = Mul(z, z) },
            else_branch = e () => (float[a, b, 4] u2, float[a, b, 4] v2) { u2 = Mul(x, z) v2 = Add(z, x) }> }"""
    check(text, (X, TRUE), (X, FALSE), (X[:1], TRUE))


def test_nested_if_with_a_size_known_only_inside(check):
    text = """g (float[a, b, 4] x, bool c, bool d) => (float[p, q, r] y) {
        axis = Constant<value_ints = [0]>() z = Add(x, x)
        y = If(c) <
            then_branch = t () => (float[a1, b, 4] u) {
                u = If(d) <
                    then_branch = t2 () => (float[p1, q1, r1] u3) {
                        k = NonZero(z) f = Cast<to = 1>(k) u3 = Unsqueeze(f, axis) },
                    else_branch = e2 () => (float[a, b, 4] u4) { u4 = Add(x, z) }> },
            else_branch = e () => (float[a, b, 4] u2) { u2 = Mul(x, z) }> }"""
    check(text, (X, TRUE, TRUE), (X, TRUE, FALSE), (X, FALSE, TRUE))


def test_each_branch_has_memory_of_its_own(check):
    text = """g (float[a, b, 4] x, bool c) => (float[a, b, 4] y) {
        y = If(c) <
            then_branch = t () => (float[a, b, 4] u) { r = Sin(x) s = Transpose(r) q = Transpose(s) u = Cos(q) },
            else_branch = e () => (float[a, b, 4] v) { z = Cos(x) w = Transpose(z) k = Transpose(w) v = Sin(k) }> }"""
    check(text, (X, TRUE), (X, FALSE))


def test_what_a_branch_learns_stays_inside(check):
    # `n` is read as integers in one branch only; the other branch and the code after it must read it again.
    text = """g (float[a, 4] x, int64[2] n, bool c) => (float[p, q] y, float[r, s] z) {
        y = If(c) <
            then_branch = t () => (float[p1, q1] u) { u = Reshape(x, n) },
            else_branch = e () => (float[p2, q2] v) { k = Reshape(x, n) v = Neg(k) }>
        z = Reshape(x, n) }"""
    check(text, (X[0], np.array([2, 6]), TRUE), (X[0], np.array([-1, 3]), FALSE))


def test_a_known_condition_lowers_one_branch():
    text = """g (float[a, b, 4] x) => (float[p, q, r] y) {
        s = Shape(x) two = Constant<value_int = 2>() four = Constant<value_int = 4>()
        k = Gather(s, two) c = Equal(k, four)
        y = If(c) <then_branch = t () => (float[a, b, 4] u) { u = Mul(x, x) },
                   else_branch = e () => (float[a, b, 4] v) { v = StringNormalizer(x) }> }"""
    module = lower(load(parse(text.replace("StringNormalizer", "Erf"))), TABLE, resolve("cpu")).module
    assert "R.call_tir" in module.script()
    assert " if " not in module.script()
    assert "erf" not in module.script()


SQUEEZE_IF_ONE = """one = Constant<value_int = 1>() axis = Constant<value_ints = [1]>()
    first = Constant<value_ints = [0]>()
    s = Shape(x) k = Gather(s, one) c = Equal(k, one)
    z = If(c) <then_branch = t () => (float[n] u) { u = Squeeze(x, axis) },
               else_branch = e () => (float[p, q] v) { v = Identity(x) }> """


def test_a_rank_that_depends_on_a_size(check):
    rest = "m = Neg(z) t2 = Shape(m) r = Size(t2) y = ReduceSum<keepdims = 0>(m)"
    text = f"g (float[a, b] x) => (float y, int64 r) {{ {SQUEEZE_IF_ONE} {rest} }}"
    check(text, (X[0],), (X[0, :, :1],))


def test_a_second_rank_that_follows_from_the_first(check):
    rest = """t2 = Shape(z) r = Size(t2) d = Equal(r, one)
        w = If(d) <then_branch = t3 () => (float[f, g1] u3) { u3 = Unsqueeze(z, first) },
                   else_branch = e3 () => (float[h, i] v3) { v3 = Neg(z) }> y = Transpose(w)"""
    check(f"g (float[a, b] x) => (float[j, k1] y) {{ {SQUEEZE_IF_ONE} {rest} }}", (X[0],), (X[0, :, :1],))


def test_a_fork_inside_of_a_branch(check):
    body = f"{SQUEEZE_IF_ONE} w = ReduceSum<keepdims = 0>(z)"
    text = f"""g (float[a, b] x, bool q0) => (float y) {{
        y = If(q0) <then_branch = tt () => (float w) {{ {body} }},
                    else_branch = ee () => (float w2) {{ w2 = ReduceMax<keepdims = 0>(x) }}> }}"""
    check(text, (X[0], TRUE), (X[0, :, :1], TRUE), (X[0], FALSE))


def test_a_branch_that_cannot_run_is_an_error_only_when_taken(compile_model):
    # A recurrent input has rank 3: only the branch that squeezes leads to it.
    text = f"""g (float[a, b] x, float[1, 4, 4] w, float[1, 4, 4] k3) => (float y) {{
        {SQUEEZE_IF_ONE} h = Unsqueeze(z, first) h2 = Unsqueeze(h, first) y = RNN<hidden_size = 4>(h2, w, k3) }}"""
    run = compile_model(parse(text))
    weights = np.ones((1, 4, 4), "f4")
    (y,) = run(X[0, :1].T.copy(), weights, weights)
    assert y.shape == (1, 1, 1, 4)
    with pytest.raises(Exception, match="branch that cannot run"):
        run(X[0], weights, weights)


def test_results_of_different_rank_are_refused(compile_model):
    with pytest.raises(UnsupportedModelError, match="different rank"):
        compile_model(parse(f"g (float[a, b] x) => (float y) {{ {SQUEEZE_IF_ONE} y = Neg(z) }}"))


def test_every_refused_node_of_a_branch_is_named(compile_model):
    text = """g (float[a, b] x, bool c) => (float y) {
        y = If(c) <then_branch = t () => (float[a, b] u) { s = RandomNormalLike(x) u = Neg(s) },
                   else_branch = e () => (float[a, b] v) { v = RandomUniformLike(x) }> }"""
    with pytest.raises(UnsupportedModelError) as caught:
        compile_model(parse(text))
    assert "RandomNormalLike" in str(caught.value)
    assert "RandomUniformLike" in str(caught.value)
    assert "2 node(s)" in str(caught.value)


LOOP = """g (float[a, 4] x{parameters}) => (float[a, 4] y, float[k, 4] z) {{
    five = Constant<value_int = 5>() zero = Constant<value_ints = [0]>() {before}
    y, z = Loop<body = b (int64 i, bool ci, float[a, 4] s) => (bool co, float[a, 4] so, float[4] o) {{
        {condition} so = Add(s, x) o1 = ReduceSum<keepdims = 0>(so, zero) f = Cast<to = 1>(i) o = Add(o1, f) }}>
        (n, , x) }}"""


@pytest.mark.parametrize("trips", [1, 3])
def test_loop_unrolled(check, trips):
    before = f"n = Constant<value_int = {trips}>()"
    check(LOOP.format(parameters="", before=before, condition="co = Identity(ci)"), (X[0],))


def test_loop_without_iterations(compile_model):
    before = "n = Constant<value_int = 0>()"
    y, z = compile_model(parse(LOOP.format(parameters="", before=before, condition="co = Identity(ci)")))(X[0])
    np.testing.assert_array_equal(y, X[0])
    assert z.shape == (0, 4)


def test_loop_with_limit_and_condition_at_run_time(check):
    text = LOOP.format(parameters=", int64 n", before="", condition="co = Less(i, five)")
    check(text, *((X[0], np.array(n)) for n in (0, 1, 3, 100)))


def test_loop_over_more_iterations_than_one_level_has(compile_model):
    text = LOOP.format(parameters=", int64 n", before="", condition="co = Identity(ci)")
    y, z = compile_model(parse(text))(X[0], np.array(5000))
    assert z.shape == (5000, 4)
    np.testing.assert_allclose(y, X[0] * 5001, rtol=1e-4)


def test_loop_whose_state_grows(check):
    text = """g (float[a, 4] x, int64 n) => (float[k, 4] y) {
        y = Loop<body = b (int64 i, bool ci, float[p, 4] s) => (bool co, float[q, 4] so) {
            co = Identity(ci) so = Concat<axis = 0>(s, x) }>(n, , x) }"""
    check(text, (X[0], np.array(3)), (X[0], np.array(0)))


def test_what_a_loop_outputs_has_a_size_that_only_an_iteration_knows(check, compile_model):
    text = """g (float[a] x, int64 n, bool c, int64[1] e) => (float[p, q] y) {
        zero = Constant<value_ints = [0]>()
        y = Loop<body = b (int64 i, bool ci) => (bool co, float[r] o) {
            co = Identity(ci) p1 = Slice(x, zero, e) f = Cast<to = 1>(i) o = Add(p1, f) }>(n, c) }"""
    check(text, (X[0, 0], np.array(3), TRUE, np.array([2])), (X[0, 0], np.array(2), TRUE, np.array([4])))
    text = text.replace("zero, e)", "zero, e2)").replace("p1 =", "i1 = Unsqueeze(i, zero) e2 = Add(i1, e) p1 =")
    with pytest.raises(Exception, match="different shapes"):
        compile_model(parse(text))(X[0, 0], np.array(3), TRUE, np.array([1]))


def test_while_loop(check):
    text = """g (float[a, 4] x, bool c) => (float[a, 4] y) {
        limit = Constant<value_float = 100.0>()
        y = Loop<body = b (int64 i, bool ci, float[a, 4] s) => (bool co, float[a, 4] so) {
            so = Add(s, s) m = ReduceMax<keepdims = 0>(so) co = Less(m, limit) }>(, c, x) }"""
    check(text, (X[0], TRUE), (X[0], FALSE))


def test_if_inside_of_a_loop(check):
    text = """g (float[a, 4] x, int64 n) => (float[a, 4] y) {
        two = Constant<value_int = 2>()
        y = Loop<body = b (int64 i, bool ci, float[a, 4] s) => (bool co, float[a, 4] so) {
            co = Identity(ci) k = Less(i, two)
            so = If(k) <then_branch = t () => (float[a, 4] u) { u = Add(s, x) },
                        else_branch = e () => (float[a, 4] v) { v = Sub(s, two_f) }> }>(n, , x) }"""
    text = text.replace("two = ", "two_f = Constant<value_float = 2.0>() two = ", 1)
    check(text, (X[0], np.array(4)))


@pytest.mark.parametrize("steps", ["t", "5"])
def test_scan(check, steps):
    for extra in ("", ", scan_input_directions = [1], scan_output_directions = [1]", ", scan_output_axes = [1]"):
        text = f"""g (float[4] h, float[{steps}, 4] x) => (float[4] y, float[p, q] z) {{
            y, z = Scan<num_scan_inputs = 1{extra}, body = b (float[4] s, float[4] e) => (float[4] so, float[4] o) {{
                so = Add(s, e) o = Mul(so, e) }}>(h, x) }}"""
        x = np.random.default_rng(0).normal(size=(5, 4)).astype("f4")
        feeds = [(X[0, 0], x)] + ([(X[0, 0], x[:1])] if steps == "t" else [])
        check(text, *feeds)


def test_sequences_of_known_structure(check):
    text = """g (float[a, 4] x) => (float[p, q] y, int64 n, float[r, s, t] z) {
        one = Constant<value_int = 1>() parts = Constant<value_ints = [1, 2]>()
        s = SequenceConstruct(x, x) e = Neg(x) s2 = SequenceInsert(s, e, one) s3 = SequenceErase(s2)
        n = SequenceLength(s3) y = ConcatFromSequence<axis = 1>(s2)
        z = ConcatFromSequence<axis = 0, new_axis = 1>(s3) }"""
    check(text, (X[0],))
    text = """g (float[3, 4] x) => (float[p, q] y) {
        one = Constant<value_int = 1>() parts = Constant<value_ints = [1, 2]>()
        s = SplitToSequence<axis = 0>(x, parts) y = SequenceAt(s, one) }"""
    check(text, (X[0],))


@pytest.mark.parametrize("count", ["n", "3"])
def test_a_sequence_that_a_loop_appends_to(check, count):
    # Joined along each axis, with and without a new one; of elements whose size the run decides.
    start = "n = Identity(m)" if count == "n" else "n = Constant<value_int = 3>()"
    text = f"""g (float[a, b, 4] x, int64 m) => (float[i, j] f, float[k, l, 4] y, float[o, p, 4] z,
                                                       float[q, r, 4] v, float[s, t, u, 4] w, int64 c) {{
        {start} none = SequenceEmpty() other = SequenceEmpty() one = Constant<value_int = 1>()
        sx = ReduceSum<keepdims = 0>(x)
        last, seq, sums = Loop<body = b (int64 i, bool ci, float s, seq(float[a, b, 4]) q, seq(float[4]) p)
                => (bool co, float so, seq(float[a, b, 4]) qo, seq(float[4]) po) {{
            co = Identity(ci) g = Cast<to = 1>(i) so = Add(s, g) e = Mul(x, so) qo = SequenceInsert(q, e)
            axes = Constant<value_ints = [0, 1]>() h = ReduceSum<keepdims = 0>(e, axes) po = SequenceInsert(p, h)
            }}>(n, , sx, none, other)
        f = ConcatFromSequence<axis = 0, new_axis = 1>(sums) y = ConcatFromSequence<axis = 0>(seq)
        z = ConcatFromSequence<axis = 1>(seq) v = SequenceAt(seq, one)
        w = ConcatFromSequence<axis = 2, new_axis = 1>(seq) c = SequenceLength(seq) }}"""
    check(text, (X, np.array(3)), *([(X[:1], np.array(2))] if count == "n" else []))


def test_slices_between_a_position_and_the_next(check):
    # What torch's EmbeddingBag with offsets becomes: the length of the starts is that of a slice of one element.
    text = """g (float[n, 2] x, int64[b] offsets, int64 k) => (float[p, q] y) {
        one = Constant<value_int = 1>() two = Constant<value_int = 2>() flat = Constant<value_ints = [-1]>()
        i = Reshape(k, flat) j = Add(i, one) l = Add(i, two)
        first = Slice(offsets, i, j) last = Slice(offsets, j, l) y = Slice(x, first, last) }"""
    offsets = np.array([0, 2, 2, 6])
    x = np.arange(12, dtype="f4").reshape(6, 2)
    check(text, *[(x, offsets, np.array(k)) for k in (0, 1, 2)])


def test_a_position_outside_of_a_tensor_gives_no_starts(compile_model):
    text = """g (float[n, 2] x, int64[b] offsets, int64[1] i) => (float[p, q] y) {
        one = Constant<value_int = 1>() j = Add(i, one) first = Slice(offsets, i, j) y = Slice(x, first, j) }"""
    run = compile_model(parse(text))
    with pytest.raises(Exception, match="match_cast"):
        run(X[0], np.array([0, 1]), np.array([2]))


def test_a_sequence_at_the_border_is_refused(compile_model):
    text = "g (float[a, 4] x) => (seq(float[a, 4]) y) { y = SequenceConstruct(x, x) }"
    with pytest.raises(UnsupportedModelError, match="cannot be an output"):
        compile_model(parse(text))
