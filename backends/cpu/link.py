"""Links object files into the shared library of an artifact, for this machine or another one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from optc.backends.base import Target
from optc.errors import MissingDependencyError, OptcError

_FLAGS = [
    "-shared",
    "-fPIC",
    "-nostdlib",
    "-Wl,-Bsymbolic",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,--strip-debug",
]


def linker(target: Target) -> list[str]:
    """Return the command that links for ``target``.

    Order: ``OPTC_CC``; for this architecture cc, gcc, clang; for another one its cross gcc; zig for any.
    """
    if override := os.environ.get("OPTC_CC"):
        return override.split()
    architecture = target.triple.split("-")[0]
    if architecture == os.uname().machine:
        names = ["cc", "gcc", "clang"]
    else:
        names = [f"{architecture}-linux-gnu-gcc", f"{target.triple}-gcc"]
    for name in names:
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-gnu"]
    raise MissingDependencyError(
        f"no linker for {target.triple} (looked for {', '.join(names)} and zig)",
        hint="pip install 'optc[cross]' brings zig, which links for every target; or set OPTC_CC",
    )


def link(objects: Sequence[Path], output: Path, target: Target) -> None:
    """Link ``objects`` into the shared library ``output``; the runtime resolves TVM's and libm's symbols."""
    command = [*linker(target), *_FLAGS, "-o", str(output), *map(str, objects)]
    environment = dict(os.environ, ZIG_GLOBAL_CACHE_DIR=str(output.parent / "zig"), SOURCE_DATE_EPOCH="0")
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise MissingDependencyError(
            f"cannot run the linker {command[0]}: {error}", hint="set OPTC_CC to a C compiler"
        ) from error
    if done.returncode:
        raise OptcError(f"linking for {target.triple} failed: {done.stderr.strip()[-2000:]}")
