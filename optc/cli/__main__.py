"""``python -m optc.cli`` is ``optc``."""

from optc.cli import main

main()
