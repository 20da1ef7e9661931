from __future__ import annotations

from collections.abc import Callable

import onnx_ir as oir
import pytest
import sympy

from optc.errors import IRError
from optc.ir import cost

Canonical = Callable[..., oir.Model]


def one(model: oir.Model, op: str) -> cost.NodeCost:
    return next(c for c in cost.estimate(model) if c.op == op)


def test_convolution(canonical: Canonical) -> None:
    model = canonical(
        """
        g (float[2,16,10,12] x) => (float[] y) <float[32,8,3,3] k = {0}, float[32] b = {0}>
        { y = Conv<group=2, pads=[1,1,1,1]>(x, k, b) }
        """
    )
    found = one(model, "Conv")
    outputs = 2 * 32 * 10 * 12
    assert found.flops == 2 * outputs * 8 * 9 + outputs
    assert found.parameter_bytes == 4 * (32 * 8 * 9 + 32)
    assert found.activation_bytes == found.bytes_written == 4 * outputs
    assert found.bytes_read == 4 * (2 * 16 * 10 * 12 + 32 * 8 * 9 + 32)


def test_transposed_convolution_counts_what_each_input_element_feeds(canonical: Canonical) -> None:
    model = canonical(
        """
        g (float[1,4,5,5] x) => (float[] y) <float[4,6,3,3] k = {0}>
        { y = ConvTranspose<strides=[2,2]>(x, k) }
        """
    )
    assert one(model, "ConvTranspose").flops == 2 * (4 * 25) * 6 * 9


@pytest.mark.parametrize(
    ("text", "op", "flops"),
    [
        ("g (float[5,2,3] x, float[3,7] z) => (float[] y) { y = MatMul(x, z) }", "MatMul", 2 * 5 * 2 * 3 * 7),
        ("g (float[3] x, float[3,7] z) => (float[] y) { y = MatMul(x, z) }", "MatMul", 2 * 3 * 7),
        (
            "g (float[3,2] x, float[3,7] z, float[7] c) => (float[] y) { y = Gemm<transA=1>(x, z, c) }",
            "Gemm",
            2 * 2 * 3 * 7 + 14,
        ),
        (
            'g (float[2,3,4] x, float[2,4,5] z) => (float[] y) { y = Einsum<equation="bij,bjk->bik">(x, z) }',
            "Einsum",
            2 * 2 * 3 * 4 * 5,
        ),
        ("g (float[2,3] x) => (float[] y) { y = Relu(x) }", "Relu", 6),
        ("g (float[2,3] x, float[3] z) => (float[] y) { y = Sum(x, z, x) }", "Sum", 12),
        ("g (float[2,3] x) => (float[] y) { y = Softmax(x) }", "Softmax", 66),
        ("g (float[2,3] x) => (float[] y) { y = ReduceMax(x) }", "ReduceMax", 6),
        ("g (float[2,3] x) => (float[] y) { y = Transpose(x) }", "Transpose", 0),
        (
            "g (float[1,1,8,8] x) => (float[] y) { y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x) }",
            "AveragePool",
            16 * 4,
        ),
        (
            """g (float[7,2,5] x, float[1,12,5] w, float[1,12,3] r) => (float[] y)
            { y = LSTM<hidden_size=3>(x, w, r) }""",
            "LSTM",
            7 * 2 * 3 * (2 * 4 * (5 + 3) + 60),
        ),
        (
            """g (float[2,4,16,8] q, float[2,4,20,8] k, float[2,4,20,6] v) => (float[] y)
            { y = Attention(q, k, v) }""",
            "Attention",
            2 * 4 * 16 * 20 * (2 * (8 + 6) + 13),
        ),
        (
            """g (float[2,16,32] q, float[2,20,16] k, float[2,20,12] v) => (float[] y)
            { y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) }""",
            "Attention",
            2 * 4 * 16 * 20 * (2 * (8 + 6) + 13),
        ),
    ],
)
def test_operations_by_hand(canonical: Canonical, text: str, op: str, flops: int) -> None:
    assert one(canonical(text), op).flops == flops


def test_symbolic_dimensions_give_formulas(mlp: oir.Model) -> None:
    total = cost.totals(cost.estimate(mlp))
    batch = sympy.Symbol("batch", integer=True, positive=True)
    assert sympy.expand(total.flops - batch * (2 * 4 * 3 + 3 + 3 + 2 * 3 * 2)) == 0
    assert total.at({"batch": 5}).flops == 5 * 42
    with pytest.raises(IRError, match="batch"):
        total.at({})


def test_views_move_nothing_and_gathers_read_what_they_return(canonical: Canonical) -> None:
    model = canonical(
        """
        g (int64[2] i) => (float[] y) <float[1000,8] table = {0}, int64[1] flat = {-1}>
        { e = Gather(table, i)
          y = Reshape(e, flat) }
        """
    )
    gather, reshape = cost.estimate(model)
    assert gather.bytes_read == 2 * 8 * 4 + 2 * 8
    assert (reshape.bytes_read, reshape.bytes_written, reshape.activation_bytes) == (0, 0, 0)


def test_elements_smaller_than_a_byte_are_packed(canonical: Canonical) -> None:
    model = canonical("g (int4[3] x) => (int4[] y) { y = Identity(x)\n z = Transpose(x) }")
    assert one(model, "Transpose").bytes_written == 2


def test_unknown_shapes_cost_none(canonical: Canonical) -> None:
    model = canonical("g (float[6] x, int64[k] s) => (float[] y) { r = Reshape(x, s)\n y = Relu(r) }")
    assert one(model, "Relu").flops is None
    assert cost.totals(cost.estimate(model)).flops is None


def test_control_flow_costs_its_bodies(canonical: Canonical) -> None:
    model = canonical(
        """
        g (bool c, float[10] x) => (float[] y, float[] z) <int64 five = {5}>
        {
            y = If(c) <then_branch = t () => (float[] a) { a = Relu(x) },
                       else_branch = e () => (float[] b) { h = Add(x, x) b = Neg(h) }>
            z = Loop(five, , x) <body = b (int64 i, bool k, float[] s) => (bool k, float[] t) { t = Neg(s) }>
        }
        """
    )
    assert one(model, "If").flops == 20
    assert one(model, "Loop").flops == 50


def test_peak_memory_follows_liveness(canonical: Canonical) -> None:
    # x and a live (2 units); a and b; then b, c and the view v of c, which is free; x dies after a.
    model = canonical(
        """
        g (float[100] x) => (float[] y) <int64[2] s = {10, 10}>
        { a = Relu(x)
          b = Neg(a)
          c = Exp(b)
          v = Reshape(c, s)
          w = Neg(v)
          y = ReduceSum<keepdims=0>(w) }
        """
    )
    assert cost.peak_activation_bytes(model) == 800
    wide = canonical("g (float[n] x) => (float[] y) { a = Relu(x)\n b = Neg(x)\n y = Add(a, b) }")
    assert cost.peak_activation_bytes(wide, {"n": 10}) == 3 * 40
    with pytest.raises(IRError, match="dimension n"):
        cost.peak_activation_bytes(wide)


def test_peak_memory_of_a_branch_comes_on_top(canonical: Canonical) -> None:
    model = canonical(
        """
        g (bool c, float[10] x) => (float[] y)
        {
            y = If(c) <then_branch = t () => (float[] a) { a = Relu(x) },
                       else_branch = e () => (float[] b) { h = Add(x, x) b = Neg(h) }>
        }
        """
    )
    # c (1 byte), x and y in the outer graph; h and b in the branch.
    assert cost.peak_activation_bytes(model) == 1 + 80 + 80


def residual_stage(blocks: int, inner: int, outer: int, size: int, stride: int, inputs: int) -> int:
    """Multiply-adds of a stage of ResNet-50, from the paper's table."""
    total, area = 0, size * size
    for block in range(blocks):
        channels, grow = (inputs, stride) if block == 0 else (outer, 1)
        total += channels * inner * area * grow * grow  # the stride is on the 3x3 convolution
        total += inner * inner * 9 * area
        total += inner * outer * area
        if block == 0:
            total += inputs * outer * area
    return total


def resnet50_text() -> str:
    """The convolutions of ResNet-50 (He et al. 2015, stride on the 3x3 layers) as ONNX text."""
    lines, weights = [], []

    def conv(source: str, channels: int, filters: int, kernel: int, stride: int = 1) -> str:
        index = len(lines)
        pad = kernel // 2
        weights.append(f"float[{filters},{channels},{kernel},{kernel}] w{index}")
        lines.append(
            f"v{index} = Conv<strides=[{stride},{stride}], pads=[{pad},{pad},{pad},{pad}]>({source}, w{index})"
        )
        return f"v{index}"

    last = conv("x", 3, 64, 7, 2)
    lines.append(f"v{len(lines)} = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>({last})")
    last, channels = f"v{len(lines) - 1}", 64
    for stage, blocks in enumerate([3, 4, 6, 3]):
        inner = 64 * 2**stage
        for block in range(blocks):
            stride = 2 if block == 0 and stage else 1
            h = conv(conv(conv(last, channels, inner, 1), inner, inner, 3, stride), inner, 4 * inner, 1)
            skip = conv(last, channels, 4 * inner, 1, stride) if block == 0 else last
            lines.append(f"v{len(lines)} = Add({h}, {skip})")
            last, channels = f"v{len(lines) - 1}", 4 * inner
    lines.append(f"y = GlobalAveragePool({last})")
    inputs = ", ".join(["float[1,3,224,224] x", *weights])
    return f"g ({inputs}) => (float[] y) {{ {' '.join(lines)} }}"


def test_resnet50_takes_four_billion_multiply_adds(canonical: Canonical) -> None:
    costs = cost.estimate(canonical(resnet50_text()))
    convolutions = sum(c.flops for c in costs if c.op == "Conv")
    expected = 3 * 64 * 49 * 112 * 112 + sum(
        residual_stage(blocks, 64 * 2**i, 256 * 2**i, 56 // 2**i, 1 if i == 0 else 2, 64 if i == 0 else 128 * 2**i)
        for i, blocks in enumerate([3, 4, 6, 3])
    )
    assert convolutions == 2 * expected
    assert 4.0e9 < expected < 4.1e9


def test_a_bert_layer(canonical: Canonical) -> None:
    model = canonical(
        """
        g (float[batch,seq,768] x, float[768,2304] qkv, float[768,768] o, float[768,3072] up, float[3072,768] down)
          => (float[] y)
        {
            a = MatMul(x, qkv)
            q, k, v = Split<axis=-1, num_outputs=3>(a)
            s = Attention<q_num_heads=12, kv_num_heads=12>(q, k, v)
            p = MatMul(s, o)
            u = MatMul(p, up)
            y = MatMul(u, down)
        }
        """
    )
    sizes = {"batch": 2, "seq": 128}
    products = sum(c.at(sizes).flops for c in cost.estimate(model) if c.op == "MatMul")
    assert products == 2 * (2 * 128) * (768 * 2304 + 768 * 768 + 2 * 768 * 3072)
    scores = 2 * 12 * 128 * 128
    assert one(model, "Attention").at(sizes).flops == scores * (2 * 2 * 64 + 13)
