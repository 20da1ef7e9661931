"""Normalizations of com.microsoft, with the sums and look-ups that its optimizer fuses into them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as oir

from optc.frontend.contrib_node import ContribEdit

_EPSILON = 1e-12


def simplified(edit: ContribEdit) -> None:
    """SimplifiedLayerNormalization => RMSNormalization, in the type of the scale."""
    x, scale = edit.input(0), edit.input(1)
    if edit.settled(x) != edit.settled(scale):
        x = edit.op("Cast", x, to=int(edit.settled(scale)))
    edit.finish(
        edit.op(
            "RMSNormalization",
            x,
            scale,
            axis=edit.integer("axis", -1),
            epsilon=edit.real("epsilon", 1e-5),
            stash_type=edit.integer("stash_type", 1),
        )
    )


def skip(edit: ContribEdit) -> None:
    """SkipLayerNormalization => LayerNormalization(input + skip + bias), and the sum."""
    total = edit.plus(edit.input(0), edit.input(1), edit.optional(4))
    parameters = [edit.input(2), *([edit.input(3)] if edit.optional(3) is not None else [])]
    edit.finish(_layer(edit, total, *parameters), None, None, total)


def skip_simplified(edit: ContribEdit) -> None:
    """SkipSimplifiedLayerNormalization => RMSNormalization(input + skip + bias), and the sum."""
    total = edit.plus(edit.input(0), edit.input(1), edit.optional(3))
    y = edit.op("RMSNormalization", total, edit.input(2), axis=-1, epsilon=edit.real("epsilon", _EPSILON))
    edit.finish(y, None, None, total)


def embed(edit: ContribEdit) -> None:
    """EmbedLayerNormalization => LayerNormalization(Gather + Gather + Gather), lengths and the sum."""
    _embedded(edit, [edit.optional(index) for index in range(2, 7)], edit.optional(8))


def embed_quantized(edit: ContribEdit) -> None:
    """QEmbedLayerNormalization => EmbedLayerNormalization of DequantizeLinear."""
    tables = [
        edit.op("DequantizeLinear", table, edit.input(index + 6), edit.input(index + 11))
        if (table := edit.optional(index)) is not None
        else None
        for index in range(2, 7)
    ]
    _embedded(edit, tables, None)


def _embedded(edit: ContribEdit, tables: list[oir.Value | None], positions: oir.Value | None) -> None:
    """Expand; ``tables`` are those of words, positions and segments, and scale and shift."""
    words, places, segments, gamma, beta = tables
    ids, kinds, mask = edit.input(0), edit.optional(1), edit.optional(7)
    if positions is None:
        assert places is not None
        zero, axes = edit.ints([0], "zero"), edit.ints([0], "axes")
        # Positions are counted from 0: one sequence of rows for all of the batch.
        rows = edit.op("Slice", places, zero, edit.length(ids, 1), axes)
        placed = edit.op("Unsqueeze", rows, axes)
    else:
        placed = edit.op("Gather", places, positions)
    kind = edit.op("Gather", segments, kinds) if kinds is not None and segments is not None else None
    total = edit.plus(edit.op("Gather", words, ids), placed, kind)
    assert gamma is not None and beta is not None
    edit.finish(_layer(edit, total, gamma, beta), _lengths(edit, ids, mask) if edit.wants(1) else None, total)


def _lengths(edit: ContribEdit, ids: oir.Value, mask: oir.Value | None) -> oir.Value:
    """Return how many words the mask lets through, by sequence; 0 without mask."""
    if mask is None:
        return edit.op("Expand", edit.constant(np.array(0, np.int32), "zero"), edit.length(ids, 0))
    one = edit.constant(np.array(1, edit.settled(mask).numpy()), "one")
    kept = edit.op("Cast", edit.op("Equal", mask, one), to=oir.DataType.INT32.value)
    return edit.op("ReduceSum", kept, edit.ints([1], "axes"), keepdims=0)


def _layer(edit: ContribEdit, x: oir.Value, *parameters: oir.Value) -> oir.Value:
    return edit.op("LayerNormalization", x, *parameters, axis=-1, epsilon=edit.real("epsilon", _EPSILON))


OPERATORS: dict[str, Callable[[ContribEdit], None]] = {
    "EmbedLayerNormalization": embed,
    "QEmbedLayerNormalization": embed_quantized,
    "SimplifiedLayerNormalization": simplified,
    "SkipLayerNormalization": skip,
    "SkipSimplifiedLayerNormalization": skip_simplified,
}
"""How each operator is expanded, by its name."""
