"""The schedule of products of 8-bit integers: Winograd's algorithm, bytes as they are, or widened to 16 bits."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import integer_dot, loops
from optc.backends.kernels.fused import take_apart
from optc.backends.kernels.integer_bytes import ByteProduct
from optc.backends.kernels.integer_contraction import QUAD, TEMPLATE
from optc.backends.kernels.integer_form import WIDE
from optc.backends.kernels.integer_product import Product
from optc.backends.kernels.integer_rows import WindowRows
from optc.backends.kernels.integer_winograd import Winograd, choose
from optc.backends.kernels.loops import static


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` as a tiled loop nest, or None if it is not one annotated product with its epilogue."""
    fused = take_apart(function, TEMPLATE)
    if fused is None:
        return None
    value = fused.core.body.value
    if not isinstance(value, tirx.Add) or not isinstance(value.b, tirx.Mul):
        return None
    notes = fused.core.annotations
    if "optc.kernel" not in notes and len(fused.reduced.variables) != 1:
        return None
    if int(notes["optc.packed"]) == QUAD:
        return ByteProduct(fused, target).function()
    product = Product(fused, target, integer_dot.choose(target), WIDE, target.caches.l2 // 2)
    if isinstance(product.rows, WindowRows) and product.direct and len(product.batch.variables) == 1:
        transform = choose(product.reader.fused, product.rows, static(product.n))
        if transform is not None:
            (packed,) = loops.loads(product.column_operand)
            axes = product.columns, product.batch
            dot = integer_dot.choose(target)
            return Winograd(product.reader, dot, product.rows, transform, *axes, packed, target).function()
    return product.function()
