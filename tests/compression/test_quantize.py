"""``optc quantize`` and its twin in Python, from the file to what runs."""

import json

import numpy as np
import onnx
import onnx_ir
import pytest

import optc
from optc import driver
from optc.cli import main
from optc.compression.data import load
from optc.compression.options import Options
from optc.compression.quantize import Quantizer
from optc.errors import AccuracyError, UnsupportedModelError, UsageError
from optc.peers import OnnxRuntime
from optc.runtime.format import TensorSpec


@pytest.fixture(scope="module")
def quantized(network, rows):
    return optc.quantize(network, calibrate=rows)


def test_it_runs_here_and_in_onnxruntime_and_is_close(network, rows, quantized):
    onnx.checker.check_model(optc.ir.to_proto(quantized.model), full_check=True)
    inputs = {"x": rows[:4]}
    (expected,) = OnnxRuntime(optc.capture(network), threads=1).run(inputs).values()
    # As it is written: its optimizations add pairs of products of bytes in 16 bits, saturated, where there is no VNNI.
    (theirs,) = OnnxRuntime(quantized.model, threads=1, literal=True).run(inputs).values()
    artifact = optc.compile(quantized.model, inputs=inputs)
    (ours,) = artifact.model().run(inputs).values()
    step = (expected.max() - expected.min()) / 255
    assert np.abs(theirs - expected).max() < 0.05 * np.abs(expected).max()
    assert np.abs(ours - theirs).max() <= step
    assert "MatMulInteger" in {n.op_type for n in optc.optimize(quantized.model).graph}


def test_every_rounding_is_that_of_onnxruntime_to_one_step(quantized, rows):
    model, inputs = quantized.model.clone(), {"x": rows[:4]}
    # Cut at each QuantizeLinear: what follows is given the integers that onnxruntime has found there.
    rounded = [n.outputs[0] for n in model.graph if n.op_type == "QuantizeLinear" and n.inputs[0].const_value is None]
    assert len(rounded) == 3
    model.graph.outputs.extend(rounded)
    theirs = OnnxRuntime(model, threads=1, literal=True).run(inputs)
    for value in rounded:
        given = onnx_ir.Value(name=f"{value.name}.given", shape=value.shape, type=value.type)
        for user, index in list(value.uses()):
            user.replace_input_with(index, given)
        model.graph.inputs.append(given)
        inputs[given.name] = theirs[value.name]
    ours = optc.compile(model, verify=False).model().run(inputs)
    for value in rounded:
        assert np.abs(ours[value.name].astype(np.int32) - theirs[value.name].astype(np.int32)).max() <= 1


def test_the_report_tells_layers_and_sizes(quantized):
    report = quantized.report
    assert [layer["to"] for layer in report["layers"]] == ["int8"] * 3
    assert report["weight_bytes"]["after"] < 0.5 * report["weight_bytes"]["before"]


def test_excluded_layers_stay(network, rows, quantized):
    name = quantized.report["layers"][1]["name"]
    found = optc.quantize(network, Options(exclude=frozenset({name})), calibrate=rows)
    assert [layer["to"] for layer in found.report["layers"]] == ["int8", "float32", "int8"]
    with pytest.raises(UsageError, match="no product is called 'nothing'"):
        optc.quantize(network, Options(exclude=frozenset({"nothing"})), calibrate=rows)


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "int3"}, {"activations": "float8"}, {"method": "magic"}, {"bits": 9}],
    ids=lambda w: next(iter(w)),
)
def test_options_that_are_not_offered(wrong):
    with pytest.raises(UsageError):
        Options(**wrong)


def test_convolutions_are_rounded_with_data_too(tmp_path):
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[1,4,9,9] x) => (float[1,8,4,4] y) {
        a = Conv<strides=[2,2]>(x, w, b) r = Relu(a) c = Conv<group=2, pads=[1,1,1,1]>(r, v) s = Add(c, r)
        y = Conv(s, u) }"""
    random, model = np.random.default_rng(0), onnx.parser.parse_model(text)
    for name, shape in {"w": (8, 4, 3, 3), "b": (8,), "v": (8, 4, 3, 3), "u": (8, 8, 1, 1)}.items():
        array = random.normal(0, 0.3, shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "model.onnx")
    mixing = random.normal(0, 1, (4, 4)).astype(np.float32)
    x = np.einsum("ncij,cd->ndij", random.normal(0, 1, (12, 4, 9, 9)).astype(np.float32), mixing)
    optimized = driver.optimize(tmp_path / "model.onnx")
    quantizer = Quantizer(optimized, load(x[:8], driver.specs(optimized.graph.inputs)))
    errors = []
    for options in (Options(activations="uint16"), Options(activations="uint16", rounding="adaround")):
        run = OnnxRuntime(quantizer.run(options).model, threads=1, literal=True).run
        whole = OnnxRuntime(optimized, threads=1).run
        pairs = [(run({"x": one[None]})["y"], whole({"x": one[None]})["y"]) for one in x[8:]]
        errors.append(float(np.mean([((a - b) ** 2).mean() for a, b in pairs])))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("kind", ["int8-dynamic", "int8-weights", "int4-weights", "float16", "bfloat16"])
def test_kinds_that_need_no_data(kind, network, rows):
    found = optc.quantize(network, Options(kind))
    onnx.checker.check_model(optc.ir.to_proto(found.model), full_check=True)
    assert found.report["kind"] == kind


def test_everything_that_data_can_do_makes_it_better(network, rows, quantized):
    inputs = {"x": rows[:4]}
    (expected,) = OnnxRuntime(optc.capture(network), threads=1).run(inputs).values()
    errors = []
    base = Quantizer(driver.optimize(network), load(rows, [TensorSpec("x", "float32", (4, 32))]))
    for options in (
        Options(bits=4, smooth=None, correct_bias=False),
        Options(bits=4, equalize=True),
        Options(rounding="adaround"),
    ):
        (found,) = OnnxRuntime(base.run(options).model, threads=1, literal=True).run(inputs).values()
        errors.append(float(np.abs(found - expected).mean()))
    assert errors[1] < errors[0]
    assert errors[2] < errors[0]


def test_values_that_would_overflow_stay_in_float32(rows):
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[4,32] x) => (float[4,32] y) <float[32,32] w, float c>
    { l = MatMul(x, w) h = Mul(l, c) r = Relu(h) d = Div(r, c) y = MatMul(d, w) }"""
    model = onnx.parser.parse_model(text)
    del model.graph.initializer[:]
    for name, array in (("w", np.eye(32, dtype=np.float32)), ("c", np.float32(30_000))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    (blind,), (seen,) = (
        optc.compile(optc.quantize(model, Options("float16"), calibrate=data).model, verify=False)
        .model()
        .run({"x": rows[:4]})
        .values()
        for data in (None, rows)
    )
    assert not np.isfinite(blind).all()
    assert np.abs(seen - np.maximum(rows[:4], 0)).max() < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "float16", "smooth": 0.5}, "smooth is for int8"),
        ({"kind": "int8", "zero_points": True}, "zero-points is for int8-weights"),
        ({"kind": "float16", "rounding": "gptq"}, "rounding is for int8"),
        ({"kind": "int4-weights", "method": "mse"}, "method is for int8"),
        ({"kind": "int8", "rounding": "gptq", "bits": 7}, "for 8 bits with a scale per channel"),
        ({"kind": "int4-weights", "block": 17}, "a block has 16"),
        ({"smooth": 2.0}, "between 0 and 1"),
        ({"smooth": "best"}, "between 0 and 1"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UsageError, match=message):
        Options(**options)


def test_calibration_data_is_needed(network):
    with pytest.raises(UsageError, match="this rounding needs calibration data"):
        optc.quantize(network, Options("int4-weights", rounding="gptq"))
    with pytest.raises(UsageError, match="needs calibration data"):
        optc.quantize(network)


def test_calibration_data_is_used_where_it_helps_most():
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 20]>
        g (float[4, 128] x) => (float[4, 64] y) <float[128, 64] w = {0}> { y = MatMul(x, w) }""")
    del model.graph.initializer[:]
    matrix = random.normal(0, 1, (128, 64)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(matrix, "w"))
    rows = random.normal(0, 1, (64, 128)).astype(np.float32)

    def weights(rounding: str, **more: object) -> list[bytes]:
        found = optc.quantize(model, Options("int4-weights", rounding=rounding), **more).model
        return [w.const_value.tobytes() for w in found.graph.initializers.values()]

    gptq, nearest = weights("gptq", calibrate=rows), weights("nearest", calibrate=rows)
    assert gptq != nearest
    assert weights("auto", calibrate=rows) == gptq
    assert weights("auto") == nearest


def test_nothing_to_quantize(rows):
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[4,32] x) => (float[4,32] y) { y = Exp(x) }'
    with pytest.raises(UnsupportedModelError, match="nothing to quantize"):
        optc.quantize(onnx.parser.parse_model(text), calibrate=rows)


def test_a_model_that_breaks_down_in_float32(rows):
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[4,32] x) => (float[4,32] y) <float[32,32] w>
    { l = Log(x) y = MatMul(l, w) }"""
    model = onnx.parser.parse_model(text)
    del model.graph.initializer[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(32, dtype=np.float32), "w"))
    with pytest.raises(AccuracyError, match=r"sample 0.*no finite"):
        optc.quantize(model, calibrate=rows)


def test_the_command(network, rows, tmp_path, capsys):
    np.save(tmp_path / "rows.npy", rows)
    arguments = [str(network), "--calibrate", str(tmp_path / "rows.npy"), "--samples", "4", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(["quantize", *arguments, "-o", str(tmp_path / "q.onnx"), "--method", "min-max", "--activations", "int8"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "int8"
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(tmp_path / "q.onnx").graph.node)
    with pytest.raises(SystemExit) as ended:
        main(["quantize", *arguments, "-o", str(tmp_path / "q.optc")])
    assert ended.value.code == 2


def test_compile_quantizes_first(network, rows, tmp_path, capsys):
    np.save(tmp_path / "x.npy", rows)
    command = ["compile", str(network), "-o", str(tmp_path / "m.optc"), "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--quantize", "int8", "--calibrate", str(tmp_path / "x.npy")])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)["report"]
    assert found["quantization"]["kind"] == "int8"
    assert optc.load(tmp_path / "m.optc").run({"x": rows[:4]})["y"].shape == (4, 3)
    for wrong in (
        ["--calibrate", "x"],
        ["--max-error", "kl:1"],
        ["--quantize", "int8", "--tune", "1s"],
        ["--plot", "p"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, *wrong])
        assert ended.value.code == 2
