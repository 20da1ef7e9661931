"""``python -m optc``: the command line."""

from __future__ import annotations

from optc.cli import main

main()
