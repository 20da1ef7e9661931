from __future__ import annotations

from collections.abc import Callable

import onnx_ir as oir
import pytest

from optc.errors import InvalidModelError

Canonical = Callable[..., oir.Model]
Find = Callable[[oir.Model, str], oir.Value]


def texts(value: oir.Value) -> list[str]:
    assert value.shape is not None
    return list(map(str, value.shape))


def test_if_keeps_what_both_branches_agree_on(canonical: Canonical, value: Find) -> None:
    model = canonical(
        """
        g (bool c, float[n,4] x, float[m,4] z) => (float[] y)
        {
            y = If(c) <then_branch = t () => (float[] a) { a = Relu(x) },
                       else_branch = e () => (float[] b) { b = Relu(z) }>
        }
        """
    )
    size, width = texts(value(model, "y"))
    assert width == "4"
    assert size not in ("n", "m")
    assert texts(value(model, "a")) == ["n", "4"]


IMPOSSIBLE = """
    g (bool c, float[2,4] x) => (float[] y)
    {{
        y = If(c) <then_branch = t () => (float[] a) {{ {then} }},
                   else_branch = e () => (float[] b) {{
            k = Constant<value_ints = [0]>() q = Squeeze(x, k) b = Neg(q) }}>
    }}
    """


def test_a_branch_that_cannot_run_at_these_sizes_has_no_say(canonical: Canonical, value: Find) -> None:
    model = canonical(IMPOSSIBLE.format(then="a = Relu(x)"))
    assert texts(value(model, "y")) == ["2", "4"]
    assert value(model, "q").shape is None


def test_two_branches_that_cannot_run_are_an_error(canonical: Canonical) -> None:
    with pytest.raises(InvalidModelError, match="Squeeze"):
        canonical(IMPOSSIBLE.format(then="j = Constant<value_ints = [1]>() p = Squeeze(x, j) a = Neg(p)"))


def test_if_with_an_unknown_branch_is_unknown(canonical: Canonical, value: Find) -> None:
    model = canonical(
        """
        g (bool c, float[n,4] x, int64[k] sizes) => (float[] y)
        {
            y = If(c) <then_branch = t () => (float[] a) { a = Relu(x) },
                       else_branch = e () => (float[] b) { b = Reshape(x, sizes) }>
        }
        """
    )
    assert value(model, "y").shape is None
    assert value(model, "y").dtype == oir.DataType.FLOAT


LOOP = """
    g (float[2,n] x, int64 trips, bool go) => (float[] last, float[] all)
    {
        last, all = Loop(trips, go, x) <body = b (int64 i, bool c, float[] s) => (bool d, float[] t, float[] o)
            { d = Identity(c) %s }>
    }
"""


def test_loop_with_an_invariant_shape(canonical: Canonical, value: Find) -> None:
    model = canonical(LOOP % "t = Relu(s) o = Neg(s)")
    assert texts(value(model, "last")) == ["2", "n"]
    count, *element = texts(value(model, "all"))
    assert element == ["2", "n"]
    assert count not in ("2", "n")
    assert texts(value(model, "i")) == []


def test_a_growing_loop_dimension_has_no_fixed_size(canonical: Canonical, value: Find) -> None:
    model = canonical(LOOP % "t = Concat<axis=1>(s, s) o = Neg(s)")
    rows, columns = texts(value(model, "last"))
    inner = texts(value(model, "t"))
    assert rows == "2"
    assert columns not in ("n", "2*n")
    assert columns != inner[1]
    assert inner[0] == "2"


def test_a_growing_loop_rank_is_unknown(canonical: Canonical, value: Find) -> None:
    model = canonical((LOOP % "t = Unsqueeze(s, z) o = Neg(s)").replace("all)\n", "all) <int64[1] z = {0}>\n", 1))
    assert value(model, "last").shape is None
    assert value(model, "all").shape is None


def test_a_counted_loop_stacks_as_many_elements_as_it_has_trips(canonical: Canonical, value: Find) -> None:
    model = canonical(
        """
        g (float[n] x) => (float[] last, float[] all) <int64 five = {5}>
        {
            last, all = Loop(five, , x) <body = b (int64 i, bool c, float[] s) => (bool c, float[] t, float[] o)
                { t = Relu(s) o = Neg(s) }>
        }
        """
    )
    assert texts(value(model, "all")) == ["5", "n"]


def test_scan_slices_and_stacks(canonical: Canonical, value: Find) -> None:
    model = canonical(
        """
        g (float[k] s0, float[b,t,k] xs) => (float[] s1, float[] ys)
        {
            s1, ys = Scan(s0, xs) <num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[-1],
                body = f (float[] s, float[] x) => (float[] u, float[] y)
                    { m = ReduceMax<keepdims=0>(x) u = Add(s, m) y = Neg(x) }>
        }
        """
    )
    assert texts(value(model, "x")) == ["b", "k"]
    assert texts(value(model, "s1")) == ["k"]
    assert texts(value(model, "ys")) == ["b", "k", "t"]
