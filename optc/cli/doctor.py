"""``optc doctor``."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata

import click

from optc.cli.common import json_option, print_json


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``fix`` says what to do when it is not ``ok``; optional lacks are not failures."""

    what: str
    found: str
    ok: bool
    required: bool
    fix: str = ""


REQUIRED = {
    "apache-tvm": "0.27.",
    "apache-tvm-ffi": "0.1.14",
    "onnx": "1.23.",
    "onnx-ir": "1.1.",
    "onnx-shape-inference": "0.4.",
    "numpy": "2.",
}
OPTIONAL = {
    "torch": ("2.13.", "torch", "PyTorch models and torch.compile"),
    "onnxscript": ("0.7.", "torch", "export of PyTorch models"),
    "onnxruntime": ("", "bench", "the preferred reference of `verify`, and a peer of `bench`"),
    "openvino": ("", "bench", "a peer of `bench`"),
    "ziglang": ("", "cross", "linking for other targets"),
}


@click.command(name="doctor")
@json_option
def command(as_json: bool) -> None:
    """Check this installation; say how to fix what is missing. Exit code 1 if something required is wrong."""
    findings = [*_packages(), *_machine(), *_tools(), _runs()]
    broken = [f for f in findings if f.required and not f.ok]
    if as_json:
        print_json([asdict(f) for f in findings])
    else:
        _show(findings)
        click.echo(f"{len(broken)} problem(s)" if broken else "everything required is there")
    raise SystemExit(1 if broken else 0)


def _packages() -> list[Finding]:
    findings = [Finding("Python", platform.python_version(), sys.version_info >= (3, 11), True, "use 3.11 or newer")]
    for name, prefix in REQUIRED.items():
        version = _version(name)
        good = version is not None and version.startswith(prefix)
        findings.append(Finding(name, version or "missing", good, True, f"pip install '{name}=={prefix}*'"))
    for name, (prefix, extra, purpose) in OPTIONAL.items():
        version = _version(name)
        good = version is not None and version.startswith(prefix)
        fix = f"for {purpose}: pip install 'optc[{extra}]'"
        findings.append(Finding(name, version or "missing", good, False, fix))
    return findings


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> list[Finding]:
    from optc.backends.cpu.target import resolve

    target = resolve("cpu")
    interesting = (
        "sse4.2",
        "avx",
        "avx2",
        "fma",
        "avxvnni",
        "avx512f",
        "avx512vnni",
        "neon",
        "dotprod",
        "sve",
    )
    features = [name for name in interesting if name in target.features]
    cores = len(os.sched_getaffinity(0))
    gpu = shutil.which("nvidia-smi")
    return [
        Finding("CPU", f"{target.cpu}, {cores} core(s), {', '.join(features)}", True, True),
        Finding("GPU", gpu or "none seen", gpu is not None, False, "only needed to run on one; CPU targets work"),
    ]


def _tools() -> list[Finding]:
    from optc.backends.cpu.link import linker
    from optc.backends.cpu.target import resolve
    from optc.errors import MissingDependencyError

    findings = []
    for name, required in (("cpu", True), ("aarch64", False)):
        try:
            found, good, fix = linker(resolve(name))[0], True, ""
        except MissingDependencyError as error:
            found, good, fix = "missing", False, error.hint or ""
        findings.append(Finding(f"linker for {name}", found, good, required, fix))
    return findings


def _runs() -> Finding:
    """Compile and run a model of one node: the only proof that the parts fit each other."""
    import numpy as np
    import onnx_ir as oir

    from optc.driver import compile
    from optc.errors import OptcError

    text = '<ir_version: 10, opset_import: ["": 20]> g (float[4] x) => (float[4] y) { y = Relu(x) }'
    x = np.array([-1, 0, 1, 2], np.float32)
    try:
        y = compile(oir.from_onnx_text(text), verify=False).model().run({"x": x})["y"]
        good = bool(y.tolist() == [0.0, 0.0, 1.0, 2.0])
        return Finding("compile and run", "works" if good else "wrong result", good, True, "reinstall optc")
    except OptcError as error:
        return Finding("compile and run", str(error), False, True, error.hint or "reinstall optc")


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else ("[red]wrong[/]" if finding.required else "[yellow]no[/]")
        table.add_row(mark, finding.what, escape(finding.found), "" if finding.ok else escape(finding.fix))
    Console().print(table)
