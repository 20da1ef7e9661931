"""What a loaded model accepts, computes and hands out."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from optc.errors import InputError, OptcError, UsageError
from optc.runtime import executor
from optc.runtime.inputs import Inputs, address, aligned_empty


@pytest.fixture(scope="module")
def model(affine):
    return affine.model()


def sample(rows=5, seed=1):
    return np.random.default_rng(seed).normal(size=(rows, 16)).astype(np.float32)


def expected(x, weight):
    return x @ weight + np.arange(16, dtype=np.float32)


def test_run_computes_the_function(model, weight):
    x = sample()
    result = model.run({"x": x})
    assert list(result) == ["y", "positive"]
    np.testing.assert_allclose(result["y"], expected(x, weight), rtol=1e-5, atol=1e-5)
    assert result["positive"].dtype == np.bool_
    np.testing.assert_array_equal(result["positive"], result["y"] > 0)


def test_call_by_position(model, two_inputs):
    y, positive = model(sample())
    np.testing.assert_array_equal(positive, y > 0)
    a = sample()
    np.testing.assert_array_equal(two_inputs.model()(a, a), a + a)  # one output: no tuple
    with pytest.raises(InputError, match="2 inputs given; the model takes 1"):
        model(a, a)


def test_description(model):
    assert [str(spec) for spec in model.inputs] == ["x: float32[batch, 16]"]
    assert [spec.name for spec in model.outputs] == ["y", "positive"]
    assert model.metadata == {"author": "someone"}
    assert model.report == {"passes": ["one"]}
    assert model.manifest.entry == "main"


@pytest.mark.parametrize("rows", [0, 1, 2, 1000])
def test_symbolic_dim_takes_any_size(model, weight, rows):
    x = sample(rows)
    np.testing.assert_allclose(model.run({"x": x})["y"], expected(x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float64"],
)
def test_dtypes(copier, dtype):
    x = np.array([[0, 1, 1], [1, 0, 1]], dtype)
    y = copier(dtype, 2, 3).model()(x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, x)


def test_bfloat16(copier):
    model = copier("bfloat16", 2, 3).model()
    x = np.array([[0.5, -1, 3], [1e30, np.inf, 7]], ml_dtypes.bfloat16)
    y = model(x)
    assert y.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(model([[0.5, -1, 3], [1, 2, 7]])[0], x[0])
    from_torch = torch.tensor([[0.5, -1, 3], [1, 2, 7]], dtype=torch.bfloat16)
    back = torch.from_dlpack(model.run_dlpack({"x": from_torch})["y"])
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, from_torch)


def test_scalars_and_empty_arrays(copier):
    scalar = copier("float32").model()
    assert scalar(2.5).shape == ()
    assert scalar(np.float32(2.5)) == 2.5
    empty = copier("int64", 0, 3).model()
    assert empty(np.empty((0, 3), np.int64)).shape == (0, 3)


def test_layouts_are_copied_when_needed(model, weight):
    x = sample(6)
    want = expected(x, weight)
    shifted = np.empty(x.nbytes + 4, np.uint8)[4:].view(np.float32).reshape(x.shape)
    shifted[...] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    wide = np.repeat(x, 2, axis=1)
    for given in (x, np.asfortranarray(x), wide[:, ::2], x[::-1][::-1], shifted, read_only):
        np.testing.assert_allclose(model.run({"x": given})["y"], want, rtol=1e-4, atol=1e-4)


def test_big_endian_is_refused(model):
    with pytest.raises(InputError, match="big-endian float32") as caught:
        model.run({"x": sample().astype(">f4")})
    assert "astype(numpy.float32)" in str(caught.value)


def test_only_unaligned_inputs_are_copied(model):
    buffer = aligned_empty((4 * 16 + 1,), np.dtype(np.float32))
    buffer[...] = 1
    assert address(buffer) % 64 == 0
    aligned, shifted = buffer[:-1].reshape(4, 16), buffer[1:].reshape(4, 16)
    inputs = Inputs(model.inputs, 64)
    arrays, starts = inputs.prepare({"x": aligned})
    assert arrays[0] is aligned
    assert starts == [address(aligned)]
    (copy,), starts = inputs.prepare({"x": shifted})
    assert starts == [address(copy)]
    assert address(copy) % 64 == 0
    np.testing.assert_array_equal(copy, shifted)
    relaxed = Inputs(model.inputs, 1)
    assert relaxed.prepare({"x": shifted})[0][0] is shifted
    odd = np.zeros(4 * 16 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(4, 16)
    assert relaxed.prepare({"x": odd})[1][0] % 4 == 0


def test_names(two_inputs):
    model, a = two_inputs.model(), sample()
    with pytest.raises(InputError, match="missing input 'b'; unknown input 'B'") as caught:
        model.run({"a": a, "B": a})
    assert "a: float32[n, m]; b: float32[n, m]" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message", "hint"),
    [
        (np.zeros((2, 16)), r"dtype float64; the model takes float32", r"astype\('float32'\)"),
        (np.array(["a"]), r"dtype str", "array of numbers"),
        (np.zeros(16, np.float32), r"shape \(16,\); the model takes \(batch, 16\)", r"array\[None\]"),
        (np.zeros((2, 8), np.float32), r"dim 1 is 8 instead of 16", r"pass \(batch, 16\)"),
        ("text", r"is a str, not an array of numbers", "float32"),
        (None, r"is a NoneType, not an array", "float32"),
        ([[1.0], [1.0, 2.0]], r"not an array of numbers", "float32"),
        ([[1e300] * 16], r"without loss: a value is out of range", "float32"),
        ([[2**24 + 1] * 16], r"without loss", "float32"),
        ([[1j] * 16], r"not an array of numbers", "float32"),
    ],
)
def test_wrong_input(model, value, message, hint):
    with pytest.raises(InputError, match=message) as caught:
        model.run({"x": value})
    assert "'x'" in caught.value.message
    assert caught.value.hint is not None
    import re

    assert re.search(hint, caught.value.hint)


def test_dims_of_one_name_agree(two_inputs):
    model = two_inputs.model()
    with pytest.raises(InputError, match="'n' is 3 at dim 0, but 2 at dim 0 of input 'a'"):
        model.run({"a": np.zeros((2, 3), np.float32), "b": np.zeros((3, 3), np.float32)})


@pytest.mark.parametrize(
    ("dtype", "value", "fits"),
    [
        ("int8", [127, -128], True),
        ("int8", [128, 0], False),
        ("uint8", [255, 0], True),
        ("uint8", [-1, 0], False),
        ("int64", [True, False], True),
        ("int64", [1.0, 2.0], False),
        ("uint64", [2**64 - 1, 2**63], True),
        ("bool", [True, False], True),
        ("bool", [1, 0], False),
        ("float64", [1, 2**53 + 1], False),
        ("float64", [1, 2.5], True),
        ("float16", [0.1, float("nan")], True),
        ("float16", [1e6, 0.0], False),
        ("float32", [float("inf"), 0.1], True),
    ],
)
def test_python_numbers_convert_only_without_loss(copier, dtype, value, fits):
    model = copier(dtype, 2).model()
    if fits:
        np.testing.assert_array_equal(model(value), np.array(value, dtype))
    else:
        with pytest.raises(InputError, match="without loss"):
            model(value)


def test_outputs_never_share_memory(aliases):
    model = aliases.model()
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    aligned = aligned_empty(x.shape, x.dtype)
    aligned[...] = x
    first = model.run({"x": aligned})
    for array in first.values():
        array[...] = -1
    np.testing.assert_array_equal(aligned, x)
    second = model.run({"x": aligned})
    np.testing.assert_array_equal(second["same"], x)
    np.testing.assert_array_equal(second["flat"], x.reshape(6))
    np.testing.assert_array_equal(second["weight"], np.arange(4))
    np.testing.assert_array_equal(second["constant"], np.arange(3))
    second["one"][...] = -1
    np.testing.assert_array_equal(second["two"], 2 * x)


def test_outputs_outlive_the_model(affine, weight):
    model, x = affine.model(), sample(3)
    y = model.run({"x": x})["y"]
    del model
    gc.collect()
    np.testing.assert_allclose(y, expected(x, weight), rtol=1e-5, atol=1e-5)
    y += 1  # writable


def test_outputs_of_later_runs_differ_in_memory(model):
    results = [model.run({"x": sample(seed=seed)})["y"] for seed in range(20)]
    for seed, result in enumerate(results):
        np.testing.assert_array_equal(result, model.run({"x": sample(seed=seed)})["y"])


def test_torch_in_and_out(model, weight):
    x = sample(4)
    given = torch.from_numpy(x.copy())
    result = model.run_dlpack({"x": given})
    y, positive = torch.from_dlpack(result["y"]), torch.from_dlpack(result["positive"])
    assert positive.dtype == torch.bool
    np.testing.assert_allclose(y.numpy(), expected(x, weight), rtol=1e-5, atol=1e-5)
    assert address(result["y"].numpy()) == y.data_ptr()  # no copy
    del result
    gc.collect()
    np.testing.assert_allclose(y.numpy(), expected(x, weight), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.run({"x": given.T.contiguous().T})["y"], y.numpy(), rtol=1e-5, atol=1e-5)


def test_dlpack_capsule_nobody_takes_is_freed(model):
    x = sample(50_000)
    model.run_dlpack({"x": x})["y"].__dlpack__()
    before = resident()
    for _ in range(50):
        model.run_dlpack({"x": x})["y"].__dlpack__()
    assert resident() - before < 50e6  # all of them would be 160 MB
    result = model.run_dlpack({"x": x})["y"]
    with pytest.raises(BufferError):
        result.__dlpack__(copy=True)
    assert result.__dlpack_device__() == (1, 0)


def test_dlpack_refusals(model):
    with pytest.raises(InputError, match="cannot be read through DLPack") as caught:
        model.run({"x": torch.zeros(2, 16, requires_grad=True)})
    assert "detach" in str(caught.value)
    with pytest.raises(InputError, match="dtype that no model uses"):
        model.run({"x": torch.zeros(2, 16, dtype=torch.complex64)})
    with pytest.raises(InputError, match="dtype float64"):
        model.run({"x": torch.zeros(2, 16, dtype=torch.float64)})

    class OnDevice:
        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self):
            raise AssertionError

    with pytest.raises(InputError, match="memory of a device"):
        model.run({"x": OnDevice()})


def test_code_without_a_clock_has_no_profile(model):
    with pytest.raises(UsageError, match="no clock"):
        model.profile({"x": sample(5)})


def test_error_in_the_code_names_the_inputs(affine):
    # A manifest that promises less than the code checks: the code finds out and the message says for what.
    from dataclasses import replace

    from optc.runtime.format import TensorSpec

    loose = replace(affine.manifest, inputs=(TensorSpec("x", "float32", ("batch", "width")),))
    model = replace(affine, manifest=loose).model()
    with pytest.raises(OptcError, match=r"failed for inputs x: float32\[2, 8\]"):
        model.run({"x": np.zeros((2, 8), np.float32)})
    model.run({"x": np.zeros((2, 16), np.float32)})  # and still works


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2", 10**6])
def test_threads_must_be_a_positive_integer(model, count):
    with pytest.raises(UsageError, match="threads"):
        model.threads = count


def _tried(clock, times, calls=60):
    """Return a trial whose calls take what ``times`` says of the moment and the way, and when it was decided."""
    trial = executor.Trial()
    for _ in range(calls):
        if trial.decided:
            break
        clock[0] += 0.004
        trial.add(trial.alone, times(clock[0], trial.alone))
    return trial, clock[0]


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(executor, "perf_counter", lambda: now[0])
    return now


def test_several_threads_are_taken_as_soon_as_they_are_faster(clock):
    trial, when = _tried(clock, lambda _, alone: 60e-6 if alone else 40e-6)
    assert trial.decided and not trial.alone and when < executor.SPREAD_SECONDS


def test_one_thread_is_taken_if_it_stays_faster(clock):
    trial, when = _tried(clock, lambda _, alone: 40e-6 if alone else 60e-6)
    assert trial.decided and trial.alone and when > executor.SPREAD_SECONDS


def test_threads_that_share_a_core_at_first_are_waited_for(clock):
    trial, _ = _tried(clock, lambda now, alone: 50e-6 if alone else 70e-6 if now < 0.1 else 30e-6)
    assert trial.decided and not trial.alone


def test_short_calls_go_either_way_with_the_same_results(model):
    model.threads = 2
    x = sample(4)
    results = [model.run({"x": x}) for _ in range(20)]
    for result in results[1:]:
        for name, value in result.items():
            np.testing.assert_array_equal(value, results[0][name])


def test_long_calls_are_not_tried_on_one_thread():
    trial = executor.Trial()
    for _ in range(3):
        assert not trial.alone
        trial.add(trial.alone, 0.05)
    assert trial.decided and not trial.alone


def test_call_overhead(model):
    x = sample(1)
    model.threads = 1
    best = 1.0
    for _ in range(200):
        start = time.perf_counter()
        model.run({"x": x})
        best = min(best, time.perf_counter() - start)
    print(f"\noverhead of a call: {best * 1e6:.0f} us")
    assert best < 2e-3


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
