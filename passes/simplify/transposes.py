"""Transposes: no-ops, chains, pairs around elementwise operators, and those that move no data."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as oir

from optc.passes.match import constant, int_attribute, producer, used_once
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule
from optc.passes.simplify.shape_vector import shape_vector

_UNARY = (
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign",
    "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_BINARY = ("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub")
_MAX_CHAIN = 16


def permutation(node: oir.Node) -> tuple[int, ...] | None:
    """Return the permutation of a Transpose, which reverses the axes by default."""
    attribute = node.attributes.get("perm")
    if attribute is not None:
        return tuple(attribute.as_ints())
    shape = node.outputs[0].shape
    return tuple(reversed(range(len(shape)))) if shape is not None else None


@rule("transpose(x, identity) => x", "Transpose")
def no_op(node: oir.Node, ops: Ops) -> Outcome:
    """Drop a Transpose that leaves every axis where it is."""
    x, perm = node.inputs[0], permutation(node)
    return Rewrite([x]) if x is not None and perm is not None and perm == tuple(range(len(perm))) else None


@rule("transpose(transpose(x)) => transpose(x)", "Transpose")
def chain(node: oir.Node, ops: Ops) -> Outcome:
    """Transpose at once."""
    inner = producer(node.inputs[0], "Transpose")
    if inner is None:
        return None
    first, second = permutation(inner), permutation(node)
    if first is None or second is None:
        return None
    return Rewrite([_transposed(ops, inner.inputs[0], [first[axis] for axis in second])])


@rule("transpose(x) of axes of size 1 => reshape(x)", "Transpose")
def without_moving(node: oir.Node, ops: Ops) -> Outcome:
    """Reshape where the axes that hold data keep their order."""
    x, perm = node.inputs[0], permutation(node)
    if x is None or x.shape is None or perm is None:
        return None
    moved = [axis for axis in perm if x.shape[axis] != 1]
    if moved != sorted(moved):
        return None
    vector = shape_vector(x.shape, node.outputs[0].shape)
    if vector is None:
        return Miss("the shape cannot be written as one constant")
    return Rewrite([ops("Reshape", x, ops.constant(vector, hint="shape"))])


@rule("transpose(op(transpose(x))) => op(transpose(x))", "Transpose")
def around_elementwise(node: oir.Node, ops: Ops) -> Outcome:
    """Take two transposes around elementwise operators together, transposing constants on the way."""
    outer = permutation(node)
    path: list[oir.Node] = []
    value = node.inputs[0]
    while value is not None and len(path) < _MAX_CHAIN:
        found = producer(value, "Transpose", *_UNARY, *_BINARY)
        if found is None or outer is None:
            return None
        if found.op_type == "Transpose":
            break
        if not used_once(value):
            return Miss(f"'{value.name}' is needed in its own layout too") if _above(found) else None
        path.append(found)
        value = _data_input(found)
    else:
        return None
    inner = permutation(found)
    if inner is None or outer is None or len(inner) != len(outer) or not path:
        return None
    x = _transposed(ops, found.inputs[0], [inner[axis] for axis in outer])
    for each in reversed(path):
        inputs = [x if v is _data_input(each) else _permuted(ops, v, outer, each) for v in each.inputs]
        attributes = {name: attribute.value for name, attribute in each.attributes.items()}
        x = ops(each.op_type, *inputs, **attributes)
    return Rewrite([x])


def _above(node: oir.Node) -> bool:
    """Tell whether a transpose feeds the node directly: what makes the pattern a near-miss."""
    return producer(_data_input(node), "Transpose") is not None


def _data_input(node: oir.Node) -> oir.Value | None:
    """Return the operand of an elementwise node that is no constant, if there is just one."""
    if node.op_type in _UNARY:
        return node.inputs[0]
    variable = [v for v in node.inputs if constant(v) is None]
    return variable[0] if len(variable) == 1 and len(node.inputs) == 2 else None


def _permuted(ops: Ops, value: oir.Value | None, perm: Sequence[int], node: oir.Node) -> oir.Value | None:
    """Return a constant operand with its axes permuted; scalars, and parameters such as Clip's, stay."""
    array = constant(value)
    if array is None or array.size == 1 or node.op_type not in _BINARY:
        return value
    padded = array.reshape((1,) * (len(perm) - array.ndim) + array.shape)
    return ops.constant(padded.transpose(perm), hint="permuted")


def _transposed(ops: Ops, x: oir.Value | None, perm: Sequence[int]) -> oir.Value:
    assert x is not None
    return x if list(perm) == list(range(len(perm))) else ops("Transpose", x, perm=list(perm))


@rule("transpose(a) op transpose(b) => transpose(a op b)", *_BINARY, "Where")
def same_operands(node: oir.Node, ops: Ops) -> Outcome:
    """Transpose once where all operands are transposed in the same way."""
    inner = [producer(v, "Transpose") for v in node.inputs]
    if len(inner) < 2 or any(n is None for n in inner):
        return None
    nodes = [n for n in inner if n is not None]
    perms = {permutation(n) for n in nodes}
    if len(perms) != 1 or None in perms:
        return None
    if not all(used_once(n.outputs[0]) for n in nodes):
        return Miss("a transposed operand is needed elsewhere too")
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    joined = ops(node.op_type, *(n.inputs[0] for n in nodes), **attributes)
    return Rewrite([ops("Transpose", joined, perm=list(perms.pop() or ()))])


@rule("gemm(transpose(a), b) => gemm(a, b) with transA", "Gemm")
def into_gemm(node: oir.Node, ops: Ops) -> Outcome:
    """Let Gemm read its operands transposed."""
    for index, flag in ((0, "transA"), (1, "transB")):
        inner = producer(node.inputs[index], "Transpose")
        if inner is None or permutation(inner) != (1, 0):
            continue
        inputs = [inner.inputs[0] if i == index else v for i, v in enumerate(node.inputs)]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        attributes[flag] = 1 - int_attribute(node, flag, 0)
        return Rewrite([ops("Gemm", *inputs, **attributes)])
    return None


PASS = RewritePass("transposes", [no_op, chain, without_moving, around_elementwise, same_operands, into_gemm])
