"""Each way in which operators couple slices: what goes, what stays, and the same numbers as the masked original."""

import numpy as np
import pytest

from optc.passes.prune.analysis import analyse
from optc.passes.prune.select import Structured

IMAGE = "(float[1,3,8,8] x) => (float[1,5,h,w] y)"
ROWS = "(float[2,6,8] x) => (float[a,b,c] y)"
FIRST = "float[8,3,3,3] w, float[8] b"
LAST = "float[5,8,1,1] v"


def conv(body, more=""):
    """A convolution to 8 channels ``h``, ``body`` from ``h`` to ``t``, and one from 8 channels to 5."""
    return f"{IMAGE} <{FIRST}, {LAST}{more}> {{ h = Conv(x, w, b) {body} y = Conv(t, v) }}"


BODIES = {
    "chain": ("t = Relu(h)", ""),
    "not zero at zero": ("s = Sigmoid(h) t = Exp(s)", ""),
    "scalar": ("t = Mul(h, c)", ", float[1] c"),
    "channel constant": ("t = Add(h, c)", ", float[8,1,1] c"),
    "leaky": ("t = PRelu(h, c)", ", float[8,1,1] c"),
    "residual": ("r = Conv <pads=[1,1,1,1]> (h, u) t = Add(r, h)", ", float[8,8,3,3] u"),
    "depthwise": ("t = Conv <group=8> (h, u, c)", ", float[8,1,3,3] u, float[8] c"),
    "grouped": ("t = Conv <group=4> (h, u)", ", float[8,2,3,3] u"),
    "squeeze-excite": (
        "p = GlobalAveragePool(h) q = Conv(p, u) r = Relu(q) s = Conv(r, a) g = HardSigmoid(s) t = Mul(h, g)",
        ", float[4,8,1,1] u, float[8,4,1,1] a",
    ),
    "group normalization": ("t = GroupNormalization <num_groups=4> (h, s, c)", ", float[8] s, float[8] c"),
    "instance normalization": ("t = InstanceNormalization(h, s, c)", ", float[8] s, float[8] c"),
    "pooling": ("p = MaxPool <kernel_shape=[2,2]> (h) t = AveragePool <kernel_shape=[2,2]> (p)", ""),
    "transposed": ("t = ConvTranspose <strides=[2,2]> (h, u, c)", ", float[8,8,2,2] u, float[8] c"),
    "transposed depthwise": ("t = ConvTranspose <group=8> (h, u)", ", float[8,1,2,2] u"),
    "padding": ("t = Pad(h, p)", ""),
    "spatial mean": ("m = ReduceMean(h, hw) t = Sub(h, m)", ""),
    "slices of space": ("t = Slice(h, one, three, two)", ""),
    "upsampling": ("t = Resize(h, , scales)", ""),
    "reshape and back": ("f = Reshape(h, flat) e = Neg(f) t = Reshape(e, back)", ""),
    "quantized": ("q = QuantizeLinear(h, s) d = DequantizeLinear(q, s) t = Relu(d)", ""),
}
CONSTANTS = {
    "p": ("Pad", np.array([0, 0, 1, 1, 0, 0, 1, 1])),
    "hw": ("ReduceMean", np.array([2, 3])),
    "one": ("Slice", np.array([1])),
    "two": ("Slice", np.array([2])),
    "three": ("Slice", np.array([3])),
    "scales": ("Resize", np.array([1, 1, 2, 2], np.float32)),
    "flat": ("Reshape", np.array([1, 8, 36])),
    "back": ("Reshape", np.array([0, 8, 6, -1])),
    "s": ("QuantizeLinear", np.float32(0.02)),
}


def constants(text):
    return {name: array for name, (op, array) in CONSTANTS.items() if f"{op}(" in text and name in text}


@pytest.mark.parametrize("name", BODIES)
def test_half_of_the_channels(name, filled, pruned, sizes):
    body, more = BODIES[name]
    text = conv(body, more)
    model = filled(text, **constants(body))
    report = pruned(model)
    assert sizes(model, "w", "b", "v") == [(4, 3, 3, 3), (4,), (5, 4, 1, 1)]
    assert report.families[0].name == "w"
    assert report.parameters[1] < 0.6 * report.parameters[0]
    assert [(u.name, u.size) for u in report.untouched] == [("v", 5)]
    assert "output 'y'" in str(report.untouched[0].reasons[0])


def test_group_counts_follow(filled, pruned):
    model = filled(conv(*BODIES["grouped"]))
    pruned(model)
    assert [n.attributes["group"].as_int() for n in model.graph if "group" in n.attributes] == [1, 2, 1]
    model = filled(conv(*BODIES["group normalization"]))
    pruned(model, 0.25)
    assert next(n for n in model.graph if n.op_type == "GroupNormalization").attributes["num_groups"].as_int() == 3


def test_batch_normalization_and_its_scale_as_importance(filled, pruned, sizes):
    scale = np.array([5, 1, 5, 1, 5, 1, 5, 1], np.float32)
    text = conv("n = BatchNormalization(h, s, c, m, d) t = Relu(n)", ", float[8] c, float[8] m")
    model = filled(text, s=scale, d=np.full(8, 2, np.float32))
    pruned(model, Structured(0.5, criterion="bn", multiple=1))
    np.testing.assert_array_equal(model.graph.initializers["s"].const_value.numpy(), [5, 5, 5, 5])
    assert sizes(model, "c", "m", "d", "v") == [(4,), (4,), (4,), (5, 4, 1, 1)]


def test_concat_and_split(filled, pruned, sizes):
    text = f"""{IMAGE} <{FIRST}, float[4,3,3,3] u, float[5,9,1,1] v>
    {{ h = Conv(x, w, b) g = Conv(x, u) c = Concat <axis=1> (h, g)
       p, q, r = Split <axis=1> (c, parts) s = Mul(p, p)
       t = Concat <axis=1> (s, r, q) k = Slice(t, z, n, o) y = Conv(k, v) }}"""
    arrays = {"parts": np.array([3, 5, 4]), "z": np.array([0]), "n": np.array([9]), "o": np.array([1])}
    model = filled(text, **arrays)
    pruned(model)
    # What the slice drops is as good as any other channel; what is left is consistent.
    assert sizes(model, "w", "u") == [(4, 3, 3, 3), (2, 3, 3, 3)]
    (kept,) = sizes(model, "v")
    assert 3 <= kept[1] <= 6
    node = next(n for n in model.graph if n.op_type == "Split")
    assert sum(node.inputs[1].const_value.numpy()) == 6


def test_even_split_states_its_sizes(filled, pruned):
    text = conv("p, q = Split <axis=1, num_outputs=2> (h) s = Sigmoid(p) t = Concat <axis=1> (s, q)")
    model = filled(text)
    pruned(model, 0.3)
    node = next(n for n in model.graph if n.op_type == "Split")
    assert "num_outputs" not in node.attributes
    assert sum(node.inputs[1].const_value.numpy()) == 6


def test_a_branch_keeps_a_channel(filled, pruned):
    """The first 2 channels are the least important ones, and a branch of their own."""
    weight = np.ones((8, 3, 3, 3), np.float32)
    weight[:2] *= 1e-3
    text = conv("p, q = Split <axis=1> (h, parts) s = Sigmoid(p) t = Concat <axis=1> (s, q)")
    model = filled(text, w=weight, parts=np.array([2, 6]))
    pruned(model, 0.5)
    node = next(n for n in model.graph if n.op_type == "Split")
    assert min(node.inputs[1].const_value.numpy()) == 1


def test_channel_shuffle_keeps_the_order_of_groups(filled, pruned, sizes):
    body = """a = Reshape(h, split) s = Transpose <perm=[0,2,1,3,4]> (a) m = Reshape(s, merge)
    t = Conv <group=8> (m, u)"""
    arrays = {"split": np.array([1, 2, 4, 6, 6]), "merge": np.array([1, 8, 6, 6])}
    model = filled(conv(body, ", float[8,1,3,3] u"), **arrays)
    (family,) = analyse(model).families
    assert len(family.units) == 4  # pairs of channels, one of each half
    pruned(model)
    assert sizes(model, "w", "u", "v") == [(4, 3, 3, 3), (4, 1, 3, 3), (5, 4, 1, 1)]


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_pixel_shuffle(mode, filled, pruned, sizes):
    text = f"""{IMAGE} <float[16,3,3,3] w, float[16] b, float[5,4,1,1] v>
    {{ h = Conv(x, w, b) t = DepthToSpace <blocksize=2, mode="{mode}"> (h) y = Conv(t, v) }}"""
    model = filled(text)
    pruned(model)
    assert sizes(model, "w", "v") == [(8, 3, 3, 3), (5, 2, 1, 1)]


def test_space_to_depth(filled, pruned, sizes):
    text = conv("t = SpaceToDepth <blocksize=2> (h)").replace("float[5,8,1,1] v", "float[5,32,1,1] v")
    model = filled(text)
    pruned(model)
    assert sizes(model, "w", "v") == [(4, 3, 3, 3), (5, 16, 1, 1)]


def test_flatten_into_a_product(filled, pruned, sizes):
    text = f"""(float[1,3,8,8] x) => (float[1,5] y) <{FIRST}, float[5,288] v, float[5] c>
    {{ h = Conv(x, w, b) p = Relu(h) t = Flatten(p) y = Gemm <transB=1> (t, v, c) }}"""
    model = filled(text)
    pruned(model)
    assert sizes(model, "w", "v", "c") == [(4, 3, 3, 3), (5, 144), (5,)]


ATTENTION = """(float[2,6,8] x) => (float[2,6,8] y)
<float[8,12] q, float[12] qb, float[8,12] k, float[8,12] v, float[12,8] o, float[2,6,4,3] none> {
    a = MatMul(x, q) ab = Add(a, qb) b = MatMul(x, k) c = MatMul(x, v)
    ar = Reshape(ab, heads) br = Reshape(b, heads) cr = Reshape(c, heads)
    at = Transpose <perm=[0,2,1,3]> (ar) bt = Transpose <perm=[0,2,3,1]> (br) ct = Transpose <perm=[0,2,1,3]> (cr)
    s = MatMul(at, bt) p = Softmax <axis=-1> (s) z = MatMul(p, ct)
    zt = Transpose <perm=[0,2,1,3]> (z) zr = Reshape(zt, rows) y = MatMul(zr, o)
}"""


def test_attention_heads_go_as_a_whole(filled, pruned, sizes):
    model = filled(ATTENTION, heads=np.array([0, 0, 4, 3]), rows=np.array([2, 6, 12]))
    report = pruned(model)
    assert [(f.before, f.after) for f in report.families] == [(4, 2)]
    assert sizes(model, "q", "qb", "k", "v", "o") == [(8, 6), (6,), (8, 6), (8, 6), (6, 8)]


def test_heads_in_one_product(filled, pruned, sizes):
    """[3, heads, width] from one matrix: the factor of 3 is stuck, so heads carry the labels."""
    text = """(float[2,6,8] x) => (float[2,6,8] y) <float[8,36] qkv, float[12,8] o> {
        a = MatMul(x, qkv) r = Reshape(a, heads) t = Transpose <perm=[2,0,3,1,4]> (r)
        q = Gather <axis=0> (t, i0) k = Gather <axis=0> (t, i1) v = Gather <axis=0> (t, i2)
        kt = Transpose <perm=[0,1,3,2]> (k) s = MatMul(q, kt) p = Softmax <axis=-1> (s) z = MatMul(p, v)
        zt = Transpose <perm=[0,2,1,3]> (z) zr = Reshape(zt, rows) y = MatMul(zr, o) }"""
    numbers = {f"i{i}": np.array(i) for i in range(3)}
    model = filled(text, heads=np.array([2, 6, 3, 4, 3]), rows=np.array([2, 6, -1]), **numbers)
    report = pruned(model)
    assert [(f.before, f.after) for f in report.families] == [(4, 2)]
    assert sizes(model, "qkv", "o") == [(8, 18), (6, 8)]


def test_heads_of_a_product_that_is_sliced(filled, pruned, sizes):
    """Slices of one of three are stuck as well, and heads are found."""
    text = """(float[2,6,8] x) => (float[2,6,8] y) <float[8,36] qkv, float[12,8] o> {
        a = MatMul(x, qkv) r = Reshape(a, heads) t = Transpose <perm=[2,0,3,1,4]> (r)
        qs = Slice(t, i0, i1, i0) ks = Slice(t, i1, i2, i0) vs = Slice(t, i2, i3, i0)
        q = Squeeze(qs, i0) k = Squeeze(ks, i0) v = Squeeze(vs, i0) z = Attention(q, k, v)
        zt = Transpose <perm=[0,2,1,3]> (z) zr = Reshape(zt, rows) y = MatMul(zr, o) }"""
    numbers = {f"i{i}": np.array([i]) for i in range(4)}
    model = filled(text, heads=np.array([2, 6, 3, 4, 3]), rows=np.array([2, 6, -1]), **numbers)
    pruned(model)
    assert sizes(model, "qkv", "o") == [(8, 18), (6, 8)]


@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_as_one_operator(key_heads, filled, pruned, sizes):
    text = f"""(float[2,6,8] x) => (float[2,6,8] y)
    <float[8,12] q, float[8,{key_heads * 3}] k, float[8,{key_heads * 3}] v, float[12,8] o> {{
        a = MatMul(x, q) b = MatMul(x, k) c = MatMul(x, v)
        z = Attention <q_num_heads=4, kv_num_heads={key_heads}> (a, b, c) y = MatMul(z, o) }}"""
    model = filled(text)
    report = pruned(model)
    assert [(f.before, f.after) for f in report.families] == [(key_heads, key_heads // 2)]
    assert sizes(model, "q", "k", "o") == [(8, 6), (8, key_heads * 3 // 2), (6, 8)]
    node = next(n for n in model.graph if n.op_type == "Attention")
    assert node.attributes["q_num_heads"].as_int() == 2
    assert node.attributes["kv_num_heads"].as_int() == key_heads // 2


def test_neurons_and_einsum(filled, pruned, sizes):
    text = f"""{ROWS} <float[8,16] u, float[16] c, float[16,10] v> {{
        h = MatMul(x, u) g = Add(h, c) a = Gelu(g) y = Einsum <equation="bij,jk->bik"> (a, v) }}"""
    model = filled(text)
    pruned(model)
    assert sizes(model, "u", "c", "v") == [(8, 8), (8,), (8, 10)]


def test_lookup_with_constant_indices(filled, pruned, sizes):
    text = f"{ROWS} <float[8,16] u, float[4,10] v> {{ h = MatMul(x, u) g = Gather <axis=2> (h, i) y = MatMul(g, v) }}"
    model = filled(text, i=np.array([1, -1, 3, 8]))
    pruned(model)
    (u, v) = sizes(model, "u", "v")
    assert u == (8, 8)
    assert 1 <= v[0] <= 4


STAYING = {
    "layer normalization": ("n = LayerNormalization(h, s, c)", ", float[16] s, float[16] c", "normalizes over"),
    "softmax": ("n = Softmax <axis=-1> (h)", "", "depend on all slices"),
    "mean": ("m = ReduceMean(h, axis) n = Sub(h, m)", "", "reduces this axis"),
    "an operator without a rule": ("n, _ = TopK(h, k)", "", "not known"),
    "sizes that are read": ("d = Shape(h) f = Expand(one, d) n = Add(h, f)", "", "not known"),
    "sums": ("n = CumSum(h, last)", "", "depend on all slices"),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_cannot_be_proved_stays_with_a_reason(name, filled, pruned, sizes):
    body, more, reason = STAYING[name]
    text = f"{ROWS} <float[8,16] u, float[16,10] v{more}> {{ h = MatMul(x, u) {body} y = MatMul(n, v) }}"
    arrays = {"axis": np.array([2]), "k": np.array([16]), "one": np.float32(1).reshape(1), "last": np.array(2)}
    model = filled(text, **{key: value for key, value in arrays.items() if f"{key})" in body or f"{key}," in body})
    report = pruned(model)
    assert sizes(model, "u", "v") == [(8, 16), (16, 10)]
    assert not report.families
    assert reason in str(report.untouched[0].reasons[0])


def test_symbolic_sizes_stay_symbolic(filled, pruned, sizes, rng):
    text = """(float[n,3,h,w] x) => (float[n,a,b,c] y) <float[8,3,1,1] w, float[5,8,1,1] v>
    { t = Conv(x, w) f = Reshape(t, flat) g = Relu(f) r = Relu(t) y = Conv(r, v) }"""
    model = filled(text.replace("g = Relu(f) ", ""), flat=np.array([0, 8, -1]))
    feeds = {"x": rng.standard_normal((2, 3, 4, 5)).astype(np.float32)}
    pruned(model, 0.5, feeds)
    assert str(model.graph.outputs[0].shape) == "[n,5,h,w]"
    assert sizes(model, "w") == [(4, 3, 1, 1)]


def test_channels_merged_with_a_symbolic_size_stay(filled, pruned, sizes, rng):
    text = """(float[n,3,h,w] x) => (float[n,m] y) <float[8,3,1,1] w>
    { t = Conv(x, w) y = Flatten(t) }"""
    model = filled(text)
    report = pruned(model, 0.5, {"x": rng.standard_normal((2, 3, 4, 5)).astype(np.float32)})
    assert sizes(model, "w") == [(8, 3, 1, 1)]
    assert "symbolic" in str(report.untouched[0].reasons[0])


def test_a_shared_weight_is_cut_once(filled, pruned, sizes):
    text = f"""{ROWS} <float[8,16] u, float[16,8] v> {{
        a = MatMul(x, u) b = Relu(a) c = MatMul(b, v) d = Relu(c) e = MatMul(d, u) f = Tanh(e) y = MatMul(f, v) }}"""
    model = filled(text)
    pruned(model)
    # The 8 columns of v are the 8 rows of u, which are those of the input.
    assert sizes(model, "u", "v") == [(8, 8), (8, 8)]
