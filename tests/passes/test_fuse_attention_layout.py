"""Attention on packed heads, and masks with one row for all queries."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.fuse.attention_layout import attention_layout_pass
from optc.passes.fuse.portable import portable_pass

PACKED = "Attention(q^T,k^T,v^T) => Reshape(Attention(Reshape(q),Reshape(k),Reshape(v)))^T"
NARROW = "Attention(q,k,v,Expand(m)) => Attention(q,k,v,m)"
WIDE = "Attention(q,k,v,m) => Attention(q,k,v,Expand(m))"
SIZES = {"b": 3, "t": 5, "s": 7, "h": 2}
SWAP = "{0}4 = Transpose<perm=[0,2,1,3]>({0}) "
SWAPS = "".join(SWAP.format(name) for name in "qkv")
OPERANDS = "float[b,t,4,8] q, float[b,s,2,8] k, float[b,s,2,6] v"
HEADS = "float[b,2,t,4] q, float[b,2,s,4] k, float[b,2,s,4] v"


@pytest.fixture
def attempt(build, check, rng):
    def run(inputs, text, fired, *, output="float[b,2,t,4] y", ops=None, **constants):
        model = build(f"({inputs}) => ({output}) {{ {text} }}", **constants)
        feeds = {}
        for value in model.graph.inputs:
            shape = [d if isinstance(d, int) else SIZES[str(d)] for d in value.shape]
            array = rng.standard_normal(shape, np.float32)
            feeds[value.name] = array > 0 if value.dtype.name == "BOOL" else array
        check(model, [attention_layout_pass(), portable_pass()], feeds, fired=fired, ops=ops)
        return model

    return run


@pytest.mark.parametrize("attributes", ["", "<scale=0.3>", "<is_causal=1>"])
def test_heads_are_read_where_projections_leave_them(attempt, attributes):
    text = SWAPS + f"a = Attention{attributes}(q4, k4, v4) y = Transpose<perm=[0,2,1,3]>(a)"
    ops = ["Reshape", "Reshape", "Reshape", "Attention", "Reshape", "Transpose", "Transpose"]
    model = attempt(OPERANDS, text, {PACKED: 1}, output="float[b,t,4,6] y", ops=ops)
    node = next(n for n in model.graph if n.op_type == "Attention")
    assert (node.attributes["q_num_heads"].value, node.attributes["kv_num_heads"].value) == (4, 2)


@pytest.mark.parametrize("mask", ["float[t,s]", "bool[b,1,t,s]", "float[b,4,t,s]"])
def test_packed_heads_keep_their_mask(attempt, mask):
    attempt(f"{OPERANDS}, {mask} m", SWAPS + "y = Attention(q4, k4, v4, m)", {PACKED: 1}, output="float[b,4,t,6] y")


@pytest.mark.parametrize(
    "inputs, text",
    [
        ("float[b,4,t,8] q, float[b,s,4,8] k, float[b,s,4,8] v", SWAPS.replace(SWAP.format("q"), "q4 = Neg(q) ")),
        ("float[b,4,t,8] q, float[b,4,s,8] k, float[b,4,s,8] v", SWAPS.replace("[0,2,1,3]", "[0,1,2,3]")),
        ("float[b,t,h,8] q, float[b,s,h,8] k, float[b,s,h,8] v", SWAPS),
    ],
    ids=["one is not transposed", "other axes", "unknown number of heads"],
)
def test_other_layouts_stay(attempt, inputs, text):
    attempt(inputs, text + "y = Attention(q4, k4, v4)", {}, output="float[b,n,t,8] y")


def test_a_cache_keeps_its_layout(build, check, rng):
    inputs = "float[1,5,2,8] q, float[1,3,2,8] k, float[1,3,2,8] v, float[1,2,4,8] pk, float[1,2,4,8] pv"
    text = SWAPS + "y, nk, nv = Attention(q4, k4, v4, , pk, pv)"
    model = build(f"({inputs}) => (float[1,2,5,8] y, float[1,2,7,8] nk, float[1,2,7,8] nv) {{ {text} }}")
    feeds = {v.name: rng.standard_normal([int(d) for d in v.shape], np.float32) for v in model.graph.inputs}
    check(model, attention_layout_pass(), feeds, fired={})


YES, NO = np.ones((1, 1, 5, 1), bool), np.array([True, False, True, True, True]).reshape(1, 1, 5, 1)
LOW = {"zero": np.array(0, np.float32), "low": np.array(-1e9, np.float32)}
MASKED = "y = Attention(q, k, v, m)"
FIXED = HEADS.replace("t,", "5,").replace("b,", "3,")


def test_a_mask_made_for_every_query_is_made_once(attempt):
    text = f"c = And(yes, keep) m = Where(c, zero, low) {MASKED}"
    model = attempt(
        f"{FIXED}, bool[3,1,1,s] keep", text, {NARROW: 1, WIDE: 1}, output="float[3,2,5,4] y", yes=YES, **LOW
    )
    where = next(n for n in model.graph if n.op_type == "Where")
    assert [str(d) for d in where.outputs[0].shape] == ["3", "1", "1", "s"]


def test_an_expanded_mask(attempt):
    text = f"m = Expand(row, sizes) {MASKED}"
    sizes = np.array([3, 2, 5, 7])
    inputs = FIXED.replace("s,", "7,") + ", float[1,1,7] row"
    attempt(inputs, text, {NARROW: 1, WIDE: 1}, output="float[3,2,5,4] y", sizes=sizes)


@pytest.mark.parametrize("columns", ["s", "1"])
def test_masks_that_differ_between_queries_or_do_not_state_every_key_stay(attempt, columns):
    yes = NO if columns == "s" else YES
    text = f"c = And(yes, keep) w = Where(c, zero, low) m = Add(w, whole) {MASKED}"
    attempt(
        f"{FIXED.replace('s,', '7,')}, bool[3,1,1,{columns.replace('s', '7')}] keep",
        text,
        {NARROW: 1, WIDE: 1} if columns == "1" else {},
        output="float[3,2,5,4] y",
        yes=yes,
        whole=np.zeros((5, 7), np.float32),
        **LOW,
    )
