"""``package.module:attribute``: how a command line names a Python object."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optc.errors import UsageError


def resolve(text: str) -> Any:
    """Return the object that ``package.module:attribute`` names; modules in the current folder are found too.

    Raises UsageError if the text has another form, or there is no such module or attribute.
    """
    module_name, separator, attribute = text.partition(":")
    if not separator or not module_name or not attribute:
        raise UsageError(f"'{text}' is not package.module:function")
    with _importable_folder(Path.cwd()):
        try:
            found: Any = importlib.import_module(module_name)
        except ImportError as error:
            raise UsageError(f"{text}: cannot import {module_name}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{text}: {module_name} has no '{attribute}'")
        found = getattr(found, part)
    return found


@contextlib.contextmanager
def _importable_folder(folder: Path) -> Iterator[None]:
    """Let imports find modules in ``folder``, as ``python -m`` would."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
