"""``optc run``: run an artifact. Imports neither the compiler nor Rich: starting fast is part of the job."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import click
import numpy as np

from optc.cli.common import json_option, print_json, read_inputs, write_atomically


@click.command(name="run")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "-i",
    "inputs",
    multiple=True,
    metavar="NAME=FILE",
    help="An input: .npy, .npz, .png or .jpg file, or random[:seed]; repeatable. A bare FILE.npz gives inputs by "
    "name, a bare random[:seed] all that are not given.",
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write all outputs to this .npz file.")
@click.option("--threads", type=click.IntRange(1), help="Threads to use (default: all cores).")
@json_option
def command(artifact: Path, inputs: tuple[str, ...], output: Path | None, threads: int | None, as_json: bool) -> None:
    """Run ARTIFACT once and show its outputs.

    \b
    Examples:
      optc run model.optc --input x=image.npy
      optc run model.optc --input x=photo.jpg --output result.npz
      optc run model.optc --input random:7
    """
    from optc.runtime import load

    start = perf_counter()
    model = load(artifact)
    if threads is not None:
        model.threads = threads
    loaded = perf_counter()
    arrays = read_inputs(inputs, model.inputs)
    begin = perf_counter()
    results = model.run(arrays)
    end = perf_counter()
    if output is not None:
        write_atomically(output, lambda path: np.savez(path, **results))  # type: ignore[arg-type]
    if as_json:
        seconds = {"load": loaded - start, "run": end - begin}
        print_json({"seconds": seconds, "outputs": {name: _describe(array) for name, array in results.items()}})
        return
    for name, array in results.items():
        click.echo(f"{name}: {array.dtype}{list(array.shape)}  {_preview(array)}")
    click.echo(f"loaded in {(loaded - start) * 1e3:.0f} ms, ran in {(end - begin) * 1e3:.2f} ms", err=True)


def _preview(array: np.ndarray) -> str:
    text = np.array2string(array.astype(np.float64) if array.dtype.kind == "V" else array, threshold=8, edgeitems=3)
    if array.size > 1 and array.dtype.kind == "f":
        text += f"  min {array.min():.4g} max {array.max():.4g}"
    return text


def _describe(array: np.ndarray) -> dict[str, object]:
    entry: dict[str, object] = {"dtype": array.dtype.name, "shape": list(array.shape)}
    if array.size <= 64:
        entry["values"] = array.tolist()
    elif array.dtype.kind in "fiu":
        entry |= {"min": float(array.min()), "max": float(array.max()), "mean": float(array.mean())}
    return entry
