"""The schedule of products with packed weights: few rows read them in registers, many rows a float copy of a panel.

Many rows take the loops of ``packed_schedule.py``. Before the rows of a chunk pass under a block of a panel, the block
is dequantized into a scratch buffer that stays in the caches of the core. Where a run decides how many rows there are,
both loop nests are there.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.fused import Fused, take_apart
from optc.backends.kernels.loops import load, loop, sequence, static, store
from optc.backends.kernels.packed_schedule import Block, PackedGenerator
from optc.backends.kernels.weight_only import TEMPLATE
from optc.backends.kernels.weight_only_rows import Matrix, RowsGenerator, most_rows


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` as a loop nest, or None if it is not a product with packed weights and its epilogue."""
    fused = take_apart(function, TEMPLATE)
    if fused is None:
        return None
    if any(static(e) == 0 for e in fused.spatial.extents):
        return function.with_body(tirx.Evaluate(0)) if fused.tail is None else None
    panels = PanelsGenerator(fused, target)
    reader, fused = panels.reader, panels.fused
    rows = static(panels.r)
    if rows is not None and rows <= most_rows(target):
        return reader.finish(RowsGenerator(fused, reader, target, rows).statement())
    if rows is not None:
        return reader.finish(panels.statement())
    one = RowsGenerator(fused, reader, target, 1).statement(rows_known=False)
    return reader.finish(tirx.IfThenElse(panels.r == 1, one, panels.statement()))


class PanelsGenerator(PackedGenerator):
    """Packed columns that are dequantized block by block."""

    unpack_cost = 1.0

    def __init__(self, fused: Fused, target: Target) -> None:
        super().__init__(fused, target)
        self.matrix = Matrix(self.fused, self.reader)
        fields = self.matrix.fields
        self.step = -(-self.step // fields) * fields
        self.blocks = -(-self.outer // self.step)
        # Every chunk of rows dequantizes all columns: chunks are twice as high as where panels are read as they lie.
        self.chunk_bytes *= 2
        # What is prefetched would be words; the processor follows them by itself.
        self.far = False
        self.rows_first = False
        self.panel, allocate = loops.scratch("panel", self.step * self.nr, self.dtype)
        self.buffers = [allocate]
        self.begin: Any = loops.index(0)

    def _unpack(self, t: Any, block: Block) -> Any:
        """Dequantize the rows of a block of panel ``t``."""
        matrix, lanes = self.matrix, self.lanes
        self.begin = block.begin
        first = block.begin // matrix.fields

        def element(step: Any, field: int, v: int, lane: Any) -> Any:
            group = (first + step) * matrix.fields // matrix.block
            q = matrix.integer(t, first + step, field, v + lane) - matrix.zero_point(t, group, v + lane)
            value = q.astype(self.dtype) * matrix.scale(t, group, v + lane, self.dtype)
            return store(self.panel, (step * matrix.fields + field) * self.nr + v + lane, value)

        def unpack(step: Any) -> Any:
            return sequence(
                *(
                    self.reader.lanewise(lanes, lambda lane, f=field, v=v: element(step, f, v, lane))
                    for v in range(0, self.nr, lanes)
                    for field in range(matrix.fields)
                )
            )

        return loop("step", loops.ceildiv(block.count, matrix.fields), unpack)

    def _column(self, places: dict[Any, Any], t: Any, k: Any, offset: Any) -> Any:
        return load(self.panel, (k - self.begin) * self.nr + offset)
