"""The pipeline: phases, fixed point, disabling, records; observers; bisection."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as oir
import pytest

from optc.errors import IRError, UsageError
from optc.passes import bisection, pipeline
from optc.passes.base import Pass, PassResult
from optc.passes.observer import DumpAfter, PassRecord, PrintAfter, VerifyAfter, observers
from optc.passes.rewrite import Ops, Outcome, Rewrite, RewritePass, rule
from optc.passes.simplify import dead_code, identities

X = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}


def model_of_everything(build):
    """Shape arithmetic, a constant expression, neutral elements: all but Neg and Relu goes."""
    text = """(float[b,s,4] x) => (float[b,s,4] y) {
      sh = Shape(x) sh0 = Slice(sh, i0, i1) sh1 = Slice(sh, i1, i2) t = Concat<axis=0>(sh0, sh1, m1)
      k2 = Add(k, k) a = Reshape(x, t) c = Mul(a, k2) e = Sub(c, z) u = Neg(e) y = Relu(u) }"""
    numbers = {f"i{n}": np.array([n]) for n in range(3)}
    return build(text, **numbers, m1=np.array([-1]), k=np.float32(0.5), z=np.float32(0))


@rule("x => 2x", "Relu")
def wrong(node: oir.Node, ops: Ops) -> Outcome:
    return Rewrite([ops("Abs", node.inputs[0])])


class Breaks(Pass):
    name = "breaks"

    def call(self, model: oir.Model) -> PassResult:
        model.graph[0].name = model.graph[1].name
        return PassResult(True, {"break": 1})


def test_reaches_a_fixed_point(build, run, verify):
    model = model_of_everything(build)
    before = run(model, X)
    records = pipeline.run(model)
    verify(model)
    assert [n.op_type for n in model.graph] == ["Neg", "Relu"]
    np.testing.assert_array_equal(run(model, X)[0], before[0])
    assert records[0].nodes_before == 10
    assert records[-1].nodes_after == 2
    for one, following in itertools.pairwise(records):
        assert one.nodes_after == following.nodes_before
    assert not any(record.modified for record in pipeline.run(model))


def test_a_pass_without_anything_new_is_not_run_again(build):
    model = build("(float[b] x) => (float[b] y) { y = Relu(x) }")
    names = [record.name for record in pipeline.run(model)]
    assert len(names) == len(set(names))


def test_default_pipeline_lists_every_pass():
    names = [one.name for one in pipeline.default_pipeline()]
    assert names[0] == "dead-code"
    assert {"fold-constants", "fold-shapes", "fuse-gelu", "reassociate"} <= set(names)


def test_given_passes_run_once_in_order(build):
    model = model_of_everything(build)
    records = pipeline.run(model, passes=[dead_code.PASS, identities.PASS])
    assert [record.name for record in records] == ["dead-code", "identities"]


def test_a_disabled_pass_does_not_run(build):
    model = model_of_everything(build)
    records = pipeline.run(model, disable=["fold-shapes"])
    assert "fold-shapes" not in {record.name for record in records}
    assert "fold-constants" in {record.name for record in records}


@pytest.mark.parametrize("name", ["x op neutral => x", "reshape(x, dims) => reshape(x, constant)"])
def test_a_disabled_rule_does_not_fire(build, name):
    def fired(**options):
        return {k for record in pipeline.run(model_of_everything(build), **options) for k in record.fired}

    assert name in fired()
    assert name not in fired(disable=[name])


def test_unknown_name_is_refused_with_suggestions(build):
    model = model_of_everything(build)
    with pytest.raises(UsageError, match="no pass or rule is called 'fold-shape'") as caught:
        pipeline.run(model, disable=["fold-shape"])
    assert "'fold-shapes'" in (caught.value.hint or "")


def test_completely_unknown_name_lists_the_passes(build):
    with pytest.raises(UsageError) as caught:
        pipeline.run(model_of_everything(build), disable=["zzzzzzzzzzzzzzzzzz"])
    assert "dead-code" in (caught.value.hint or "")


def test_shapes_are_inferred_again_when_something_unfolds(build):
    """The size of y is a name of its own until the If is decided."""
    text = """(float[b,4] x) => (float[n,4] y) {
      r = If (k) <then_branch = t () => (float[p,4] v) { v = Neg(x) },
                  else_branch = e () => (float[q,4] w) { w = Concat<axis=0>(x, x) }>
      y = Relu(r) }"""
    model = build(text, k=np.array(False))
    assert pipeline.shapes_are_open(model)
    pipeline.run(model)
    assert not pipeline.shapes_are_open(model)
    assert str(model.graph.outputs[0].shape[0]) == "2*b"


def test_declared_output_shape_survives(build):
    """Branches of different rank leave the rank unknown; what the interface says stays."""
    text = """(bool c, float[b,4] x) => (float[n,4] y) {
      z = Mul(x, one) u = Neg(z)
      y = If (c) <then_branch = t () => (float[p,4] v) { v = Neg(u) },
                  else_branch = e () => (float[q] w) { w = Reshape(u, m1) }> }"""
    model = build(text, one=np.float32(1), m1=np.array([-1]))
    model.graph.outputs[0].shape = oir.Shape(["n", 4])
    pipeline.run(model)
    assert [d if isinstance(d, int) else "symbol" for d in model.graph.outputs[0].shape] == ["symbol", 4]


def test_print_after(build):
    text: list[str] = []
    pipeline.run(model_of_everything(build), observers=[PrintAfter(["identities"], text.append)])
    assert text[0].startswith("# after identities: ")
    assert "Relu" in text[0]


def test_print_after_all(build):
    text: list[str] = []
    records = pipeline.run(model_of_everything(build), observers=[PrintAfter(["all"], text.append)])
    assert text[0].startswith("# before the passes")
    assert len(text) == 1 + sum(record.modified for record in records)


def test_dump_after(build, tmp_path):
    w = np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32)
    model = build(
        "(float[b,20] x) => (float[b,20] y) { t = Transpose(w) r = Add(x, z) y = MatMul(r, t) }", w=w, z=np.float32(0)
    )
    records = pipeline.run(model, observers=[DumpAfter(tmp_path / "ir")])
    files = sorted(path.name for path in (tmp_path / "ir").glob("*.onnx"))
    assert files[0] == "00-input.onnx"
    assert [name[3:-5] for name in files[1:]] == [record.name for record in records if record.modified]
    assert len(list((tmp_path / "ir" / "weights").iterdir())) == 2  # w and its transpose, once each
    last = onnx.load(str(tmp_path / "ir" / files[-1]))
    onnx.checker.check_model(last)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(last.graph.initializer[0]), w.T)
    assert isinstance(next(iter(model.graph.initializers.values())).const_value, oir.Tensor)


def test_verify_after_names_the_pass(build):
    with pytest.raises(IRError, match="pass 'breaks' left the model not canonical"):
        pipeline.run(model_of_everything(build), passes=[Breaks()], observers=[VerifyAfter()])


def test_verify_after_checks_the_start(build):
    model = model_of_everything(build)
    Breaks().call(model)
    with pytest.raises(IRError, match="the frontend"):
        pipeline.run(model, passes=[], observers=[VerifyAfter()])


def test_observers_from_options(tmp_path):
    assert observers() == []
    kinds = [type(one) for one in observers(print_ir_after=["all"], dump_ir=tmp_path, verify_ir=True)]
    assert kinds == [VerifyAfter, PrintAfter, DumpAfter]


def test_record_of_near_misses(build):
    model = build("(float[b,4] x) => (float[b,4] y) { y = Mul(x, c) }", c=np.ones((1, 1, 1), np.float32))
    (record,) = pipeline.run(model, passes=[identities.PASS])
    assert isinstance(record, PassRecord)
    assert record.skipped[0].rule == "x op neutral => x"
    assert record.seconds >= 0


@pytest.mark.parametrize("runner", [None, bisection._run_reference])
def test_bisection_names_the_pass(build, runner):
    model = model_of_everything(build)
    passes = [dead_code.PASS, identities.PASS, RewritePass("wrong", [wrong]), dead_code.PASS]
    assert bisection.bisect(model, X, 1e-5, passes=passes, run=runner) == "wrong"
    assert bisection.bisect(model, X, 1e-5, passes=passes[:2], run=runner) is None
    assert len(model.graph) == 10  # unchanged


def test_bisection_of_the_default_pipeline(build):
    assert bisection.bisect(model_of_everything(build), X, 1e-5) is None


@pytest.mark.parametrize(
    ("a", "b", "close"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 1e-6], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([np.nan, 2.0], [np.nan, 2.0], True),
        ([np.nan, 2.0], [1.0, 2.0], False),
        ([1.0, 2.0], [np.nan, 2.0], False),
        ([np.inf, 2.0], [np.inf, 2.0], True),
        ([np.inf, 2.0], [-np.inf, 2.0], False),
        ([[1.0]], [1.0], False),
        ([], [], True),
    ],
)
def test_is_close(a, b, close):
    assert bisection.is_close(np.float32(a), np.float32(b), 1e-5) == close


def test_is_close_compares_types_and_booleans():
    assert not bisection.is_close(np.float32([1]), np.float64([1]), 1e-5)
    assert not bisection.is_close(np.array([True]), np.array([False]), 1e-5)
    assert bisection.is_close(np.array([True]), np.array([True]), 1e-5)
