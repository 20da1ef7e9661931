"""RNN, GRU and LSTM against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from tvm import tirx

import optc
from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve
from optc.backends.kernels import loops
from optc.backends.kernels.threads import LAUNCH, is_parallel
from optc.backends.lowering import imperative, recurrent_steps
from optc.errors import OptcError, UnsupportedModelError
from optc.frontend.onnx import load

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
PER_DIRECTION = {"RNN": 1, "GRU": 2, "LSTM": 3}


def reference(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def build(
    make_model, op, *, direction="forward", hidden=5, features=4, given=(), constant=True, scale=0.5, seed=0, **attrs
):
    """Return a model of one recurrent node with symbolic time and batch, and a function that makes its inputs."""
    rng = np.random.default_rng(seed)
    d, g = 2 if direction == "bidirectional" else 1, GATES[op]
    first = attrs.get("layout", 0) == 1
    names = ["x", "w", "r", "b", "lens", "h0"] + (["c0", "p"] if op == "LSTM" else [])
    used = [n if n in ("x", "w", "r", *given) else "" for n in names]
    while not used[-1]:
        used.pop()
    weights = {
        "w": rng.normal(size=(d, g * hidden, features)).astype("f4") * scale,
        "r": rng.normal(size=(d, g * hidden, hidden)).astype("f4") * scale,
        "b": rng.normal(size=(d, 2 * g * hidden)).astype("f4") * scale,
        "p": rng.normal(size=(d, 3 * hidden)).astype("f4") * scale,
    }
    weights = {k: v for k, v in weights.items() if k in used}
    state = ["n", d, hidden] if first else [d, "n", hidden]
    inputs = {"x": ("f4", ["n", "t", features] if first else ["t", "n", features])}
    inputs |= {k: ("f4", state) for k in ("h0", "c0") if k in used}
    if "lens" in used:
        inputs["lens"] = ("i4", ["n"])
    if not constant:
        inputs |= {k: ("f4", v.shape) for k, v in weights.items()}
    outputs = {"y": "f4", "yh": "f4"} | ({"yc": "f4"} if op == "LSTM" else {})
    node = helper.make_node(op, used, list(outputs), hidden_size=hidden, direction=direction, **attrs)
    model = make_model([node], inputs, outputs, weights if constant else {}, opset=21)

    def feed(steps: int, batch: int) -> dict[str, np.ndarray]:
        sizes = {"t": steps, "n": batch}
        result = {}
        for name, (dtype, shape) in inputs.items():
            shape = [sizes.get(s, s) for s in shape]
            if name == "lens":
                result[name] = rng.integers(1, steps + 1, size=shape).astype("i4")
            elif name in weights:
                result[name] = weights[name]
            else:
                result[name] = rng.normal(size=shape).astype(dtype)
        return result

    return model, feed


def check(compile_model, model, feeds):
    run = compile_model(model)
    names = [i.name for i in model.graph.input]
    for feed in feeds:
        for got, want in zip(run(*(feed[n] for n in names)), reference(model, feed), strict=True):
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", ["RNN", "GRU", "LSTM"])
def test_directions_states_lengths(compile_model, make_model, op, direction):
    given = ("b", "lens", "h0", "c0", "p")
    model, feed = build(make_model, op, direction=direction, given=given)
    check(compile_model, model, [feed(6, 3), feed(1, 1)])


@pytest.mark.parametrize("op", ["RNN", "GRU", "LSTM"])
def test_weights_that_are_inputs(compile_model, make_model, op):
    model, feed = build(make_model, op, constant=False, given=("b",), direction="bidirectional")
    check(compile_model, model, [feed(3, 2)])


@pytest.mark.parametrize("hidden", [1, 16, 33, 128])
def test_hidden_sizes_that_do_and_do_not_fill_panels(compile_model, make_model, hidden):
    model, feed = build(make_model, "LSTM", hidden=hidden, given=("b",))
    check(compile_model, model, [feed(3, 2)])


@pytest.mark.parametrize("linear", [0, 1])
@pytest.mark.parametrize("hidden", [3, 24])
def test_gru_reset(compile_model, make_model, linear, hidden):
    model, feed = build(make_model, "GRU", hidden=hidden, given=("b", "h0", "lens"), linear_before_reset=linear)
    check(compile_model, model, [feed(4, 2)])


def test_lstm_clip_and_coupled_gates(compile_model, make_model):
    for attributes in ({"clip": 0.3}, {"input_forget": 1}):
        model, feed = build(make_model, "LSTM", given=("b", "p", "c0"), **attributes)
        check(compile_model, model, [feed(4, 2)])


@pytest.mark.parametrize(
    "name", ["Relu", "Tanh", "Sigmoid", "Affine", "LeakyRelu", "ThresholdedRelu", "ScaledTanh", "HardSigmoid",
             "Elu", "Softsign", "Softplus"]
)  # fmt: skip
def test_activations(compile_model, make_model, name):
    arguments = {"activations": [name]}
    if name in ("Affine", "LeakyRelu", "ThresholdedRelu", "ScaledTanh", "HardSigmoid", "Elu"):
        arguments["activation_alpha"] = [0.3]
    if name in ("Affine", "ScaledTanh", "HardSigmoid"):
        arguments["activation_beta"] = [0.4]
    model, feed = build(make_model, "RNN", given=("b",), **arguments)
    check(compile_model, model, [feed(3, 2)])


def test_alphas_go_to_the_activations_that_take_one(compile_model, make_model):
    model, feed = build(
        make_model,
        "GRU",
        direction="bidirectional",
        activations=["Sigmoid", "LeakyRelu", "HardSigmoid", "Tanh"],
        activation_alpha=[0.2, 0.3],
        activation_beta=[0.1],
    )
    check(compile_model, model, [feed(3, 2)])


def test_a_product_of_activations(compile_model, make_model):
    """TVM refuses within a vector of products what activations of float64 bind; bounded sums, small weights."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(1, 32, 3)) * 0.2, "r": rng.normal(size=(1, 32, 8)) * 0.2}
    node = helper.make_node(
        "LSTM", ["x", "w", "r"], ["y"], hidden_size=8, activations=["Elu", "ScaledTanh", "LeakyRelu"],
        activation_alpha=[0.8, 0.5, 0.1], activation_beta=[0.75],
    )  # fmt: skip
    x = rng.normal(size=(4, 2, 3))
    model = make_model([node], {"x": ("f8", x.shape)}, {"y": "f8"}, weights, opset=21)
    # onnxruntime has it for float32 only.
    narrow = {name: array.astype("f4") for name, array in weights.items()}
    single = make_model([node], {"x": ("f4", x.shape)}, {"y": "f4"}, narrow, opset=21)
    (found,), (expected,) = compile_model(model)(x), reference(single, {"x": x.astype("f4")})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_batch_first_against_time_first(compile_model, make_model):
    for op in ("RNN", "GRU", "LSTM"):
        options = {"given": ("b", "h0", "c0"), "direction": "bidirectional", "seed": 3}
        model, feed = build(make_model, op, layout=1, **options)
        first = feed(4, 3)
        got = compile_model(model)(*first.values())
        plain, _ = build(make_model, op, **options)
        swapped = {k: v.swapaxes(0, 1) for k, v in first.items()}
        want = reference(plain, swapped)
        np.testing.assert_allclose(got[0], want[0].transpose(2, 0, 1, 3), rtol=1e-4, atol=1e-6)
        for a, b in zip(got[1:], want[1:], strict=True):
            np.testing.assert_allclose(a, b.swapaxes(0, 1), rtol=1e-4, atol=1e-6)


def test_no_steps_leave_the_initial_state(compile_model, make_model):
    model, feed = build(make_model, "LSTM", given=("h0", "c0"))
    feeds = feed(0, 2)
    y, h, c = compile_model(model)(*feeds.values())
    assert y.shape == (0, 1, 2, 5)
    np.testing.assert_array_equal(h, feeds["h0"])
    np.testing.assert_array_equal(c, feeds["c0"])


def test_unknown_activation_is_refused(compile_model, make_model):
    model, _ = build(make_model, "RNN", activations=["Sine"])
    with pytest.raises(UnsupportedModelError, match="Sine"):
        compile_model(model)


@pytest.fixture
def steps_together(monkeypatch):
    """Let threads share the steps of layers that are too small for it, and tell of how many layers they did."""
    monkeypatch.setattr(recurrent_steps, "_WAIT_CYCLES", 0)
    monkeypatch.setattr(recurrent_steps, "LEAST_CYCLES", 1)
    monkeypatch.setattr(recurrent_steps, "_SHARES", 1e9)
    begun = []
    together = imperative.all_threads

    def all_threads():
        begun.append(1)
        return together()

    monkeypatch.setattr(imperative, "all_threads", all_threads)
    return begun


@pytest.mark.parametrize("direction", ["reverse", "bidirectional"])
@pytest.mark.parametrize("op, attrs", [("RNN", {}), ("LSTM", {}), ("GRU", {}), ("GRU", {"linear_before_reset": 1})])
def test_threads_share_the_steps(make_model, steps_together, op, attrs, direction):
    """Some threads get no block, or the last one, which is not full; what they make does not depend on that.

    The weights are small, because steps that enlarge differences would not be compared.
    """
    given = ("b", "lens", "h0", "c0", "p")
    model, feed = build(make_model, op, direction=direction, hidden=75, given=given, scale=0.1, **attrs)
    compiled = optc.compile(model).model()
    assert steps_together
    feeds = [feed(20, 3), feed(1, 1), feed(7, 9)]
    first: list[list[np.ndarray]] = []
    for threads in (1, 2, 3, 8):
        compiled.threads = threads
        for number, inputs in enumerate(feeds):
            for _ in range(3):
                found = list(compiled.run(inputs).values())
                if threads == 1:
                    first.append(found)
                    for got, want in zip(found, reference(model, inputs), strict=True):
                        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6)
                for got, want in zip(found, first[3 * number], strict=True):
                    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["x86-64", "x86-64-v3", "x86-64-v4", "aarch64"])
@pytest.mark.parametrize("batch", [1, 5, None])
@pytest.mark.parametrize("gates", [1, 2, 3, 4])
def test_plans_cover_the_hidden_elements_and_fit_the_registers(name, batch, gates):
    target = resolve(name)
    for hidden in (1, 8, 75, 128, 512, 1000):
        plan = recurrent_steps.plan(tuple(range(gates)), hidden, batch, target.lanes(32), target)
        assert plan.blocks * plan.width >= hidden > (plan.blocks - 1) * plan.width
        assert plan.rows * gates * plan.width // target.lanes(32) < target.registers
        assert 1 <= plan.rows <= (batch or plan.rows)


def test_long_steps_are_shared_and_short_ones_are_not(make_model, monkeypatch):
    begun = []
    together = imperative.all_threads
    monkeypatch.setattr(imperative, "all_threads", lambda: begun.append(1) or together())
    for hidden, shared in ((16, False), (512, True)):
        optc.compile(build(make_model, "LSTM", hidden=hidden, given=("b",))[0])
        assert bool(begun) == shared


@pytest.mark.parametrize("op", ["RNN", "GRU", "LSTM"])
def test_lengths_may_be_zero_and_must_not_be_larger_than_the_number_of_steps(make_model, op):
    model, feed = build(make_model, op, direction="bidirectional", given=("b", "lens", "h0", "c0"))
    compiled, inputs = optc.compile(model).model(), feed(6, 3)
    inputs["lens"][:] = [6, 0, 2]
    for got, want in zip(compiled.run(inputs).values(), reference(model, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6)
    for wrong in (7, -1):
        inputs["lens"][1] = wrong
        with pytest.raises(OptcError, match="sequence_lens must be from 0 to the number of steps"):
            compiled.run(inputs)


def test_steps_that_threads_share_stay_shared(make_model, steps_together):
    """With sizes known while compiling, too, where short kernels lose their parallel loops."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(1, 128, 4)), "r": rng.normal(size=(1, 128, 32))}
    weights = {name: array.astype("f4") for name, array in weights.items()}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=32)
    model = make_model([node], {"x": ("f4", [3, 1, 4])}, {"y": "f4"}, weights, opset=21)
    module = CpuBackend(resolve("x86-64-v3")).schedule(load(model)).relax
    assert steps_together
    kernels = [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc) and LAUNCH in str(f)]
    (kernel,) = kernels
    assert any(map(is_parallel, loops.collect(kernel.body, tirx.For)))
