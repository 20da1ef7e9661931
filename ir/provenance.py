"""Where a node comes from: the names of the source nodes, and what made it, kept in its metadata."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as oir

SOURCE = "optc.source"
MADE_BY = "optc.made_by"
_SEPARATOR = " | "
_SHOWN = 3


def stamp(node: oir.Node, source: str) -> None:
    """Record ``source`` (an ONNX node name or an FX node name) as the origin of ``node``."""
    node.metadata_props[SOURCE] = source


def sources(node: oir.Node) -> tuple[str, ...]:
    """Return the names of the source nodes of ``node``, in order, possibly none."""
    text = node.metadata_props.get(SOURCE, "")
    return tuple(text.split(_SEPARATOR)) if text else ()


def is_stamped(node: oir.Node) -> bool:
    """Tell whether ``node`` says where it comes from or what made it."""
    return SOURCE in node.metadata_props or MADE_BY in node.metadata_props


def inherit(node: oir.Node, parents: Iterable[oir.Node], *, made_by: str) -> None:
    """Give ``node`` the sources of ``parents`` and the name of the pass or rule that made it."""
    merged = dict.fromkeys(source for parent in parents for source in sources(parent))
    if merged:
        node.metadata_props[SOURCE] = _SEPARATOR.join(merged)
    node.metadata_props[MADE_BY] = made_by


def describe(node: oir.Node) -> str:
    """Return ``op 'name' (from source)`` for messages."""
    domain = f"{node.domain}." if node.domain else ""
    text = f"{domain}{node.op_type} '{node.name or ''}'"
    origin = [s for s in sources(node) if s != node.name]
    if not origin:
        return text
    more = f" and {len(origin) - _SHOWN} more" if len(origin) > _SHOWN else ""
    return f"{text} (from {', '.join(origin[:_SHOWN])}{more})"
