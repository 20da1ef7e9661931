"""Blocks of ``torch.no_grad`` as plain nodes, so that they can be cut, costed and seeded like any others."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_no_grad(root: fx.GraphModule) -> None:
    """Replace each such block by its nodes, which read detached tensors instead: nothing else keeps gradients out.

    Blocks inside of other regions are replaced as well.
    """
    while blocks := [node for node in root.graph.nodes if node.target is _SET_GRAD]:
        for block in blocks:
            _inline(root, block)
    for child in root.children():
        if isinstance(child, fx.GraphModule):
            inline_no_grad(child)
    root.recompile()


def _inline(root: fx.GraphModule, block: fx.Node) -> None:
    enabled, body_node, *operands = block.args
    assert isinstance(body_node, fx.Node)
    body = root.get_submodule(str(body_node.target))
    # Export writes blocks one after the other: what enables gradients within one ends it.
    assert isinstance(body, fx.GraphModule) and not enabled
    copies: dict[fx.Node, Any] = {}
    given: dict[fx.Node, Any] = {}
    inputs = iter(operands)
    with root.graph.inserting_before(block):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                given[node] = next(inputs)
                copies[node] = _detached(root, given[node])
            elif node.op == "get_attr":
                name = f"{body_node.target}_{node.target}".replace(".", "_")
                _adopt(root, name, body, str(node.target))
                copies[node] = root.graph.get_attr(name)
            elif node.op != "output":
                copies[node] = root.graph.node_copy(node, lambda inner: copies[inner])
    results = pytree.tree_leaves(body.graph.output_node().args[0])
    for user in list(block.users):
        source = _written_input(results[user.args[1]])
        # What was written to in place is still the tensor that it was, with its gradient.
        user.replace_all_uses_with(given[source] if source in given else copies[results[user.args[1]]])
        root.graph.erase_node(user)
    root.graph.erase_node(block)
    if not body_node.users:
        root.graph.erase_node(body_node)
        root.delete_submodule(str(body_node.target))


def _detached(root: fx.GraphModule, operand: Any) -> Any:
    if not isinstance(operand, fx.Node):
        return operand
    value = operand.meta.get("val")
    if operand.op == "get_attr" or not isinstance(value, torch.Tensor):
        *path, name = str(operand.target).split(".")
        found = getattr(root.get_submodule(".".join(path)), name) if operand.op == "get_attr" else None
        if not isinstance(found, torch.nn.Parameter):
            return operand  # buffers and numbers have no gradient
    elif not value.is_floating_point() and not value.is_complex():
        return operand
    detached = root.graph.call_function(torch.ops.aten.detach.default, (operand,))
    detached.meta = {key: item for key, item in operand.meta.items() if key in ("stack_trace", "nn_module_stack")}
    return detached


def _adopt(root: fx.GraphModule, name: str, body: fx.GraphModule, target: str) -> None:
    *path, last = target.split(".")
    value = getattr(body.get_submodule(".".join(path)), last)
    if isinstance(value, torch.nn.Module):
        root.add_module(name, value)
    elif isinstance(value, torch.Tensor):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)


def _written_input(node: fx.Node) -> fx.Node:
    """What ``node`` is another name of: the first argument of operators that write to it and return it."""
    while node.op == "call_function" and isinstance(
        schema := getattr(node.target, "_schema", None), torch.FunctionSchema
    ):
        alias = schema.returns[0].alias_info if schema.returns else None
        if alias is None or not alias.is_write or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node
