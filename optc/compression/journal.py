"""What a search has evaluated so far, a line for each, on the disk as soon as it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from optc.errors import UsageError


class Journal:
    """Losses, and costs that were measured with them, by the set of layers that were compressed.

    Appended to ``path`` line by line and flushed to the disk, so that a killed search loses the evaluation that was
    running, at most. Lines of another ``subject`` (model, data, options: any text) are left alone; a last line that was
    cut off is removed.
    """

    def __init__(self, path: Path | None, subject: str) -> None:
        self._path, self._subject = path, subject
        self.losses: dict[frozenset[str], float] = {}
        self.costs: dict[frozenset[str], float] = {}
        self.resumed = 0
        if path is None or not path.exists():
            return
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the journal {path}: {error}") from error
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            try:
                record = json.loads(line)
                if record["subject"] == subject:
                    key = frozenset(record["layers"])
                    self.losses[key] = float(record["loss"])
                    if "cost" in record:
                        self.costs[key] = float(record["cost"])
            except (ValueError, KeyError, TypeError) as error:
                if line.endswith("\n"):
                    raise UsageError(
                        f"{path}, line {number}: not a line of a journal", hint="name another file"
                    ) from error
        if text and not text.endswith("\n"):
            # The next line must not continue the one that was cut off.
            path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        self.resumed = len(self.losses)

    def add(self, layers: Iterable[str], loss: float, cost: float | None = None) -> None:
        """Keep the loss with these layers compressed, and the cost if it was measured."""
        key = frozenset(layers)
        self.losses[key] = loss
        record = {"subject": self._subject, "layers": sorted(key), "loss": loss}
        if cost is not None:
            self.costs[key] = record["cost"] = cost
        if self._path is None:
            return
        line = json.dumps(record)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())
