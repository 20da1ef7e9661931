"""Additions of constants become biases, and Gemm takes its plainest form."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.fuse.pattern import along, integer, is_float, leak, number, same_dim
from optc.passes.match import commuted, constant, producer, rank
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule


def output_channels(conv: oir.Node) -> int | None:
    """Return the number of output channels of Conv or ConvTranspose with constant weights."""
    weight = constant(conv.inputs[1])
    if weight is None:
        return None
    return int(weight.shape[0] if conv.op_type == "Conv" else weight.shape[1] * integer(conv, "group", 1))


Attribute = int | float | str | list[int]


def attributes_of(node: oir.Node) -> dict[str, Attribute]:
    """Return the attributes of ``node`` as Python values, to build a changed copy of it."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def copied(ops: Ops, node: oir.Node, *inputs: oir.Value | None, **changed: Attribute) -> oir.Value:
    """Create ``node`` anew with other ``inputs`` and ``changed`` attributes; the output type is left open."""
    return ops(node.op_type, *inputs, **{**attributes_of(node), **changed})  # type: ignore[arg-type]


def bias_of(node: oir.Node, size: int) -> np.ndarray | None:
    """Return the bias of Conv or ConvTranspose in float64: zeros where absent, None where computed."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return np.zeros(size)
    found = constant(node.inputs[2])
    return found.astype(np.float64) if found is not None else None


def widened(node: oir.Node, inner: oir.Value) -> Miss | None:
    """Return a Miss if the constant operand broadcasts the shape of ``inner`` to a larger one."""
    if rank(node.outputs[0]) == rank(inner):
        return None
    return Miss(f"the constant widens shape {inner.shape} to {node.outputs[0].shape}")


@rule("Conv(x,w,b)+c => Conv(x,w,b+c)", "Add", "Sub")
def conv_bias(node: oir.Node, ops: Ops) -> Outcome:
    """Add a per-channel constant to the bias of the Conv or ConvTranspose before it."""
    for value, other in commuted(node) if node.op_type == "Add" else (tuple(node.inputs),):
        conv, shift = producer(value, "Conv", "ConvTranspose"), constant(other)
        if conv is None or value is None or shift is None:
            continue
        channels, dims = output_channels(conv), rank(value)
        if channels is None or dims is None:
            return Miss("the weight is not constant, so the number of channels is unknown")
        vector, bias = along(shift, dims, 1, channels), bias_of(conv, channels)
        if vector is None or bias is None:
            return Miss(f"constant of shape {shift.shape} is not one per channel, or the bias is not constant")
        if (reason := leak(node, conv.inputs[0])) is not None:
            return Miss(reason)
        total = (bias + (vector if node.op_type == "Add" else -vector)).astype(shift.dtype)
        return Rewrite([copied(ops, conv, conv.inputs[0], conv.inputs[1], ops.constant(total, "bias"))])
    return None


@rule("MatMul(x,w)+c => Gemm(x,w,c)", "Add")
def gemm_from_matmul(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse where both operands are matrices; a batched product keeps MatMul and Add."""
    for value, other in commuted(node):
        product = producer(value, "MatMul")
        if product is None or other is None or value is None or not is_float(value):
            continue
        if rank(product.inputs[0]) != 2 or rank(product.inputs[1]) != 2:
            return None
        if not _is_gemm_bias(other, value):
            return Miss(f"{other.shape} does not broadcast to {value.shape} in one direction")
        if (reason := leak(node, *product.inputs, other)) is not None:
            return Miss(reason)
        gemm = ops("Gemm", *product.inputs, other, alpha=1.0, beta=1.0, transA=0, transB=0)
        return Rewrite([gemm])
    return None


def _is_gemm_bias(bias: oir.Value, product: oir.Value) -> bool:
    if bias.shape is None or product.shape is None or len(bias.shape) > 2:
        return False
    pairs = zip(reversed(list(bias.shape)), reversed(list(product.shape)), strict=False)
    return all(d == 1 or same_dim(d, size) for d, size in pairs)


@rule("Gemm(x,w,c,alpha,beta,transB) => Gemm(x,w',c')", "Gemm")
def gemm_plain(node: oir.Node, ops: Ops) -> Outcome:
    """Fold alpha, beta and transB into constants, so that Gemm is ``x @ w + c``."""
    x, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    alpha, beta = number(node, "alpha", 1.0), number(node, "beta", 1.0)
    transposed = integer(node, "transB", 0)
    beta_matters = bias is not None and beta != 1.0
    if not (alpha != 1.0 or transposed or beta_matters):
        return None
    w, c = constant(weight), constant(bias)
    if w is None or (beta_matters and c is None):
        return Miss("the weight or the bias is not constant")
    if weight is None or len(weight.uses()) != 1:
        return Miss("the weight is shared, and a copy saves no work")
    w64 = w.astype(np.float64) * alpha
    matrix = ops.constant((w64.T if transposed else w64).astype(w.dtype), "weight")
    if beta_matters and c is not None:
        bias = ops.constant((c.astype(np.float64) * beta).astype(c.dtype), "bias")
    inputs = [x, matrix, bias] if bias is not None else [x, matrix]
    return Rewrite([copied(ops, node, *inputs, alpha=1.0, beta=1.0, transB=0)])


@rule("Gemm(x,w) => MatMul(x,w)", "Gemm")
def matmul_from_gemm(node: oir.Node, ops: Ops) -> Outcome:
    """A Gemm that neither adds, scales nor transposes is a MatMul."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return None
    plain = number(node, "alpha", 1.0) == 1.0 and not integer(node, "transA", 0) and not integer(node, "transB", 0)
    return Rewrite([ops("MatMul", node.inputs[0], node.inputs[1])]) if plain else None


@rule("Reshape(Gemm(Reshape(x,[M,K]),w,c),[..,N]) => MatMul(Reshape(x,[..,K]),w)+c", "Reshape")
def unflattened_gemm(node: oir.Node, ops: Ops) -> Outcome:
    """Multiply in the shape that is wanted at the end (GPT-2's Conv1D, TensorFlow's Dense).

    The reshape that stays is dropped too where x has the leading dimensions of the result already.
    """
    product = producer(node.inputs[0], "Gemm", "MatMul")
    flat = producer(product.inputs[0], "Reshape") if product is not None else None
    if product is None or flat is None or flat.inputs[0] is None or integer(product, "transA", 0):
        return None
    x, out, weight = flat.inputs[0], node.outputs[0], product.inputs[1]
    plain = number(product, "alpha", 1.0) == 1.0 and number(product, "beta", 1.0) == 1.0
    bias = product.inputs[2] if len(product.inputs) > 2 else None
    if integer(product, "transB", 0) or not plain or rank(flat.outputs[0]) != 2 or rank(weight) != 2:
        return None
    if x.shape is None or out.shape is None or len(out.shape) < 3 or (bias is not None and rank(bias) != 1):
        return None
    assert weight is not None and weight.shape is not None
    inner, columns = weight.shape
    if not same_dim(out.shape[-1], columns) or not isinstance(inner, int):
        return Miss(f"{weight.shape} multiplied and reshaped to {out.shape} does not keep the columns")
    if (reason := leak(node, x, weight, bias, node.inputs[1], flat.inputs[1])) is not None:
        return Miss(reason)
    wanted = [*out.shape[:-1], inner]
    if len(x.shape) != len(wanted) or not all(map(same_dim, x.shape, wanted)):
        shape = _shape_tensor(ops, node, wanted)
        if shape is None:
            return Miss(f"{oir.Shape(wanted)} has more than one symbolic dimension")
        x = ops("Reshape", x, shape, allowzero=1, shape=oir.Shape(wanted), dtype=x.dtype)
    whole = ops("MatMul", x, weight, like=out)
    return Rewrite([ops("Add", whole, bias) if bias is not None else whole])


def _shape_tensor(ops: Ops, reshape: oir.Node, wanted: list[int | oir.SymbolicDim]) -> oir.Value | None:
    """Return a shape tensor for ``wanted``: a constant where that is possible, or that of ``reshape``."""
    if sum(not isinstance(d, int) for d in wanted) <= 1 and 0 not in wanted:
        target = [d if isinstance(d, int) else -1 for d in wanted]
        return ops.constant(np.array(target, np.int64), "shape")
    out = reshape.outputs[0].shape
    equal = out is not None and same_dim(wanted[-1], out[-1]) and integer(reshape, "allowzero", 0) == 1
    return reshape.inputs[1] if equal else None


def bias_pass() -> RewritePass:
    """Return the pass that folds biases and normalises Gemm."""
    return RewritePass("fuse-bias", [conv_bias, gemm_plain, matmul_from_gemm, unflattened_gemm, gemm_from_matmul])
