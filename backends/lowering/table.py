"""The table that maps an ONNX operator to the function that lowers it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optc.backends.lowering.site import Site

Lower = Callable[["Site"], Any]
"""Takes a node with its lowered inputs, returns one Relax expression or one per output of the node."""


class Table:
    """The operators of one family. Files fill their own table; ``merge`` joins them, visibly, in one place."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Lower] = {}

    def lowers(self, *op_types: str, domain: str = "") -> Callable[[Lower], Lower]:
        """Register the decorated function for ``op_types``; a second entry for one operator is an error."""

        def wrap(function: Lower) -> Lower:
            for op_type in op_types:
                if (domain, op_type) in self.entries:
                    raise ValueError(f"{domain}.{op_type} has two lowerings")
                self.entries[domain, op_type] = function
            return function

        return wrap


def merge(tables: Iterable[Table]) -> dict[tuple[str, str], Lower]:
    """Join tables; an operator in two of them is an error."""
    merged = Table()
    for table in tables:
        for (domain, op_type), function in table.entries.items():
            merged.lowers(op_type, domain=domain)(function)
    return merged.entries


def outputs(result: Any) -> Sequence[Any]:
    """Normalize what a lowering returned to one expression per output."""
    return list(result) if isinstance(result, list | tuple) else [result]
