"""``optc bench``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from optc.cli.common import json_option, print_json, read_inputs
from optc.errors import UsageError

_PROFILED = 11
"""Runs of which a kernel's time is the median: an interrupt in one of them does not count."""


@click.command(name="bench")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--model", "-m", help="The model the artifact was compiled from; needed with --against.")
@click.option("--against", default="", metavar="NAMES", help="Peers, by comma: onnxruntime, openvino.")
@click.option("--threads", type=click.IntRange(1), help="Threads for every contestant (default: all cores).")
@click.option("--seconds", default=5.0, show_default=True, help="Time to measure for, all contestants together.")
@click.option("--input", "-i", "inputs", multiple=True, metavar="NAME=FILE", help="As in `optc run`.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE", help="Size of a symbolic dimension.")
@click.option("--profile", is_flag=True, help="Also show the time of every kernel.")
@json_option
def command(
    artifact: Path,
    model: str | None,
    against: str,
    threads: int | None,
    seconds: float,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    profile: bool,
    as_json: bool,
) -> None:
    """Time ARTIFACT, side by side with other programs in alternating runs of one process.

    \b
    Examples:
      optc bench model.optc
      optc bench model.optc --model model.onnx --against onnxruntime,openvino --threads 1
      optc bench model.optc --dim w=640 --profile
    """
    from optc import sample
    from optc.frontend.bind import parse_dim
    from optc.runtime import load

    names = [name.strip() for name in against.split(",") if name.strip()]
    if names and model is None:
        raise UsageError("--against needs the model the artifact was compiled from", hint="add --model MODEL")
    count = threads or len(os.sched_getaffinity(0))
    loaded = load(artifact)
    loaded.threads = count
    sizes = dict(parse_dim(text) for text in dims)
    arrays = sample.random_inputs(loaded.inputs, dims=sizes) | read_inputs(inputs, loaded.inputs)
    contestants: dict[str, Callable[[], object]] = {"optc": lambda: loaded.run(arrays)}
    if names:
        assert model is not None
        contestants |= _peers(model, names, count, arrays)
    timings = _measure(contestants, seconds, quiet=as_json)
    kernels = loaded.profile(arrays, repeat=_PROFILED) if profile else []
    if as_json:
        print_json(
            {
                "threads": count,
                "shapes": {name: list(array.shape) for name, array in arrays.items()},
                "timings": [t.describe() for t in timings],
                "kernels": [asdict(k) for k in kernels],
            }
        )
        return
    _show(timings, count)
    if profile:
        work = {k["name"]: k["operations"] for k in loaded.report.get("kernels", []) if "operations" in k}
        _show_kernels(kernels, work)


def _peers(model: str, names: list[str], threads: int, arrays: dict[str, Any]) -> dict[str, Callable[[], object]]:
    from optc.peers import open_peer
    from optc.source import capture

    original = capture(model)
    runs: dict[str, Callable[[], object]] = {}
    for name in names:
        peer = open_peer(name, original, threads)
        runs[peer.name] = lambda peer=peer: peer.run(arrays)  # type: ignore[misc]
    return runs


def _measure(contestants: dict[str, Callable[[], object]], seconds: float, *, quiet: bool) -> list[Any]:
    from rich.console import Console
    from rich.progress import Progress

    from optc.timing import alternate

    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("measuring", total=1.0)
        return alternate(contestants, seconds=seconds, progress=lambda done: bar.update(task, completed=done))


def _show(timings: list[Any], threads: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{threads} thread(s), alternating runs, milliseconds")
    for header in ("", "median", "p10", "p90", "p99", "runs", "optc is"):
        table.add_column(header, justify="left" if not header else "right")
    ours = timings[0].median
    for timing in timings:
        ratio = "" if timing is timings[0] else f"{timing.median / ours:.2f} x as fast"
        cells = [f"{v:.3f}" for v in (timing.median, *map(timing.percentile, (10, 90, 99)))]
        table.add_row(timing.name, *cells, str(len(timing.samples)), ratio)
    Console().print(table)


def _show_kernels(kernels: list[Any], operations: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kernels by time")
    for header in ("kernel", "calls", "ms", "share", "GFLOP/s"):
        table.add_column(header, justify="left" if header == "kernel" else "right")
    total = sum(k.seconds for k in kernels) or 1.0
    for kernel in sorted(kernels, key=lambda k: -k.seconds):
        work = operations.get(kernel.name, 0) * kernel.calls
        speed = f"{work / kernel.seconds / 1e9:.1f}" if work and kernel.seconds else ""
        milliseconds, share = f"{kernel.seconds * 1e3:.3f}", f"{kernel.seconds / total:.1%}"
        table.add_row(kernel.name, str(kernel.calls), milliseconds, share, speed)
    Console().print(table)
