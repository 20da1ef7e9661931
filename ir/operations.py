"""Floating-point (or integer) operations per operator, from the shapes of its operands.

A multiply-add counts as two. Special functions (exp, tanh, erf, ...) and normalizations count as the fixed
number of operations per element in the tables below: a convention that makes costs comparable, not a measurement.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as oir

from optc.ir.sizes import Amount, elements, product, total

# Operators that only move or describe data.
_MOVEMENT = """
    BitCast Cast CastLike CenterCropPad Compress Concat ConcatFromSequence Constant ConstantOfShape DepthToSpace
    Dropout Expand EyeLike Flatten Gather GatherElements GatherND Identity NonZero OneHot Optional OptionalGetElement
    OptionalHasElement Pad Reshape ReverseSequence ScatterElements ScatterND SequenceAt SequenceConstruct SequenceEmpty
    SequenceErase SequenceInsert SequenceLength Shape Size Slice SpaceToDepth Split SplitToSequence Squeeze
    TensorScatter Tile Transpose Trilu Unsqueeze Where
"""
MOVEMENT = frozenset(_MOVEMENT.split())
# Operators whose output is the memory of their first input under another shape.
VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})

# Operations per element of the output; 1 for every operator that has no other rule.
_TRANSCENDENTAL = """
    Acos Acosh Asin Asinh Atan Atanh Cos Cosh Erf Exp Log Pow Sin Sinh Sqrt Tan Tanh
"""
_ACTIVATIONS = "Celu Elu Gelu Mish Selu Sigmoid Softplus Swish"
_PER_ELEMENT = {
    **dict.fromkeys(_TRANSCENDENTAL.split(), 8),
    **dict.fromkeys(_ACTIVATIONS.split(), 10),
    "BatchNormalization": 4,
    "DequantizeLinear": 2,
    "DynamicQuantizeLinear": 6,
    "GroupNormalization": 8,
    "Hardmax": 2,
    "HardSigmoid": 4,
    "HardSwish": 5,
    "InstanceNormalization": 8,
    "LayerNormalization": 8,
    "LogSoftmax": 12,
    "LpNormalization": 5,
    "LRN": 12,
    "MeanVarianceNormalization": 7,
    "QuantizeLinear": 3,
    "RMSNormalization": 6,
    "RotaryEmbedding": 3,
    "Softmax": 11,
}

# Operations per element of the input, for what shrinks its input or reads all of it per output.
_ONE_PER_INPUT = """
    ArgMax ArgMin CumProd CumSum GlobalAveragePool GlobalLpPool GlobalMaxPool ReduceLogSum ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum TopK Unique
"""
_PER_INPUT_ELEMENT = {
    **dict.fromkeys(_ONE_PER_INPUT.split(), 1),
    "ReduceL1": 2,
    "ReduceL2": 2,
    "ReduceLogSumExp": 10,
    "ReduceSumSquare": 2,
}

_RESIZE_PER_ELEMENT = {"nearest": 0, "linear": 3, "cubic": 32}


def count(node: oir.Node) -> Amount:
    """Return the operations that one run of ``node`` takes, or None where shapes are unknown. No control flow."""
    rule = _RULES.get(node.op_type)
    if rule is not None:
        return rule(node)
    if node.op_type in MOVEMENT:
        return 0
    if node.op_type in _PER_INPUT_ELEMENT:
        return _times(elements(node.inputs[0]), _PER_INPUT_ELEMENT[node.op_type])
    arity = len(node.inputs) - 1 if node.op_type in ("Sum", "Mean", "Max", "Min") else 1
    return _times(elements(node.outputs[0]), _PER_ELEMENT.get(node.op_type, max(1, arity)))


def _times(*factors: Amount) -> Amount:
    result: Amount = 1
    for factor in factors:
        if factor is None or result is None:
            return None
        result = result * factor
    return result


def _dims(value: oir.Value | None) -> tuple[int | oir.SymbolicDim, ...] | None:
    return value.shape.dims if value is not None and value.shape is not None else None


def _bias(node: oir.Node, index: int | None) -> Amount:
    """One addition per element of the output if the optional bias is there."""
    present = index is not None and len(node.inputs) > index and node.inputs[index] is not None
    return elements(node.outputs[0]) if present else 0


def _convolution(weight: int, bias: int | None) -> Callable[[oir.Node], Amount]:
    """Conv-22: the weight is [M, C/group, k1, ...]; each output element takes C/group*k1*... multiply-adds."""

    def rule(node: oir.Node) -> Amount:
        kernel = _dims(node.inputs[weight])
        if kernel is None:
            return None
        return total([_times(2, elements(node.outputs[0]), product(kernel[1:])), _bias(node, bias)])

    return rule


def _transposed_convolution(node: oir.Node) -> Amount:
    """ConvTranspose-22: the weight is [C, M/group, k1, ...]; each input element feeds M/group*k1*... sums."""
    kernel = _dims(node.inputs[1])
    if kernel is None:
        return None
    return total([_times(2, elements(node.inputs[0]), product(kernel[1:])), _bias(node, 2)])


def _matmul(node: oir.Node) -> Amount:
    left = _dims(node.inputs[0])
    return None if not left else _times(2, elements(node.outputs[0]), product(left[-1:]))


def _gemm(node: oir.Node) -> Amount:
    left = _dims(node.inputs[0])
    if left is None:
        return None
    inner = left[0] if node.attributes.get_int("transA", 0) else left[1]
    return total([_times(2, elements(node.outputs[0]), product([inner])), _bias(node, 2)])


def _einsum(node: oir.Node) -> Amount:
    """Einsum-12: every combination of indices takes one multiplication per further operand and one addition."""
    equation = node.attributes["equation"].as_string().replace(" ", "")
    sizes: dict[str, int | oir.SymbolicDim] = {}
    terms = equation.split("->")[0].split(",")
    for term, value in zip(terms, node.inputs, strict=True):
        shape = _dims(value)
        if shape is None:
            return None
        before, dots, after = term.partition("...")
        broadcast = shape[len(before) : len(shape) - len(after)] if dots else ()
        sizes.update(zip(before, shape, strict=False))
        sizes.update(zip(after, shape[len(shape) - len(after) :], strict=False))
        sizes.update({f".{len(broadcast) - i}": d for i, d in enumerate(broadcast) if d != 1})
    return _times(len(terms), product(sizes.values()))


def _attention(node: oir.Node) -> Amount:
    """Attention-24: Q*K, scale, mask, softmax and scores*V over [batch, heads, queries, keys]."""
    query, key, value = (_dims(v) for v in node.inputs[:3])
    if query is None or key is None or value is None:
        return None
    heads = node.attributes.get_int("q_num_heads", 0)
    kv_heads = node.attributes.get_int("kv_num_heads", 0)
    past = _dims(node.inputs[4]) if len(node.inputs) > 4 else None
    keys = total([product(key[-2:-1]), product(past[2:3]) if past is not None else 0])
    if len(query) == 4:
        scores = _times(product(query[:3]), keys)
        widths = total([product(query[3:]), product(value[3:])])
        return _times(scores, total([_times(2, widths), 13]))
    # 3-D: the last dimension holds all heads, and those of K and V may be fewer.
    value_width = product(value[2:])
    if not heads or not kv_heads or not isinstance(value_width, int):
        return None
    scores = _times(product(query[:2]), heads, keys)
    width = product(query[2:])
    return total(
        [
            _times(2, product(query[:2]), width, keys),
            _times(2, scores, value_width // kv_heads),
            _times(13, scores),
        ]
    )


def _recurrent(gates: int, per_state: int) -> Callable[[oir.Node], Amount]:
    """RNN/GRU/LSTM-22: per step two products with the gates' weights, then ``per_state`` operations per state."""

    def rule(node: oir.Node) -> Amount:
        data, recurrence = _dims(node.inputs[0]), _dims(node.inputs[2])
        if data is None or recurrence is None:
            return None
        directions, hidden = product(recurrence[:1]), product(recurrence[2:])
        per_step = total([_times(2, gates, total([product(data[2:]), hidden])), per_state])
        return _times(product(data[:2]), directions, hidden, per_step)

    return rule


def _pool(node: oir.Node) -> Amount:
    kernel = node.attributes["kernel_shape"].as_ints()
    return _times(elements(node.outputs[0]), product(kernel))


def _resize(node: oir.Node) -> Amount:
    mode = node.attributes.get_string("mode", "nearest")
    return _times(elements(node.outputs[0]), _RESIZE_PER_ELEMENT[mode])


def _grid_sample(node: oir.Node) -> Amount:
    mode = node.attributes.get_string("mode", "linear")
    return _times(elements(node.outputs[0]), _RESIZE_PER_ELEMENT.get(mode, 8))


_RULES: dict[str, Callable[[oir.Node], Amount]] = {
    "Attention": _attention,
    "AveragePool": _pool,
    "Conv": _convolution(weight=1, bias=2),
    "ConvInteger": _convolution(weight=1, bias=None),
    "ConvTranspose": _transposed_convolution,
    "DeformConv": _convolution(weight=1, bias=3),
    "Einsum": _einsum,
    "GRU": _recurrent(gates=3, per_state=40),
    "Gemm": _gemm,
    "GridSample": _grid_sample,
    "LSTM": _recurrent(gates=4, per_state=60),
    "LpPool": _pool,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "MaxPool": _pool,
    "QLinearConv": _convolution(weight=3, bias=8),
    "QLinearMatMul": _matmul,
    "RNN": _recurrent(gates=1, per_state=12),
    "Resize": _resize,
}
