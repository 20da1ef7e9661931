"""Geometry of sliding windows, shared by convolution and pooling: auto_pad, output sizes, ceil mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from optc.backends.lowering.emit import as_index
from optc.backends.lowering.site import Site


@dataclass(frozen=True)
class Windows:
    """A window over each spatial axis. Sizes and pads may be symbolic; kernel, strides and dilations are numbers."""

    kernel: list[Any]
    strides: list[int]
    dilations: list[int]
    before: list[Any]
    after: list[Any]
    out: list[Any]

    @property
    def padded(self) -> bool:
        """Tell whether any axis is padded (or may be)."""
        return any(not (isinstance(p, int) and p == 0) for p in (*self.before, *self.after))


def windows(site: Site, sizes: Sequence[Any], kernel: Sequence[Any], *, ceil: bool = False) -> Windows:
    """Read strides, dilations, pads and auto_pad of a node over spatial ``sizes``."""
    rank = len(sizes)
    strides = site.attr("strides") or [1] * rank
    dilations = site.attr("dilations") or [1] * rank
    pads = site.attr("pads") or [0] * (2 * rank)
    auto = _text(site.attr("auto_pad", "NOTSET"))
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        out = [up(s, t) for s, t in zip(sizes, strides, strict=True)]
        totals = [at_least((o - 1) * t + e - s, 0) for o, t, e, s in zip(out, strides, extents, sizes, strict=True)]
        half = [t // 2 for t in totals]
        rest = [t - h for t, h in zip(totals, half, strict=True)]
        before, after = (half, rest) if auto == "SAME_UPPER" else (rest, half)
        before, after, out = ([site.simplify(v) for v in values] for values in (before, after, out))
        return Windows(list(kernel), strides, dilations, before, after, out)
    if auto == "VALID":
        pads = [0] * (2 * rank)
    before, after = pads[:rank], pads[rank:]
    out = []
    for s, e, t, b, a in zip(sizes, extents, strides, before, after, strict=True):
        span = s + b + a - e
        if not ceil:
            out.append(span // t + 1)
            continue
        count = up(span, t) + 1
        # A window that would start in the padding after the end is dropped.
        out.append(choose((count - 1) * t >= s + b, count - 1, count))
    return Windows(list(kernel), strides, dilations, before, after, [site.simplify(o) for o in out])


def up(value: Any, divisor: int) -> Any:
    """Return ``value / divisor`` rounded up."""
    return (value + (divisor - 1)) // divisor


def at_least(value: Any, bound: int) -> Any:
    """Return the maximum of ``value`` and ``bound``."""
    return max(value, bound) if isinstance(value, int) else tirx.max(as_index(value), as_index(bound))


def choose(condition: Any, yes: Any, no: Any) -> Any:
    """Return ``yes`` if ``condition`` holds, else ``no``; the condition is a bool or an expression."""
    if isinstance(condition, bool):
        return yes if condition else no
    return tirx.Select(condition, as_index(yes), as_index(no))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
