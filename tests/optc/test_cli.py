"""Every verb as a user runs it, and every exit code."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from optc.cli import VERBS, cli

OPTC = [sys.executable, "-m", "optc"]


def run(*arguments, check=0, **options):
    done = subprocess.run([*OPTC, *map(str, arguments)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == check, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb):
    result = CliRunner().invoke(cli, [verb, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output
    if verb not in ("targets", "doctor"):
        assert f"optc {verb}" in result.output


def test_compile_run_inspect(mlp, tmp_path):
    out = tmp_path / "m.optc"
    summary = json.loads(run("compile", mlp, "-o", out, "--json").stdout)
    assert summary["report"]["verification"]["outputs"][0]["relative"] < 1e-5
    np.save(tmp_path / "x.npy", np.ones((2, 8), np.float32))
    run("run", out, "--input", f"x={tmp_path}/x.npy", "--output", tmp_path / "y.npz")
    assert np.load(tmp_path / "y.npz")["y"].shape == (2, 4)
    shown = json.loads(run("run", out, "-i", "random:1", "--threads", "1", "--json").stdout)
    assert shown["outputs"]["y"]["dtype"] == "float32"
    assert json.loads(run("inspect", out, "--json").stdout)["manifest"]["format"] == 2
    assert "x: float32[" in run("inspect", out).stdout
    assert "MatMul" in run("inspect", mlp).stdout


def test_verify_passes_and_fails_with_exit_code_4(mlp, artifact):
    result = json.loads(run("verify", mlp, artifact, "--dim", "batch=3", "--json").stdout)
    assert result["dims"] == {"batch": 3}
    run("verify", mlp, artifact, "--reference", "onnx")
    failed = run("verify", mlp, artifact, "--tolerance", "-1", check=4)
    assert "error" in failed.stderr
    assert "no pass changes" in run("verify", mlp, "--bisect").stdout


def test_bench_against_onnxruntime(mlp, artifact):
    against = ["-m", mlp, "--against", "onnxruntime", "--seconds", "0.1"]
    result = json.loads(run("bench", artifact, *against, "--threads", "1", "--json").stdout)
    assert [t["name"].split()[0] for t in result["timings"]] == ["optc", "onnxruntime"]
    assert "as fast" in run("bench", artifact, *against).stdout


def test_optimize_writes_portable_onnx(mlp, tmp_path):
    run("optimize", mlp, "-o", tmp_path / "o.onnx", "--dump-ir", tmp_path / "ir", "--verify-ir")
    onnx.checker.check_model(tmp_path / "o.onnx")
    assert list((tmp_path / "ir").iterdir())


def test_check_targets_doctor_completion(mlp):
    assert json.loads(run("check", mlp, "--json").stdout)["supported"]
    assert any(t["name"] == "aarch64" for t in json.loads(run("targets", "--json").stdout))
    assert all(f["ok"] for f in json.loads(run("doctor", "--json").stdout) if f["required"])
    assert "_OPTC_COMPLETE" in run("completion", "bash").stdout


def test_a_build_step_from_a_file(mlp, tmp_path):
    run("compile", mlp, "-o", tmp_path / "a.optc", "--dim", "batch=2", "--save-config", tmp_path / "optc.toml")
    (tmp_path / "a.optc").unlink()
    run("compile", cwd=tmp_path)
    assert (tmp_path / "a.optc").exists()


ERRORS = {
    "no such model": (["compile", "none.onnx"], 2, "none.onnx"),
    "no model": (["compile"], 2, "no model given"),
    "truncated model": (["compile", "truncated.onnx"], 3, "truncated.onnx"),
    "not a model": (["compile", "rubbish.onnx"], 3, "rubbish.onnx"),
    "unknown input": (["compile", "m.onnx", "--input-shape", "z:1"], 2, "z"),
    "wrong rank": (["compile", "m.onnx", "--input-shape", "x:1"], 2, "x"),
    "unknown dim": (["compile", "m.onnx", "--dim", "width=3"], 2, "width"),
    "bad dim": (["compile", "m.onnx", "--dim", "batch=tea"], 2, "batch"),
    "unknown pass": (["compile", "m.onnx", "--disable-pass", "tea"], 2, "tea"),
    "unknown target": (["compile", "m.onnx", "--target", "z80"], 2, "z80"),
    "no folder": (["compile", "m.onnx", "-o", "nowhere/m.optc"], 2, "nowhere"),
    "no factory": (["compile", "nowhere:build"], 2, "nowhere"),
    "no artifact": (["run", "none.optc"], 2, "none.optc"),
    "rubbish artifact": (["run", "rubbish.onnx"], 6, "rubbish.onnx"),
    "truncated artifact": (["run", "truncated.optc"], 6, "truncated.optc"),
    "missing input": (["run", "m.optc"], 2, "x"),
    "wrong shape": (["run", "m.optc", "-i", "x=wrong.npy"], 2, "x"),
    "unknown option": (["run", "--tea"], 2, "tea"),
    "unknown verb": (["brew"], 2, "brew"),
    "bench without model": (["bench", "m.optc", "--against", "onnxruntime"], 2, "--model"),
    "unknown peer": (["bench", "m.optc", "-m", "m.onnx", "--against", "tea"], 2, "tea"),
    "optimize to another format": (["optimize", "m.onnx", "-o", "m.txt"], 2, "m.txt"),
}


@pytest.fixture(scope="module")
def folder(mlp, artifact, tmp_path_factory):
    path = tmp_path_factory.mktemp("errors")
    (path / "m.onnx").write_bytes(mlp.read_bytes())
    (path / "m.optc").write_bytes(artifact.read_bytes())
    (path / "truncated.onnx").write_bytes(mlp.read_bytes()[:300])
    (path / "truncated.optc").write_bytes(artifact.read_bytes()[:3000])
    (path / "rubbish.onnx").write_bytes(b"rubbish " * 100)
    np.save(path / "wrong.npy", np.ones((2, 9), np.float32))
    return path


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_end_with_a_message_and_their_exit_code(folder, case):
    arguments, code, message = ERRORS[case]
    before = {p.name for p in folder.iterdir()}
    done = run(*arguments, check=code, cwd=folder)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in folder.iterdir()} == before


def test_a_full_disk_leaves_no_file(mlp, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    big = tmp_path / "big.onnx"
    model = onnx.load(mlp)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 100_000), np.float32), "w3"))
    model.graph.node.append(onnx.helper.make_node("MatMul", ["y", "w3"], ["z"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, ["batch", 100_000]))
    onnx.save(model, big)
    done = run("compile", big, "-o", tmp_path / "big.optc", "--no-verify", check=1, preexec_fn=limit)
    assert "big.optc" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["big.onnx"]


@pytest.mark.parametrize("delay", [0.5, 2.0, 4.0])
def test_ctrl_c_leaves_no_file(mlp, tmp_path, delay):
    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs inherit that it is ignored

    command = [*OPTC, "compile", str(mlp), "-o", str(tmp_path / "m.optc")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=heed)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    left = [p.name for p in tmp_path.iterdir()]
    if left:  # it had finished the file first
        assert left == ["m.optc"]
        run("run", tmp_path / "m.optc", "-i", "random")
    else:
        assert process.returncode in (130, -signal.SIGINT, 1)
    if process.returncode == 130:
        assert b"interrupted" in error


def test_two_compiles_of_one_output_at_once(mlp, tmp_path):
    command = [*OPTC, "compile", str(mlp), "-o", str(tmp_path / "m.optc"), "--no-verify"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    assert [p.wait(timeout=600) for p in both] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["m.optc"]
    run("run", tmp_path / "m.optc", "-i", "random")


def test_run_imports_no_compiler(artifact):
    code = (
        "import sys; sys.argv = ['optc', 'run', sys.argv[1], '-i', 'random']\n"
        "from optc.cli import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code, e.code\n"
        "bad = {'tvm', 'onnx', 'onnx_ir', 'torch', 'sympy', 'rich'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_output_into_a_closed_pipe(artifact):
    done = subprocess.run(
        f"{' '.join(OPTC)} inspect {artifact} --json | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr


def test_the_environment_has_no_say_in_the_bytes(mlp, tmp_path):
    for name, seed in (("a", "1"), ("b", "2")):
        environment = dict(os.environ, PYTHONHASHSEED=seed, TVM_NUM_THREADS=seed)
        run("compile", mlp, "-o", tmp_path / f"{name}.optc", env=environment)
    assert Path(tmp_path / "a.optc").read_bytes() == Path(tmp_path / "b.optc").read_bytes()
