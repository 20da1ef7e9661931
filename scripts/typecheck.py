"""Runs mypy on the packages as they are installed.

The rooms are folders at the root that setuptools maps into the package ``optc``; mypy knows no such mapping, so it is
given a folder of links that looks like the installed package.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    package = ROOT / "build" / "typecheck" / "optc"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (ROOT / "optc").iterdir() if path.name != "__pycache__"}
    for name, folder in setuptools["package-dir"].items():
        if name != "optc":
            wanted[name.removeprefix("optc.")] = ROOT / folder
    for link in package.iterdir():
        link.unlink()
    for name, path in wanted.items():
        (package / name).symlink_to(path)
    arguments = sys.argv[1:] or ["-p", "optc"]
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *arguments]
    return subprocess.run(command, cwd=package.parent, env=dict(os.environ, MYPYPATH="."), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
