"""Conv and ConvTranspose, on channels-last values."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from optc.backends.kernels import contraction, convolution, few_rows, winograd
from optc.backends.kernels.border import BORDER
from optc.backends.kernels.decisions import Space
from optc.backends.kernels.loops import ceildiv, static
from optc.backends.kernels.workload import Core, annotation, sizes
from optc.backends.lowering.emit import as_index, shape_of
from optc.backends.lowering.known import Known
from optc.backends.lowering.layout import channels_last, permuted
from optc.backends.lowering.matmul import panel_width, static_product
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table
from optc.backends.lowering.windows import Windows, at_least, windows

TABLE = Table()
_OPAQUE = {"op_pattern": 8}
_CHANNELS, _USES = 16, 256
"""Channels, and multiplications with each element, from which an image is worth turning to channels-last."""


@TABLE.lowers("Conv")
def conv(site: Site) -> Any:
    """Conv-22 over any number of spatial axes.

    With constant weights a matrix product: pixels are rows, channels and kernel positions are summed, filters are
    columns. Padding is materialized first, so that the inner loops have no branches. Depthwise convolution has a
    kernel of its own, which reads the image as it is.
    """
    weights = site.constant(1)
    shape = site.shape(0)
    filters = list(weights.shape) if weights is not None else site.shape(1)
    groups = site.attr("group", 1)
    if not all(isinstance(d, int) for d in filters):
        site.unsupported("the shape of the convolution's weights must be known while compiling")
    geometry = windows(site, shape[2:], filters[2:])
    if weights is None:
        return _unpacked(site, filters, groups, geometry)
    if filters[1] == 1 and groups > 1 and filters[0] % groups == 0:
        return Known(last=_depthwise(site, weights, groups, geometry))
    core = conv_core(site, weights, groups, geometry)
    with site.layout(core) as layout:
        tile = _winograd_tile(site, weights, groups, geometry)
        if tile is not None:
            return Known(last=_winograd(site, weights, geometry, tile, core, layout))
        return _direct(site, weights, groups, geometry, core, layout)


def conv_core(site: Site, weights: np.ndarray, groups: int, geometry: Windows) -> Core:
    """Return the workload of a convolution with constant weights ``[M, C/G, *K]``, before anything is fused to it."""
    return {
        "op": "conv",
        "batch": static(site.shape(0)[0]),
        "out": sizes(geometry.out),
        "filters": list(weights.shape),
        "groups": groups,
        "strides": geometry.strides,
        "dilations": geometry.dilations,
        "padded": int(bool(geometry.padded)),
        "last": int(site.value(0) in site.lowerer.channels_last),
        "dtype": site.dtype(0),
    }


def _direct(site: Site, weights: np.ndarray, groups: int, geometry: Windows, core: Core, layout: Space) -> Any:
    shape, filters = site.shape(0), weights.shape
    wanted = [shape[0], filters[1] * groups, *shape[2:]]
    # The rows of the product may lie in memory in any way: an image that is not channels-last is read as it is, unless
    # its pixels are read often. Then neighbouring terms should be neighbours in memory.
    uses = filters[0] // groups * prod(filters[2:]) / prod(geometry.strides)
    last = site.value(0) in site.lowerer.channels_last or (filters[1] >= _CHANNELS and uses >= _USES)
    if last:
        x = site.check_equal(site.last(0), permuted(wanted, channels_last(len(shape))))
    else:
        x = site.check_equal(site.tensor(0), wanted)
    x = padded(site, x, geometry, last=last)
    return Known(last=product(site, x, weights, groups, geometry, core, layout, last=last))


def product(
    site: Site,
    x: Any,
    weights: np.ndarray,
    groups: int,
    geometry: Windows,
    core: Core,
    layout: Space,
    *,
    last: bool,
) -> Any:
    """Convolve padded ``x``, channels-last or not, with constant ``weights [M, C/G, *K]`` and the bias of input 2.

    What this decides about the layout of the filters is in ``layout``, which must be in force.
    """
    channels, dtype = weights.shape[0], str(x.ty.dtype)
    rows = static_product([shape_of(x)[0], *geometry.out])
    w = site.weight(pack_filters(site, weights, groups, rows, dtype), "packed")
    notes = annotation(core, layout.decisions) | _border(geometry, shape_of(x)[1 if last else 2])
    bias = [site.tensor(2)] if site.has(2) else []

    def compute(a: Any, f: Any, *b: Any) -> Any:
        y = convolution.conv_last(
            a,
            f,
            channels=channels,
            groups=groups,
            strides=geometry.strides,
            dilations=geometry.dilations,
            out=geometry.out,
            last=last,
            notes=notes,
        )
        for term in b:
            y = convolution.add_channels(y, term, groups)
        return contraction.narrow(y, dtype)

    y = site.emit(compute, x, w, *bias, name="conv", attributes=contraction.FUSIBLE)
    return site.reshape(y, [shape_of(x)[0], *geometry.out, channels]) if groups > 1 else y


def _border(geometry: Windows, padded_size: Any) -> dict[str, list[int]]:
    """Return the annotation that tells which rows of a padded image are not zeros."""
    before, after = geometry.before[0], geometry.after[0]
    if not all(isinstance(v, int) for v in (before, after, padded_size, geometry.kernel[0])):
        return {}
    if geometry.kernel[0] == 1 or before == after == 0:
        return {}
    size = padded_size - before - after
    return {BORDER: [before, size, geometry.strides[0], geometry.dilations[0]]}


def pack_filters(site: Site, weights: np.ndarray, groups: int, rows: int | None, dtype: str) -> np.ndarray:
    """Pack ``[M, C/G, *K]`` for ``convolution.conv_last``."""
    per_group = weights.shape[0] // groups
    split = weights.reshape(groups, per_group, *weights.shape[1:])
    # [G, M/G, C/G, *K] -> [G, *K, C/G, M/G]
    ordered = np.moveaxis(np.moveaxis(split, 2, -1), 1, -1)
    width = panel_width(site, rows, weights[0].size, per_group, dtype)
    packed = [contraction.pack_columns(group, width) for group in ordered]
    return np.stack(packed) if groups > 1 else packed[0]


def _winograd_tile(site: Site, weights: np.ndarray, groups: int, geometry: Windows) -> int | None:
    """Return the output tile of Winograd's algorithm, or None where it does not apply or would not pay."""
    plain = geometry.strides == [1, 1] and geometry.dilations == [1, 1] and geometry.kernel == [3, 3]
    known = all(isinstance(b, int) for b in geometry.before)
    if not plain or not known or groups > 1 or weights.dtype != np.float32 or "winograd" in site.lowerer.without:
        return None
    height, width = geometry.out
    return winograd.choose(height, width, weights.shape[1], weights.shape[0], site.target)


def _winograd(site: Site, weights: np.ndarray, geometry: Windows, m: int, core: Core, layout: Space) -> Any:
    """Convolve by Winograd's algorithm with output tiles of ``m`` x ``m``."""
    maps, depth = weights.shape[:2]
    shape = site.shape(0)
    x = site.check_equal(site.last(0), permuted([shape[0], depth, *shape[2:]], channels_last(4)))
    height, width = geometry.out
    rows = static_product([shape[0], ceildiv(height, m), ceildiv(width, m)])
    panel = panel_width(site, max(rows, few_rows.ROWS + 1) if rows else None, depth, maps, "float32", padded=True)
    filters = winograd.transform_filters(weights, m)
    u = site.weight(np.stack([contraction.pack_columns(f, panel) for f in filters]), f"winograd{m}")
    tables = [relax.const(table[m].astype(np.float32)) for table in (winograd.INPUT, winograd.OUTPUT)]
    before, out = (geometry.before[0], geometry.before[1]), (_index(height), _index(width))
    bias = [site.tensor(2)] if site.has(2) else []
    notes = annotation(core, layout.decisions)

    def compute(a: Any, f: Any, forward: Any, back: Any, *b: Any) -> Any:
        y = winograd.convolve(a, f, forward, back, maps, before, out, notes)
        for term in b:
            y = convolution.add_channels(y, term, 1)
        return y

    return site.emit(compute, x, u, *tables, *bias, name="winograd", attributes=contraction.FUSIBLE)


def _depthwise(site: Site, weights: np.ndarray, groups: int, geometry: Windows) -> Any:
    shape, dtype = site.shape(0), site.dtype(0)
    x = site.check_equal(site.last(0), permuted([shape[0], groups, *shape[2:]], channels_last(len(shape))))
    w = site.weight(np.ascontiguousarray(np.moveaxis(weights[:, 0], 0, -1)), "depthwise")
    bias = [site.tensor(2)] if site.has(2) else []

    def compute(a: Any, f: Any, *b: Any) -> Any:
        y = convolution.depthwise(
            a,
            f,
            strides=geometry.strides,
            dilations=geometry.dilations,
            before=[_index(v) for v in geometry.before],
            out=geometry.out,
        )
        for term in b:
            y = convolution.add_channels(y, term, 1)
        return contraction.narrow(y, dtype)

    return site.emit(compute, x, w, *bias, name="depthwise", attributes=contraction.FUSIBLE)


def _index(value: Any) -> Any:
    return value if isinstance(value, int) else as_index(value)


def _unpacked(site: Site, filters: list[int], groups: int, geometry: Windows) -> Any:
    """Convolve with weights that only a run knows, on ``[N, C, *S]``."""
    shape = site.shape(0)
    x = padded(site, site.check_equal(site.tensor(0), [shape[0], filters[1] * groups, *shape[2:]]), geometry)
    bias, dtype = [site.tensor(2)] if site.has(2) else [], str(x.ty.dtype)

    def compute(a: Any, f: Any, *b: Any) -> Any:
        y = convolution.conv(
            a,
            f,
            channels=filters[0],
            groups=groups,
            strides=geometry.strides,
            dilations=geometry.dilations,
            out=geometry.out,
            kernel=filters[2:],
        )
        for term in b:
            y = convolution.add_bias(y, term, 2 if groups > 1 else 1, filters[0] // groups)
        return contraction.narrow(y, dtype)

    y = site.emit(compute, x, site.tensor(1), *bias, name="conv", attributes=contraction.FUSIBLE)
    return site.reshape(y, [shape[0], filters[0], *geometry.out]) if groups > 1 else y


def padded(site: Site, x: Any, geometry: Windows, value: float = 0, *, last: bool = False) -> Any:
    """Return ``x``, ``[N, C, *S]`` or channels-last, with its spatial axes padded, by a kernel of its own."""
    if not geometry.padded:
        return x
    before, after = ([_index(v) for v in pads] for pads in (geometry.before, geometry.after))
    fill = scalar(value, str(x.ty.dtype))
    return site.emit(lambda a: convolution.pad_rows(a, before, after, fill, last=last), x, name="pad")


@TABLE.lowers("ConvTranspose")
def conv_transpose(site: Site) -> Any:
    """ConvTranspose-22: a product over channels for every kernel position, then each output gathers its terms."""
    weights = site.constant(1)
    shape, dtype = site.shape(0), site.dtype(0)
    filters = list(weights.shape) if weights is not None else site.shape(1)
    groups = site.attr("group", 1)
    if not all(isinstance(d, int) for d in filters):
        site.unsupported("the shape of the convolution's weights must be known while compiling")
    depth, per_group, *kernel = filters
    x = site.check_equal(site.last(0), permuted([shape[0], depth, *shape[2:]], channels_last(len(shape))))
    before, out, strides, dilations = _transposed_geometry(site, shape[2:], kernel)
    channels, maps = per_group * groups, per_group * int(np.prod(kernel, dtype=np.int64))
    width = panel_width(site, static_product([shape[0], *shape[2:]]), depth // groups, maps, dtype)
    w = _spread_weights(site, weights, groups, width, maps)
    spread = site.emit(
        lambda a, f: convolution.spread(a, f, maps=maps, groups=groups),
        x,
        w,
        name="conv_transpose",
        attributes=contraction.FUSIBLE,
    )
    bias = [site.tensor(2)] if site.has(2) else []
    whole = [site.prove_equal(o, d * t) for o, d, t in zip(out, shape[2:], strides, strict=True)]

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
            whole=whole,
            groups=groups,
        )
        return contraction.narrow(total, dtype)

    return Known(last=site.emit(gather, spread, *bias, name="conv_transpose_gather"))


def _spread_weights(site: Site, weights: np.ndarray | None, groups: int, width: int, maps: int) -> Any:
    """Return ``[C, M/G, *K]`` as ``[G, ceil(maps/width), C/G, width]``: columns are kernel positions, then maps."""
    if weights is not None:
        depth = weights.shape[0] // groups
        ordered = np.moveaxis(weights, 1, -1).reshape(groups, depth, maps)
        return site.weight(np.stack([contraction.pack_columns(group, width) for group in ordered]), "packed")
    depth, per_group, *_kernel = site.shape(1)
    blocks, positions = -(-maps // width), maps // per_group
    flat = site.reshape(site.tensor(1), [groups, depth // groups, per_group, positions])

    def pack(a: Any) -> Any:
        def element(g: Any, block: Any, c: Any, lane: Any) -> Any:
            j = block * width + lane
            inside = a(g, c, j % per_group, tirx.min(j // per_group, positions - 1))
            return tirx.if_then_else(j < maps, inside, scalar(0, str(a.dtype)))

        return te.compute((groups, blocks, depth // groups, width), element, "pack")

    return site.emit(pack, flat, name="pack")


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
