"""``optc log``: what is inside of tuning logs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optc.cli.common import capture_arguments, capture_options, json_option, print_json
from optc.errors import OptcError, UsageError

if TYPE_CHECKING:
    from optc.autotune.log import Log
    from optc.autotune.lookup import Choice
    from optc.autotune.record import Record

_PATH = click.Path(path_type=Path)


@click.group(name="log")
def command() -> None:
    """Show, merge and check tuning logs.

    \b
    Examples:
      optc log ls tuning.jsonl
      optc log merge a.jsonl b.jsonl -o all.jsonl
      optc log why tuning.jsonl model.onnx
      optc log export model.optc -o used.jsonl
      optc log import work_dir --log tuning.jsonl
    """


def _read(path: Path) -> Log:
    """Read a log and say which of its lines are bad."""
    from optc.autotune import log

    found = log.read(path)
    for line in found.bad:
        click.echo(f"{path}:{line.number}: skipped: {line.reason}", err=True)
    return found


@command.command()
@click.argument("log", type=_PATH)
@json_option
def ls(log: Path, as_json: bool) -> None:
    """List the workloads of LOG with the best choice of each, by machine."""
    rows: list[dict[str, Any]] = []
    records = _read(log).records
    for machine in sorted({r.machine for r in records}, key=str):
        best: dict[str, Choice] = {}
        counts = Counter(r.workload.key for r in records if r.machine == machine)
        for choice in _choices([r for r in records if r.machine == machine]):
            best.setdefault(choice.workload.key, choice)
        for key, choice in sorted(best.items(), key=lambda item: str(item[1].workload)):
            rows.append(
                {
                    "key": key,
                    "workload": str(choice.workload),
                    "machine": str(machine),
                    "records": counts[key],
                    "ratio": choice.ratio,
                    "decisions": {k: v for k, v in choice.decisions.items() if choice.defaults.get(k) != v},
                }
            )
    if as_json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{log}: {len(records)} records of {len(rows)} workloads")
    for header in ("key", "workload", "machine", "records", "speedup", "decisions"):
        table.add_column(header, justify="right" if header in ("records", "speedup") else "left")
    for row in rows:
        text = ", ".join(f"{k}={v}" for k, v in row["decisions"].items()) or "untuned"
        cells = [str(row["key"]), str(row["workload"]), str(row["machine"]), str(row["records"])]
        table.add_row(*cells, f"{1 / row['ratio']:.3f}", text)
    Console().print(table)


def _choices(records: list[Any]) -> list[Choice]:
    from optc.autotune.lookup import choices

    return choices(records)


@command.command()
@click.argument("log", type=_PATH)
@click.argument("key")
def show(log: Path, key: str) -> None:
    """Print the records of LOG whose workload's key starts with KEY, as JSON lines."""
    found = [r for r in _read(log).records if r.workload.key.startswith(key)]
    if not found:
        raise UsageError(f"{log} has no record whose key starts with '{key}'", hint="`optc log ls` lists the keys")
    for record in sorted(found, key=lambda r: r.line):
        click.echo(record.line)


@command.command()
@click.argument("logs", type=_PATH, nargs=-1, required=True)
@click.option("--output", "-o", type=_PATH, required=True, help="The log to write.")
def merge(logs: tuple[Path, ...], output: Path) -> None:
    """Write the union of LOGS, in any order the same bytes. Bad lines are left out, and named."""
    from optc.autotune import log

    records = [record for path in logs for record in _read(path).records]
    log.write(output, records)
    click.echo(f"{output}: {len({r.line for r in records})} records")


@command.command()
@click.argument("source", type=_PATH)
@click.option("--output", "-o", type=_PATH, help="The log to write (default: standard output).")
def export(source: Path, output: Path | None) -> None:
    """Write the records that the artifact SOURCE was built with, or those of a log, sorted."""
    from optc.autotune import log

    if source.suffix == ".optc":
        from optc.runtime import read_tuning

        data = read_tuning(source)
    else:
        data = log.dump(_read(source).records)
    if output is None:
        click.echo(data.decode(), nl=False)
    else:
        log.write(output, log.read_bytes(data).records)


@command.command(name="import")
@click.argument("folder", type=_PATH)
@click.option("--log", "-l", required=True, type=_PATH, help="The tuning log to add to.")
@click.option("--target", "-t", default="cpu", help="What will be tuned for.")
@click.option("--threads", type=click.IntRange(1), help="Threads of kernels (default: this machine's).")
def import_(folder: Path, log: Path, target: str, threads: int | None) -> None:
    """Take hints from the database of TVM's meta_schedule in FOLDER: tiles that `optc tune` tries first.

    Its times are not relative to an untuned kernel of ours, so nothing of it decides a build.
    """
    from optc import driver
    from optc.autotune import log as logs
    from optc.autotune.imported import read
    from optc.autotune.machine import machine_of
    from optc.runtime.cpu import default_threads

    found = read(folder, machine_of(driver.resolve_target(target), threads or default_threads()))
    logs.append(log, found.records)
    click.echo(f"{log}: {len(found.records)} hints")
    for reason, count in sorted(found.skipped.items()):
        click.echo(f"  {count} records gave none: {reason}")


@command.command()
@click.argument("log", type=_PATH)
@click.option("--stale", is_flag=True, help="Also drop records of other versions of TVM or of templates.")
def prune(log: Path, stale: bool) -> None:
    """Keep of LOG what decides builds; what is dropped, bad lines too, goes to LOG.pruned."""
    from optc.autotune import log as logs

    dropped: list[bytes] = []

    def choose(found: Log) -> list[Record]:
        kept = _deciding(found.records, stale)
        dropped.extend(r.line.encode() for r in found.records if r.line not in kept)
        dropped.extend(line.text for line in found.bad)
        return [r for r in found.records if r.line in kept]

    logs.rewrite(log, choose)
    if dropped:
        with log.with_name(f"{log.name}.pruned").open("ab") as file:
            file.write(b"\n".join(dropped) + b"\n")
    click.echo(f"{log}: {len(logs.read(log).records)} records kept, {len(dropped)} lines moved to {log.name}.pruned")


def _deciding(records: list[Record], stale: bool) -> set[str]:
    """Return the lines of the best choice for each workload and layout, alone and inside of models, by context."""
    from optc.autotune.lookup import refusal

    kept: set[str] = set()
    for context in {_context(r) for r in records}:
        own = [r for r in records if _context(r) == context]
        if stale and refusal(own[0], own[0].machine) is not None:
            continue
        seen: set[tuple[str, str, bool]] = set()
        for choice in _choices(own):
            place = (choice.workload.key, str(sorted(choice.workload.layout.items())), choice.inside)
            if place not in seen:
                seen.add(place)
                kept |= {r.line for r in choice.records}
    return kept


def _context(record: Record) -> tuple[Any, ...]:
    return record.machine, record.tvm, record.template, record.template_version


@command.command()
@click.argument("log", type=_PATH)
def verify(log: Path) -> None:
    """Check every line of LOG; exit code 1 if one is bad."""
    from optc.autotune.record import tvm_version

    found = _read(log)
    states = Counter(r.state for r in found.records)
    text = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    click.echo(f"{log}: {len(found.records)} records ({text or 'none'}), {len(found.bad)} bad lines")
    other = Counter(r.tvm for r in found.records if r.tvm != tvm_version())
    for version, count in sorted(other.items()):
        click.echo(f"  {count} were measured with TVM {version} and do not serve {tvm_version()}")
    if found.bad:
        raise OptcError(f"{len(found.bad)} bad lines", hint="`optc log prune` moves them out of the log")


@command.command()
@click.argument("log", type=_PATH)
@click.argument("model")
@click.option("--target", "-t", default="cpu", help="What would be compiled for.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the log's records (default: this machine's).")
@capture_options
@json_option
def why(
    log: Path,
    model: str,
    target: str,
    threads: int | None,
    input_shapes: tuple[str, ...],
    dims: tuple[str, ...],
    as_json: bool,
) -> None:
    """Tell for each kernel of MODEL what LOG gives it, and why not more."""
    from optc.tuning import Tuning, explain

    rows = explain(model, Tuning(log, threads), target, **capture_arguments(input_shapes, dims))
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(f"{row['kernel']}: {row['source']}: {row['why']}")
