"""``optc.toml``: the options of a build step in a file, so that a build is one command without arguments.

    [compile]
    model = "model.onnx"
    output = "model.optc"
    target = "x86-64-v3"
    dims = { batch = 8 }
    input_shapes = { x = [1, 3, 224, 224] }
    log = "tuning.jsonl"
    offline = true
    require_tuned = true

Paths are relative to the file. Options on the command line win.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optc.errors import UsageError

DEFAULT_NAME = "optc.toml"


@dataclass
class CompileConfig:
    """The table ``[compile]``: every field may be left out."""

    model: str | None = None
    output: str | None = None
    target: str = "cpu"
    input_shapes: dict[str, list[int | str]] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    verify: bool = True
    tolerance: float | None = None
    disable_passes: list[str] = field(default_factory=list)
    log: str | None = None
    threads: int | None = None
    offline: bool = False
    require_tuned: bool = False


_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "output": str,
    "target": str,
    "input_shapes": dict,
    "dims": dict,
    "verify": bool,
    "tolerance": (int, float),
    "disable_passes": list,
    "log": str,
    "threads": int,
    "offline": bool,
    "require_tuned": bool,
}


def read(path: Path) -> CompileConfig:
    """Read ``path``; UsageError names the key that is wrong."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    unknown = set(content) - {"compile"}
    if unknown:
        raise UsageError(f"{path}: unknown table {', '.join(sorted(unknown))}; there is [compile]")
    table = content.get("compile", {})
    for key, value in table.items():
        if key not in _TYPES:
            raise UsageError(f"{path}: unknown key compile.{key}", hint=f"keys: {', '.join(_TYPES)}")
        if not isinstance(value, _TYPES[key]) or (isinstance(value, bool) and _TYPES[key] is not bool):
            raise UsageError(f"{path}: compile.{key} has the wrong type ({type(value).__name__})")
    config = CompileConfig(**table)
    for key in ("model", "output", "log"):
        text = getattr(config, key)
        # package.module:factory is no path
        if text is not None and ":" not in text:
            setattr(config, key, str(path.parent / text))
    return config


def write(path: Path, config: CompileConfig) -> None:
    """Write ``config`` to ``path``, which must not exist; only what differs from the defaults."""
    default = CompileConfig()
    lines = ["[compile]"]
    for key in _TYPES:
        value = getattr(config, key)
        if value != getattr(default, key):
            lines.append(f"{key} = {_toml(value)}")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    except FileExistsError as error:
        raise UsageError(f"{path} exists already; it was left as it is") from error
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _toml(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists are TOML's too; only tables differ.
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)
