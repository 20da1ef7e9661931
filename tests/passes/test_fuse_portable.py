"""The passes for models that onnxruntime has to execute."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from onnx.reference import ReferenceEvaluator

from optc.passes.fuse.portable import portable_pass

SWISH = "Swish(x,alpha) => x*Sigmoid(alpha*x)"
MASK = "Attention(q,k,v,m) => Attention(q,k,v,Expand(m))"


@pytest.mark.parametrize(("alpha", "ops"), [(1.0, ["Sigmoid", "Mul"]), (1.7, ["Mul", "Sigmoid", "Mul"])])
def test_swish(alpha, ops, build, run, op_types, rng):
    model = build(f"(float[b,5] x) => (float[b,5] y) {{ y = Swish<alpha={alpha}>(x) }}")
    feeds = {"x": rng.standard_normal((3, 5), np.float32)}
    expected = ReferenceEvaluator(oir.to_proto(model)).run(None, feeds)[0]
    assert portable_pass().call(model).fired == {SWISH: 1}
    assert op_types(model) == ops
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", ["float[b,1,1,s]", "float[1,s]", "bool[b,1,1,s]", "bool[1,s]"])
def test_attention_mask(mask, build, run, rng):
    text = f"(float[b,2,t,4] q, float[b,2,s,4] k, float[b,2,s,4] v, {mask} m) => (float[b,2,t,4] y) "
    model = build(text + "{ y = Attention(q, k, v, m) }")
    sizes = {"b": 3, "t": 5, "s": 7}
    feeds = {n: rng.standard_normal((3, 2, 5 if n == "q" else 7, 4), np.float32) for n in "qkv"}
    shape = [sizes.get(d, 1) for d in mask.split("[")[1][:-1].split(",")]
    feeds["m"] = rng.standard_normal(shape, np.float32)
    feeds["m"] = feeds["m"] > -0.5 if mask.startswith("bool") else feeds["m"]
    expected = ReferenceEvaluator(oir.to_proto(model)).run(None, feeds)[0]
    assert portable_pass().call(model).fired == {MASK: 1}
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=1e-5, atol=1e-6)


def test_full_mask_stays(build):
    text = "(float[b,2,t,4] q, float[b,2,s,4] k, float[b,2,s,4] v, float[t,s] m) => (float[b,2,t,4] y) "
    assert not portable_pass().call(build(text + "{ y = Attention(q, k, v, m) }")).modified
