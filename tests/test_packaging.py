"""The package list matches the tree; importing stays cheap; a wheel installs and runs on its own."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_folder_with_code_is_listed_and_exists():
    found = set()
    for name, folder in SETUPTOOLS["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            relative = init.parent.relative_to(ROOT / folder)
            found.add(".".join([name, *relative.parts]))
    assert found == set(SETUPTOOLS["packages"])


def test_every_folder_of_python_files_is_a_package():
    for folder in SETUPTOOLS["package-dir"].values():
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = {"tvm", "tvm_ffi", "onnx", "onnx_ir", "torch", "sympy", "networkx", "onnxruntime", "onnxscript", "rich"}


@pytest.mark.parametrize("statement", ["import optc", "import optc.runtime", "import optc.cli", "import optc.cli.run"])
def test_light_imports_stay_light(statement):
    loaded = set(python(f"{statement}; import sys; print(*sys.modules)").split())
    assert not loaded & HEAVY


def test_the_import_time_budget():
    # Best of three, in seconds of the processor: what the import needs, not what the machine was doing.
    code = "from time import process_time as t; a = t(); import optc.runtime, optc.cli.run; print(t() - a)"
    assert min(float(python(code)) for _ in range(3)) < 0.5


def test_importing_the_ir_does_not_import_its_heavy_parts():
    loaded = set(python("import optc.ir; import sys; print(*sys.modules)").split())
    assert not loaded & {"tvm", "torch", "networkx", "onnxruntime"}


@pytest.mark.xdist_group("heavy")
def test_a_wheel_installs_into_an_empty_folder_and_runs(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("optc-*.whl")
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
import numpy as np, onnx_ir as oir, optc
assert optc.__file__.startswith({str(site)!r}), optc.__file__
text = '<ir_version: 10, opset_import: ["": 20]> g (float[n] x) => (float[n] y) {{ y = Relu(x) }}'
artifact = optc.compile(oir.from_onnx_text(text))
artifact.save({str(tmp_path / "relu.optc")!r})
print(optc.load({str(tmp_path / "relu.optc")!r}).run({{"x": np.array([-1, 2], np.float32)}})["y"])
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[0.", "2.]"]
