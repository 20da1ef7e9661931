"""Removes slices: weights are cut, and what nodes say about sizes follows. Or zeroes them, as a reference."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant
from optc.passes.prune.analysis import Coupling
from optc.passes.prune.axes import UPDATES, Kept
from optc.passes.rewrite import Namer


def remove(model: oir.Model, coupling: Coupling, removed: np.ndarray) -> dict[str, list[np.ndarray | None]]:
    """Remove the slices with the labels ``removed`` from the model that ``coupling`` is of, in place.

    Returns which slices were kept along each axis, None where the size is symbolic, by the name of each tensor that
    lost some.
    """
    axes = coupling.axes
    namer = Namer(model)

    def new_constant(node: oir.Node, array: np.ndarray) -> oir.Value:
        tensor = oir.tensor(array)
        value = oir.Value(
            name=namer.fresh(f"{node.name}.sizes"),
            shape=oir.Shape(array.shape),
            type=oir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        model.graph.initializers.add(value)
        return value

    kept = Kept(axes, removed, new_constant)
    masks = {value: [kept.mask(value, axis) for axis in range(len(table))] for value, table in axes.table.items()}
    touched = {v: m for v, m in masks.items() if any(mask is not None and not mask.all() for mask in m)}
    for node in model.graph:
        update = UPDATES.get(node.op_type) if node.domain == "" else None
        if update is not None and any(v in touched for v in (*node.inputs, *node.outputs) if v is not None):
            update(node, kept)
    for value, along in touched.items():
        array = constant(value)
        if array is not None:
            for axis, mask in enumerate(along):
                if mask is not None and not mask.all():
                    array = np.compress(mask, array, axis)
            value.const_value = oir.tensor(np.ascontiguousarray(array), dtype=value.dtype, name=value.name)
        assert value.shape is not None
        value.shape = oir.Shape(
            [d if m is None or m.all() else int(m.sum()) for d, m in zip(value.shape, along, strict=True)]
        )
    return {str(value.name): along for value, along in touched.items()}


# Inputs whose removed slices may be zero: neither divisors nor variances nor exponents.
_MASKED = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Add", "Mul", "Gather"), range(3)),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization", "GroupNormalization"), (1, 2)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (1,)),
}


def mask(model: oir.Model, coupling: Coupling, removed: np.ndarray) -> None:
    """Zero the slices with the labels ``removed`` in the weights, in place; sizes stay.

    Every sum over removed slices is then one over zeros, so the outputs are those of the model that lacks them.
    """
    kept = Kept(coupling.axes, removed, lambda *_: oir.Value())
    for value in list(coupling.axes.table):
        array = constant(value)
        if array is None or not all(use.idx in _MASKED.get(use.node.op_type, ()) for use in value.uses()):
            continue
        zeroed = array.copy()
        for axis in range(array.ndim):
            mask = kept.mask(value, axis)
            if mask is not None and not mask.all():
                np.moveaxis(zeroed, axis, 0)[~mask] = 0
        if not np.array_equal(zeroed, array):
            value.const_value = oir.tensor(zeroed, dtype=value.dtype, name=value.name)
