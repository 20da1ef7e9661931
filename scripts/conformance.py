"""Runs onnx's backend test suite through optc and onnxruntime and writes the table by operator.

    python scripts/conformance.py [--jobs 2] [--only REGEX] [--backend optc]

Each test runs in a process of its own, so that a crash or a hang costs one test. Results: ``pass``; ``unsupported``
(refused by name before anything is built); ``rounding`` (outside of the suite's own tolerance, but nearer to the result
in float64 than the suite's expected values are); ``wrong`` (any other result outside of the tolerance); ``error`` (any
other exception); ``crash``; ``timeout``. Everything but the first three is a defect.
"""

import argparse
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import BackendIsNotSupposedToImplementIt, Runner
from onnx.reference import ReferenceEvaluator

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "real")
LIGHT = "onnx/backend/test/data/light/"
TIMEOUT = 300.0


def tests() -> dict[str, object]:
    found = {}
    for kind in KINDS:
        for case in load_model_tests(kind=kind):
            # "real" models are downloads, but for the light ones, which the package ships.
            if kind != "real" or (case.url or "").startswith(LIGHT):
                found[f"{'light' if kind == 'real' else kind}/{case.name}"] = case
    return dict(sorted(found.items()))


def load_value(path: str, kind: onnx.TypeProto) -> object:
    data = Path(path).read_bytes()
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if kind.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def material(case: object) -> tuple[onnx.ModelProto, list[tuple[list[object], list[object]]]]:
    """Return the model of a test and its data sets of inputs and expected outputs."""
    if case.model is not None:
        sets = [([as_array(v) for v in ins], [as_array(v) for v in outs]) for ins, outs in case.data_sets]
        return case.model, sets
    if (case.url or "").startswith(LIGHT):
        path = Path(onnx.__file__).parent.parent / case.url
        model = onnx.load(path)
        initializers = {i.name for i in model.graph.initializer}
        inputs = [
            Runner.generate_dummy_data(x, seed=0, name=case.model_name)
            for x in model.graph.input
            if x.name not in initializers
        ]
        stem = str(path)[: -len(".onnx")]
        kinds = [output.type for output in model.graph.output]
        return model, [(inputs, [load_value(f"{stem}_output_{i}.pb", kind) for i, kind in enumerate(kinds)])]
    model = onnx.load(Path(case.model_dir) / "model.onnx")
    sets = []
    for folder in sorted(Path(case.model_dir).glob("test_data_set*")):
        inputs = [
            load_value(f"{folder}/input_{i}.pb", x.type)
            for i, x in enumerate(model.graph.input)
            if Path(f"{folder}/input_{i}.pb").exists()
        ]
        outputs = [load_value(f"{folder}/output_{i}.pb", x.type) for i, x in enumerate(model.graph.output)]
        sets.append((inputs, outputs))
    return model, sets


def as_array(value: object) -> object:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def run_optc(model: onnx.ModelProto, sets: list) -> list:
    from optc.onnx_backend import OptcBackend

    representation = OptcBackend.prepare(model)
    return [representation.run(inputs) for inputs, _ in sets]


class RefusedError(Exception):
    pass


def run_onnxruntime(model: onnx.ModelProto, sets: list) -> list:
    import onnxruntime

    # onnxruntime reads IR versions up to 13; nothing in the tests needs the newer one.
    model.ir_version = min(model.ir_version, 13)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RefusedError(str(error)) from error
    names = [x.name for x in session.get_inputs()]
    try:
        return [session.run(None, dict(zip(names, map(plain, inputs), strict=False))) for inputs, _ in sets]
    except Exception as error:
        raise RefusedError(str(error)) from error


def plain(value: object) -> object:
    return np.asarray(value) if isinstance(value, np.generic) else value


def judge(case: object, backend: str) -> dict[str, object]:
    model, sets = material(case)
    result: dict[str, object] = {"ops": sorted({node.op_type for node in model.graph.node})}
    try:
        outputs = run_optc(model, sets) if backend == "optc" else run_onnxruntime(model, sets)
    except (BackendIsNotSupposedToImplementIt, RefusedError) as error:
        return result | {"status": "unsupported", "message": str(error)[:2000]}
    except Exception as error:
        return result | {"status": "error", "message": f"{type(error).__name__}: {error}"[:2000]}
    try:
        for found, (_, expected) in zip(outputs, sets, strict=True):
            Runner.assert_similar_outputs(expected, list(found), rtol=case.rtol, atol=case.atol)
    except AssertionError as error:
        errors = errors_to_float64(model, sets, outputs)
        if errors is not None and errors[0] <= errors[1]:
            message = (
                f"largest error to the result in float64: {errors[0]:.1e}; the expected values' own: {errors[1]:.1e}"
            )
            return result | {"status": "rounding", "message": message}
        return result | {"status": "wrong", "message": " ".join(str(error).split())[:600]}
    return result | {"status": "pass"}


def errors_to_float64(model: onnx.ModelProto, sets: list, outputs: list) -> tuple[float, float] | None:
    """Return the largest errors of our outputs and of the expected ones to the model's result in float64.

    None where onnx's reference evaluator cannot run the model in float64.
    """
    wide = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*wide.graph.input, *wide.graph.output):
        if value.type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in wide.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    ours = theirs = 0.0
    try:
        evaluator = ReferenceEvaluator(wide)
        for (inputs, expected), found in zip(sets, outputs, strict=True):
            arrays = [
                x.astype(np.float64) if x.dtype in (np.float32, np.float16) else x for x in map(np.asarray, inputs)
            ]
            exact = evaluator.run(None, dict(zip(evaluator.input_names, arrays, strict=False)))
            for e, a, b in zip(exact, found, expected, strict=True):
                ours = max(ours, float(np.abs(np.asarray(a, np.float64) - e).max()))
                theirs = max(theirs, float(np.abs(np.asarray(b, np.float64) - e).max()))
    except Exception:
        return None
    return ours, theirs


def in_a_process(case: object, backend: str) -> dict[str, object]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        with os.fdopen(writer, "w") as pipe:
            json.dump(judge(case, backend), pipe)
        os._exit(0)
    os.close(writer)
    end = time.monotonic() + TIMEOUT
    data = b""
    try:
        while (left := end - time.monotonic()) > 0:
            if select.select([reader], [], [], left)[0]:
                chunk = os.read(reader, 1 << 16)
                if not chunk:
                    break
                data += chunk
        else:
            os.kill(child, signal.SIGKILL)
            return {"status": "timeout"}
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    return json.loads(data) if data else {"status": "crash", "message": f"wait status {status}"}


def work(backend: str, only: str, shard: int, shards: int, output: Path) -> None:
    """Run one share of the tests; results are written as they come, so that an interrupted run has them."""
    if backend == "optc":
        # Imported once here, shared by all children.
        import optc.backends.cpu.build
        import optc.driver
        import optc.runtime.model  # noqa: F401
    results = {}
    output.write_text("{}")
    chosen = [(n, c) for n, c in tests().items() if re.search(only, n)]
    for name, case in chosen[shard::shards]:
        results[name] = in_a_process(case, backend)
        if len(results) % 50 == 0 or len(results) == len(chosen[shard::shards]):
            output.write_text(json.dumps(results))
            print(f"{backend} {len(results)} {dict(Counter(r['status'] for r in results.values()))}", file=sys.stderr)


def run(backend: str, only: str, jobs: int) -> dict[str, dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for shard in range(jobs):
            output = f"{folder}/{shard}.json"
            command = [sys.executable, __file__, "--only", only, "--backend", backend, "--shard", f"{shard}/{jobs}"]
            children.append((subprocess.Popen([*command, "--output", output]), output))
        merged = {}
        for child, output in children:
            if child.wait():
                raise SystemExit(f"a worker for {backend} failed")
            merged |= json.loads(Path(output).read_text())
    return dict(sorted(merged.items()))


def by_operator(results: dict[str, dict[str, dict[str, object]]]) -> str:
    ours, theirs = results["optc"], results["onnxruntime"]
    total = {name: Counter(r["status"] for r in table.values()) for name, table in results.items()}
    columns = ("pass", "unsupported", "rounding", "wrong", "error", "crash", "timeout")
    lines = [
        "# Conformance",
        "",
        f"onnx {onnx.__version__}'s backend suite, {len(ours)} tests, both programs in the same run. "
        "`make conformance` writes this page.",
        "",
        "For onnxruntime, `unsupported` counts every model it does not load or run, and its Python interface cannot be",
        "given some element types.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
        *(f"| {n} | " + " | ".join(str(c[s]) for s in columns) + " |" for n, c in total.items()),
        "",
        "`rounding`: outside of the suite's tolerance, but nearer to the result in float64 than the expected values.",
        "",
        *others(ours),
        "## By operator",
        "",
        "A test counts for each operator in it; for multi-node models that is every one of them.",
        "",
        "| operator | tests | optc | onnxruntime | why optc refuses |",
        "|---|---|---|---|---|",
    ]
    operators = sorted({op for r in ours.values() for op in r.get("ops", [])})
    for op in operators:
        names = [n for n, r in ours.items() if op in r.get("ops", [])]
        good = sum(ours[n]["status"] == "pass" for n in names)
        peer = sum(theirs[n]["status"] == "pass" for n in names)
        reasons = Counter(reason(str(ours[n].get("message", ""))) for n in names if ours[n]["status"] == "unsupported")
        text = "; ".join(f"{why} ({count})" for why, count in reasons.most_common(3))
        lines.append(f"| {op} | {len(names)} | {good} | {peer} | {text} |")
    return "\n".join(lines) + "\n"


def others(results: dict[str, dict[str, object]]) -> list[str]:
    """Return the lines that name what neither passed nor was refused."""
    lines = [
        f"* `{name}`: {r['status']}. {r.get('message', '')}"
        for name, r in results.items()
        if r["status"] not in ("pass", "unsupported")
    ]
    return ["## Neither passed nor refused by optc", "", *lines, ""] if lines else []


def reason(message: str) -> str:
    found = re.search(r"- [^:]*?'[^']*'[^:]*: (.+)", message) or re.search(r"(.+)", message)
    return found.group(1).replace("|", "/")[:100] if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="a regular expression on kind/test name")
    parser.add_argument("--backend", choices=("optc", "onnxruntime"), help="only this one; prints, writes no page")
    parser.add_argument("--shard", default="", help=argparse.SUPPRESS)
    parser.add_argument("--output", help="write the results to this JSON file")
    options = parser.parse_args()
    if options.shard:
        shard, shards = map(int, options.shard.split("/"))
        work(options.backend, options.only, shard, shards, Path(options.output))
        return
    names = [options.backend] if options.backend else ["optc", "onnxruntime"]
    results = {name: run(name, options.only, options.jobs) for name in names}
    for name, table in results.items():
        print(name, len(table), dict(Counter(r["status"] for r in table.values())))
    for test, result in results[names[0]].items():
        if result["status"] not in ("pass", "unsupported"):
            print(f"{result['status']:8} {test}: {str(result.get('message', ''))[:300]}")
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=1))
    if not options.backend and not options.only:
        (ROOT / "docs" / "conformance.md").write_text(by_operator(results))
        passing = sorted(name for name, r in results["optc"].items() if r["status"] == "pass")
        (ROOT / "tests" / "conformance" / "passing.txt").write_text("\n".join(passing) + "\n")


if __name__ == "__main__":
    main()
