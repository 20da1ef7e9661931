"""Random graphs of products, residuals, parts, joints and reshapes: always equal to the masked original."""

import numpy as np
import onnx
import onnx_ir as oir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import optc
from optc.ir import shapes
from optc.ir.verifier import violations
from optc.passes.prune.select import Structured
from optc.passes.prune.structured import prune
from optc.peers import OnnxRuntime

ROWS, WIDTH = 5, 6


class Text:
    """A graph in ONNX's text form, on values [ROWS, channels]."""

    def __init__(self, draw):
        self.draw, self.body, self.arrays = draw, [], {}
        self.values = [("x", WIDTH)]
        self.rng = np.random.default_rng(draw(st.integers(0, 999)))

    def array(self, content):
        self.arrays[name := f"c{len(self.arrays)}"] = content
        return name

    def weight(self, *shape):
        return self.array((self.rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))

    def add(self, operator, *inputs, width=None):
        name = f"v{len(self.body)}"
        self.body.append(f"{name} = {operator}({', '.join(inputs)})")
        if width is not None:
            self.values.append((name, width))
        return name

    def pick(self):
        return self.draw(st.sampled_from(self.values))


def pointwise(t, name, width):
    t.add(t.draw(st.sampled_from(["Relu", "Sigmoid", "Tanh", "Softplus"])), name, width=width)


def residual(t, name, width):
    other = t.draw(st.sampled_from([v for v, w in t.values if w == width]))
    t.add(t.draw(st.sampled_from(["Add", "Mul", "Sub"])), name, other, width=width)


def product(t, name, width):
    new = t.draw(st.sampled_from([4, 8, 12]))
    bias = t.add("MatMul", name, t.weight(width, new))
    t.add("Add", bias, t.weight(new), width=new)


def concat(t, name, width):
    other, more = t.pick()
    t.add("Concat <axis=1> ", name, other, width=width + more)


def cut(t, name, width):
    start = t.draw(st.integers(0, width - 1))
    end = t.draw(st.integers(start + 1, width))
    bounds = [t.array(np.array([n])) for n in (start, end, 1)]
    t.add("Slice", name, *bounds, width=end - start)


def lookup(t, name, width):
    places = t.draw(st.lists(st.integers(-width, width - 1), min_size=1, max_size=6))
    t.add("Gather <axis=1> ", name, t.array(np.array(places)), width=len(places))


def blocks(t, name, width):
    """Taken apart in blocks and put together again, shuffled or not."""
    if width % 2 == 0:
        parts = [ROWS, 2, width // 2]
        apart = t.add("Reshape", name, t.array(np.array(parts)))
        if t.draw(st.booleans()):
            apart = t.add("Transpose <perm=[0,2,1]> ", apart)
        changed = t.add("Tanh", apart)
        t.add("Reshape", changed, t.array(np.array([0, -1])), width=width)


def normalize(t, name, width):
    t.add("LayerNormalization", name, t.weight(width), t.weight(width), width=width)


def mean(t, name, width):
    t.add("ReduceMean <keepdims=1> ", name, t.array(np.array([1])), width=1)


STEPS = (pointwise, residual, residual, product, product, product, concat, cut, lookup, blocks, blocks, normalize, mean)


@st.composite
def graphs(draw):
    text = Text(draw)
    product(text, "x", WIDTH)
    for _ in range(draw(st.integers(2, 12))):
        draw(st.sampled_from(STEPS))(text, *text.pick())
    joined = text.add("Concat <axis=1> ", text.values[-1][0], text.values[-2][0])
    text.body.append(f"y = MatMul({joined}, {text.weight(text.values[-1][1] + text.values[-2][1], 3)})")
    source = f"g (float[{ROWS},{WIDTH}] x) => (float[{ROWS},3] y) {{ {' '.join(text.body)} }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {source}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in text.arrays.items())
    return model


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(graphs(), st.sampled_from([0.2, 0.5, 0.8]), st.sampled_from(["layer", "global"]))
def test_pruned_is_masked(proto, ratio, scope):
    model = optc.capture(oir.from_proto(proto))
    zero = model.clone()
    prune(model, Structured(ratio, scope=scope, multiple=1), zero=zero)
    assert violations(model) == []
    known = {value.name: str(value.shape) for node in model.graph for value in node.outputs}
    shapes.infer(model)
    assert {value.name: str(value.shape) for node in model.graph for value in node.outputs} == known
    x = {"x": np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)}
    expected, found = (OnnxRuntime(m, 1, literal=True).run(x)["y"] for m in (zero, model))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(expected).max())))
