"""Real ONNX models against onnxruntime: one artifact for all sizes, error relative to the largest magnitude."""

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image, ImageDraw, ImageFont

import optc
from optc import sample, verification
from optc.driver import specs
from optc.ir import serialize

pytestmark = pytest.mark.models
LIMIT = 1e-4

OCR = {
    "ppocr/det.onnx": [(1, 3, 320, 320), (1, 3, 640, 640), (2, 3, 224, 480)],
    "ppocr/rec.onnx": [(1, 3, 48, 320), (4, 3, 48, 160), (1, 3, 48, 701)],
    "ppocr/cls.onnx": [(1, 3, 48, 192), (6, 3, 48, 192), (2, 3, 48, 100)],
}
STATIC = ["exported/resnet50.onnx", "exported/mobilenetv2.onnx", "exported/bert_6.onnx", "exported/vit_base.onnx"]
SILERO = {
    "silero/silero_vad.onnx": ("input", ["state"], (1, 576), True),
    "silero/silero_vad_16k_op15.onnx": ("input", ["state"], (1, 576), True),
    "silero/silero_vad_half.onnx": ("input", ["state"], (1, 576), False),
    "silero/silero_vad_op18_ifless.onnx": ("input", ["state"], (1, 576), True),
    "silero/silero_vad_openvino_16k.onnx": ("input", ["state"], (1, 576), False),
    "silero/silero_vad_16k_sequence.onnx": ("input", ["h", "c"], (1, 576), False),
}


def text_image(shape):
    """Return pictures of words, normalized to -1..1: on noise the detector's outputs are all close to 0."""
    images = []
    for number in range(shape[0]):
        image = Image.new("RGB", (shape[3], shape[2]), (250, 245, 240))
        pen = ImageDraw.Draw(image)
        for top in range(4, shape[2] - 36, 60):
            pen.text((6 + 3 * number, top), f"Line {top} of {number}: tests", (20, 30, 40), ImageFont.load_default(30))
        images.append(np.asarray(image, np.float32) / 127.5 - 1.0)
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", OCR)
@pytest.mark.xdist_group("ocr")
def test_one_artifact_serves_all_sizes(compiled, reference, relative_error, name):
    model = compiled(name)
    for shape in OCR[name]:
        x = text_image(shape)
        expected = reference(name)({"x": x})
        for output, found in model.run({"x": x}).items():
            assert relative_error(found, expected[output]) <= LIMIT, shape


@pytest.mark.parametrize("name", STATIC)
def test_fixed_models(compiled, reference, relative_error, model_path, name):
    model = compiled(name)
    choices = verification.integer_choices(optc.capture(model_path(name)))
    inputs = sample.random_inputs(model.inputs, seed=1, integers=choices)
    expected = reference(name)(inputs)
    for output, found in model.run(inputs).items():
        assert relative_error(found, expected[output]) <= LIMIT


@pytest.mark.parametrize("name", SILERO)
@pytest.mark.xdist_group("silero")
def test_a_stateful_model_follows_the_reference_over_100_chunks(model_path, reference, name):
    """Both sides feed their own state back, so that an error would grow."""
    try:
        reference(name)
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
        pytest.skip(f"not a legal model: {error}")
    audio, states, shape, has_rate = SILERO[name]
    model = optc.compile(model_path(name), verify=False).model()
    by_name = {spec.name: spec for spec in model.inputs}
    ours, theirs = ({s: _zeros(by_name[s]) for s in states} for _ in range(2))
    generator = np.random.default_rng(0)
    outputs = [spec.name for spec in model.outputs]
    worst = 0.0
    for _ in range(100):
        chunk = {audio: (generator.standard_normal(shape) * 0.1).astype(np.float32)}
        if has_rate:
            chunk["sr"] = np.array(16000, np.int64)
        found, expected = model.run(chunk | ours), reference(name)(chunk | theirs)
        ours = dict(zip(states, (found[o] for o in outputs[1:]), strict=True))
        theirs = dict(zip(states, (expected[o] for o in outputs[1:]), strict=True))
        for output in outputs:
            difference = np.abs(found[output] - expected[output]).max()
            worst = max(worst, float(difference / max(np.abs(expected[output]).max(), 1e-3)))
    assert worst <= LIMIT


@pytest.mark.xdist_group("silero")
def test_rate_and_batch_choose_among_branches_at_run_time(model_path, reference, relative_error):
    name = "silero/silero_vad.onnx"
    model = optc.compile(model_path(name), verify=False).model()
    generator = np.random.default_rng(0)
    for rate, length, batch in ((16000, 576, 1), (8000, 288, 1), (8000, 288, 3), (16000, 576, 2)):
        inputs = {
            "input": generator.standard_normal((batch, length)).astype(np.float32),
            "state": generator.standard_normal((2, batch, 128)).astype(np.float32),
            "sr": np.array(rate, np.int64),
        }
        expected = reference(name)(inputs)
        for output, found in model.run(inputs).items():
            assert relative_error(found, expected[output]) <= LIMIT, (rate, batch, output)


def _zeros(spec):
    return np.zeros([1 if isinstance(d, str) else d for d in spec.shape], np.float32)


@pytest.mark.parametrize("name", [*OCR, *STATIC, *SILERO])
def test_the_optimized_graph_is_portable(model_path, reference, relative_error, name, tmp_path):
    optimized = optc.optimize(model_path(name))
    path = tmp_path / "optimized.onnx"
    serialize.save(optimized, path)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    original = optc.capture(model_path(name))
    choices = verification.integer_choices(original)
    described = specs(original.graph.inputs)
    # Silero's audio is a chunk of 576 samples, its state has the batch in the middle.
    sizes = sample.default_dims(described, (1, 1, 576)) if name in SILERO else None
    inputs = sample.random_inputs(described, dims=sizes, integers=choices)
    if name in OCR:
        inputs = {"x": text_image(OCR[name][0])}
    expected = reference(name)(inputs)
    names = [output.name for output in session.get_outputs()]
    for output, found in zip(names, session.run(None, inputs), strict=True):
        assert relative_error(found, expected[output]) <= LIMIT
