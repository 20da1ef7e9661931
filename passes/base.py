"""What a pass is: a named function of the model that says whether it changed it.

(The file cannot be called ``pass.py``: ``pass`` is a keyword and could not be imported.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as oir


@dataclass(frozen=True)
class Condition:
    """A requirement or a guarantee: in words, and as a check that returns a complaint or None."""

    text: str
    check: Callable[[oir.Model], str | None]


@dataclass(frozen=True)
class Skipped:
    """Why a rule did not fire at a node: the best near-miss is worth reading, so it keeps its reason."""

    rule: str
    node: str
    reason: str


@dataclass
class PassResult:
    """What one call of a pass did. ``fired`` counts rewrites by rule name."""

    modified: bool
    fired: dict[str, int] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


class Pass(ABC):
    """A graph pass. Subclasses set ``name`` and implement ``call``, which edits the model in place."""

    name: str
    requires: tuple[Condition, ...] = ()
    ensures: tuple[Condition, ...] = ()

    @abstractmethod
    def call(self, model: oir.Model) -> PassResult:
        """Run on a canonical model, in place; the model is canonical again on return."""

    def rule_names(self) -> tuple[str, ...]:
        """Return the names of the rules that can be left out one by one."""
        return ()

    def without(self, names: frozenset[str]) -> Pass:
        """Return this pass without the rules called ``names``."""
        return self
