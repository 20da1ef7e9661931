"""Conv and ConvTranspose."""

from __future__ import annotations

from typing import Any

import numpy as np

from optc.backends.kernels import contraction, convolution
from optc.backends.lowering.emit import shape_of
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table
from optc.backends.lowering.windows import Windows, at_least, windows

TABLE = Table()


@TABLE.lowers("Conv")
def conv(site: Site) -> Any:
    """Conv-22 over any number of spatial axes, as a contraction over channels and kernel positions.

    Padding is materialized first, so that the inner loops have no branches: by a kernel of its own, or for a depthwise
    convolution inside the kernel, channel by channel.
    """
    x, weights = site.tensor(0), site.constant(1)
    shape = shape_of(x)
    filters = list(weights.shape) if weights is not None else site.shape(1)
    groups = site.attr("group", 1)
    channels, kernel = filters[0], filters[2:]
    if not all(isinstance(d, int) for d in filters):
        site.unsupported("the shape of the convolution's weights must be known while compiling")
    x = site.check_equal(x, [shape[0], filters[1] * groups, *shape[2:]])
    geometry = windows(site, shape[2:], kernel)
    bias = [site.tensor(2)] if site.has(2) else []
    dtype, per_group = str(x.ty.dtype), channels // groups
    common: dict[str, Any] = {
        "channels": channels,
        "strides": geometry.strides,
        "dilations": geometry.dilations,
        "out": geometry.out,
        "kernel": kernel,
    }
    if filters[1] == 1 and groups > 1:

        def each(a: Any, w: Any, *b: Any) -> Any:
            y = convolution.depthwise(a, w, before=geometry.before, after=geometry.after, **common)
            for term in b:
                y = convolution.add_bias(y, term, 1, per_group)
            return contraction.narrow(y, dtype)

        return site.emit(each, x, site.tensor(1), *bias, name="depthwise", attributes=contraction.FUSIBLE)
    x = padded(site, x, geometry)
    w = site.tensor(1) if weights is None else site.weight(pack_filters(weights, groups), "packed")

    def compute(a: Any, f: Any, *b: Any) -> Any:
        y = convolution.conv(a, f, groups=groups, packed=weights is not None, **common)
        for term in b:
            y = convolution.add_bias(y, term, 2 if groups > 1 else 1, per_group)
        return contraction.narrow(y, dtype)

    result = site.emit(compute, x, w, *bias, name="conv", attributes=contraction.FUSIBLE)
    return site.reshape(result, [shape[0], channels, *geometry.out]) if groups > 1 else result


def pack_filters(weights: np.ndarray, groups: int) -> np.ndarray:
    """Pack ``[M, C/G, *K]`` for ``convolution.conv``."""
    return contraction.pack_rows(weights.reshape(groups, weights.shape[0] // groups, *weights.shape[1:]))


def padded(site: Site, x: Any, geometry: Windows, value: float = 0) -> Any:
    """Return ``x`` with its spatial axes padded, by a kernel of its own; ``x`` itself without padding."""
    if not geometry.padded:
        return x
    fill = scalar(value, str(x.ty.dtype))
    # Opaque to fusion: as the epilogue of the convolution before, it would keep that one from its template.
    return site.emit(
        lambda a: convolution.pad(a, geometry.before, geometry.after, fill), x, name="pad", attributes={"op_pattern": 8}
    )


@TABLE.lowers("ConvTranspose")
def conv_transpose(site: Site) -> Any:
    """ConvTranspose-22: a contraction over channels for every kernel position, then each output gathers its terms."""
    x, weights = site.tensor(0), site.constant(1)
    shape = shape_of(x)
    filters = list(weights.shape) if weights is not None else site.shape(1)
    groups = site.attr("group", 1)
    if not all(isinstance(d, int) for d in filters):
        site.unsupported("the shape of the convolution's weights must be known while compiling")
    depth, per_group, *kernel = filters
    x = site.check_equal(x, [shape[0], depth, *shape[2:]])
    before, out, strides, dilations = _transposed_geometry(site, shape[2:], kernel)
    channels, maps = per_group * groups, per_group * int(np.prod(kernel, dtype=np.int64))
    flat = [groups, depth // groups, maps]
    if weights is not None:
        w = site.weight(contraction.pack_rows(weights.reshape(flat).transpose(0, 2, 1)), "packed")
    else:
        w = site.reshape(site.tensor(1), flat)
    spread = site.emit(
        lambda a, f: convolution.spread(a, f, maps=maps, groups=groups, packed=weights is not None),
        x,
        w,
        name="conv_transpose",
        attributes=contraction.FUSIBLE,
    )
    bias = [site.tensor(2)] if site.has(2) else []
    dtype = str(x.ty.dtype)

    def gather(y: Any, *b: Any) -> Any:
        total = convolution.gather(
            y,
            b[0] if b else None,
            channels=channels,
            kernel=kernel,
            strides=strides,
            dilations=dilations,
            before=before,
            out=out,
            groups=groups,
        )
        return contraction.narrow(total, dtype)

    return site.emit(gather, spread, *bias, name="conv_transpose_gather")


def _transposed_geometry(
    site: Site, sizes: list[Any], kernel: list[int]
) -> tuple[list[Any], list[Any], list[int], list[int]]:
    """Return pads before, output sizes, strides and dilations."""
    rank = len(sizes)
    strides = site.attr("strides") or [1] * rank
    dilations = site.attr("dilations") or [1] * rank
    pads = site.attr("pads") or [0] * (2 * rank)
    extra = site.attr("output_padding") or [0] * rank
    auto = str(site.attr("auto_pad", "NOTSET"))
    full = [
        (s - 1) * t + e + (k - 1) * d + 1
        for s, t, e, k, d in zip(sizes, strides, extra, kernel, dilations, strict=True)
    ]
    wanted = site.attr("output_shape")
    if wanted or auto in ("SAME_UPPER", "SAME_LOWER"):
        out = list(wanted)[-rank:] if wanted else [s * t for s, t in zip(sizes, strides, strict=True)]
        totals = [at_least(f - o, 0) for f, o in zip(full, out, strict=True)]
        half = [t // 2 for t in totals]
        # The odd element goes to the end for SAME_UPPER, else to the front.
        before = half if auto == "SAME_UPPER" else [t - h for t, h in zip(totals, half, strict=True)]
        before = [site.simplify(v) for v in before]
        return before, [site.simplify(v) for v in out], strides, dilations
    if auto == "VALID":
        pads = [0] * (2 * rank)
    out = [f - pads[i] - pads[rank + i] for i, f in enumerate(full)]
    return pads[:rank], [site.simplify(v) for v in out], strides, dilations
