"""``optc targets``."""

from __future__ import annotations

import click

from optc.cli.common import json_option, print_json


@click.command(name="targets")
@json_option
def command(as_json: bool) -> None:
    """List what can be compiled for.

    A target is `cpu` (this machine), the name of an x86-64 CPU as LLVM knows it, or TRIPLE[:CPU]. Options may follow:
    `:+feature,-feature` adds or leaves out instructions, `:l1=48K,l2=1M` gives the data caches of one core.
    """
    from optc.backends.cpu.link import linker
    from optc.backends.cpu.target import EXAMPLES, resolve
    from optc.errors import MissingDependencyError

    rows = []
    for name in EXAMPLES:
        target = resolve(name)
        try:
            linked_by = linker(target)[0]
        except MissingDependencyError as error:
            linked_by = f"no linker: {error.hint}"
        caches = {"l1": target.caches.l1, "l2": target.caches.l2}
        vectors = {"vector_bits": target.vector_bits, "registers": target.registers}
        rows.append(target.describe() | vectors | {"name": name, "caches": caches, "linker": linked_by})
    if as_json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="targets (examples; any CPU of LLVM's can be named)")
    for header in ("name", "triple", "CPU", "vectors", "caches", "linked by"):
        table.add_column(header)
    for row in rows:
        width = f"{row['registers']} x {row['vector_bits']} bit"
        sizes = " + ".join(str(size // 1024) for size in row["caches"].values()) + " KiB"
        table.add_row(row["name"], row["triple"], row["cpu"], width, sizes, escape(row["linker"]))
    Console().print(table)
