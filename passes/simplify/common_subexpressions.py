"""Common subexpressions: equal nodes are computed once, equal initializers are stored once.

Nodes are equal if operator, inputs and attributes are. Random operators, training-mode operators and those with
subgraphs are left alone. A branch may use what was computed before it outside, never the other way round.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
import onnx_ir as oir

from optc.passes.base import Pass, PassResult
from optc.passes.rewrite import Namer, is_unused_initializer, remove_dead, replace_value, subgraphs

_NOT_DETERMINISTIC = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
_SAMPLE = 16

Key = tuple[Hashable, ...]


class CommonSubexpressions(Pass):
    """See the module."""

    name = "common-subexpressions"

    def call(self, model: oir.Model) -> PassResult:
        """Run on a canonical model."""
        fired: Counter[str] = Counter()
        if merged := _merge_initializers(model.graph):
            fired["equal initializers => one"] = merged
        if merged := _Merger(model).graph(model.graph, {}):
            fired["equal nodes => one"] = merged
        return PassResult(bool(fired), dict(fired))


class _Merger:
    def __init__(self, model: oir.Model) -> None:
        self.namer = Namer(model)

    def graph(self, graph: oir.Graph, seen: dict[Key, oir.Node]) -> int:
        merged = 0
        for node in graph:
            inner = subgraphs(node)
            if inner:
                merged += sum(self.graph(each, dict(seen)) for each in inner)
                continue
            key = _key(node)
            if key is None:
                continue
            kept = seen.setdefault(key, node)
            if kept is not node and _is_worth(node):
                for old, new in zip(node.outputs, kept.outputs, strict=True):
                    replace_value(graph, old, new, self.namer)
                remove_dead([node])
                merged += 1
        return merged


def _is_worth(node: oir.Node) -> bool:
    """Tell whether removing a duplicate helps: an Identity that names a graph output would come back."""
    return node.op_type != "Identity" or not node.outputs[0].is_graph_output()


def _key(node: oir.Node) -> Key | None:
    """Return what makes two nodes equal, or None for a node that must not be merged."""
    if node.domain == "" and node.op_type in _NOT_DETERMINISTIC:
        return None
    if int(node.attributes["training_mode"].value if "training_mode" in node.attributes else 0):
        return None
    attributes = tuple((name, _attribute_key(node.attributes[name])) for name in sorted(node.attributes))
    inputs = tuple(id(value) if value is not None else None for value in node.inputs)
    outputs = tuple((v.dtype, bool(v.name)) for v in node.outputs)
    return (node.domain, node.op_type, node.overload, inputs, attributes, outputs)


def _attribute_key(attribute: oir.Attr) -> Hashable:
    value = attribute.value
    if attribute.type == oir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return (tensor.dtype, tuple(tensor.shape), _digest(tensor.numpy()))
    # As text, because 1.0 and 1 are equal for Python, and so are 0.0 and -0.0.
    return (attribute.type, repr(list(value) if isinstance(value, Sequence) else value))


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest()


def _merge_initializers(graph: oir.Graph) -> int:
    """Merge initializers of equal type, shape and bytes; large ones are hashed only if a sample is equal."""
    groups: defaultdict[Hashable, list[oir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or value.is_graph_output() or tensor.dtype.is_string():
            continue
        groups[tensor.dtype, tuple(tensor.shape)].append(value)
    merged = 0
    for group in groups.values():
        if len(group) > 1:
            merged += _merge_equal(group)
    return merged


def _merge_equal(group: list[oir.Value]) -> int:
    arrays = {id(value): _array(value) for value in group}
    sampled: defaultdict[bytes, list[oir.Value]] = defaultdict(list)
    for value in group:
        flat = arrays[id(value)].reshape(-1)
        step = max(1, flat.size // _SAMPLE)
        sampled[flat[::step].tobytes()].append(value)
    merged = 0
    for candidates in sampled.values():
        kept: dict[bytes, oir.Value] = {}
        for value in candidates if len(candidates) > 1 else ():
            first = kept.setdefault(_digest(arrays[id(value)]), value)
            if first is not value:
                value.replace_all_uses_with(first)
                if is_unused_initializer(value) and value.graph is not None:
                    value.graph.initializers.pop(value.name or "")
                merged += 1
    return merged


def _array(value: oir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


PASS = CommonSubexpressions()
